"""Decoding: grey levels of more than 8 bits keep their order; everything else is as Pillow makes it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from isomorphic.data.decoding import UnreadableImage, decode, image_suffixes, to_rgb
from isomorphic.data.sources import DataSource, build_dataset
from isomorphic.data.transforms import Preprocessing
from isomorphic.training.augment import train_transform
from isomorphic.training.recipe import AugmentRecipe
from tests.unit.data.conftest import save_image

RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)


def greys(image: Image.Image) -> np.ndarray:
    """The grey levels of an RGB image whose channels are equal."""
    pixels = np.asarray(image)
    assert image.mode == "RGB" and pixels.dtype == np.uint8
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0]


def written(pixels: np.ndarray, kind: str) -> Image.Image:
    """The image as it comes from a file of that kind."""
    file = io.BytesIO()
    if kind == "PGM":
        height, width = pixels.shape
        file.write(f"P5\n{width} {height}\n65535\n".encode() + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(file, kind)
    file.seek(0)
    return Image.open(file)


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PGM", ">u2")])
def test_sixteen_bits_are_scaled_by_the_range_of_their_type(kind: str, dtype: str):
    found = greys(to_rgb(written(RAMP.astype(dtype), kind)))
    assert np.array_equal(np.unique(found), np.arange(256))
    assert abs(found.astype(float) - RAMP / 257).max() <= 0.51
    dark = greys(to_rgb(written((RAMP / 16).astype(dtype), kind)))
    assert dark.max() == 16, "two images stay comparable: a dark one is not stretched"


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0.2, 0.2, 0.4]], dtype=np.float32), [51, 51, 102]),
        (np.array([[0.0, 10.0, 20.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[-1.0, 0.0, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[np.nan, -np.inf, 3.0, 5.0, np.inf]], dtype=np.float32), [0, 0, 0, 255, 255]),
        (np.array([[np.nan, np.inf]], dtype=np.float32), [0, 255]),
        (np.array([[7.0, 7.0]], dtype=np.float32), [0, 0]),
        (np.array([[-1024, 1023, 3071]], dtype=np.int32), [0, 127, 255]),
        (np.array([[2**31 - 4, 2**31 - 1]], dtype=np.int32), [0, 255]),
    ],
)
def test_thirty_two_bits_are_taken_as_fractions_or_stretched(pixels: np.ndarray, expected: list[int]):
    assert greys(to_rgb(written(pixels, "TIFF")))[0].tolist() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_other_images_are_as_pillow_converts_them(mode: str):
    pixels = np.random.default_rng(0).integers(256, size=(9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(pixels[..., 0]))
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


def test_training_and_evaluation_see_the_same_levels(tmp_path: Path):
    """One decoder for both, and for torchvision's folders, whose own would clip them."""
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / split / "cat" / "0.png")
    plain = train_transform(AugmentRecipe(64, scale=(1, 1), ratio=(1, 1), hflip=0.0), Preprocessing(64, 64))
    expected = np.rint(RAMP / 257)
    for source in (DataSource(root=str(tmp_path)), DataSource("torch/image_folder", root=str(tmp_path))):
        training = build_dataset(source, "train", plain)[0][0]
        evaluation = build_dataset(source, "val", v2.PILToTensor())[0][0]
        for pixels in (training, evaluation):
            assert abs(pixels[0].numpy() - expected).max() <= 1


def test_what_cannot_be_decoded_is_named_with_a_reason(tmp_path: Path):
    save_image(tmp_path / "whole.png", (1, 2, 3))
    (tmp_path / "text.png").write_text("<html>")
    (tmp_path / "short.png").write_bytes((tmp_path / "whole.png").read_bytes()[:50])
    for name, reason in [("text.png", "not an image"), ("short.png", "."), ("none.png", "No such file")]:
        with pytest.raises(UnreadableImage, match=f"the {name}: .*{reason}") as error:
            decode(str(tmp_path / name), f"the {name}")
        assert "\n" not in str(error.value)
    assert decode(str(tmp_path / "whole.png"), "").size == (12, 10)


def test_files_that_pillow_reads_are_images_and_those_that_it_only_writes_or_knows_are_not():
    assert {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".jp2", ".bmp", ".mpo", ".gif"} <= image_suffixes()
    assert not {".pdf", ".h5", ".mpg", ".grib", ".txt", ""} & image_suffixes()


def test_a_plugin_that_was_imported_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    assert ".heic" in image_suffixes()
