"""Images without labels, and crops of them: a folder of the user's, or photographs that scikit-image ships."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import v2

from isomorphic.data.decoding import decode
from isomorphic.data.folders import list_folder
from isomorphic.data.transforms import Preprocessing, interpolation_mode
from isomorphic.errors import UserError

# What scikit-image's wheel holds of photographs; the rest are drawings, patterns and masks.
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png"),
    *("page.png", "retina.jpg", "rocket.jpg"),
)
EVERY = 3  # of so many images one is judged on
SMALLEST_CROP = 0.35  # of an image's area


def find_images(folder: str | None) -> list[Path]:
    """Returns the images of a folder and its subfolders, or scikit-image's photographs.

    Raises:
        UserError: there are fewer than three.
    """
    if folder is None:
        found = importlib.util.find_spec("skimage")
        places = found.submodule_search_locations or () if found else ()
        files = [file for place in places for name in PHOTOGRAPHS if (file := Path(place, "data", name)).exists()]
        where = "scikit-image (pip install --no-deps scikit-image; scripts/real_weights.sh does)"
    else:
        files = [Path(path) for path, _ in list_folder(Path(folder)).samples] if Path(folder).is_dir() else []
        where = folder
    if len(files) < EVERY:
        raise UserError(f"{len(files)} images in {where}: give a folder of {EVERY} or more")
    return files


def split_images(images: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Returns the images to score and to recover on, and every third one, to judge on."""
    return [image for place, image in enumerate(images) if (place + 1) % EVERY], list(images[EVERY - 1 :: EVERY])


def crops_of(images: Sequence[Path], preprocessing: Preprocessing, crops: int, seed: int) -> Tensor:
    """Returns random crops (crops · images, 3, S, S), one of each image after the other, the same for a seed."""
    size, mode = preprocessing.input_size, interpolation_mode(preprocessing.interpolation)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(SMALLEST_CROP, 1.0), interpolation=mode, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=list(preprocessing.mean), std=list(preprocessing.std)),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([transform(decode(str(path), path.name)) for _ in range(crops) for path in images])
