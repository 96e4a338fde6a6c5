"""Networks by name: what is not there, or cannot be fetched, is named. No test reaches for the network."""

import pickle
import sys
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import _api

from mhex_vision import MHEXClassifier, PlainClassifier, backbones, load_classifier


@pytest.fixture
def fetched(monkeypatch):
    """Pretrained weights of torchvision, drawn instead of downloaded; returns the addresses that were asked for."""
    asked = []

    def fetch(url, *_, **__):
        asked.append(url)
        return models.resnet18(num_classes=1000).state_dict()

    monkeypatch.setattr(_api, "load_state_dict_from_url", fetch)
    return asked


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet19", "got 'resnet19'; close: .*resnet18"),
        ("resnet", "got 'resnet'; close: .*resnet50"),
        ("nothing", "got 'nothing'; close: resnet18, resnet50"),
        ("", "got ''; close: resnet18, resnet50"),
        ("fcn_resnet50", "torchvision classification network"),
        ("timm/nothing", "must name a timm network after 'timm/', got 'nothing'; timm.list_models"),
        ("timm/", "must name a timm network"),
    ],
)
def test_a_name_nobody_knows_is_named(name, words):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=words) as caught:
        MHEXClassifier.from_backbone(name, 3)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_timm_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"needs timm: pip install \"mhex-vision\[timm\]\""):
        backbones.build("timm/resnet18", 3)


def test_weights_nobody_knows_are_listed_beside_those_there_are():
    with pytest.raises(ValueError, match=r"one of IMAGENET1K_V1, IMAGENET1K_V2.* for 'resnet50', got 'V3'"):
        backbones.build("resnet50", 3, weights="V3")


def test_timm_weights_nobody_knows_are_named():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"weights of 'resnet18' cannot be used: .*nothing"):
        backbones.build("timm/resnet18", 3, weights="nothing")


@pytest.mark.parametrize(
    "error",
    [
        URLError("no route to host"),
        TimeoutError("timed out"),
        ConnectionResetError("reset by peer"),
        RuntimeError('invalid hash value (expected "f37072fd", got "0")'),
        EOFError("Ran out of input"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_weights_that_cannot_be_fetched_are_named(monkeypatch, error):
    monkeypatch.setattr(_api, "load_state_dict_from_url", failing(error))
    with pytest.raises(OSError, match=r"the weights 'DEFAULT' of 'resnet18' could not be fetched: .") as caught:
        backbones.build("resnet18", 3, weights="DEFAULT")
    assert caught.value.__cause__ is error


def test_timm_weights_that_cannot_be_fetched_are_named(monkeypatch):
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", failing(ConnectionError("no route to host")))
    with pytest.raises(OSError, match="the weights of 'resnet18' could not be fetched: no route to host"):
        backbones.build("timm/resnet18", 3, weights="DEFAULT")


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_pretrained_weights_come_with_their_classes(fetched, weights):
    assert backbones.build("resnet18", 3, weights=weights).fc.out_features == 1000
    assert len(fetched) == 1


@pytest.mark.parametrize("freeze", [False, True])
def test_a_kept_classifier_gets_the_classes_wanted(fetched, make_images, freeze):
    model = MHEXClassifier.from_backbone("resnet18", 4, weights="DEFAULT", classifier="keep", freeze_backbone=freeze)
    assert model.backbone.fc.out_features == 4
    assert model(make_images(2, (64, 64))).logits.shape == (2, 4)
    same = MHEXClassifier.from_backbone(
        "resnet18", 1000, weights="DEFAULT", classifier="keep", gate=False, freeze_backbone=True
    )
    assert same.backbone.fc.out_features == 1000
    with pytest.raises(ValueError, match=r"num_classes is 4, .*a frozen classifier keeps its classes"):
        MHEXClassifier.from_backbone(
            "resnet18", 4, weights="DEFAULT", classifier="keep", gate=False, freeze_backbone=True
        )


def test_pretrained_weights_are_in_the_classifier(monkeypatch):
    torch.manual_seed(0)
    state = models.resnet18(num_classes=1000).state_dict()
    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda *_, **__: state)
    model = MHEXClassifier.from_backbone("resnet18", 4, weights="DEFAULT")
    ours = model.backbone.state_dict()
    assert set(state) - set(ours) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, state[name]) for name, value in ours.items())


