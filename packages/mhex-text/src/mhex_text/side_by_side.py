"""Explanations of the same texts, put in order: by method, and of each method its classes.

Letters: N texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from mhex_text.explanation import Explanation, ExplanationSettings, TextExplanation
from mhex_text.explanation.records import as_names

Given = Explanation | Sequence[Explanation]

OWN = "mhex"
"""What the classifier's own evidence is called."""

_SAME_MODEL = 0.05  # by how much probabilities may differ: mixed precision depends on the batch
_SAME_EVIDENCE = 1e-3  # of the largest
_BLOCK = re.compile(r"layer \d+")


def by_method(given: object) -> list[tuple[str, list[Explanation]]]:
    """The methods by name, and the explanations of each: of the same texts, for different classes.

    Args:
        given: An explanation, a sequence, or either by the name of the method.

    Raises:
        TypeError: It is something else.
        ValueError: There is none, or those of one name are weighed differently.
    """
    if isinstance(given, Mapping):
        found = [(name, _listed(f"explanations[{name!r}]", members)) for name, members in given.items()]
        as_names("explanations", [name for name, _ in found])
        for name, members in found:
            if any(member.settings != members[0].settings for member in members):
                raise ValueError(f"explanations[{name!r}] must all be weighed alike, got different settings")
    else:
        found = []
        for one in _listed("explanations", given):
            name = method_name(one.settings)
            for known, members in found:
                if known == name and members[0].settings == one.settings and _joins(one, members):
                    members.append(one)
                    break
            else:
                found.append((name, [one]))
        found = _distinct(found)
    if not found:
        raise ValueError("explanations must hold at least one, got none")
    return found


def _listed(name: str, given: object) -> list[Explanation]:
    if isinstance(given, TextExplanation | Explanation):
        return [as_batch(given)]
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{name} must be an Explanation or a sequence of them, got {type(given).__name__}")
    for index, one in enumerate(given):
        if not isinstance(one, Explanation):
            raise TypeError(f"{name}[{index}] must be an Explanation, got {type(one).__name__}")
    if not given:
        raise ValueError(f"{name} must hold at least one explanation, got none")
    return list(given)


def as_batch(given: TextExplanation | Explanation) -> Explanation:
    """One text as a batch of one."""
    return Explanation((given,), given.settings) if isinstance(given, TextExplanation) else given


def method_name(settings: ExplanationSettings) -> str:
    """What made an explanation, as far as it says so: other methods have one layer, which is called as they are."""
    only = settings.layer_names[0] if len(settings.layer_names) == 1 else OWN
    return OWN if _BLOCK.fullmatch(only) else only


def _joins(one: Explanation, members: Sequence[Explanation]) -> bool:
    """Whether nothing speaks against their being of one method: evidence for the same class is the same."""
    return all(
        item.target != other.target or _same_evidence(item, other)
        for member in members
        if len(member) == len(one)
        for item, other in zip(one, member, strict=True)
    )


def _same_evidence(item: TextExplanation, other: TextExplanation) -> bool:
    if len(item.tokens) != len(other.tokens):
        return False
    ours, theirs = (
        torch.tensor([[*token.positive, *token.negative] for token in each.tokens]) for each in (item, other)
    )
    leeway = _SAME_EVIDENCE * float(ours.abs().max()) if ours.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=0, atol=leeway)


def _distinct(found: Sequence[tuple[str, list[Explanation]]]) -> list[tuple[str, list[Explanation]]]:
    """Methods of the same name with their numbers behind it, from the second on."""
    counts: dict[str, int] = {}
    named = []
    for name, members in found:
        counts[name] = counts.get(name, 0) + 1
        named.append((name if counts[name] == 1 else f"{name} ({counts[name]})", members))
    return named


def check_same(explanations: Sequence[Explanation]) -> None:
    """Refuse explanations that cannot stand side by side.

    Raises:
        ValueError: They are of different texts, tokens, classes or models.
    """
    first = explanations[0]
    for one in explanations[1:]:
        if one.settings.class_names != first.settings.class_names or len(one) != len(first):
            raise ValueError(
                f"explanations must be of the same texts and classes, got {len(first)} and {len(one)} texts, "
                f"{len(first.settings.class_names)} and {len(one.settings.class_names)} names of classes"
            )
        for place, (item, other) in enumerate(zip(first, one, strict=True)):
            if item.texts != other.texts or _places(item) != _places(other):
                raise ValueError(
                    f"explanations must be of the same texts in the same tokens, got different ones at {place}"
                )
            if len(item.probabilities) != len(other.probabilities) or any(
                abs(ours - theirs) > _SAME_MODEL
                for ours, theirs in zip(item.probabilities, other.probabilities, strict=True)
            ):
                raise ValueError(f"explanations must be of one model, got other probabilities of the text at {place}")


def _places(item: TextExplanation) -> list[tuple[int, int, int, int]]:
    return [(token.part, token.start, token.end, token.word) for token in item.tokens]
