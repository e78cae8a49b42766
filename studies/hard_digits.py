"""Handwritten digits made hard: few training images, turned, scaled, shifted, in noise and behind a patch.

On the digits as they are, every method reaches 99%. These are made so that a dense model reaches 90 to 96%, and what
a cut costs can be told. Images are (3, 16, 16), about zero mean and unit variance; distortions are drawn anew for each
epoch of training, and once and for all for validation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from isomorphic.data.sources import DIGITS_FILE, DIGITS_TRAIN_IMAGES

SIDE = 16
TRAINING_IMAGES = 1000
VALIDATION_COPIES = 4  # of each of the 360 images, distorted differently: an image is 0.07 points
TURN, SCALE, SHIFT = math.radians(15), (0.85, 1.15), 0.1  # up to; shares of the image's side
NOISE, PATCH = 0.25, 4  # standard deviation beside an image's range of 1; pixels of a side of what is hidden

Labelled = tuple[Tensor, Tensor]


@functools.cache  # asked for in every epoch
def plain_digits(*, training: bool) -> Labelled:
    """Returns images (N, 1, 8, 8) from 0 to 1 and their labels (N,): 1,000 to train on, or 360 to validate on."""
    digits = np.load(DIGITS_FILE)
    images = torch.from_numpy(digits["images"]).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits["labels"]).long()
    chosen = slice(0, TRAINING_IMAGES) if training else slice(DIGITS_TRAIN_IMAGES, None)
    return images[chosen], labels[chosen]


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the images (N, 1, 8, 8) turned, scaled, shifted, hidden in part and in noise: (N, 3, 16, 16)."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, scale = uniform(-TURN, TURN), uniform(*SCALE)
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    x, y = 2 * uniform(-SHIFT, SHIFT), 2 * uniform(-SHIFT, SHIFT)  # an image reaches from -1 to 1
    maps = torch.stack([cosine, -sine, x, sine, cosine, y], 1).view(count, 2, 3)
    grid = F.affine_grid(maps, [count, 1, SIDE, SIDE], align_corners=False)
    found = F.grid_sample(images, grid, mode="bicubic", align_corners=False).clamp(0, 1)
    found = found.masked_fill(_patches(count, generator), 0.5)
    found = found + NOISE * torch.randn(found.shape, generator=generator)
    return ((found - 0.3) / 0.5).expand(-1, 3, -1, -1).contiguous()


def _patches(count: int, generator: torch.Generator) -> Tensor:
    """A square somewhere on each image, as a mask (N, 1, 16, 16)."""
    top, left = (torch.randint(0, SIDE - PATCH + 1, (count, 1), generator=generator) for _ in range(2))
    places = torch.arange(SIDE)
    rows = (places >= top) & (places < top + PATCH)  # (N, 16)
    columns = (places >= left) & (places < left + PATCH)
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def validation() -> Labelled:
    """Returns the 1,440 validation images and their labels: the same each time."""
    images, labels = plain_digits(training=False)
    images, labels = images.repeat(VALIDATION_COPIES, 1, 1, 1), labels.repeat(VALIDATION_COPIES)
    return distort(images, torch.Generator().manual_seed(2024)), labels


def epoch(generator: torch.Generator, batch_size: int) -> Iterator[Labelled]:
    """Yields the training images once, distorted anew and in a random order, in batches; a remainder is left out."""
    images, labels = plain_digits(training=True)
    order = torch.randperm(len(images), generator=generator)
    distorted = distort(images[order], generator)
    for first in range(0, len(order) - batch_size + 1, batch_size):
        yield distorted[first : first + batch_size], labels[order][first : first + batch_size]
