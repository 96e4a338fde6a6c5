"""The made-up notes: what makes their class is known to the character, and nothing else gives it away."""

import re

import pytest
import torch

from mhex_text import TextBundle
from mhex_text.data.notes import (
    _DECOYS,
    _FILLERS,
    _FINDINGS,
    _PRESENT,
    _PRESENT_PAIRS,
    _SLOTS,
    NOTE_CLASSES,
    notes_bundle,
)

CLASS_WORDS = {name: {word for finding in found for word in finding.split()} for name, found in _FINDINGS.items()}


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def pieces(row, column):
    return [row["text"][start:end].lower() for start, end in row[column]]


def without(row, column):
    """The text with holes where the spans were."""
    text = row["text"]
    for start, end in reversed(row[column]):
        text = text[:start] + " " + text[end:]
    return text


def classes_named(text):
    """The class numbers whose words are in a text."""
    return {number for number, name in enumerate(NOTE_CLASSES) if CLASS_WORDS[name] & set(words(text))}


@pytest.fixture(scope="module")
def bundle():
    return notes_bundle(train=800, validation=80, test=200)


@pytest.fixture(scope="module")
def rows(bundle):
    return [row for split in bundle.splits().values() for row in split]


def test_the_same_seed_makes_the_same_notes_and_a_larger_set_begins_with_the_smaller(bundle):
    again, larger = notes_bundle(train=800, validation=80, test=200), notes_bundle(train=900, validation=4, test=4)
    assert all(again.splits()[name].to_dict() == split.to_dict() for name, split in bundle.splits().items())
    assert larger.train[:800] == bundle.train[:]
    assert not set(notes_bundle(train=800, seed=1).train["text"]) & set(bundle.train["text"])


def test_is_a_bundle_with_all_splits_and_every_class_alike(bundle):
    assert isinstance(bundle, TextBundle)
    assert bundle.class_names == NOTE_CLASSES
    for split in bundle.splits().values():
        labels = list(split["label"])
        assert {labels.count(number) for number in range(4)} == {len(split) // 4}


def test_no_note_is_there_twice(rows):
    assert len({row["text"] for row in rows}) == len(rows) == 1080


def test_notes_are_8_to_60_words_long_and_differ(rows):
    lengths = [len(row["text"].split()) for row in rows]
    assert 8 <= min(lengths) < 14
    assert 38 < max(lengths) <= 60
    assert all(sentence[0].isupper() or sentence[0].isdigit() for row in rows for sentence in row["text"].split(". "))
    assert not any("{" in row["text"] or "  " in row["text"] for row in rows)


def test_the_rationale_holds_the_findings_of_the_class_which_are_nowhere_else(rows):
    counts = []
    for row in rows:
        own = _FINDINGS[NOTE_CLASSES[row["label"]]]
        marked = " | ".join(pieces(row, "rationale"))
        counts.append(sum(finding in marked for finding in own))
        assert classes_named(marked) == {row["label"]}
        assert row["label"] not in classes_named(without(row, "rationale"))
        # Without decoys, the class is told by the rationale and by nothing else.
        if not row["decoys"]:
            assert not classes_named(without(row, "rationale"))
    assert set(counts) == {1, 2}


def test_the_rationale_says_that_the_finding_is_there(rows):
    """It is a sentence of its kind between the brackets, with every slot filled, to the character."""
    kinds = [piece for template in (*_PRESENT, *_PRESENT_PAIRS) for piece in re.findall(r"\[(.*?)\]", template)]
    patterns = [re.compile(re.sub(r"\{\w+\}", ".+", kind), re.IGNORECASE) for kind in kinds]
    for row in rows:
        for start, end in row["rationale"]:
            assert any(pattern.fullmatch(row["text"][start:end]) for pattern in patterns)
            assert start == 0 or not row["text"][start - 1].isalnum()
            assert not row["text"][end].isalnum()
    assert {"presents with angina", "woken"} <= {piece for row in rows for piece in pieces(row, "rationale")}


def test_decoys_are_findings_of_other_classes(rows):
    others = []
    for row in rows:
        found = pieces(row, "decoys")
        others.append(len(found))
        assert classes_named(without(row, "decoys")) == {row["label"]}
        for finding in found:
            (owner,) = (number for number, name in enumerate(NOTE_CLASSES) if finding in _FINDINGS[name])
            assert owner != row["label"]
        assert classes_named(row["text"]) == {row["label"]}.union(*(classes_named(finding) for finding in found))
    assert set(others) == {0, 1, 2}
    assert sum(count > 0 for count in others) > len(others) / 2


def test_no_word_belongs_to_two_classes_or_to_a_sentence():
    of_sentences = set()
    for text in [
        *_PRESENT,
        *_PRESENT_PAIRS,
        *_DECOYS,
        *_FILLERS,
        *(value for slot in _SLOTS.values() for value in slot),
    ]:
        of_sentences |= set(words(re.sub(r"\{\w+\}", " ", text)))
    groups = [of_sentences, *CLASS_WORDS.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_sentences_of_every_kind_are_drawn_alike_for_all_classes(bundle):
    """Words outside the findings say nothing about the class."""
    counts = {}
    for row in bundle.train:
        for word in set(words(row["text"])) - set().union(*CLASS_WORDS.values()):
            counts.setdefault(word, [0, 0, 0, 0])[row["label"]] += 1
    table = torch.tensor([count for count in counts.values() if sum(count) >= 40], dtype=torch.float64)
    expected = table.sum(dim=1, keepdim=True) / 4
    chi_squared = ((table - expected) ** 2 / expected).sum(dim=1)
    assert len(table) > 100
    assert float(chi_squared.mean()) < 4  # 3 degrees of freedom: its mean is at most 3


def test_words_without_their_order_do_not_tell_the_class(bundle):
    """A linear classifier of word counts, which cannot know what is denied, stays far from what can be had."""
    numbers = {word: number for number, word in enumerate(sorted({w for t in bundle.train["text"] for w in words(t)}))}

    def counts(split):
        table = torch.zeros(len(split), len(numbers))
        for row, text in enumerate(split["text"]):
            for word in words(text):
                if word in numbers:
                    table[row, numbers[word]] += 1
        return table, torch.tensor(split["label"])

    linear = torch.nn.Linear(len(numbers), 4)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.05, weight_decay=1e-3)
    texts, labels = counts(bundle.train)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(linear(texts), labels).backward()
        optimizer.step()
    texts, labels = counts(bundle.test)
    accuracy = float((linear(texts).argmax(dim=1) == labels).double().mean())
    assert 0.4 < accuracy < 0.8


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
        ({"train": 0}, ValueError, "train must be at least 1, got 0"),
        ({"test": "many"}, TypeError, "test must be an int, got str"),
    ],
)
def test_arguments_are_checked(settings, error, message):
    with pytest.raises(error, match=message):
        notes_bundle(**settings)
