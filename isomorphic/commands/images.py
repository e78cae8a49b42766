"""What commands do with images beside opening them: what they say of them, and which they may leave out."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from isomorphic import progress
from isomorphic.commands import entry
from isomorphic.data.loaders import build_eval_loader, build_scoring_loader
from isomorphic.data.skipping import STAND_IN, SkippedImages, SubstitutedImages, check_share, describe_unreadable
from isomorphic.data.sources import LabelledImages
from isomorphic.measure.accuracy import Accuracy
from isomorphic.measure.fidelity import Fidelity

Images = Dataset[tuple[Tensor, int]]


@functools.cache  # the same images may be opened to score, to calibrate and to evaluate
def tell(note: str) -> None:
    """Prints a note on images, once."""
    entry.say(note)


def evaluation_loader(args: argparse.Namespace, images: Images, device: torch.device) -> DataLoader[Any]:
    """Returns a loader for `measure_accuracy`, whose result names the images that cannot be read: `check_readable`."""
    return build_eval_loader(images, args.batch_size, args.workers, device, collect_unreadable=True)


def check_readable(args: argparse.Namespace, found: Accuracy | Fidelity) -> None:
    """Says which images could not be read, and, unless they may be skipped, that what was found is for nothing.

    Raises:
        UserError: there are some, or more than `--skip-unreadable` allows, in every process alike.
    """
    check_share(found.unreadable, found.num_images + len(found.unreadable), args.skip_unreadable)
    if found.unreadable:
        names = describe_unreadable(found.unreadable)
        entry.say(f"Skipped {names}; what follows is of the other {found.num_images}")


def substituted(args: argparse.Namespace, images: Images) -> tuple[Dataset[Any], SkippedImages | None]:
    """Returns images to learn from, with others for those that cannot be read if `--skip-unreadable` allows it."""
    if not args.skip_unreadable:
        return images, None
    labelled = cast(LabelledImages, images)
    return SubstitutedImages(labelled, args.skip_unreadable), SkippedImages(len(labelled), args.skip_unreadable)


class Passes:
    """Batches that are gone over several times: each pass begins anew, with a bar of its own.

    Args:
        begin: returns the batches of a pass.
    """

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[Any]:
        return self._begin()


def scoring_batches(
    args: argparse.Namespace, images: Images, device: torch.device, count: int, title: str, *, leave: bool = True
) -> Iterable[tuple[Tensor, Tensor]]:
    """Returns this process's share of `count` batches of training images, with a progress bar, to `leave` or not."""
    readable, skipped = substituted(args, images)
    loader = build_scoring_loader(readable, args.batch_size, count, args.workers, device, seed=args.seed)

    def begin() -> Iterator[tuple[Tensor, Tensor]]:
        bar = progress.Bar(loader, desc=title, unit="batch", leave=leave)
        return iter(bar) if skipped is None else _stripped(bar, skipped)

    return Passes(begin)


def _stripped(loader: Iterable[Any], skipped: SkippedImages) -> Iterator[tuple[Tensor, Tensor]]:
    yield from skipped.strip(loader)
    names = skipped.news()
    if names:
        entry.say(f"Skipped {describe_unreadable(names)}; {STAND_IN}")
