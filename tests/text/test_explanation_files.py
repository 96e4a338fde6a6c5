"""Explanations of texts as JSON and as pages, and read back."""

import collections
import json
import math
import random
import time

import pytest
import torch

from mhex_text.explanation import Explanation
from mhex_text.rendering import html_fragment

from .. import mutations  # noqa: TID252
from .conftest import LAYERS, Case

HOSTILE = (
    "<script>alert('x')</script> & \"good\" \u202efilm\u202c "
    "\u05e9\u05dc\u05d5\u05dd \U0001f469\u200d\U0001f680 e\u0301\r\n\tbad\x1b[31m\x00"
)


@pytest.fixture(scope="module")
def hostile(tokenizer):
    return Case(tokenizer, [HOSTILE, "good film", ""], max_length=24).explain(
        class_names=("</title>", 'a"b', "\u05e9\x1b")
    )


def test_json_round_trip(case, pairs, hostile, tmp_path):
    for explanation in (case.explain(beta=1 / 3), pairs.explain(layers=[4]), hostile, hostile[:0]):
        path = tmp_path / "explanation.json"
        text = explanation.to_json(path)
        assert path.read_bytes().decode("utf-8") == text
        assert Explanation.from_json(text) == explanation
        assert Explanation.from_json(path) == Explanation.from_json(str(path)) == explanation
        assert list(tmp_path.iterdir()) == [path]


def test_json_is_as_documented(case):
    item = case.explain()[0]
    document = json.loads(case.explain().to_json())
    assert (document["format"], document["version"], document["beta"]) == ("mhex-text-explanation", 2, 0.0)
    assert document["layer_weights"] == [1, 1, 1, 0, 0]
    first = document["explanations"][0]
    assert first["texts"] == ["Unbelievable  film, not bad"]
    assert [word["text"] for word in first["words"]] == ["Unbelievable", "film", ",", "not", "bad"]
    assert [word["score"] for word in first["words"]] == [word.score for word in item.words]
    token = first["tokens"][0]
    assert math.fsum(token["scores"]) == token["score"] == item.tokens[0].score
    assert (first["truncated"], first["target"], first["prediction"]) == (0, 0, 2)


def damage(text, change):
    document = json.loads(text)
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("beta"),
        lambda d: d.update(extra=1),
        lambda d: d.update(format="other"),
        lambda d: d.update(version="1"),
        lambda d: d.update(version=True),
        lambda d: d.update(beta=0.5),
        lambda d: d.update(beta=None),
        lambda d: d.update(layer_names=["a"]),
        lambda d: d.update(class_names=5),
        lambda d: d.update(explanations=None),
        lambda d: d["explanations"].append(3),
        lambda d: d["explanations"][0].update(target=17),
        lambda d: d["explanations"][0].update(target=1.0),
        lambda d: d["explanations"][0].update(prediction=0),
        lambda d: d["explanations"][0].update(truncated=3),
        lambda d: d["explanations"][0].update(texts=["another"]),
        lambda d: d["explanations"][0].update(texts="ab"),
        lambda d: d["explanations"][0].update(seen=[[0, 1, 2]]),
        lambda d: d["explanations"][0].update(note="x"),
        lambda d: d["explanations"][0]["tokens"][0].update(start=-1),
        lambda d: d["explanations"][0]["tokens"][0].update(score=1.0),
        lambda d: d["explanations"][0]["tokens"][0].update(positive=["1"] * 5),
        lambda d: d["explanations"][0]["tokens"][0]["positive"].append(0.0),
        lambda d: d["explanations"][0]["tokens"][0]["negative"].pop(),
        lambda d: d["explanations"][0]["tokens"].pop(),
        lambda d: d["explanations"][0]["words"].pop(),
        lambda d: d["explanations"][0]["words"][0].update(score=0),
    ],
)
def test_damaged_json_is_refused(case, change):
    text = damage(case.explain().to_json(), change)
    with pytest.raises(ValueError, match=r"^source must hold a saved explanation; the text is damaged") as caught:
        Explanation.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(case, number):
    text = case.explain().to_json().replace('"beta": 0.0', f'"beta": {number}')
    with pytest.raises(ValueError, match="is damaged or something else"):
        Explanation.from_json(text)


