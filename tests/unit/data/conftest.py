"""Small images that the tests of data share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from isomorphic.data.sources import DataSource, LabelledImages, Split, build_dataset
from isomorphic.data.transforms import Preprocessing

PIXELS = v2.PILToTensor()
TINY = Preprocessing(input_size=8, resize_size=8)


def save_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def every(dataset: LabelledImages) -> list[tuple[torch.Tensor, int]]:
    return [dataset[index] for index in range(len(dataset))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ with 2 + 1 images and val/ with 1 + 1, classes cat and dog."""
    for split, name, colour in [
        ("train", "cat/0.png", (255, 0, 0)),
        ("train", "cat/1.png", (250, 0, 0)),
        ("train", "dog/0.png", (0, 0, 255)),
        ("val", "cat/0.png", (200, 0, 0)),
        ("val", "dog/0.png", (0, 0, 200)),
    ]:
        save_image(tmp_path / split / name, colour)
    return tmp_path


def synthetic(
    split: Split = "val", *, size: int = 64, seed: int = 0, num_classes: int | None = 10, image_size: int = 8
) -> LabelledImages:
    source = DataSource("synthetic", synthetic_size=size, seed=seed)
    return build_dataset(source, split, PIXELS, num_classes=num_classes, image_size=image_size)
