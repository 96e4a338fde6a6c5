"""A bulk job over texts: what is read, what comes of it, and that a row depends on nothing but its text."""

import os
import pickle
import random
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mhex_core.bulk.job import OWN_COLUMNS, pad
from mhex_text import Explanation, explain_by
from mhex_text.bulk import TextJob, open_source
from mhex_text.bulk.checkpoint import find_checkpoint

from .conftest import LIMIT, save_tokenizer, spoken

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def write(tmp_path):
    """A file of texts, opened."""

    def write(texts, name="texts.jsonl"):
        path = tmp_path / name
        fields = [{"text": text} if isinstance(text, str) else {"text": text[0], "pair": text[1]} for text in texts]
        parquet.write_table(pa.Table.from_pylist(fields), path.with_suffix(".parquet"))
        return open_source(path.with_suffix(".parquet"))

    return write


def read(job):
    """All inputs as a reader gives them."""
    (entries,) = job.entries()
    return job.reader()(entries)


def in_batches(decoded, model, *, size, seed=None):
    """The row of each kept input, from batches of its group."""
    groups = {}
    for place, value, group in zip(decoded.kept, decoded.values, decoded.groups, strict=True):
        groups.setdefault(group, []).append((place, value))
    found = {}
    for members in groups.values():
        if seed is not None:
            random.Random(seed).shuffle(members)
        for start in range(0, len(members), size):
            part = members[start : start + size]
            values = pad([value for _, value in part], -(-len(part) // 16) * 16)
            rows = model(values).slice(0, len(part)).to_pylist()
            found |= dict(zip((place for place, _ in part), rows, strict=True))
    return [found[place] for place in sorted(found)]


def explained(job):
    return in_batches(read(job), job.model(CPU, batch_size=32), size=32)


def check(rows, explanation, *, keep_text=True):
    """Rows that say what an explanation says."""
    assert len(rows) == len(explanation)
    for row, item in zip(rows, explanation, strict=True):
        if keep_text:
            assert (row["text"], *([row["pair"]] if "pair" in row else [])) == item.texts
        assert row["prediction"] == item.prediction_name
        assert row["target"] == item.target_name
        assert row["truncated"] == item.truncated
        np.testing.assert_allclose(row["probabilities"], item.probabilities, atol=1e-5)
        assert row["probability"] == max(row["probabilities"])
        assert row["target_probability"] == row["probabilities"][item.target]
        fields = ("text", "start", "end", "part", "word")[not keep_text :]
        assert [[token[name] for name in fields] for token in row["tokens"]] == [
            [getattr(token, name) for name in fields] for token in item.tokens
        ]
        scores = [token.score for token in item.tokens]
        np.testing.assert_allclose([token["score"] for token in row["tokens"]], scores, rtol=1e-4, atol=1e-4)


def both(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


OWN = {
    "as it is": {},
    "all layers": {"layers": "all", "beta": 0.25},
    "places": {"layers": [0, -1]},
    "attention": {"attention": True},
    "target": {"target": 2},
}


@pytest.mark.parametrize("case", OWN)
def test_rows_are_what_explain_gives(case, checkpoint, write):
    texts = [*spoken(40), "​", "  good \u200b ", "\u200bgood"]
    job = TextJob(checkpoint=checkpoint, source=write(texts), **OWN[case])
    model, tokenizer = both(checkpoint)
    explanation = model.explain(texts, tokenizer=tokenizer, **{"target": None} | OWN[case])
    assert any(item.truncated for item in explanation)
    check(explained(job), explanation)


def test_a_method_with_options_of_its_own(checkpoint, write):
    texts = spoken(20)
    spec = "mhex:layers=last,sharpness=soft,tau_neg=0.2,decay=0.5"
    model, tokenizer = both(checkpoint)
    check(
        explained(TextJob(checkpoint=checkpoint, source=write(texts), method=spec)),
        explain_by(model, texts, spec, tokenizer=tokenizer),
    )


@pytest.mark.parametrize("method", ["cdam", "occlusion", "random", "mhex:rectify=true"])
def test_other_methods_give_what_explain_by_gives(method, checkpoint, write):
    texts = spoken(24, most=9)
    model, tokenizer = both(checkpoint)
    job = TextJob(checkpoint=checkpoint, source=write(texts), method=method, target="yes")
    assert not job.model(CPU, batch_size=16).shared
    check(explained(job), explain_by(model, texts, method, 1, tokenizer=tokenizer))


def test_a_classifier_without_blocks(plain, write):
    texts = spoken(24, most=9)
    model, tokenizer = both(plain)
    rows = explained(TextJob(checkpoint=plain, source=write(texts), method="attention"))
    check(rows, explain_by(model, texts, "attention", tokenizer=tokenizer))
    assert {row["prediction"] for row in rows} <= {"LABEL_0", "LABEL_1"}


def test_pairs(checkpoint, write):
    first, second = spoken(30, most=25), spoken(30, most=25, seed=1)
    texts = list(zip(first, second, strict=True))
    job = TextJob(checkpoint=checkpoint, source=write(texts), layers="all")
    model, tokenizer = both(checkpoint)
    rows = explained(job)
    explanation = model.explain(texts, tokenizer=tokenizer, layers="all")
    check(rows, explanation)
    assert {token["part"] for row in rows for token in row["tokens"]} == {0, 1}
    assert any(row["truncated"] for row in rows)
    cdam = explained(TextJob(checkpoint=checkpoint, source=write(texts), method="cdam"))
    check(cdam, explain_by(model, texts, "cdam", tokenizer=tokenizer))


def test_texts_are_cut_where_it_is_asked_for(checkpoint, write):
    texts = spoken(20)
    job = TextJob(checkpoint=checkpoint, source=write(texts), max_length=7)
    model, tokenizer = both(checkpoint)
    check(explained(job), model.explain(texts, tokenizer=tokenizer, max_length=7))
    assert set(read(job).groups) == {7}


def test_without_the_texts_only_places_are_written(checkpoint, write):
    texts = spoken(20)
    job = TextJob(checkpoint=checkpoint, source=write(texts), keep_text=False)
    rows = explained(job)
    assert "text" not in job.schema.names
    assert set(rows[0]["tokens"][0]) == {"start", "end", "part", "word", "score"}
    model, tokenizer = both(checkpoint)
    check(rows, model.explain(texts, tokenizer=tokenizer), keep_text=False)


def test_independent_classes_have_probabilities_of_their_own(checkpoint, tmp_path, write):
    folder = tmp_path / "independent"
    model, _ = both(checkpoint)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(folder)
    save_tokenizer(folder)
    texts = spoken(8)
    model, tokenizer = both(folder)
    rows = explained(TextJob(checkpoint=folder, source=write(texts)))
    check(rows, model.explain(texts, tokenizer=tokenizer))
    assert any(abs(sum(row["probabilities"]) - 1) > 0.01 for row in rows)


# ----------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention": True},
        {"autocast": "bfloat16"},
        {"method": "cdam"},
        {"method": "occlusion"},
        {"method": "attention-shapley:game=cls"},
        {"method": "random"},
    ],
    ids=str,
)
def test_a_row_has_the_same_bits_in_any_batch(settings, checkpoint, write):
    own = "method" not in settings
    job = TextJob(
        checkpoint=checkpoint, source=write(spoken(96 if own else 48, most=LIMIT + 5 if own else 6)), **settings
    )
    decoded, model = read(job), job.model(CPU, batch_size=48)
    first = in_batches(decoded, model, size=16)
    assert in_batches(decoded, job.model(CPU, batch_size=16), size=16) == first
    for size in (32, 48):
        for seed in range(3):
            assert in_batches(decoded, model, size=size, seed=seed) == first


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_in_any_batch(checkpoint, write):
    source = write(spoken(60))
    plain, job = (TextJob(checkpoint=checkpoint, source=source, compile=compiled) for compiled in (False, True))
    decoded, model = read(job), job.model(CPU, batch_size=16)
    assert model.fixed
    first = in_batches(decoded, model, size=16)
    assert in_batches(decoded, model, size=16, seed=1) == first
    for row, other in zip(first, explained(plain), strict=True):
        np.testing.assert_allclose(row["probabilities"], other["probabilities"], atol=1e-5)
        scores = [[token["score"] for token in each["tokens"]] for each in (row, other)]
        np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-4)