def test_files_that_are_something_else(case, tmp_path):
    path = tmp_path / "explanation.json"
    whole = case.explain().to_json(path).encode()
    twice = whole.replace(b'"beta"', b'"beta": 0.0, "beta"', 1)
    deep = b'{"a":' + b"[" * 200_000
    for content in (b"", b"\xff\xfe", b"[]", b"null", whole[:-1], whole[: len(whole) // 2], twice, deep, b"\x80\x04."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"explanation\.json is damaged or something else") as caught:
            Explanation.from_json(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Explanation.from_json(tmp_path / "none.json")
    with pytest.raises(TypeError, match="source must be a path or a str, got bytes"):
        Explanation.from_json(whole)


def test_a_newer_version_is_refused(case):
    text = damage(case.explain().to_json(), lambda d: d.update(version=3, news=1))
    with pytest.raises(ValueError, match=r"version 2 or older; the text is of version 3, which a newer mhex-text"):
        Explanation.from_json(text)


@pytest.mark.parametrize("version", [3, 99, 10**400], ids=["3", "99", "huge"])
def test_a_newer_file_is_named(case, tmp_path, version):
    path = tmp_path / "newer.json"
    path.write_text(damage(case.explain().to_json(), lambda d: d.update(version=version)))
    with pytest.raises(ValueError, match=r"newer\.json is of version \d{1,20}, which a newer"):
        Explanation.from_json(path)


@pytest.mark.slow
def test_ten_thousand_mutations_of_a_file_are_refused_or_valid(case, tmp_path):
    """Half of them to bytes, half of them to what the JSON holds."""
    path = tmp_path / "mutated.json"
    whole = case.explain(beta=0.25)[:1].to_json().encode()
    chance = random.Random(15)
    streams = {"bytes": mutations.of_bytes(whole, chance), "json": mutations.of_json(whole, chance)}
    counts = collections.Counter()
    for kind in ("bytes", "json") * 5000:
        path.write_bytes(next(streams[kind]))
        start = time.perf_counter()
        try:
            loaded = Explanation.from_json(path)
        except ValueError as error:
            assert "mutated.json" in str(error)  # noqa: PT017 - what is harmless need not be refused
            counts[kind, "refused"] += 1
        else:
            # It fits together, is kept as it is, and can be weighed and shown.
            assert Explanation.from_json(loaded.to_json()) == loaded
            assert len(loaded.reweighted(beta=1.0)) == len(loaded)
            assert str(loaded) or not len(loaded)
            counts[kind, "loaded"] += 1
        assert time.perf_counter() - start < 5
    print(dict(counts))  # noqa: T201 - what -s shows
    assert counts["bytes", "refused"] > 4500
    assert counts["json", "refused"] > 4500


def test_an_interrupted_write_leaves_what_was_there(case, tmp_path, monkeypatch):
    path = tmp_path / "explanation.json"
    path.write_text("before")

    def fail(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", fail)
        for write in (case.explain().to_json, case.explain().save_html):
            with pytest.raises(OSError, match="no space"):
                write(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_is_saved(hostile, tmp_path):
    path = hostile.save_html(tmp_path / "why.html")
    assert path.read_bytes().decode() == hostile.to_html()
    assert hostile[0].to_html().startswith("<!DOCTYPE html>")
    assert html_fragment(hostile) in hostile.to_html()
    path = hostile[0].save_html(tmp_path / "one.html", name="first", label='a"b', title="One")
    assert "<title>One</title>" in path.read_text()
    for shown in (hostile, hostile[0]):
        assert shown._repr_html_().startswith("<iframe ")


def test_heads_are_kept(case, tmp_path):
    heads = [torch.tensor([[0.25, 0.5, 0.25], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])] * LAYERS
    explanation = case.explain(head_probabilities=heads)
    assert explanation[1].head_probabilities == ((1.0, 0.0, 0.0),) * LAYERS
    assert explanation.reweighted(beta=1).items[1].head_probabilities == explanation[1].head_probabilities
    text = explanation.to_json(tmp_path / "explanation.json")
    assert json.loads(text)["explanations"][2]["head_probabilities"] == [[0.0, 0.5, 0.5]] * LAYERS
    assert Explanation.from_json(tmp_path / "explanation.json") == explanation
    with pytest.raises(ValueError, match="is damaged or something else"):
        Explanation.from_json(damage(text, lambda d: d["explanations"][0]["head_probabilities"].pop()))


def test_what_version_1_wrote_is_read(case):
    text = damage(case.explain(beta=0.3).to_json(), lambda d: d.update(version=1))
    assert "head_probabilities" not in text
    assert Explanation.from_json(text) == case.explain(beta=0.3)


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        ([torch.zeros(3, 3)] * 4, ValueError, r"must hold 5 tensors of shape \(3, 3\), got \(3, 3\), \(3, 3\)"),
        ([torch.zeros(3, 2)] * 5, ValueError, r"must hold 5 tensors of shape \(3, 3\), got \(3, 2\)"),
        ([torch.full((3, 3), 2.0)] * 5, ValueError, r"head_probabilities\[0\] must be one or more numbers in \[0, 1\]"),
        ([1.0] * 5, TypeError, r"head_probabilities\[0\] must be a torch.Tensor, got float"),
    ],
)
def test_heads_that_do_not_fit_are_refused(case, heads, error, message):
    with pytest.raises(error, match=message):
        case.explain(head_probabilities=heads)


def test_words_name_their_tokens(case, pairs):
    for item in (*case.explain(), *pairs.explain()):
        assert sorted(place for places in item.word_tokens for place in places) == list(range(len(item.tokens)))
        for word, places in zip(item.words, item.word_tokens, strict=True):
            assert word.score == pytest.approx(sum(item.tokens[place].score for place in places))
            assert {item.tokens[place].part for place in places} == {word.part}
