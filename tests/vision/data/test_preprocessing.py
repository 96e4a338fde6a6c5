import contextlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mhex_vision.data import Preprocessing, UnreadableImageError
from mhex_vision.data.augment import imagenet_augmentation
from mhex_vision.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD


def picture(width: int = 40, height: int = 30) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 90)], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


class TestSettings:
    def test_survive_json(self) -> None:
        settings = Preprocessing(size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, resize="crop")
        assert Preprocessing.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings

    def test_whole_numbers_equal_fractions(self) -> None:
        assert Preprocessing.from_dict({"size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}) == Preprocessing(
            size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
        )

    @pytest.mark.parametrize(
        ("settings", "error", "words"),
        [
            ({"size": 0}, ValueError, "size: .* at least 1, got 0"),
            ({"size": 28.0}, TypeError, "size: .*28.0"),
            ({"size": True}, TypeError, "size: .*True"),
            ({"size": 28, "mean": (0.5, 0.5)}, ValueError, "mean: .*three"),
            ({"size": 28, "mean": 0.5}, TypeError, "mean: .*0.5"),
            ({"size": 28, "mean": (0.5, float("nan"), 0.5)}, ValueError, "mean: .*nan"),
            ({"size": 28, "std": (0.5, 0.0, 0.5)}, ValueError, "std: .*positive"),
            ({"size": 28, "std": ("a", "b", "c")}, TypeError, "std: "),
            ({"size": 28, "resize": "pad"}, ValueError, "resize: .*stretch.*'pad'"),
            ({"size": 28, "resize": None}, TypeError, "resize: .*None"),
            ({"size": 28, "crop": True}, ValueError, "settings: .*crop"),
            ({}, ValueError, "settings: .*size"),
            ([28], TypeError, "settings: .*mapping.*list"),
        ],
    )
    def test_refuse_nonsense(self, settings: dict, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            Preprocessing.from_dict(settings)


class TestLoad:
    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "CMYK", "YCbCr"])
    def test_gives_three_channels_for_every_mode(self, tmp_path: Path, mode: str) -> None:
        grey = picture().convert("L")
        if mode == "I;16":
            image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        elif mode == "LA":
            image = grey.convert("LA")
        else:
            image = grey.convert("RGB").convert(mode)
        path = tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr") else "image.png")
        image.save(path)
        loaded = Preprocessing(size=20).load(path)
        assert loaded.shape == (3, 20, 20)
        assert loaded.dtype == torch.uint8
        assert loaded.is_contiguous()
        expected = Preprocessing(size=20).load(grey)
        tolerance = {"1": 255, "P": 16}.get(mode, 3)  # few colours
        assert (loaded.int() - expected.int()).abs().max() <= tolerance

    def test_composites_transparency_on_white(self, tmp_path: Path) -> None:
        path = tmp_path / "image.png"
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(path)
        assert (Preprocessing(size=8).load(path) == 255).all()
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([0, 0, 0, 200, 10, 10])
        palette.save(path, transparency=bytes([255, 0]))
        assert (Preprocessing(size=8).load(path) == 255).all()

    def test_turns_photographs_upright(self, tmp_path: Path) -> None:
        path = tmp_path / "photo.jpg"
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        picture().save(path, quality=95, exif=exif)
        turned = Preprocessing(size=16).load(path)
        expected = Preprocessing(size=16).load(picture()).flip(1, 2)
        assert (turned.int() - expected.int()).abs().float().mean() < 6

    @pytest.mark.parametrize(("values", "shown"), [([0.0, 0.5, 1.0], [0, 128, 255])])
    def test_scales_floating_point(self, tmp_path: Path, values: list[float], shown: list[int]) -> None:
        path = tmp_path / "image.tif"
        Image.fromarray(np.array([values], dtype=np.float32).repeat(3, axis=0)).save(path)
        assert Preprocessing(size=3).load(path)[0, 0].tolist() == shown

    def test_refuses_values_of_unknown_range(self, tmp_path: Path) -> None:
        path = tmp_path / "image.tif"
        Image.fromarray(np.array([[0.0, 300.0]], dtype=np.float32)).save(path)
        with pytest.raises(UnreadableImageError, match="0 to 300, expected 0 to 1"):
            Preprocessing(size=3).load(path)
        Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(path)
        with pytest.raises(UnreadableImageError, match="0 to 70000"):
            Preprocessing(size=3).load(path)

    def test_leaves_an_opened_image_alone(self) -> None:
        image = picture().convert("RGBA")
        before = image.tobytes()
        Preprocessing(size=8).load(image)
        assert image.mode == "RGBA"
        assert image.tobytes() == before

    def test_stretch_shows_the_whole_image(self) -> None:
        loaded = Preprocessing(size=64).load(picture(200, 50))
        assert loaded[0, 0, 0] < 8
        assert loaded[0, 0, -1] > 247

    @pytest.mark.parametrize(("width", "height"), [(200, 120), (120, 200), (224, 224), (30, 31), (1000, 40)])
    def test_crop_equals_resizing_the_whole_and_cropping(self, width: int, height: int) -> None:
        image = picture(width, height)
        short = round(56 * 256 / 224)
        scale = short / min(width, height)
        size = [short if side == min(width, height) else int(side * scale) for side in (width, height)]
        left, top = (round((side - 56) / 2) for side in size)
        whole = image.resize((size[0], size[1]), Image.Resampling.BILINEAR).crop((left, top, left + 56, top + 56))
        expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
        loaded = Preprocessing(size=56, resize="crop").load(image)
        assert (loaded.int() - expected.int()).abs().max() <= 1

    def test_crop_of_a_long_strip_stays_small(self) -> None:
        assert Preprocessing(size=224, resize="crop").load(picture(20000, 2)).shape == (3, 224, 224)

    def test_shrinks_without_aliasing(self) -> None:
        stripes = np.zeros((128, 128, 3), dtype=np.uint8)
        stripes[:, ::2] = 255
        loaded = Preprocessing(size=16).load(Image.fromarray(stripes))
        assert (loaded[:, :, 1:-1].int() - 127).abs().max() < 12


