"""Images that cannot be read and may be left out: what takes their place, and how many there may be.

Scoring and training replace such an image by the next one of the data set that can be read, so that batches keep their
sizes, whatever the number of processes, and an epoch its length: which image that is depends on the files alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor
from torch.utils.data import Dataset

from isomorphic.data.decoding import UnreadableImage
from isomorphic.data.sources import LabelledImages
from isomorphic.errors import UserError
from isomorphic.processes import distributed

T = TypeVar("T")

# What becomes of an image that is left out of training and scoring, for messages.
STAND_IN = "the next image that can be read stands in for each"
# How many of many unreadable images a message names.
NAMED_UNREADABLE = 10


class SubstitutedImages(Dataset[tuple[Tensor, int, tuple[str, ...]]]):
    """The same images, with the next one that can be read in the place of each that cannot.

    ``dataset[i]`` is (image, label, those that were stepped over, by name and reason). A `UserError` if more than this
    share of all images is stepped over at once.
    """

    def __init__(self, images: LabelledImages, share: float) -> None:
        self.images = images
        self.share = share

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, tuple[str, ...]]:
        unreadable: list[str] = []
        while True:
            try:
                image, label = self.images.load((index + len(unreadable)) % len(self.images))
            except UnreadableImage as error:
                unreadable.append(str(error))
                check_share(unreadable, len(self.images), self.share)
                if len(unreadable) == len(self.images):
                    raise UserError(f"there is no image that can be read: {describe_unreadable(unreadable)}") from error
            else:
                return self.images.transform(image), label, tuple(unreadable)


class SkippedImages:
    """Collects the unreadable images of a data set, by name and reason, and raises if there are too many.

    Args:
        num_images: size of the data set.
        share: the largest share of them that may be left out.
    """

    def __init__(self, num_images: int, share: float) -> None:
        self.num_images = num_images
        self.share = share
        self._found: set[str] = set()
        self._told: set[str] = set()

    def add(self, unreadable: Iterable[str]) -> None:
        """Adds those of a batch of this process.

        Raises:
            UserError: this process alone has met too many.
        """
        self._found.update(unreadable)
        check_share(self._found, self.num_images, self.share)

    def strip(self, batches: Iterable[tuple[T, Sequence[str]]]) -> Iterator[T]:
        """Yields the batches of a loader of `SubstitutedImages`, and adds what each of them names."""
        for batch, unreadable in batches:
            self.add(unreadable)
            yield batch

    def news(self) -> list[str]:
        """Returns those that any process has met since the last call, sorted. Every process calls this.

        Raises:
            UserError: all processes together have met too many; every process stops.
        """
        for found in distributed.gather_objects(self._found - self._told):
            self._found |= found
        check_share(self._found, self.num_images, self.share)
        fresh = sorted(self._found - self._told)
        self._told |= self._found
        return fresh


def check_share(unreadable: Collection[str], num_images: int, share: float) -> None:
    """Raises a `UserError` if the unreadable images are more than this share of all images."""
    if len(unreadable) <= share * num_images:
        return
    found = describe_unreadable(sorted(unreadable))
    if not share:
        raise UserError(f"cannot read {found}; replace or remove them, or leave them out with --skip-unreadable")
    raise UserError(
        f"cannot read {found}; these are more than {100 * share:g}% of {num_images} images: replace or remove them "
        "(python tools/check_images.py DIR names them all), or let --skip-unreadable SHARE leave out more"
    )


def describe_unreadable(names: Sequence[str]) -> str:
    """`image a.png: not an image`, or `12 images: a.png: not an image; b.png: …; and 2 more`."""
    if len(names) == 1:
        return f"image {names[0]}"
    rest = [f"and {len(names) - NAMED_UNREADABLE} more"] if len(names) > NAMED_UNREADABLE else []
    return f"{len(names)} images: {'; '.join([*names[:NAMED_UNREADABLE], *rest])}"
