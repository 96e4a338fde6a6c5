"""Made-up clinical notes whose class is the complaint a patient has, with the words that say so marked.

They are for trying out and testing explanations: what makes the class is known to the character. A note names one or
two findings of its class as present. Everything else is drawn alike for all classes: who the patient is, what was
measured, and *decoys*, in which findings of other classes are denied, feared, past, or a relative's. So a model must
read how a finding is meant, and the rationale is the finding together with the words that say it is present: neither
makes the class alone.

The notes are no medicine: their findings are words, put together at random.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import datasets
import numpy as np

from mhex_core import _checks
from mhex_text.data.bundle import TextBundle

SYNTHETIC_NOTES = "synthetic-notes"
NOTE_CLASSES = ("heart", "lungs", "stomach", "nerves")

_WORDS = range(8, 61)  # how many a note may have
_PIECE = re.compile(r"\{\w+\}|[\[\]]|[^][{}]+")
_SPLITS = ("train", "validation", "test")

# No word of a class is one of another's, nor of any sentence below.
_FINDINGS = {
    "heart": (
        "palpitations",
        "chest tightness",
        "chest pressure",
        "swollen ankles",
        "skipped heartbeats",
        "pounding heartbeats",
        "angina",
        "cardiac murmurs",
    ),
    "lungs": (
        "wheezing",
        "breathlessness",
        "laboured breathing",
        "noisy breathing",
        "dry coughing",
        "coughing fits",
        "yellow sputum",
        "asthma attacks",
    ),
    "stomach": (
        "nausea",
        "vomiting",
        "loose stools",
        "acid reflux",
        "bloating",
        "abdominal cramps",
        "stomach aches",
        "indigestion",
    ),
    "nerves": (
        "numb fingers",
        "tingling toes",
        "blurred vision",
        "double vision",
        "migraines",
        "slurred speech",
        "hand tremors",
        "dizzy spells",
    ),
}

# Brackets hold what says that the finding is there. Some say "no" or "not", so that such a word alone decides nothing.
_PRESENT = (
    "[Presents with {finding}] since {time}.",
    "[Reports {finding}, worse] {moment}.",
    "[Main complaint today: {finding}].",
    "[{finding} began] {time} [and persisted].",
    "[Complains of {finding}] for {number} days.",
    "[Woken] {moment} [by {finding}].",
    "[Came in because of {finding}].",
    "[Could not work] {time} [because of {finding}].",
    "[There is no relief from {finding}] despite rest.",
    "[{finding} did not settle] with the usual tablets.",
    "[Referred by the family doctor for {finding}].",
    "[Troubled by {finding}], {moment} above all.",
    "[Known {finding} have not improved] since {time}.",
    "If anything, [{finding} got worse] since {time}.",
)
_PRESENT_PAIRS = (
    "[Presents with {finding} and {finding}] since {time}.",
    "[Complains of {finding} together with {finding}].",
    "[Reports {finding}, and] {moment} [also {finding}].",
    "[There is no relief from {finding} or {finding}].",
)
_DECOYS = (
    "Denies {finding}.",
    "Denies any {finding} {moment}.",
    "No sign of {finding}.",
    "There is no {finding} at present.",
    "Does not report {finding}.",
    "Was never troubled by {finding}.",
    "{finding} ruled out by the family doctor.",
    "{finding} looked for and not found.",
    "Told to come back if {finding} should begin.",
    "Will ring the ward in case of {finding}.",
    "The leaflet of the tablets warns of {finding}.",
    "{relative} suffers from {finding}.",
    "{relative} was treated for {finding} last year.",
    "Treated for {finding} as a child, none since.",
)
_FILLERS = (
    "{age} years old, works as a {job}.",
    "Retired {job}, lives with {relation}.",
    "Lives alone on the {floor} floor.",
    "Seen {moment} in the walk-in clinic.",
    "Weight {weight} kg, unchanged since {time}.",
    "Temperature {temperature} degrees.",
    "Takes {number} tablets a day.",
    "Has given up smoking {number} years ago.",
    "Drinks {number} cups of coffee a day.",
    "Sleeps about {number} hours.",
    "Came with {relation}.",
    "Bloods were taken {time}.",
    "Results are expected within {number} days.",
    "Walks the dog {moment}.",
    "No known allergies.",
    "Vaccinations are up to date.",
    "The letter of the referring practice is missing.",
    "Speaks freely and is well dressed.",
    "Returned from a journey {time}.",
    "Works shifts as a {job}.",
    "Moved house {time}.",
    "A follow-up visit is planned.",
    "Was not able to fill in the form.",
    "Glasses were left at home.",
    "Knee surgery {number} years ago.",
    "Prefers appointments {moment}.",
)
_SLOTS: dict[str, tuple[str, ...]] = {
    "time": (
        "yesterday",
        "Monday",
        "last week",
        "last night",
        "the weekend",
        "Easter",
        "this spring",
        "Friday evening",
    ),
    "moment": ("in the morning", "at night", "after meals", "in the evening", "on weekdays", "after exercise"),
    "number": ("two", "three", "four", "five", "six", "seven"),
    "relative": ("A brother", "A sister", "The mother", "The father", "An aunt", "A neighbour", "The grandmother"),
    "relation": ("a daughter", "a son", "the husband", "the wife", "two cats", "a friend"),
    "age": tuple(str(age) for age in range(19, 88)),
    "job": ("teacher", "baker", "driver", "nurse", "roofer", "clerk", "florist", "cook", "welder", "librarian"),
    "floor": ("first", "second", "third", "top"),
    "weight": tuple(str(weight) for weight in range(48, 104)),
    "temperature": ("36.4", "36.7", "36.9", "37.1", "37.3"),
}


def notes_bundle(*, seed: int = 0, train: int = 2400, validation: int = 400, test: int = 600) -> TextBundle:
    """Make a data set of notes.

    Note i of a split has class i % 4 (see `NOTE_CLASSES`) and 8 to 60 words. No note is there twice, in one split or in
    two. Beside "text" and "label" each split has two columns of lists of [start, end], in characters of the text:

    - "rationale": the findings that are present with the words that say so, such as "Complains of palpitations": what
      makes the class; at least one span.
    - "decoys": the findings of other classes, which are not present; sometimes none.

    Args:
        seed: Not negative; another seed gives other notes.
        train: How many notes to learn from.
        validation: How many notes to choose by.
        test: How many notes to judge by.

    Raises:
        TypeError: An argument is not an int.
        ValueError: The seed is negative, or a count is less than 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    counts = dict(zip(_SPLITS, (train, validation, test), strict=True))
    for split, count in counts.items():
        _checks.positive_int(split, count)
    seen: set[str] = set()
    made = {}
    for place, (split, count) in enumerate(counts.items()):
        notes = [_new_note(seen, seed, place, index) for index in range(count)]
        made[split] = datasets.Dataset.from_dict(
            {
                "text": [text for text, _, _ in notes],
                "label": [index % len(NOTE_CLASSES) for index in range(count)],
                "rationale": [rationale for _, rationale, _ in notes],
                "decoys": [decoys for _, _, decoys in notes],
            },
            features=_features(),
        )
    return TextBundle(name=SYNTHETIC_NOTES, class_names=NOTE_CLASSES, **made)