class TestUnreadable:
    def test_truncated(self, tmp_path: Path) -> None:
        for name in ("image.jpg", "image.png"):
            path = tmp_path / name
            noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
            path.write_bytes(path.read_bytes()[:1500])
            self.check(path, "truncated")

    def test_empty(self, tmp_path: Path) -> None:
        path = tmp_path / "image.jpg"
        path.touch()
        self.check(path, "empty")

    def test_not_an_image(self, tmp_path: Path) -> None:
        path = tmp_path / "image.jpg"
        path.write_text("<html>404</html>")
        self.check(path, "not an image")

    def test_missing(self, tmp_path: Path) -> None:
        self.check(tmp_path / "image.jpg", "no such file")

    def test_folder(self, tmp_path: Path) -> None:
        self.check(tmp_path, "directory|denied")

    def test_decompression_bomb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "image.png"
        picture().save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        self.check(path, "decompression bomb")

    @pytest.mark.parametrize("position", range(0, 400, 16))
    def test_damaged_anywhere(self, tmp_path: Path, position: int) -> None:
        """Bytes overwritten at any place give an image or our error, never another one."""
        for name in ("image.png", "image.tif", "image.jpg", "image.bmp", "image.webp"):
            path = tmp_path / name
            picture().save(path)
            data = bytearray(path.read_bytes())
            data[position : position + 8] = b"\xff\x00\xfe\x7f\x80\x01\xaa\x55"
            path.write_bytes(bytes(data))
            with warnings.catch_warnings(), contextlib.suppress(UnreadableImageError):
                warnings.simplefilter("ignore", UserWarning)  # Pillow's, about damage it can read past
                Preprocessing(size=8).load(path)

    def test_wrong_type(self) -> None:
        with pytest.raises(TypeError, match=r"source: .*int"):
            Preprocessing(size=8).load(3)  # type: ignore[arg-type]

    def check(self, path: Path, reason: str) -> None:
        with pytest.raises(UnreadableImageError, match=reason) as caught:
            Preprocessing(size=8).load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


class TestNormalize:
    def test_there_and_back(self) -> None:
        images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
        for settings in (Preprocessing(size=16), Preprocessing(size=16, mean=IMAGENET_MEAN, std=IMAGENET_STD)):
            normalised = settings.normalize(images)
            assert normalised.dtype == torch.float32
            assert torch.equal(settings.denormalize(normalised), images)
            assert torch.equal(settings.denormalize(normalised.double()), images)

    def test_half_and_half_is_minus_one_to_one(self) -> None:
        normalised = Preprocessing(size=1).normalize(torch.tensor([0, 255, 0], dtype=torch.uint8).view(1, 3, 1, 1))
        assert normalised.flatten().tolist() == [-1.0, 1.0, -1.0]

    def test_clips(self) -> None:
        assert Preprocessing(size=1).denormalize(torch.full((1, 3, 1, 1), 9.0)).flatten().tolist() == [255] * 3

    def test_takes_no_batch_of_no_images_amiss(self) -> None:
        assert Preprocessing(size=4).normalize(torch.empty((0, 3, 4, 4), dtype=torch.uint8)).shape == (0, 3, 4, 4)

    def test_refuses_what_is_normalised_already(self) -> None:
        settings = Preprocessing(size=4)
        with pytest.raises(TypeError, match=r"images: .*uint8.*float32"):
            settings.normalize(torch.zeros(1, 3, 4, 4))
        with pytest.raises(TypeError, match=r"images: .*floating"):
            settings.denormalize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"images: .*\(3, 4, 4\)"):
            settings.normalize(torch.zeros(3, 4, 4, dtype=torch.uint8))
        with pytest.raises(TypeError, match=r"images: .*ndarray"):
            settings.normalize(np.zeros((1, 3, 4, 4)))  # type: ignore[arg-type]


class TestAugmentation:
    def test_varies_and_repeats_with_the_seed(self) -> None:
        augment = imagenet_augmentation(24)
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(torch.stack([augment(picture()) for _ in range(4)]))
        assert drawn[0].shape == (4, 3, 24, 24)
        assert drawn[0].dtype == torch.uint8
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])

    def test_takes_tensors_too(self) -> None:
        augmented = imagenet_augmentation(24)(torch.zeros(3, 50, 40, dtype=torch.uint8))
        assert augmented.shape == (3, 24, 24)
        assert augmented.dtype == torch.uint8

    def test_refuses_nonsense(self) -> None:
        with pytest.raises(ValueError, match="size: "):
            imagenet_augmentation(0)
