"""Which concepts a class rests on, layer by layer: the whole of a T-TCAV study once activations are at hand.

Letters: N samples of a concept, B explained samples, T tokens, C channels, L layers.
Sources: attention-weighted concept derivatives (T-TCAV), Eggen, Lysnaes-Larsen and Strumke (arXiv 2508.08966); TCAV,
Kim et al. 2018 (arXiv 1711.11279), from which the random concepts come. Held-out accuracy, the control and the
correction are additions: without them a score says little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mhex_core import _checks
from mhex_core.concepts import (
    ConceptVectors,
    concept_derivatives,
    concept_significance,
    fit_concept_vectors,
    holm,
    tcav_scores,
)


@dataclass(frozen=True, kw_only=True)
class ConceptSamples:
    """The activations of the samples that show one concept.

    Attributes:
        activations: L tensors (N, T, C), what each layer hands on, shallow to deep.
        mask: bool (N, T), true for real tokens, or None where all are.
    """

    activations: tuple[Tensor, ...]
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        layers = _checks.tensors("activations", self.activations, ndim=3)
        samples, tokens, _ = layers[0].shape
        for index, layer in enumerate(layers):
            if layer.shape[:2] != (samples, tokens):
                raise ValueError(
                    f"activations[{index}] must have shape ({samples}, {tokens}, C), got {tuple(layer.shape)}"
                )
        if self.mask is not None and self.mask.shape != (samples, tokens):
            raise ValueError(f"mask must have shape ({samples}, {tokens}), got {tuple(self.mask.shape)}")
        object.__setattr__(self, "activations", layers)

    def __len__(self) -> int:
        return self.activations[0].shape[0]


@dataclass(frozen=True, kw_only=True)
class ConceptScore:
    """What one concept is to the class at one layer.

    Attributes:
        concept: Its name.
        layer: The layer's name.
        scores: T-TCAV of each run: the share of explained samples whose mean weighted derivative is positive.
        control: The same for as many random concepts.
        accuracy: With which the concept's vectors tell samples apart that they were not fitted to, mean of the runs.
        control_accuracy: The same for the random concepts; by chance it would be 1/2.
        p_value: Of the scores being those of random concepts, two-sided, for overlapping runs.
        adjusted: The same after Holm's correction for all rows of the report.
    """

    concept: str
    layer: str
    scores: tuple[float, ...]
    control: tuple[float, ...]
    accuracy: float
    control_accuracy: float
    p_value: float
    adjusted: float

    @property
    def score(self) -> float:
        """The mean of the runs."""
        return math.fsum(self.scores) / len(self.scores)

    @property
    def control_score(self) -> float:
        """The mean of the random concepts."""
        return math.fsum(self.control) / len(self.control)


@dataclass(frozen=True, kw_only=True)
class ConceptReport:
    """The outcome of a study.

    Attributes:
        target: The class.
        samples: How many samples were explained.
        rows: One for each concept and layer: concepts in the order given, layers shallow to deep.
        vectors: The fitted vectors by concept and layer, to draw with.
    """

    target: str
    samples: int
    rows: tuple[ConceptScore, ...]
    vectors: Mapping[tuple[str, str], ConceptVectors] = field(repr=False, compare=False)

    def to_markdown(self, *, level: float = 0.05) -> str:
        """A table; scores that random concepts do not explain at this level, after correction, are bold.

        Args:
            level: Of significance, in (0, 1).
        """
        lines = [
            f"T-TCAV of {self.target!r}, {self.samples} samples, {len(self.rows[0].scores)} runs",
            "",
            "| concept | layer | T-TCAV | random concepts | held-out accuracy | random | p | p, Holm |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            score = f"{row.score:.3f}"
            lines.append(
                f"| {row.concept} | {row.layer} | {f'**{score}**' if row.adjusted < level else score} | "
                f"{row.control_score:.3f} | {row.accuracy:.3f} | {row.control_accuracy:.3f} | {row.p_value:.2g} | "
                f"{row.adjusted:.2g} |"
            )
        return "\n".join(lines) + "\n"

    def to_record(self) -> dict[str, Any]:
        """Everything but the vectors, as JSON can hold it."""
        return {"target": self.target, "samples": self.samples, "rows": [asdict(row) for row in self.rows]}


def concept_report(
    concepts: Mapping[str, ConceptSamples],
    gradients: Sequence[Tensor],
    attention: Sequence[Tensor],
    *,
    layer_names: Sequence[str],
    target: str,
    mask: Tensor | None = None,
    random: ConceptSamples | None = None,
    runs: int = 50,
    held_out: float = 0.33,
    seed: int = 0,
) -> ConceptReport:
    """Fit vectors of every concept at every layer, score the class, and set both against random concepts.

    Negatives of a concept are drawn from `random`, or, without it, from all other concepts, as in the paper: scores
    then say "more than the others". A random concept is as many samples, drawn from the same pool, against as many
    others.

    Args:
        concepts: Their samples by name; all have L layers. Keep them apart from the samples that are explained.
        gradients: L tensors (B, T, C), of the class's logit with respect to each layer's output. At the last layer of a
            model that reads one token, only that token has any.
        attention: L tensors (B, T), how much the token that is read attends to each, mean over heads.
        layer_names: L names.
        target: The class's name.
        mask: bool (B, T), true for real tokens of the explained samples, or None where all are.
        random: Samples of no concept in particular.
        runs: How many vectors for each concept and layer.
        held_out: The share of samples that a vector's accuracy is measured on, in (0, 1).
        seed: Of all draws.

    Raises:
        TypeError: An argument is of another type.
        ValueError: The numbers of layers differ, or a concept has no samples to be told from.
    """
    if not isinstance(concepts, Mapping) or not concepts:
        raise ValueError("concepts must be at least one, by name, got none")
    slopes = _checks.tensors("gradients", gradients, ndim=3)
    rows_read = _checks.tensors("attention", attention, ndim=2)
    runs = _checks.positive_int("runs", runs)
    pools = {name: _pool(name, concepts, random) for name in concepts}
    for name, samples in concepts.items():
        if len(samples.activations) != len(layer_names):
            raise ValueError(f"concepts[{name!r}] must have {len(layer_names)} layers, got {len(samples.activations)}")
    for name, given in (("gradients", slopes), ("attention", rows_read)):
        if len(given) != len(layer_names):
            raise ValueError(f"{name} must hold one tensor per layer ({len(layer_names)}), got {len(given)}")
    found: list[tuple[str, str, ConceptVectors, ConceptVectors, Tensor, Tensor]] = []
    for name, samples in concepts.items():
        everything = random if random is not None else _joined([samples, pools[name]])
        for index, layer in enumerate(layer_names):
            fitted = _fit(samples, pools[name], index, runs=runs, held_out=held_out, seed=seed)
            control = _random_concepts(everything, len(samples), index, runs=runs, held_out=held_out, seed=seed)
            scores, against = (
                tcav_scores(
                    concept_derivatives(slopes[index], rows_read[index], vectors.vectors.to(slopes[index]), mask=mask),
                    mask=mask,
                )
                for vectors in (fitted, control)
            )
            found.append((name, layer, fitted, control, scores, against))
    p_values = [concept_significance(scores, against, held_out=held_out) for *_, scores, against in found]
    rows = tuple(
        ConceptScore(
            concept=name,
            layer=layer,
            scores=tuple(scores.tolist()),
            control=tuple(against.tolist()),
            accuracy=float(fitted.accuracies.mean()),
            control_accuracy=float(control.accuracies.mean()),
            p_value=p_value,
            adjusted=adjusted,
        )
        for (name, layer, fitted, control, scores, against), p_value, adjusted in zip(
            found, p_values, holm(p_values), strict=True
        )
    )
    return ConceptReport(
        target=target,
        samples=slopes[0].shape[0],
        rows=rows,
        vectors={(name, layer): fitted for name, layer, fitted, *_ in found},
    )


def _pool(name: str, concepts: Mapping[str, ConceptSamples], random: ConceptSamples | None) -> ConceptSamples:
    """What a concept's negatives are drawn from."""
    if random is not None:
        return random
    others = [samples for other, samples in concepts.items() if other != name]
    if not others:
        raise ValueError(f"random must be given where {name!r} is the only concept: there is nothing to tell it from")
    return _joined(others)