_Spans = list[list[int]]
_Note = tuple[str, _Spans, _Spans]


def _features() -> datasets.Features:
    # Named, since a list that is empty in every note tells no type.
    spans = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
    return datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.Value("int64"), "rationale": spans, "decoys": spans}
    )


def _new_note(seen: set[str], seed: int, *place: int) -> _Note:
    """The first note drawn for this place that is not too short, not too long, and not there yet."""
    for attempt in itertools.count():
        text, rationale, decoys = _note(np.random.default_rng([seed, *place, attempt]), place[-1] % len(NOTE_CLASSES))
        if text not in seen and len(text.split()) in _WORDS:
            break
    seen.add(text)
    return text, rationale, decoys


def _note(rng: np.random.Generator, label: int) -> _Note:
    """A note, the spans of what makes its class, and those of its decoys."""
    name = NOTE_CLASSES[label]
    others = [other for other in NOTE_CLASSES if other != name]
    pair = rng.random() < 0.25
    own = [_FINDINGS[name][place] for place in rng.permutation(len(_FINDINGS[name]))[: 1 + pair]]
    sentences = [(_one(rng, _PRESENT_PAIRS if pair else _PRESENT), own, True)]
    for _ in range(int(rng.choice(3, p=(0.2, 0.4, 0.4)))):
        decoy = _one(rng, _FINDINGS[_one(rng, others)])
        sentences.append((_one(rng, _DECOYS), [decoy], False))
    fillers = rng.permutation(len(_FILLERS))[: rng.integers(1, 6)]
    sentences += [(_FILLERS[place], [], False) for place in fillers]
    text = ""
    rationale: _Spans = []
    decoys: _Spans = []
    for place in rng.permutation(len(sentences)):
        template, findings, present = sentences[place]
        sentence, brackets, found = _fill(rng, template, findings)
        start = len(text) + bool(text)
        spans, kept = (rationale, brackets) if present else (decoys, found)
        spans += [[start + first, start + last] for first, last in kept]
        text = f"{text} {sentence}" if text else sentence
    return text, rationale, decoys


def _fill(rng: np.random.Generator, template: str, findings: Sequence[str]) -> tuple[str, _Spans, _Spans]:
    """The sentence of a template, where its brackets were, and where its findings lie."""
    left = iter(findings)
    sentence, opened = "", 0
    brackets: _Spans = []
    found: _Spans = []
    for piece in _PIECE.findall(template):
        if piece == "[":
            opened = len(sentence)
        elif piece == "]":
            brackets.append([opened, len(sentence)])
        elif piece == "{finding}":
            finding = next(left)
            found.append([len(sentence), len(sentence) + len(finding)])
            sentence += finding
        else:
            sentence += _one(rng, _SLOTS[piece[1:-1]]) if piece.startswith("{") else piece
    return sentence[0].upper() + sentence[1:], brackets, found


def _one(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
