"""The folder of a comparison belongs to one comparison; modes and checksums of networks."""

import json

import pytest
import torch
from torch import nn

from mhex_core.modes import in_evaluation_mode
from mhex_core.pieces import Pieces, weights_checksum

SETTINGS = {"methods": ["a", "b"], "seed": (1, 2), "note": {"from": "here"}}


def test_a_folder_is_claimed_and_claimed_again(tmp_path):
    pieces = Pieces.claim(tmp_path / "out", SETTINGS, overwrite=False)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["seed"] == [1, 2]
    assert Pieces.claim(tmp_path / "out", SETTINGS | {"note": {"from": "there"}}, overwrite=False) == pieces
    with pytest.raises(ValueError, match=r"holds another comparison \(it differs in extra, seed\)"):
        Pieces.claim(tmp_path / "out", SETTINGS | {"seed": 3, "extra": 1}, overwrite=False)


def test_overwriting_removes_what_was_there(tmp_path):
    pieces = Pieces.claim(tmp_path, SETTINGS, overwrite=False)
    for path in (pieces.samples, pieces.path("a", 0)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    Pieces.claim(tmp_path, {"methods": ["c"]}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.json"]


@pytest.mark.parametrize("content", ["[", "[]", "3", "\x00"])
def test_a_damaged_folder_is_refused(tmp_path, content):
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(ValueError, match=r"comparison\.json is damaged or something else"):
        Pieces.claim(tmp_path, SETTINGS, overwrite=False)


def test_samples_of_something_else_are_not_touched(tmp_path):
    (tmp_path / "samples.parquet").write_text("mine")
    with pytest.raises(ValueError, match=r"holds a samples\.parquet of something else"):
        Pieces.claim(tmp_path, SETTINGS, overwrite=False)
    assert (tmp_path / "samples.parquet").read_text() == "mine"
    assert not (tmp_path / "comparison.json").exists()


def test_methods_whose_names_look_alike_have_files_of_their_own(tmp_path):
    names = ["a:b=1", "a:b=2", "a/b=1", "a_b=1", "../../a", "ä", "gradcam++"]
    paths = [Pieces(tmp_path).path(name, 3) for name in names]
    assert len(set(paths)) == len(names)
    assert all(path.parent.parent == tmp_path / "pieces" and path.name == "000003.parquet" for path in paths)


def test_checksums_tell_weights_apart():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(torch.bfloat16)
    before = weights_checksum(network)
    assert weights_checksum(network) == before
    assert len(before) == 16
    network[1].num_batches_tracked += 1
    assert weights_checksum(network) != before


def test_modes_come_back_also_when_something_raises():
    network = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    network[1].eval()
    modes = [module.training for module in network.modules()]

    def fail():
        assert not any(module.training for module in network.modules())
        raise KeyError

    with pytest.raises(KeyError), in_evaluation_mode(network):
        fail()
    assert [module.training for module in network.modules()] == modes
