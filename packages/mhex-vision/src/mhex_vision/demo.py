"""The main job on the embedded lesions: train, explain, measure against the known truth, draw."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mhex_vision import drawing
from mhex_vision.classifier import MHEXClassifier
from mhex_vision.data import load_data
from mhex_vision.data.sets import ArrayImages, DataBundle
from mhex_vision.explainers import explainer
from mhex_vision.explanation import Explanation
from mhex_vision.exploring import batches_of, chosen_places, explore
from mhex_vision.metrics.localization import mass_inside, pointing_game
from mhex_vision.progress import bar
from mhex_vision.recipes import RECIPES
from mhex_vision.training import Epoch, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from mhex_core.explorer import ExplorerPage

FIGURE_FILE = "demo.png"
EXPLANATION_FILE = "explanation.npz"
PAGE_FILE = "report.html"

_PAGE_SAMPLES = 200
_BATCH = 128


def run_demo(
    out: Path, *, epochs: int | None = None, seed: int = 0, overwrite: bool = False, say: Callable[[str], None]
) -> None:
    """Train on synthetic lesions, explain the test images, and write what a user would look at first.

    Args:
        out: A folder: the checkpoint, `demo.png` and `explanation.npz` of the shown samples, `report.html`.
        epochs: None for the recipe's.
        seed: Of weights, order and images.
        overwrite: Whether another run in `out` may be replaced.
        say: Where lines for the user go.
    """
    start = time.perf_counter()
    recipe = RECIPES["lesions"] if epochs is None else replace(RECIPES["lesions"], epochs=epochs)
    data = load_data("synthetic-lesions", seed=seed)
    say(
        f"{len(data.train)} synthetic tissue images of {data.preprocessing.size} px with one lesion each; "
        f"its texture is the class: {', '.join(data.class_names)}"
    )
    torch.manual_seed(seed)
    model = MHEXClassifier.from_backbone("resnet18", data.num_classes)
    say(f"ResNet-18 with a gate and a head on each of its {len(model.blocks)} residual connections")

    def report(epoch: Epoch) -> None:
        accuracy = f"{100 * epoch.validation.accuracy:.1f} %" if epoch.validation else "-"
        say(f"  epoch {epoch.epoch:2d}: loss {epoch.train_loss:6.3f}, validation {accuracy}, {epoch.seconds:.1f} s")

    result = train(model, data, recipe, out=out, seed=seed, overwrite=overwrite, on_epoch=report)
    test = data.test
    if result.test is None or not isinstance(test, ArrayImages) or test.masks is None:
        raise RuntimeError("the synthetic lesions come with test images and masks")
    say(f"test accuracy {100 * result.test.accuracy:.1f} % on {result.test.images} images")

    explanation = explain_all(model, data, test)
    say("where the saliency lies, against the true lesions (pointing game, mass inside):")
    for name, maps in [("aggregate", explanation.saliency), *_baselines(model, data, test)]:
        hit, mass = pointing_game(maps, test.masks).mean(), mass_inside(maps, test.masks).mean()
        say(f"  {name:16s} {100 * float(hit):5.1f} %  {100 * float(mass):5.1f} %")
    shown = _one_of_each_class(explanation, test)
    drawing.save_figure(beta_figure(shown), out / FIGURE_FILE, dpi=110)
    shown.save(out / EXPLANATION_FILE)
    page = lesions_page(model, data, test, seed=seed)
    page.save(out / PAGE_FILE)
    say(f"wrote {out / FIGURE_FILE}, {out / EXPLANATION_FILE} and the checkpoint in {out}")
    say(f"wrote {out / PAGE_FILE}: {page.samples} test images, to be weighed anew in any browser")
    say(f"done in {time.perf_counter() - start:.0f} s; next, with images of your own:")
    say(f"  mhex-vision explain --checkpoint {out} --input FILE --out DIR")


def lesions_page(model: MHEXClassifier, data: DataBundle, images: ArrayImages, *, seed: int = 0) -> ExplorerPage:
    """Some of the images as a page: every class of each, the predicted one first."""
    places = chosen_places(len(images), _PAGE_SAMPLES, seed)
    return explore(
        model,
        batches_of(images, places, data, model, size=_BATCH),
        {"mhex": explainer("mhex")},
        count=-(-len(places) // _BATCH),
        targets=data.num_classes,
        title="Synthetic lesions",
        about={"images": f"{data.name}, {len(places)} of {len(images)} test images by chance"},
    )


def explain_all(
    model: MHEXClassifier, data: DataBundle, images: ArrayImages, *, batch_size: int = _BATCH
) -> Explanation:
    """One explanation of a whole set of images in memory."""
    with bar(torch.split(images.images, batch_size), desc="explaining") as shown:
        parts = [model.explain(data.preprocessing.normalize(part)) for part in shown]
    return Explanation.concatenate(parts)


def beta_figure(explanation: Explanation) -> Figure:
    """One row per sample: image, overlay, aggregate map with beta 0 and beta 1, each layer's map."""
    strict = explanation.reweighted(beta=0.0)
    even = explanation.reweighted(beta=1.0)
    return strict.plot(samples=len(explanation), extra=[("beta = 1", even.saliency)])


def _baselines(model: MHEXClassifier, data: DataBundle, images: ArrayImages) -> list[tuple[str, Tensor]]:
    inputs = data.preprocessing.normalize(images.images)
    return [(name, explainer(name)(model, inputs, images.labels)) for name in ("random", "centre-gaussian")]


def _one_of_each_class(explanation: Explanation, images: ArrayImages) -> Explanation:
    """The first rightly classified sample of each class; the first of all where a class has none."""
    chosen = []
    for label in range(explanation.probabilities.shape[1]):
        right = (images.labels == label) & (explanation.prediction == label)
        rest = images.labels == label
        positions = right.nonzero() if bool(right.any()) else rest.nonzero()
        chosen.append(int(positions[0]))
    return Explanation.concatenate([explanation[index] for index in chosen])