class Branching(nn.Module):
    """Ends in a layer that is no nn.Linear, or in an nn.Linear that is not what it returns."""

    def __init__(self, networks, *, kind):
        super().__init__()
        self.step = networks.Step(3, 3)
        self.fc = nn.Conv2d(3, 5, 1) if kind == "conv" else nn.Linear(3, 6)
        self.kind = kind

    def forward(self, images):
        features = self.step(images)
        if self.kind == "conv":
            return self.fc(features).mean(dim=(2, 3))
        return self.fc(features.mean(dim=(2, 3)))[:, :5]


@pytest.mark.parametrize(("kind", "words"), [("conv", "5 outputs and ends in Conv2d"), ("sliced", "5 outputs")])
def test_a_last_layer_that_cannot_be_replaced_is_named(networks, kind, words):
    with pytest.raises(ValueError, match=f"classifier='keep' needs a backbone with num_classes = 2 .*{words}"):
        MHEXClassifier.from_backbone(Branching(networks, kind=kind), 2, classifier="keep", image_size=16)
    kept = MHEXClassifier.from_backbone(Branching(networks, kind=kind), 5, classifier="keep", image_size=16)
    assert kept(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 5)


def test_a_replaced_layer_is_where_and_what_the_old_one_was(networks):
    network = networks.Net(classes=7).double()
    network.fc = nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 7, bias=False, dtype=torch.float64))
    model = MHEXClassifier.from_backbone(network, 2, classifier="keep", image_size=16)
    last = model.backbone.fc[1]
    assert (last.in_features, last.out_features, last.bias, last.weight.dtype) == (6, 2, None, torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (type(self.witness).touch, (self.witness,))


@pytest.mark.parametrize("how", ["name", "checkpoint", "plain checkpoint"])
@pytest.mark.parametrize(
    "option", ["checkpoint_path={}", "pretrained_cfg={}", "cache_dir={}", "pretrained=true", "kwargs_filter=x"]
)
def test_a_name_opens_no_file_and_fetches_nothing(tmp_path, how, option):
    pytest.importorskip("timm")
    witness, pickled = tmp_path / "was-run", tmp_path / "weights.pth"
    pickled.write_bytes(pickle.dumps(Payload(witness)))
    model = PlainClassifier.from_name("timm/test_resnet", 2)
    if how == "checkpoint":
        model = MHEXClassifier.from_backbone(model, 2, image_size=32)
    model.save_pretrained(tmp_path)

    def use(name):
        if how == "name":
            return MHEXClassifier.from_backbone(name, 2)
        config = tmp_path / "config.json"
        config.write_text(config.read_text().replace("timm/test_resnet", name))
        return load_classifier(tmp_path)

    name = f"timm/test_resnet:{option.format(pickled)}"
    with pytest.raises(ValueError, match=f"options of a backbone must be of its shape .*{option.partition('=')[0]}"):
        use(name)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm/test_vit:depth=3000", r"depth must be in \(0, 256\], got 3000 in 'timm/test_vit:depth=3000'"),
        ("timm/test_vit:embed_dim=1000000", "embed_dim must be at most 65536"),
        ("timm/test_vit:depth=deep", r"depth must be in \(0, 256\], got deep"),
        ("timm/test_vit:mlp_ratio=nan", "mlp_ratio must be at most"),
        ("timm/test_vit:patch_size=0", "cannot be built with these options"),
        ("timm/test_vit:num_heads=0", "cannot be built with these options"),
        ("timm/test_vit:act_layer=of-no-such-name", "cannot be built with these options"),
        ("timm/hf-hub:somebody/something", "must name a timm network"),
        ("timm/local-dir:somewhere", "must name a timm network"),
    ],
)
def test_a_shape_that_cannot_be_is_named_before_it_is_built(name, words):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=words):
        backbones.build(name, 2)


def test_shapes_that_can_be_are_built():
    pytest.importorskip("timm")
    vit = backbones.build("timm/test_vit:img_size=32,patch_size=8,depth=2,embed_dim=32,num_heads=2,qkv_bias=false", 2)
    assert len(vit.blocks) == 2
    assert not backbones.build("resnet18:zero_init_residual=true", 2).layer1[0].bn2.weight.any()
