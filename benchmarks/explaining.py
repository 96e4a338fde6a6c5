"""The user's view: images explained per second over images merely classified per second, with the same backbone.

Every rival explains the predicted class of the same batch with the network it was made for: a plain ResNet-18 whose
last stage it looks at, as its documentation shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import timing
from mhex_vision import MHEXClassifier

CLASSES = 8


def contenders(images: Tensor) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What to time, by name, and why the other rivals do not run here. "X: classify" is what "X" is compared with."""
    torch.manual_seed(0)
    device, dtype = images.device, images.dtype
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    plain = resnet18(num_classes=CLASSES).to(device, dtype, memory_format=layout).eval()
    model = MHEXClassifier.from_backbone("resnet18", CLASSES).to(device, dtype, memory_format=layout).eval()
    # A network trained by others, explained by heads alone: it classifies exactly as before.
    kept = (
        MHEXClassifier.from_backbone(plain, CLASSES, freeze_backbone=True, gate=False, classifier="keep")
        .to(device, dtype, memory_format=layout)
        .eval()
    )
    deployed = model.strip_heads().eval()
    runs: dict[str, Callable[[], Any]] = {
        "plain: classify": _without_gradient(lambda: plain(images)),
        "mhex: classify": _without_gradient(lambda: deployed(images)),
        "mhex: classify with heads": _without_gradient(lambda: model(images)),
        "mhex": lambda: model.explain(images),
        "mhex, heads on the plain network": lambda: kept.explain(images),
    }
    missing: dict[str, str] = {}
    for name, make in (("pytorch-grad-cam", _grad_cam), ("torch-cam", _torch_cam), ("captum", _captum)):
        try:
            run = make(plain, images)
            run()
        except ImportError:
            missing[name] = "not installed"
        except (TypeError, RuntimeError) as error:
            missing[name] = str(error).splitlines()[0]  # half precision, for one
        else:
            runs[name] = run
    return runs, missing


def _without_gradient(run: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode():
            return run()

    return call


def _grad_cam(network: nn.Module, images: Tensor) -> Callable[[], Any]:
    from pytorch_grad_cam import GradCAM

    cam = GradCAM(model=network, target_layers=[network.layer4[-1]])
    return lambda: cam(input_tensor=images, targets=None)


def _torch_cam(network: nn.Module, images: Tensor) -> Callable[[], Any]:
    from torchcam.methods import GradCAM

    def run() -> Any:
        with GradCAM(network, target_layer="layer4") as extractor:
            scores = network(images)
            (maps,) = extractor(scores.argmax(dim=1).tolist(), scores)
            return torch.nn.functional.interpolate(maps.unsqueeze(1), size=images.shape[2:], mode="bilinear")

    return run


def _captum(network: nn.Module, images: Tensor) -> Callable[[], Any]:
    from captum.attr import LayerAttribution, LayerGradCam

    method = LayerGradCam(network, network.layer4)

    def run() -> Any:
        with torch.no_grad():
            target = network(images).argmax(dim=1)
        return LayerAttribution.interpolate(method.attribute(images, target=target), images.shape[2:], "bilinear")

    return run


BASES = {
    "mhex": "mhex: classify",
    "mhex: classify with heads": "mhex: classify",
    "mhex, heads on the plain network": "plain: classify",
    "pytorch-grad-cam": "plain: classify",
    "torch-cam": "plain: classify",
    "captum": "plain: classify",
}


def measure(
    *,
    pixels: int,
    batch: int,
    device: torch.device,
    rounds: int,
    dtype: torch.dtype = torch.float32,
    channels_last: bool,
) -> dict[str, Any]:
    """Images per second of each, and what explaining costs over classifying with the same network."""
    images = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rivals' own
        runs, missing = contenders(images)
        timings = timing.in_turns(runs, device=device, rounds=rounds)
    return {
        "case": f"{pixels} px, batch {batch}, {str(dtype).removeprefix('torch.')}, "
        f"{'channels_last' if channels_last else 'contiguous'}",
        "absent": missing,
        "contenders": {
            name: {
                **taken.record(),
                "images_per_s": batch / taken.median,
                "times_classifying": taken.median / timings[BASES[name]].median if name in BASES else None,
            }
            for name, taken in timings.items()
        },
    }
