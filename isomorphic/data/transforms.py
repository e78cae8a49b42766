"""How an image becomes a model's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isomorphic.errors import UserError

if TYPE_CHECKING:  # a model that is not about images needs none of them
    from PIL import Image
    from torchvision.transforms import InterpolationMode

Transform = Callable[["Image.Image"], Tensor]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input: sizes in pixels; mean and std per RGB channel of 0..1."""

    input_size: int = 224
    resize_size: int = 256
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """Resize the shorter side, crop the centre, scale to 0..1 and normalise: PIL image → float tensor 3×S×S.

    The resize is Pillow's, which filters out aliasing. Raises `UserError` for an interpolation that does not
    exist and for a resize smaller than the crop, which would frame every image in black.
    """
    from torchvision.transforms import v2

    p = preprocessing
    if p.resize_size < p.input_size:
        raise UserError(
            f"images resized to {p.resize_size} are too small for an input of {p.input_size}: "
            f"pass --val-resize-size {p.input_size} or more"
        )
    return v2.Compose(
        [
            v2.Resize(p.resize_size, interpolation=interpolation_mode(p.interpolation), antialias=True),
            v2.CenterCrop(p.input_size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=list(p.mean), std=list(p.std)),
        ]
    )


class PairTransform:
    """One image as two models take it, each with a preprocessing of its own: PIL image → two tensors 3×S×S."""

    def __init__(self, first: Preprocessing, second: Preprocessing) -> None:
        self._first, self._second = eval_transform(first), eval_transform(second)
        self._same = first == second

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        tensor = self._first(image)
        return tensor, tensor if self._same else self._second(image)


def interpolation_mode(name: str) -> InterpolationMode:
    """torchvision's mode of that name ('bicubic', 'bilinear', ...). Raises `UserError` for any other."""
    from torchvision.transforms import InterpolationMode

    try:
        return InterpolationMode(name)
    except ValueError:
        known = ", ".join(mode.value for mode in InterpolationMode)
        raise UserError(f"unknown interpolation {name!r}: choose one of {known}") from None