def test_one_model_explains_in_several_threads_at_once(checkpoint, write):
    from concurrent.futures import ThreadPoolExecutor

    job = TextJob(checkpoint=checkpoint, source=write(spoken(64)))
    decoded, model = read(job), job.model(CPU, batch_size=16)
    assert model.shared
    assert not model.fixed
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        found = list(threads.map(lambda seed: in_batches(decoded, model, size=16, seed=seed), range(8)))
    assert all(rows == found[0] for rows in found)


# --------------------------------------------------------------------------------------------------------------- readin


def test_what_cannot_be_read_is_rejected_and_the_rest_is_kept(checkpoint, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,n\ngood,1\n,2\n"open\nbad,3\nna\xefve,4\nplot,5\n')
    decoded = read(TextJob(checkpoint=checkpoint, source=open_source(path)))
    assert decoded.kept == [0, 3, 5]
    assert [value.texts for value in decoded.values] == [("good",), ("bad",), ("plot",)]
    assert decoded.rejected == [(1, "no text"), (2, "not a row of 2 columns"), (4, "not UTF-8")]


def test_groups_are_lengths_in_steps_within_what_the_model_takes(checkpoint, write):
    texts = [" ".join(["good"] * count) for count in (1, 14, 15, 30, 31, 100)]
    source = write(texts)
    assert read(TextJob(checkpoint=checkpoint, source=source)).groups == [16, 16, 32, 32, LIMIT, LIMIT]
    assert read(TextJob(checkpoint=checkpoint, source=source, method="cdam")).groups == [3, 16, 17, 32, 33, LIMIT]


def test_a_text_the_tokenizer_cannot_take_is_rejected_alone(checkpoint, tmp_path, write):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "words"
    shutil.copytree(checkpoint, folder)
    core = Tokenizer(models.WordLevel({"[PAD]": 0, "good": 1, "film": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    reader = TextJob(checkpoint=folder, source=write(["good", "strange", "film", "good film"])).reader()
    reader._tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]")
    (entries,) = reader._read._source.entries()
    decoded = reader(entries)
    assert decoded.kept == [0, 2, 3]
    assert [place for place, _ in decoded.rejected] == [1]
    assert decoded.rejected[0][1].startswith("the tokenizer cannot read it: ")


def test_a_tokenizer_without_special_tokens_has_texts_without_tokens(checkpoint, tmp_path, write):
    folder = tmp_path / "bare"
    shutil.copytree(checkpoint, folder)
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    decoded = read(TextJob(checkpoint=folder, source=write(["good", "\u200b"])))
    assert decoded.kept == [0]
    assert decoded.rejected == [(1, "no token")]


def test_the_tokenizers_threads_are_off_for_the_call_alone(checkpoint, write, monkeypatch):
    job = TextJob(checkpoint=checkpoint, source=write(["good"]))
    reader = job.reader()
    (entries,) = job.entries()
    seen = []
    tokenizer = reader._tokenizer

    def watched(*arguments, **options):
        seen.append(os.environ["TOKENIZERS_PARALLELISM"])
        return tokenizer(*arguments, **options)

    reader._tokenizer = watched
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    reader(entries)
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    reader(entries)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert seen == ["false", "false"]


# ---------------------------------------------------------------------------------------------------- files and setting


@pytest.mark.parametrize(("pairs", "keep_text"), [(False, True), (True, True), (False, False)])
def test_datasets_reads_the_files(pairs, keep_text, checkpoint, write, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = spoken(20)
    job = TextJob(
        checkpoint=checkpoint,
        source=write(list(zip(texts, texts[::-1], strict=True)) if pairs else texts),
        keep_text=keep_text,
    )
    rows = explained(job)
    schema = pa.schema([*OWN_COLUMNS, *job.schema], metadata=job.schema.metadata)
    own = [{"index": place, "id": f"a/{place}", "source": "a"} for place in range(20)]
    table = pa.Table.from_pylist([one | row for one, row in zip(own, rows, strict=True)], schema=schema)
    (tmp_path / "data").mkdir()
    parquet.write_table(table, tmp_path / "data" / "part-000000.parquet")
    found = datasets.load_dataset("parquet", data_dir=tmp_path / "data", split="train", cache_dir=tmp_path / "cache")
    assert found.column_names == schema.names
    assert found.features["tokens"].feature["score"] == datasets.Value("float32")
    assert found.features["tokens"].feature["part"] == datasets.Value("int8")
    assert found.features["index"] == datasets.Value("int64")
    row = found[7]
    assert [token["start"] for token in row["tokens"]] == [token["start"] for token in rows[7]["tokens"]]
    assert row["probabilities"] == rows[7]["probabilities"]
    assert ("text" in row, "pair" in row) == (keep_text, pairs and keep_text)


def test_settings_change_with_whatever_changes_values(checkpoint, plain, tmp_path, write):
    source = write(["good"])
    first = TextJob(checkpoint=checkpoint, source=source)
    assert first.settings == TextJob(checkpoint=str(checkpoint), source=source).settings
    for change in (
        {"target": "yes"},
        {"method": "cdam"},
        {"layers": 2},
        {"layers": [0, 1, 2]},
        {"beta": 0.5},
        {"attention": True},
        {"max_length": 9},
        {"keep_text": False},
        {"autocast": "bfloat16"},
        {"compile": True},
    ):
        assert TextJob(checkpoint=checkpoint, source=source, **change).settings != first.settings, change
    assert (
        TextJob(checkpoint=checkpoint, source=source, target="yes").settings
        == TextJob(checkpoint=checkpoint, source=source, target=1).settings
    )
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    (folder / "log.csv").write_text("what a run wrote beside it")
    assert TextJob(checkpoint=folder, source=source).settings == first.settings
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert TextJob(checkpoint=folder, source=source).settings != first.settings
    assert first.about["class_names"] == ["no", "yes", "naïve"]
    assert first.about["layers"] == [f"layer {index}" for index in range(4)]


def test_a_job_goes_to_other_processes(checkpoint, write):
    job = TextJob(checkpoint=checkpoint, source=write(spoken(16)), layers=[0, 1])
    other = pickle.loads(pickle.dumps(job))
    assert other.settings == job.settings
    assert explained(other) == explained(job)
    decoded = pickle.loads(pickle.dumps(read(job)))
    assert in_batches(decoded, job.model(CPU, batch_size=16), size=16) == explained(job)


def test_a_repository_is_known_by_its_commit(checkpoint, write, monkeypatch, tmp_path):
    """In the cache of the hub's library a repository is a folder of that name."""
    import huggingface_hub.constants
    import transformers.utils.hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--me--reviews"
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    # Before version 5 transformers kept its own copies of both.
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", True, raising=False)
    known = find_checkpoint("me/reviews")
    assert (known.place, known.revision, known.digest) == ("me/reviews", commit, f"me/reviews@{commit}")
    rows = explained(TextJob(checkpoint="me/reviews", source=write(["good", "bad"])))
    assert [row["text"] for row in rows] == ["good", "bad"]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"source": "a.csv"}, TypeError, "source must be a TextSource"),
        ({"checkpoint": 3}, TypeError, "checkpoint must be a folder"),
        ({"checkpoint": "./nothing"}, FileNotFoundError, "there is no folder"),
        ({"target": "maybe"}, ValueError, "target must be one of the classes"),
        ({"target": 3}, ValueError, "target must be one of the classes"),
        ({"target": True}, TypeError, "target must be the name or the number"),
        ({"method": "soup"}, ValueError, "name must be one of"),
        ({"method": "cdam", "beta": 0.5}, ValueError, "beta must go with the method 'mhex'"),
        ({"method": "mhex:layers=2", "layers": 2}, ValueError, "layers must go with the method 'mhex'"),
        ({"layers": 0}, ValueError, "layers must be at least 1"),
        ({"layers": [4]}, ValueError, "layers must name layers"),
        ({"beta": 2}, ValueError, "beta must be in"),
        ({"attention": 1}, TypeError, "attention must be a bool"),
        ({"max_length": 2}, ValueError, "max_length must be at least 3"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1"),
        ({"autocast": "float8"}, ValueError, "autocast must be one of"),
        ({"compile": True, "method": "cdam"}, ValueError, "compile must go with the method 'mhex'"),
        ({"compile": True, "attention": True}, ValueError, "compile must go with the method 'mhex'"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, said, checkpoint, write):
    with pytest.raises(error, match=said):
        TextJob(**{"checkpoint": checkpoint, "source": write(["good"])} | change)


def test_a_classifier_without_blocks_has_no_evidence_of_its_own(plain, write):
    with pytest.raises(ValueError, match="checkpoint must hold an MHEX classifier for the method 'mhex'"):
        TextJob(checkpoint=plain, source=write(["good"]))


def test_damaged_weights_are_said_in_one_line(checkpoint, tmp_path, write):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    job = TextJob(checkpoint=folder, source=write(["good"]))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged, truncated"):
        job.model(CPU, batch_size=16)


def test_what_is_no_number_stays_none(checkpoint, tmp_path, write):
    folder = tmp_path / "broken"
    model, _ = both(checkpoint)
    with torch.no_grad():
        model.encoder.embeddings.LayerNorm.weight.fill_(3e38)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    rows = explained(TextJob(checkpoint=folder, source=write(["good film", "bad"]), layers="all"))
    assert all(np.isnan(row["probability"]) for row in rows)
    assert all(np.isnan(token["score"]) for row in rows for token in row["tokens"])


def test_an_explanation_is_what_the_columns_are_checked_against(checkpoint):
    """A guard for the tests above: scores differ between layers and are not all alike."""
    model, tokenizer = both(checkpoint)
    explanation = model.explain(spoken(4), tokenizer=tokenizer)
    assert isinstance(explanation, Explanation)
    assert len({round(token.score, 4) for item in explanation for token in item.tokens}) > 20