def _joined(parts: Sequence[ConceptSamples]) -> ConceptSamples:
    """The samples of several concepts as those of one; shorter ones are padded."""
    longest = max(part.activations[0].shape[1] for part in parts)
    masked = any(part.mask is not None or part.activations[0].shape[1] != longest for part in parts)

    def padded(tensor: Tensor) -> Tensor:
        missing = longest - tensor.shape[1]
        return F.pad(tensor, (0, 0, 0, missing) if tensor.ndim == 3 else (0, missing))

    layers = tuple(
        torch.cat([padded(part.activations[index]) for part in parts]) for index in range(len(parts[0].activations))
    )
    masks = [padded(_mask_of(part)) for part in parts]
    return ConceptSamples(activations=layers, mask=torch.cat(masks) if masked else None)


def _mask_of(samples: ConceptSamples) -> Tensor:
    if samples.mask is not None:
        return samples.mask.to(torch.bool)
    first = samples.activations[0]
    return torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)


def _fit(
    samples: ConceptSamples, pool: ConceptSamples, layer: int, *, runs: int, held_out: float, seed: int
) -> ConceptVectors:
    return fit_concept_vectors(
        samples.activations[layer],
        pool.activations[layer],
        positive_mask=samples.mask,
        negative_mask=pool.mask,
        runs=runs,
        held_out=held_out,
        seed=seed,
    )


def _random_concepts(
    pool: ConceptSamples, size: int, layer: int, *, runs: int, held_out: float, seed: int
) -> ConceptVectors:
    """Vectors of `runs` concepts that are none: samples drawn at random against others."""
    count = min(size, len(pool) // 2)
    if count < 2:
        raise ValueError(f"random must hold at least 4 samples to draw random concepts from, got {len(pool)}")
    mask = _mask_of(pool)
    found = []
    for run in range(runs):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed + run))
        chosen, others = order[:count], order[count : 2 * count]
        found.append(
            fit_concept_vectors(
                pool.activations[layer][chosen],
                pool.activations[layer][others],
                positive_mask=mask[chosen],
                negative_mask=mask[others],
                runs=1,
                held_out=held_out,
                seed=seed + run,
            )
        )
    return ConceptVectors(
        vectors=torch.cat([part.vectors for part in found]), accuracies=torch.cat([part.accuracies for part in found])
    )
