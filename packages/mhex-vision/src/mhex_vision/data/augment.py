"""Random variation of training images."""

from collections.abc import Callable

from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from mhex_vision.data._checks import check_int

__all__ = ["imagenet_augmentation"]


def imagenet_augmentation(size: int) -> Callable[[Image.Image | Tensor], Tensor]:
    """Return the customary ImageNet augmentation: random crop and resize, mirror image, one random change.

    It draws from torch's random state, so seeded loaders give the same images again.

    Args:
        size: Side of the square the network sees, in pixels.

    Returns:
        A picklable callable from an RGB Pillow image, or a uint8 tensor (3, H, W), to a uint8 tensor (3, size, size).
    """
    check_int("size", size, minimum=1)
    pipeline: Callable[[Image.Image | Tensor], Tensor] = v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
            v2.PILToTensor(),  # last, because Pillow is the faster of the two on 8-bit images; leaves tensors alone
        ]
    )
    return pipeline
