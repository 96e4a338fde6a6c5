"""The demo: the main job in one call, without a download."""

import json
import re

import pytest
import torch
from transformers import AutoTokenizer

from mhex_text import Explanation, MHEXForSequenceClassification, TextBundle
from mhex_text.data import NOTE_CLASSES, notes_bundle
from mhex_text.demo import _one_of_each_class, agreement, run_demo, small_encoder, wordpiece_tokenizer

NAMES = ["first", "all", "layer", "random"]


def figures(lines):
    """Token F1, IoU and AUPRC in percent, by the first word of their line."""
    found = [line.split() for line in lines if line.startswith("  ") and line.count(" %") == 3]
    return {line[0]: [float(value) for value in line if re.fullmatch(r"\d+\.\d", value)] for line in found}


@pytest.fixture(scope="module")
def notes():
    return notes_bundle(train=64, validation=16, test=24)


@pytest.fixture(scope="module")
def tokenizer(notes):
    return wordpiece_tokenizer(notes.train["text"])


@pytest.fixture(scope="module")
def demo(notes, tmp_path_factory):
    """What was said, and the folder."""
    out, lines = tmp_path_factory.mktemp("demo") / "demo", []
    run_demo(out, bundle=notes, epochs=1, say=lines.append)
    return "\n".join(lines).splitlines(), out


def test_says_what_it_found_and_what_it_wrote(demo):
    lines, out = demo
    assert list(figures(lines)) == NAMES
    assert all(0 <= value <= 100 for values in figures(lines).values() for value in values)
    assert sum(line.startswith("  epoch") for line in lines) == 1
    for name in ("demo.html", "explanations.json"):
        assert any(str(out / name) in line for line in lines)
    assert lines[-1].startswith(f"  mhex-text explain --checkpoint {out} --text ")


def test_leaves_a_checkpoint_a_page_and_explanations(demo, notes):
    _, out = demo
    there = {path.name for path in out.iterdir()}
    assert there >= {"config.json", "demo.html", "explanations.json", "log.csv", "model.safetensors", "run.json"}
    assert not any(name.startswith(".") for name in there)
    explanation = Explanation.from_json(out / "explanations.json")
    assert {item.texts[0] for item in explanation} <= set(notes.test["text"])
    assert len(explanation) == len(NOTE_CLASSES)
    assert explanation.settings.class_names == NOTE_CLASSES
    page = (out / "demo.html").read_text(encoding="utf-8")
    assert page.partition("</noscript>")[0].count("<article") == 4
    assert "<title>Made-up clinical notes</title>" in page

    model = MHEXForSequenceClassification.from_pretrained(out)
    again = model.explain(explanation[3].texts[0])
    for one, other in zip(again[0].tokens, explanation[3].tokens, strict=True):
        assert one.text == other.text
        assert one.score == pytest.approx(other.score, rel=1e-3, abs=1e-5)


def test_another_run_is_replaced_only_where_that_is_asked_for(demo, notes, tmp_path):
    _, out = demo
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="out must be"):
        run_demo(out, bundle=notes, epochs=1, seed=3, say=lambda line: None)
    assert (out / "model.safetensors").read_bytes() == before
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in out.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    run_demo(copy, bundle=notes, epochs=1, seed=3, overwrite=True, say=lambda line: None)
    assert (copy / "model.safetensors").read_bytes() != before
    assert json.loads((copy / "run.json").read_text())["settings"]["seed"] == 3


def test_wants_rationales(notes, tmp_path):
    for test in (None, notes.test.remove_columns("rationale")):
        bundle = TextBundle(name="notes", train=notes.train, validation=None, test=test, class_names=notes.class_names)
        with pytest.raises(ValueError, match="bundle must have test texts with a rationale, got one without"):
            run_demo(tmp_path / "out", bundle=bundle, say=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_reads_every_letter_and_gives_the_text_back(notes, tokenizer, tmp_path):
    assert len(tokenizer) == 600
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.model_max_length) == (0, 4, 128)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in notes.test["text"]:
        found = tokenizer(text, return_offsets_mapping=True)
        assert tokenizer.unk_token_id not in found["input_ids"]
        assert loaded(text)["input_ids"] == found["input_ids"]
        read = tokenizer.decode(found["input_ids"], skip_special_tokens=True)
        assert re.sub(r"\W", "", read) == re.sub(r"\W", "", text.lower())
        for number, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            piece = tokenizer.convert_ids_to_tokens(number)
            assert number in (2, 3) or piece.removeprefix("##") == text[start:end].lower()
    assert tokenizer("a word of [MASK]")["input_ids"][-2] == tokenizer.mask_token_id
    assert loaded("no pain", "at night")["input_ids"] == tokenizer("no pain", "at night")["input_ids"]


def test_the_same_texts_always_give_the_same_vocabulary(notes, tokenizer):
    """The library's hash tables have another order each time."""
    for _ in range(5):
        again = wordpiece_tokenizer(iter(notes.train["text"]))
        assert again.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(("vocabulary", "error"), [(0, ValueError), (4.5, TypeError)])
def test_the_vocabulary_must_be_a_count(vocabulary, error):
    with pytest.raises(error, match="vocabulary must be"):
        wordpiece_tokenizer(["a note"], vocabulary=vocabulary)


@pytest.fixture(scope="module")
def explained(notes, tokenizer):
    torch.manual_seed(0)
    model = MHEXForSequenceClassification.from_encoder(small_encoder(tokenizer), 4, labels=NOTE_CLASSES)
    return model.explain(list(notes.test["text"]), tokenizer=tokenizer)


def test_agreement_is_whole_for_the_rationale_itself_and_nil_for_its_opposite(explained, notes):
    rationales = list(notes.test["rationale"])
    inside = []
    for item, spans in zip(explained, rationales, strict=True):
        marked = {place for start, end in spans for place in range(start, end)}
        inside.append([float(bool(marked & set(range(token.start, token.end)))) for token in item.tokens])
    assert agreement(explained, rationales, inside) == (1, 1, 1)
    f1, iou, auprc = agreement(explained, rationales, [[-value for value in row] for row in inside])
    assert iou < f1 < 0.1  # not 0: the rationale of a short note is more than half of it
    assert auprc < 0.3
    share = sum(sum(row) / len(row) for row in inside) / len(inside)
    flat = [[0.0] * len(row) for row in inside]
    assert agreement(explained, rationales, flat)[2] == pytest.approx(share)


def test_shows_one_text_of_each_class_if_possible_a_right_one(explained, notes):
    labels = list(notes.test["label"])
    shown = _one_of_each_class(explained, labels)
    assert len(shown) == 4
    for label, item in enumerate(shown):
        candidates = [index for index in range(len(labels)) if labels[index] == label]
        right = [index for index in candidates if explained[index].prediction == label]
        assert item == (right or candidates)[0]


@pytest.mark.slow
def test_the_whole_demo_learns_and_its_explanations_find_the_rationales(tmp_path):
    lines = []
    run_demo(tmp_path / "out", say=lines.append)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["result"]["test"]["accuracy"] > 0.95
    found = figures("\n".join(lines).splitlines())
    assert found["first"][0] > 55
    for value, random in zip(found["first"], found["random"], strict=True):
        assert value > 2.5 * random
