"""Explanations of texts as a page that lets a reader weigh them anew: `mhex_core.explorer` with words.

Letters: K classes, L layers, T tokens, N texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import zip_longest

import torch
from torch import Tensor

from mhex_core import _checks
from mhex_core.explorer import Evidence, ExplorerPage, Method, Piece, Sample, explorer_page, notebook_frame
from mhex_text import rendering
from mhex_text.explanation import Explanation, ExplanationSettings, TextExplanation
from mhex_text.explanation.records import as_names, as_tuple
from mhex_text.side_by_side import OWN, Given, as_batch, by_method, check_same, method_name

_NAME_LENGTH = 48  # characters of a text that stand for it
_STATIC = 50  # texts shown where scripts do not run
_IN_NOTEBOOKS = 8


def report(
    explanations: TextExplanation | Given | Mapping[str, Given],
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[int | str | None] | Tensor | None = None,
    title: str = "Explanations",
    about: Mapping[str, str] | None = None,
    max_bytes: int | None = None,
    compact: bool = False,
    fixed: bool = False,
) -> ExplorerPage:
    """One page of HTML in which a reader weighs explanations anew: layers, beta, classes, methods side by side.

    Args:
        explanations: Of N texts; or several of the same N texts. Those of one method that are weighed alike, for
            several classes, are put together; others stand side by side. A method is called by its name, in a mapping,
            or else by what the explanation says of it.
        names: N names; None means by number and first words.
        labels: Of each text the true class, its number or its name, or None; None means that none is known.
        title: Of the page.
        about: What is known of how they came to be (checkpoint, data, versions), by name.
        max_bytes: What the file may have. Classes beyond each text's first are left out until it fits.
        compact: The small page of a notebook.
        fixed: Whether scores are shown as they are, without anything to weigh them anew: those of an archive, say.

    Returns:
        The page; its `save` writes it.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The explanations are of different texts, tokens, models or classes, an argument does not fit, or the
            page does not.
    """
    _checks.flag("compact", compact)
    _checks.flag("fixed", fixed)
    methods = by_method(explanations)
    first = methods[0][1][0]
    check_same([one for _, members in methods for one in members])
    settings = first.settings
    known_as = _names(names, first)
    classes = _labels(labels, first)
    if not isinstance(title, str):
        raise TypeError(f"title must be a str, got {type(title).__name__}")
    as_names("title", [title])
    samples = [
        _sample(place, methods, name=name, label=label)
        for place, (name, label) in enumerate(zip(known_as, classes, strict=True))
    ]
    return explorer_page(
        samples,
        methods=[_method(name, members[0].settings, fixed=fixed) for name, members in methods],
        class_names=settings.class_names,
        title=title,
        about={"mhex-text": version("mhex-text"), **_facts(about)},
        max_bytes=max_bytes,
        compact=compact,
        without_script=_static(first),
    )


def notebook_html(explanation: TextExplanation | Explanation) -> str:
    """The page of at most the first eight texts in a frame, as a notebook shows it."""
    given = as_batch(explanation)
    frame = notebook_frame(report(given[:_IN_NOTEBOOKS], compact=True))
    if len(given) <= _IN_NOTEBOOKS:
        return frame
    return f"{frame}<p>The first {_IN_NOTEBOOKS} of {len(given)} texts; <code>save_html</code> writes all of them.</p>"


def pieces(explanation: TextExplanation, part: int) -> tuple[Piece, ...]:
    """One text in the pieces of `rendering.segments`, each with the tokens whose scores it sums up.

    Args:
        explanation: Of the text.
        part: 0, or 1 for the second text of a pair.
    """
    return tuple(
        Piece(cut.text, tuple(token for word in cut.words for token in explanation.word_tokens[word]), cut.seen)
        for cut in rendering.cuts(explanation, part)
    )


def _method(name: str, settings: ExplanationSettings, *, fixed: bool) -> Method:
    own = method_name(settings) == OWN
    return Method(
        name=name,
        layer_names=settings.layer_names,
        layer_weights=settings.layer_weights,
        beta=settings.beta,
        normalize=False,
        signed=True,
        unit="logits" if own else "",
        fixed=fixed,
    )


def _sample(
    place: int, methods: Sequence[tuple[str, Sequence[Explanation]]], *, name: str, label: int | None
) -> Sample:
    items = [[member[place] for member in members] for _, members in methods]
    first = items[0][0]
    heads = next((item.head_probabilities for row in items for item in row if item.head_probabilities), ())
    return Sample(
        name=name,
        probabilities=first.probabilities,
        evidence=_evidence(items),
        label=label,
        heads=tuple((head.index(max(head)), max(head)) for head in heads),
        texts=tuple(pieces(first, part) for part in range(len(first.texts))),
        tokens=tuple(token.text for token in first.tokens),
        note=rendering.cut_note(first),
    )


def _evidence(items: Sequence[Sequence[TextExplanation]]) -> tuple[Evidence, ...]:
    """Every method's first class, then every method's second, and so on; each class once."""
    there: set[tuple[int, int]] = set()
    found = []
    for row in zip_longest(*items):
        for method, item in enumerate(row):
            if item is None or (method, item.target) in there:
                continue
            there.add((method, item.target))
            positive, negative = (
                torch.tensor(values, dtype=torch.float64).reshape(len(item.tokens), len(item.layer_names)).unbind(dim=1)
                for values in (
                    [token.positive for token in item.tokens],
                    [token.negative for token in item.tokens],
                )
            )
            found.append(Evidence.of_layers(positive, negative, method=method, target=item.target))
    return tuple(found)


def _names(names: object, explanation: Explanation) -> tuple[str, ...]:
    if names is None:
        words = [first_words(item) for item in explanation]
        return tuple(words) if len(words) == 1 else tuple(f"{place}: {text}" for place, text in enumerate(words, 1))
    found = as_names("names", names)
    if len(found) != len(explanation):
        raise ValueError(f"names must hold one name per text ({len(explanation)}), got {len(found)}")
    return found


def first_words(item: TextExplanation) -> str:
    """A text by its first words, to call it by."""
    text = " ".join(" ".join(item.texts).split())
    if len(text) <= _NAME_LENGTH:
        return text or "no text"
    start = text[:_NAME_LENGTH]
    return f"{start.rpartition(' ')[0] or start}..."


def _labels(labels: object, explanation: Explanation) -> list[int | None]:
    if labels is None:
        return [None] * len(explanation)
    if isinstance(labels, Tensor):
        labels = _checks.tensor("labels", labels, ndim=1, floating=False).tolist()
    given = as_tuple("labels", labels)
    if len(given) != len(explanation):
        raise ValueError(f"labels must hold one class per text ({len(explanation)}), got {len(given)}")
    names = explanation.settings.class_names
    found: list[int | None] = []
    for place, (label, item) in enumerate(zip(given, explanation, strict=True)):
        if isinstance(label, str):
            if label not in names:
                raise ValueError(f"labels[{place}] must be one of {', '.join(names) or 'no names'}, got {label!r}")
            found.append(names.index(label))
        elif label is None:
            found.append(None)
        elif isinstance(label, bool) or not isinstance(label, int):
            raise TypeError(f"labels[{place}] must be an int, a name or None, got {type(label).__name__}")
        elif not 0 <= label < len(item.probabilities):
            raise ValueError(f"labels[{place}] must lie in [0, {len(item.probabilities) - 1}], got {label}")
        else:
            found.append(label)
    return found


def _facts(about: object) -> dict[str, str]:
    if about is None:
        return {}
    if not isinstance(about, Mapping):
        raise TypeError(f"about must be a mapping of names to texts, got {type(about).__name__}")
    as_names("about", [part for entry in about.items() for part in entry])
    return dict(about)


def _static(explanation: Explanation) -> str:
    """The texts as they are weighed now, for browsers without scripts."""
    shown = rendering.html_fragment(explanation[:_STATIC])
    rest = len(explanation) - _STATIC
    return shown if rest <= 0 else f"{shown}<p>{rest} more texts are shown where scripts run.</p>"
