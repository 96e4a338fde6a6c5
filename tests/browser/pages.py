"""Pages for the browser's tests: smooth random evidence, pictures with something in them, texts with words.

Letters: L layers, h_l x w_l layer size, T tokens.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from mhex_core import SaliencyOptions, SignedMaps, combine_maps
from mhex_core.explorer import Evidence, Method, Picture, Piece, Sample

LAYERS = ((7, 5), (4, 6), (1, 1), (3, 2))
CLASSES = ("cat", "猫 <script>", "dog", "fox")

WORDS = [
    "the",
    "film",
    "begins",
    "slowly",
    "but",
    "its",
    "second",
    "half",
    "is",
    "a",
    "delight",
    "acted",
    "with",
    "warmth",
    "and",
    "never",
    "dull",
    "although",
    "some",
    "jokes",
    "fall",
    "flat",
    "and",
    "the",
    "music",
    "is",
    "too",
    "loud",
    "for",
    "my",
    "taste",
]

# Moves beta ten times and says how many milliseconds one movement took until everything was drawn.
MOVED = """async () => {
    const slider = document.querySelector(".controls input[type=range]");
    const begin = performance.now();
    for (let step = 1; step <= 10; step += 1) {
        slider.value = step / 10;
        slider.dispatchEvent(new Event("input"));
        await mhexExplorer.settled();
    }
    return (performance.now() - begin) / 10;
}"""


@dataclass(frozen=True)
class Maps:
    """A sample's evidence as it was before it was packed, with what Python makes of it."""

    positive: tuple[torch.Tensor, ...]
    negative: tuple[torch.Tensor, ...]
    size: tuple[int, int]

    def saliency(self, method: Method, *, beta: float | None = None, weights: object = None) -> np.ndarray:
        """What `combine_maps` gives for these settings."""
        options = SaliencyOptions(
            beta=method.beta if beta is None else beta,
            layer_weights=method.layer_weights if weights is None else weights,
            normalize=method.normalize,
            floor=method.floor,
        )
        maps = SignedMaps(
            *(tuple(layer.float().unsqueeze(0) for layer in part) for part in (self.positive, self.negative))
        )
        return combine_maps(maps, size=self.size, options=options)[0].numpy()


def random_maps(seed: int, *, layers=LAYERS, size=(13, 11)) -> Maps:
    """Smooth positive evidence with a spot or two, negative evidence below zero elsewhere."""
    generator = np.random.default_rng(seed)

    def layer(height, width):
        y, x = np.mgrid[:height, :width]
        total = 0.05 * generator.standard_normal((height, width))
        for _ in range(2):
            centre, spread = generator.random(2) * (height, width), 0.12 + 0.2 * generator.random()
            distance = ((y - centre[0]) / height) ** 2 + ((x - centre[1]) / width) ** 2
            total = total + generator.random() * np.exp(-distance / (2 * spread**2))
        return torch.from_numpy(np.abs(total) * generator.uniform(0.2, 3))

    return Maps(tuple(layer(*shape) for shape in layers), tuple(-layer(*shape) for shape in layers), size)


def method(name="mhex", *, layers=LAYERS, **settings) -> Method:
    count = len(layers)
    defaults = {"layer_weights": tuple(0.9 ** (count - 1 - index) for index in range(count))}
    return Method(
        name=name, layer_names=tuple(f"layer{index + 1}.0" for index in range(count)), **(defaults | settings)
    )


def picture(seed: int, size: tuple[int, int], *, jpeg: bool = False) -> Picture:
    """Soft colours with a few discs, as PNG or JPEG."""
    generator = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width].astype(float)
    pixels = np.stack([np.full(size, base) for base in generator.uniform(120, 220, 3)], axis=-1)
    pixels += 40 * np.sin(x / width * generator.uniform(1, 6) + y / height * generator.uniform(1, 6))[..., None]
    for _ in range(5):
        centre, radius = generator.random(2) * size, generator.uniform(0.06, 0.22) * min(size)
        inside = 1 / (1 + np.exp((np.hypot(y - centre[0], x - centre[1]) - radius) / max(0.4, 0.01 * min(size))))
        pixels += inside[..., None] * (generator.uniform(0, 255, 3) - pixels)
    pixels += generator.normal(0, 4, pixels.shape)
    file = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(file, **({"format": "JPEG", "quality": 90} if jpeg else {"format": "PNG"}))
    return Picture(file.getvalue(), "image/jpeg" if jpeg else "image/png", width, height)


def probabilities(seed: int, classes: int) -> tuple[float, ...]:
    values = np.random.default_rng(seed).exponential(1, classes) ** 2.5
    return tuple(float(value) for value in values / values.sum())


def image_sample(seed: int, methods, *, size=(13, 11), layers=LAYERS, targets=2, classes=CLASSES, **fields):
    """A sample with evidence of each method for the most probable classes, and its maps by (method, class)."""
    shares = probabilities(seed, len(classes))
    ranked = sorted(range(len(classes)), key=lambda index: -shares[index])
    maps, evidence = {}, []
    for number, one in enumerate(methods):
        shapes = layers if len(one.layer_names) == len(layers) else (size,) * len(one.layer_names)
        for target in ranked[:targets]:
            found = random_maps(1000 * seed + 10 * number + target, layers=shapes, size=size)
            maps[number, target] = found
            parts = (found.positive, found.negative)
            evidence.append(Evidence.of_layers(*parts, method=number, target=target, size=size))
    heads = tuple((ranked[(seed + head) % 3 == 0], 0.9 - 0.1 * head) for head in range(len(layers)))
    defaults = {
        "name": f"sample {seed}",
        "label": ranked[seed % 4 == 1],
        "heads": heads,
        "picture": picture(seed, size),
    }
    return Sample(probabilities=shares, evidence=tuple(evidence), **(defaults | fields)), maps


def text_sample(seed: int, *, words=24, layers=3, pair=False, targets=2, **fields):
    """A text whose longer words are two tokens, and its evidence by class: (L, T) for, (L, T) against."""
    generator = np.random.default_rng(seed)
    chosen = [WORDS[index] for index in generator.integers(0, len(WORDS), words)]
    tokens, texts = [], []
    for part in (chosen[: words // 2], chosen[words // 2 :]) if pair else (chosen,):
        pieces = []
        for index, word in enumerate(part):
            parts = [word] if len(word) < 6 else [word[:4], word[4:]]
            pieces += [Piece(" ")] if index else []
            pieces.append(Piece(word, tuple(range(len(tokens), len(tokens) + len(parts)))))
            tokens += parts
        texts.append((*pieces, Piece(" and what was cut", seen=False)))
    shares = probabilities(seed, 4)
    ranked = sorted(range(4), key=lambda index: -shares[index])
    found, evidence = {}, []
    for target in ranked[:targets]:
        positive = torch.from_numpy(generator.exponential(0.3, (layers, len(tokens))) ** 2)
        negative = -torch.from_numpy(generator.exponential(0.3, (layers, len(tokens))) ** 2)
        found[target] = (positive.numpy(), negative.numpy())
        evidence.append(Evidence.of_layers(list(positive), list(negative), method=0, target=target))
    defaults = {"name": f"text {seed}", "label": ranked[seed % 3 == 1], "note": "The last 17 characters were not read."}
    sample = Sample(
        probabilities=shares,
        evidence=tuple(evidence),
        texts=tuple(texts),
        tokens=tuple(tokens),
        heads=tuple((ranked[head == 0], 0.8) for head in range(layers)),
        **(defaults | fields),
    )
    return sample, found
