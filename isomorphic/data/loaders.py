"""Batches: who sees which images, in which order, and what happens to those that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from isomorphic.data.decoding import UnreadableImage
from isomorphic.data.skipping import SubstitutedImages
from isomorphic.data.sources import LabelledImages
from isomorphic.data.workers import loader_options
from isomorphic.processes import distributed


class Batch(NamedTuple):
    """Images (B, C, H, W), their labels (B,), and the images that are missing among them, by name and reason."""

    images: Tensor
    labels: Tensor
    unreadable: Sequence[str] = ()


def build_eval_loader(
    dataset: Dataset[tuple[Tensor, int]],
    batch_size: int,
    workers: int,
    device: torch.device | str,
    *,
    collect_unreadable: bool = False,
) -> DataLoader[Any]:
    """Batches (images B×C×H×W, labels B) of this process's shard, in order: all ranks see each image once.

    Rank r of n sees images r, r + n, r + 2n, ... Shards may differ by one image: nothing is padded or
    repeated, so that sums over ranks are exact (361 images on 2 ranks count 361).

    An image that cannot be read is a `UserError`. With `collect_unreadable`, which needs `LabelledImages`, it is
    left out of its batch instead, which becomes a `Batch` that names it; a batch may have no images left.
    """
    images: Dataset[Any] = ReadableImages(cast(LabelledImages, dataset)) if collect_unreadable else dataset
    if distributed.world_size() > 1:
        mine = range(distributed.rank(), len(cast(Sized, dataset)), distributed.world_size())
        images = Subset(images, mine)
    collate = _collate_readable if collect_unreadable else None
    return DataLoader(images, batch_size, shuffle=False, collate_fn=collate, **loader_options(workers, device))


def build_scoring_loader(
    dataset: Dataset[Any], batch_size: int, num_batches: int, workers: int, device: torch.device | str, *, seed: int = 0
) -> DataLoader[Any]:
    """This process's share of `num_batches` batches drawn without repetition, in the order that `seed` sets.

    The batches are the same however many processes there are; rank r of n gets batches r, r + n, ... A
    dataset that is too small gives fewer, and its last batch may be smaller.

    An image that cannot be read is a `UserError`. Of `SubstitutedImages`, the loader gives pairs (batch, images that
    others take the place of, by name and reason), which `SkippedImages.strip` takes apart.
    """
    order = torch.randperm(len(cast(Sized, dataset)), generator=torch.Generator().manual_seed(seed))
    batches = [batch.tolist() for batch in order.split(batch_size)[:num_batches]]
    mine = batches[distributed.rank() :: distributed.world_size()]
    collate = _collate_substituted if isinstance(dataset, SubstitutedImages) else None
    return DataLoader(dataset, batch_sampler=mine, collate_fn=collate, **loader_options(workers, device, seed=seed))


class ReadableImages(Dataset[tuple[Tensor, int] | str]):
    """The same images, with name and reason in the place of each that cannot be read."""

    def __init__(self, images: LabelledImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        try:
            image, label = self.images.load(index)
        except UnreadableImage as error:
            return str(error)
        return self.images.transform(image), label


def _collate_readable(items: list[tuple[Tensor, int] | str]) -> Batch:
    names = [item for item in items if isinstance(item, str)]
    readable = [item for item in items if not isinstance(item, str)]
    images, labels = default_collate(readable) if readable else (torch.empty(0), torch.empty(0, dtype=torch.long))
    return Batch(images, labels, names)


def _collate_substituted(items: list[tuple[Tensor, int, tuple[str, ...]]]) -> tuple[Any, list[str]]:
    return default_collate([item[:2] for item in items]), [name for item in items for name in item[2]]
