"""The page itself: the parts as JSON and base64 beside the script that shows them.

The document is in a script element of its own, evidence in one element per sample, so that a browser that opens the
page reads no evidence but that of the samples it shows. `assets/` holds the script and the style; they are put into the
page as they are, in the order of their names.

Letters: K classes, L layers.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from mhex_core import _checks
from mhex_core.explorer.parts import Evidence, Method, Sample
from mhex_core.files import write_atomically

FORMAT = "mhex-explorer"
FORMAT_VERSION = 1

_MOST_PROBABLE = 10  # classes whose probability is kept, beside the label and those explained
# No address is ever asked for anything: what the page needs is in it.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_DOCUMENT = '<script type="application/json" id="document">{}</script>\n'
_FRAME_HEIGHT = 620  # pixels
# The script comes last: where it never came, or cannot be read, this stays.
_WAITING = "Unpacking. If this sentence stays, the file is incomplete or the browser too old."


@dataclass(frozen=True)
class ExplorerPage:
    """A page that is done.

    Attributes:
        html: All of it.
        samples: How many it shows.
        targets: How many explained classes they have together, over all methods.
        left_out: How many explained classes were left out to keep it small.
    """

    html: str
    samples: int
    targets: int
    left_out: int

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.html.encode())

    def save(self, path: str | Path) -> Path:
        """Write it, in one step.

        Returns:
            The path written.
        """
        return write_atomically(path, lambda temporary: temporary.write_bytes(self.html.encode()))


def explorer_page(
    samples: Sequence[Sample],
    *,
    methods: Sequence[Method],
    class_names: Sequence[str] = (),
    title: str = "Explanations",
    about: Mapping[str, str] | None = None,
    max_bytes: int | None = None,
    compact: bool = False,
    without_script: str = "",
) -> ExplorerPage:
    """Make a page of samples.

    Args:
        samples: All images or all texts.
        methods: What made their evidence.
        class_names: K names, or none: then classes go by number.
        title: Of the page.
        about: What is known of how they came to be (checkpoint, data, versions), by name.
        max_bytes: What the file may have. Classes explained beyond each sample's first are left out, the last of each
            sample before the others, until it fits; None means no limit.
        compact: The small page of a notebook: no gallery, no second pane.
        without_script: HTML that is shown where scripts do not run.

    Raises:
        TypeError: An argument is of another type.
        ValueError: Samples are images and texts, evidence names no method of the page, or the page does not fit.
    """
    methods, names = tuple(methods), tuple(class_names)
    samples = _checked(samples, methods, names)
    kind = "texts" if samples and samples[0].texts else "images"
    before = sum(len(sample.evidence) for sample in samples)
    frame = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "kind": kind,
        "title": title,
        "about": dict(about or {}),
        "compact": compact,
        "class_names": list(names),
        "methods": [_method(method) for method in methods],
    }
    shell = _shell(title, without_script)
    if max_bytes is not None:
        taken = len("".join(shell).encode()) + len(_DOCUMENT.format(_json(frame | {"samples": []})))
        samples = _fitted(samples, _checks.positive_int("max_bytes", max_bytes) - taken)
    document = _json(frame | {"samples": [_sample(sample, number) for number, sample in enumerate(samples)]})
    blocks = "".join(_block(number, sample) for number, sample in enumerate(samples))
    return ExplorerPage(
        html=shell[0] + _DOCUMENT.format(document) + blocks + shell[1],
        samples=len(samples),
        targets=sum(len(sample.evidence) for sample in samples),
        left_out=before - sum(len(sample.evidence) for sample in samples),
    )


def notebook_frame(page: ExplorerPage, *, height: int = _FRAME_HEIGHT) -> str:
    """A page within a notebook's cell, in a frame of its own, so that neither reaches into the other.

    Args:
        page: Made with `compact=True`.
        height: In pixels.
    """
    return (
        f'<iframe title="Explanations" sandbox="allow-scripts" loading="lazy" srcdoc="{html.escape(page.html)}" '
        f'style="width:100%;height:{_checks.positive_int("height", height)}px;border:0"></iframe>'
    )


def _checked(samples: Sequence[Sample], methods: tuple[Method, ...], names: tuple[str, ...]) -> tuple[Sample, ...]:
    checked = tuple(samples)
    for index, sample in enumerate(checked):
        if not isinstance(sample, Sample):
            raise TypeError(f"samples[{index}] must be a Sample, got {type(sample).__name__}")
        if bool(sample.texts) != bool(checked[0].texts):
            raise ValueError("samples must be all images or all texts, got both")
        classes = len(sample.probabilities)
        if names and classes != len(names):
            raise ValueError(f"class_names must hold one name per class ({classes}), got {len(names)}")
        _check_sample(sample, index, classes)
        for evidence in sample.evidence:
            if not 0 <= evidence.method < len(methods):
                raise ValueError(f"evidence must name one of {len(methods)} methods, got {evidence.method}")
            if not 0 <= evidence.target < classes:
                raise ValueError(f"evidence must be for one of {classes} classes, got {evidence.target}")
            if len(evidence.shapes) != len(methods[evidence.method].layer_names):
                raise ValueError(
                    f"evidence must have the layers of {methods[evidence.method].name!r}, got {len(evidence.shapes)}"
                )
    return checked


def _check_sample(sample: Sample, index: int, classes: int) -> None:
    named = [*(head for head, _ in sample.heads), *([] if sample.label is None else [sample.label])]
    for number in named:
        if not 0 <= number < classes:
            raise ValueError(f"label and heads of samples[{index}] must be one of {classes} classes, got {number}")
    tokens = len(sample.tokens)
    for piece in (piece for pieces in sample.texts for piece in pieces):
        if not all(0 <= token < tokens for token in piece.tokens):
            raise ValueError(f"tokens of a piece must lie in [0, {tokens - 1}], got {piece.tokens}")
    for evidence in sample.evidence:
        if (evidence.size is None) != bool(sample.texts):
            raise ValueError("evidence must have a size in images, and none in texts")
        if sample.texts and any(shape != (tokens,) for shape in evidence.shapes):
            raise ValueError(f"evidence of a text must have one value for each of its {tokens} tokens")


def _fitted(samples: tuple[Sample, ...], room: int) -> tuple[Sample, ...]:
    """Samples with as much evidence as there is room for: everybody's first, everybody's second, and so on."""
    firsts: list[list[Evidence]] = []
    rounds: list[list[tuple[int, Evidence]]] = []
    for number, sample in enumerate(samples):
        methods: set[int] = set()
        kept: list[Evidence] = []
        more = 0
        for evidence in sample.evidence:
            if evidence.method not in methods:
                methods.add(evidence.method)
                kept.append(evidence)
                continue
            if more == len(rounds):
                rounds.append([])
            rounds[more].append((number, evidence))
            more += 1
        firsts.append(kept)
    needed = sum(
        len(_json(_sample(replace(sample, evidence=tuple(kept)), number))) + len(_block(number, sample, kept)) + 1
        for number, (sample, kept) in enumerate(zip(samples, firsts, strict=True))
    )
    if needed > room:
        raise ValueError(
            f"max_bytes must leave room for one map of each method and sample, which take {needed / 1e6:.1f} MB; "
            f"show fewer samples than {len(samples)}, or fewer methods"
        )
    for one_round in rounds:
        for number, evidence in one_round:
            needed += _encoded(evidence) + len(_json(_evidence(evidence))) + 2
            if needed > room:
                return tuple(replace(s, evidence=tuple(k)) for s, k in zip(samples, firsts, strict=True))
            firsts[number].append(evidence)
    return tuple(replace(sample, evidence=tuple(kept)) for sample, kept in zip(samples, firsts, strict=True))


def _encoded(evidence: Evidence) -> int:
    return 4 * -(-len(evidence.data) // 3)


def _method(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "layer_names": list(method.layer_names),
        "layer_weights": list(method.layer_weights),
        "beta": method.beta,
        "normalize": method.normalize,
        "floor": method.floor,
        "signed": method.signed,
        "unit": method.unit,
        "fixed": method.fixed,
    }


def _sample(sample: Sample, number: int) -> dict[str, Any]:
    ranked = sorted(range(len(sample.probabilities)), key=lambda index: -sample.probabilities[index])
    kept = {*ranked[:_MOST_PROBABLE], *(evidence.target for evidence in sample.evidence)}
    kept |= set() if sample.label is None else {sample.label}
    described: dict[str, Any] = {
        "name": sample.name,
        "label": sample.label,
        "prediction": sample.prediction,
        "probabilities": [[index, _short(sample.probabilities[index])] for index in ranked if index in kept],
        "heads": [[index, _short(probability)] for index, probability in sample.heads],
        "note": sample.note,
        "block": number,
        "evidence": [_evidence(evidence) for evidence in sample.evidence],
    }
    if sample.picture is not None:
        described["picture"] = {"width": sample.picture.width, "height": sample.picture.height}
    else:
        described["texts"] = [
            [[piece.text, list(piece.tokens), piece.seen] for piece in pieces] for pieces in sample.texts
        ]
        described["tokens"] = list(sample.tokens)
    return described


def _evidence(evidence: Evidence) -> dict[str, Any]:
    return {
        "method": evidence.method,
        "target": evidence.target,
        "shapes": [list(shape) for shape in evidence.shapes],
        "size": None if evidence.size is None else list(evidence.size),
    }


def _block(number: int, sample: Sample, evidence: Sequence[Evidence] | None = None) -> str:
    """A sample's picture (an address with the data in it), then its evidence, a line each."""
    lines = []
    if sample.picture is not None:
        encoded = base64.b64encode(sample.picture.data).decode()
        lines.append(f"data:{sample.picture.media_type};base64,{encoded}")
    lines += [base64.b64encode(one.data).decode() for one in (sample.evidence if evidence is None else evidence)]
    return f'<script type="text/plain" id="block-{number}">\n' + "\n".join(lines) + "\n</script>\n"


def _shell(title: str, without_script: str) -> tuple[str, str]:
    """What comes before the document, and what comes after the blocks."""
    assets = resources.files("mhex_core.explorer") / "assets"
    files = sorted((item for item in assets.iterdir()), key=lambda item: item.name)
    style = "\n".join(item.read_text("utf-8") for item in files if item.name.endswith(".css"))
    script = "\n".join(item.read_text("utf-8") for item in files if item.name.endswith(".js"))
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style></head>\n<body>\n"
        f"<noscript>{without_script or '<p>This page shows explanations by means of a script.</p>'}</noscript>\n"
        f'<div id="explorer"><p class="waiting">{_WAITING}</p></div>\n'
    )
    # Half of a pair of surrogates, which JSON keeps, is nothing that a file can hold.
    head = head.encode("utf-8", "replace").decode()
    return head, f'<script>\n"use strict";\n(() => {{\n{script}}})();\n</script>\n</body></html>\n'


def _json(value: object) -> str:
    """JSON that may stand in a script element: nothing in it can end the element, or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _short(number: float) -> float:
    return float(f"{number:.6g}")
