"""What a bulk run is told about images: settings, columns, reading, and rows that depend on nothing but their image."""

import io
import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from mhex_core.bulk import BATCH_STEP
from mhex_core.bulk.shards import full_schema
from mhex_vision.bulk import ImageJob, open_source, read_saliency
from mhex_vision.data import Preprocessing
from mhex_vision.explaining import explain_by
from mhex_vision.plain import load_classifier

CPU = torch.device("cpu")
SIDE = 32


@pytest.fixture
def source(photos):
    return open_source(photos)


@pytest.fixture
def make_job(run_folder, source):
    def make(checkpoint=run_folder, **options):
        return ImageJob(str(checkpoint), source, **options)

    return make


@pytest.fixture(scope="module")
def images():
    """uint8 images, coarse enough to differ in what a network sees."""
    small = torch.rand(48, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear") * 255).to(torch.uint8)


def explained(job, images):
    return job.model(CPU, batch_size=len(images))(images)


# ------------------------------------------------------------------------------------------------------------- reading


def test_what_is_read_is_what_the_network_learnt_from(make_job, photos):
    job = pickle.loads(pickle.dumps(make_job()))
    (entries,) = job.entries()
    reader = job.reader()
    decoded = reader(entries)
    reader.close()
    names = entries.column("id").to_pylist()
    assert [names[place] for place in decoded.kept] == ["a.png", "b/a.jpg", "b/deep/x.PNG", "c.gif"]
    assert decoded.values.dtype == torch.uint8
    for place, value in zip(decoded.kept, decoded.values, strict=True):
        assert value.equal(Preprocessing(size=SIDE).load(photos / names[place]))
    reasons = {names[place]: reason for place, reason in decoded.rejected}
    assert reasons.keys() == {"b/cut.jpg", "empty.png", "text.png"}
    assert all(reason and "\n" not in reason and str(photos) not in reason for reason in reasons.values())
    assert decoded.groups is None


def test_nothing_readable_is_no_defect(make_job, photos):
    (entries,) = make_job().entries()
    decoded = make_job().reader()(entries.slice(5))
    assert (decoded.kept, len(decoded.rejected), tuple(decoded.values.shape)) == ([], 2, (0, 3, SIDE, SIDE))


def test_a_known_problem_is_the_reason(tmp_path, run_folder, picture, make_tar, encode):
    make_tar(tmp_path / "a.tar", [("a.png", encode(picture()))])
    (tmp_path / "b.tar").write_text("text\n" * 500)
    job = ImageJob(str(run_folder), open_source(tmp_path))
    (entries,) = job.entries()
    reader = job.reader()
    decoded = reader(entries)
    reader.close()
    assert decoded.kept == [0]
    assert decoded.rejected[0][1] == entries.column("problem")[1].as_py()


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
@pytest.mark.parametrize("target", [None, "ring"])
def test_rows_hold_what_explain_gives(make_job, run_folder, images, dtype, target):
    job = make_job(dtype=dtype, target=target, beta=0.5)
    rows = explained(job, images[:16])
    model = load_classifier(run_folder)
    own = model.explain(Preprocessing(size=SIDE).normalize(images[:16]), None if target is None else 1, beta=0.5)
    step = 0.5 / 255 if dtype == "uint8" else 2**-12
    assert np.abs(read_saliency(rows) - own.saliency.numpy()).max() <= step + 1e-4
    assert read_saliency(rows).max() > 0.9
    probabilities = np.array(rows.column("probabilities").to_pylist())
    assert np.allclose(probabilities, own.probabilities.numpy(), atol=1e-5)
    names = model.config.class_names
    for row in range(16):
        one = {name: rows.column(name)[row].as_py() for name in rows.schema.names}
        assert one["prediction"] == names[int(own.prediction[row])]
        assert one["target"] == (target or one["prediction"])
        assert one["probability"] == one["probabilities"][names.index(one["prediction"])]
        assert one["target_probability"] == one["probabilities"][names.index(one["target"])]


@pytest.mark.parametrize("options", [{}, {"resolution": "native", "dtype": "float16"}, {"autocast": "bfloat16"}])
def test_a_rows_bits_depend_on_its_image_alone(make_job, images, options):
    job = make_job(**options)
    model = job.model(CPU, batch_size=48)
    whole = pa.Table.from_batches([model(images)])
    for size in (BATCH_STEP, 2 * BATCH_STEP):
        parts = [model(images[first : first + size]) for first in range(0, 48, size)]
        assert (
            pa.Table.from_batches([part for part in parts if part.num_rows == size])
            .slice(0, size)
            .equals(whole.slice(0, size))
        )
    turned = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    assert pa.Table.from_batches([model(images[turned])]).equals(whole.take(pa.array(turned.numpy())))
    repeated = model(images[5:6].expand(BATCH_STEP, -1, -1, -1))
    assert pa.Table.from_batches([repeated]).slice(3, 1).equals(whole.slice(5, 1))


def test_memory_format_and_threads_leave_the_caller_alone(make_job, images):
    model = make_job().model(CPU, batch_size=16)
    before = torch.is_grad_enabled(), torch.get_num_threads()
    kept = images[:16].clone()
    model(images[:16])
    assert (torch.is_grad_enabled(), torch.get_num_threads()) == before
    assert not torch.is_inference_mode_enabled()
    assert images[:16].equal(kept)


def test_native_maps_are_the_finest_blocks(make_job, run_folder, images):
    job = make_job(resolution="native")
    height, width = job.settings["resolution"]
    maps = read_saliency(explained(job, images[:16]))
    assert maps.shape == (16, height, width)
    own = load_classifier(run_folder).explain(Preprocessing(size=SIDE).normalize(images[:16]), size=(height, width))
    assert tuple(own.positive[0].shape[1:]) == (height, width)
    assert np.abs(maps - own.saliency.numpy()).max() <= 0.5 / 255 + 1e-4


def test_any_side_can_be_asked_for(make_job, images):
    assert read_saliency(explained(make_job(resolution=20), images[:16])).shape == (16, 20, 20)
    maps = read_saliency(explained(make_job(resolution=20, method="random"), images[:16]))
    assert maps.shape == (16, 20, 20)
    assert maps.min() >= 0


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_other_methods_keep_their_values(make_job, plain_folder, images, dtype):
    job = make_job(plain_folder, method="random:seed=3", dtype=dtype)
    model = job.model(CPU, batch_size=16)
    assert not model.shared
    rows = model(images[:16])
    network = load_classifier(plain_folder)
    expected = explain_by(network, network.config.preprocessing.normalize(images[:16]), "random:seed=3")
    assert np.abs(read_saliency(rows) - expected.saliency.numpy()).max() <= 0.5 / 255 + 1e-6
    assert np.allclose(rows.column("probabilities").to_pylist(), expected.probabilities.numpy(), atol=1e-5)
    assert set(rows.column("prediction").to_pylist()) <= {"0", "1", "2"}


def test_signed_maps_of_a_method_that_takes_gradients(make_job, images):
    pytest.importorskip("captum")
    job = make_job(method="integrated-gradients:steps=2", overlays=True)
    model = job.model(CPU, batch_size=16)
    rows = model(images[:16])
    maps = read_saliency(rows)
    assert maps.min() < 0 < maps.max()
    assert len(set(rows.column("saliency_scale").to_pylist())) == 16
    assert (
        pa.Table.from_batches([model(images[:16].flip(0))])
        .take(list(range(15, -1, -1)))
        .equals(pa.Table.from_batches([rows]))
    )


def test_maps_of_unnormalised_evidence_keep_their_own_extremes(make_job, images):
    model = make_job(method="mhex:normalize=false", beta=1.0).model(CPU, batch_size=16)
    assert model.shared
    rows = model(images[:16])
    assert (np.array(rows.column("saliency").to_pylist()).max(axis=(1, 2)) == 255).all()
    close = explained(make_job(method="mhex:normalize=false", beta=1.0, dtype="float16"), images[:16])
    error = np.abs(read_saliency(rows) - read_saliency(close)).max(axis=(1, 2))
    assert (error <= 0.51 * rows.column("saliency_scale").to_numpy() + 2**-10).all()


def test_overlays_are_pictures_at_the_images_size(make_job, run_folder, images):
    rows = explained(make_job(overlays=True, resolution="native", dtype="float16"), images[:16])
    overlay = rows.column("overlay")[3].as_py()
    assert overlay["path"] is None
    with Image.open(io.BytesIO(overlay["bytes"])) as picture:
        shown = np.asarray(picture).astype(int)
    own = load_classifier(run_folder).explain(Preprocessing(size=SIDE).normalize(images[:16]), size=(8, 8))
    expected = own.overlay()[3].movedim(0, -1).numpy().astype(int)
    assert np.abs(shown - expected).mean() < 6  # JPEG, of a small and busy picture


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_an_image_without_numbers_does_not_stop_a_run(make_job, run_folder, images, dtype, monkeypatch):
    """As where half precision overflows: its row says so, and the others are what they are without it."""
    job = make_job(run_folder, dtype=dtype, overlays=True)
    expected = explained(job, images[:16])
    normalize = Preprocessing.normalize

    def overflowing(self, pictures):
        ready = normalize(self, pictures)
        ready[torch.tensor([3, 7])] = torch.inf
        return ready

    monkeypatch.setattr(Preprocessing, "normalize", overflowing)
    rows = explained(job, images[:16])
    lost = np.isin(np.arange(16), (3, 7))
    assert (read_saliency(rows)[lost] == 0).all()
    assert (np.isnan(rows.column("probability").to_numpy()) == lost).all()
    for name in expected.schema.names:
        assert rows.column(name).take(np.flatnonzero(~lost)) == expected.column(name).take(np.flatnonzero(~lost)), name


def test_of_a_network_without_numbers_every_row_says_so(make_job, run_folder, tmp_path, images):
    broken = load_classifier(run_folder)
    with torch.no_grad():
        next(broken.parameters()).fill_(3e38)  # finite, as what is loaded must be; sums of it are not
    broken.save_pretrained(tmp_path / "broken")
    rows = explained(make_job(tmp_path / "broken", overlays=True), images[:16])
    assert (read_saliency(rows) == 0).all()
    assert np.isnan(rows.column("probability").to_numpy()).all()


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_up_to_rounding(make_job, images):
    plain, job = explained(make_job(), images[:16]), make_job(compile=True)
    model = job.model(CPU, batch_size=16)
    assert model.fixed
    assert np.abs(read_saliency(model(images[:16])) - read_saliency(plain)).max() <= 1 / 255 + 1e-3


# ------------------------------------------------------------------------------------------------------------ settings


def test_settings_are_what_decides_values(make_job, run_folder, tmp_path):
    settings = make_job().settings
    assert json.loads(json.dumps(settings)) == settings
    moved = shutil.copytree(run_folder, tmp_path / "moved")
    assert make_job(moved).settings == settings
    changes = ({"beta": 0.5}, {"dtype": "float16"}, {"resolution": 16}, {"target": 1}, {"overlays": True})
    for change in (*changes, {"autocast": "bfloat16"}, {"compile": True}, {"method": "mhex-paper"}):
        assert make_job(**change).settings != settings
    assert make_job(target="ring").settings == make_job(target=1).settings == make_job(target="1").settings
    model = load_classifier(run_folder)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(moved)
    assert make_job(moved).settings["checkpoint_sha256"] != settings["checkpoint_sha256"]


def test_the_manifest_can_say_what_the_numbers_mean(make_job, run_folder):
    job = make_job(target="ring", resolution="native")
    about = json.loads(json.dumps(job.about))
    assert about["class_names"] == ["disc", "ring", "cross"]
    assert about["target"] == "ring"
    assert about["layers"] == list(load_classifier(run_folder).layer_names)
    assert about["preprocessing"] == Preprocessing(size=SIDE).to_dict()
    assert about["map"]["shape"] == job.settings["resolution"]
    assert job.program == "mhex-vision"
    assert job.input_bytes == 3 * SIDE * SIDE
    assert make_job(overlays=True).row_bytes > make_job().row_bytes > job.row_bytes > 0


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_datasets_reads_maps_as_arrays_and_overlays_as_images(make_job, images, tmp_path, dtype):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    job = make_job(overlays=True, resolution=20, dtype=dtype)
    rows = explained(job, images[:16])
    own = [pa.array(range(16)), pa.array([f"{row}.png" for row in range(16)]), pa.array(["/x"] * 16)]
    (tmp_path / "data").mkdir()
    table = pa.Table.from_arrays([*own, *rows.columns], schema=full_schema(job.schema))
    parquet.write_table(table, tmp_path / "data" / "part-000000.parquet")
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.features["saliency"] == datasets.Array2D(shape=(20, 20), dtype=dtype)
    assert isinstance(loaded.features["overlay"], datasets.Image)
    assert loaded[2]["overlay"].size == (SIDE, SIDE)
    assert loaded[2]["id"] == "2.png"
    assert np.array_equal(read_saliency(loaded.with_format("arrow")[:16]), read_saliency(rows))
    assert np.array_equal(read_saliency(parquet.read_table(tmp_path / "data")), read_saliency(rows))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target": "square"}, "target must be one of the classes"),
        ({"target": 3}, "target must be one of the classes"),
        ({"target": -1}, "target must be one of the classes"),
        ({"method": "nothing"}, "name must be one of"),
        ({"method": "random", "beta": 0.5}, "beta belongs to the classifier's own saliency"),
        ({"method": "random", "resolution": "native"}, "resolution must be"),
        ({"method": "random", "compile": True}, "compile belongs to"),
        ({"beta": 2.0}, "beta"),
        ({"resolution": "tiny"}, "resolution must be 'full', 'native' or a side"),
        ({"resolution": 0}, "resolution must be at least 1"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"autocast": "int8"}, "autocast must be one of"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(make_job, options, expected):
    with pytest.raises(ValueError, match=expected):
        make_job(**options)


@pytest.mark.parametrize("options", [{"target": 1.0}, {"overlays": 1}, {"compile": "yes"}, {"resolution": 2.0}])
def test_options_of_another_type_are_refused(make_job, source, options):
    with pytest.raises(TypeError, match=next(iter(options))):
        make_job(**options)
    with pytest.raises(TypeError, match="checkpoint"):
        ImageJob(1, source)


def test_a_plain_network_has_no_saliency_of_its_own(make_job, plain_folder, tmp_path):
    with pytest.raises(ValueError, match="is a plain network"):
        make_job(plain_folder)
    with pytest.raises(FileNotFoundError):
        make_job(tmp_path / "none")
