"""The order of the training images, their distribution over processes, and the seeds of their augmentation.

Order and augmentation are functions of (seed, epoch, position in the epoch) alone. So a run is repeatable with any
number of loader workers, a resumed run continues with the images that the interrupted one would have seen, and n
processes together see the batches that one process with an n times larger batch sees.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.random import mtrand
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate, get_worker_info
from torchvision.transforms import v2

from isomorphic.data.skipping import SubstitutedImages
from isomorphic.data.workers import loader_options
from isomorphic.processes import distributed
from isomorphic.training.recipe import AugmentRecipe, LoaderRecipe

# torch and numpy have the same generator and would draw the same numbers from the same seed
NUMPY_SEED = 0x5851F42D
# the generator of numpy's global functions while an image is loaded in the main process
_SPARE = np.random.MT19937(0)


class RawBatch(NamedTuple):
    """A batch as it leaves the loader; as uint8 it has a quarter of the bytes that floats would have.

    Attributes:
        images: uint8 (B, 3, H, W).
        labels: int64 (B,).
        boxes: int64 (B, 4), the rectangle to erase as top, left, height and width; height 0 where there is none.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor


def build_train_loader(
    dataset: Dataset[Any],
    recipe: LoaderRecipe,
    augment: AugmentRecipe,
    device: torch.device | str,
    *,
    takes_single: bool = True,
) -> DataLoader[RawBatch]:
    """Returns a loader of shuffled batches of this process's share of the images; `start_epoch` chooses the epoch.

    `dataset` gives uint8 images (3, H, W). The last batch may be smaller. Every process gets the same number of images:
    a share that would be too small repeats some. A last batch of one image, behind others, is left out unless the model
    `takes_single`: the variance of one value is none. Of `SubstitutedImages`, the loader gives pairs (batch, images
    that others take the place of, by name and reason), which `SkippedImages.strip` takes apart.
    """
    sampler = SeededSampler(dataset, recipe.ra_reps, recipe.seed)
    if not takes_single and len(sampler) > recipe.batch_size > 1 and len(sampler) % recipe.batch_size == 1:
        sampler.left_out = 1
    loader: DataLoader[Any] = DataLoader(
        SeededImages(dataset, augment.random_erase),
        batch_size=recipe.batch_size,
        sampler=sampler,
        collate_fn=_collate_substituted if isinstance(dataset, SubstitutedImages) else _collate,
        persistent_workers=recipe.workers > 0,
        **loader_options(recipe.workers, device, seed=recipe.seed),
    )
    return loader


def start_epoch(loader: DataLoader, epoch: int, skip: int = 0) -> None:
    """Sets the next pass over `loader` to `epoch`, counted from 0, without this process's first `skip` images.

    The skipped images are not loaded. If `skip` is a multiple of the batch size, the batches are the last ones of the
    whole epoch. `len(loader)` remains that of the whole epoch.
    """
    assert isinstance(loader.sampler, SeededSampler)
    loader.sampler.epoch = epoch
    loader.sampler.skip = skip


def images_left_out(loader: DataLoader) -> int:
    """Returns the number of images that `build_train_loader` leaves out of each epoch, over all processes."""
    assert isinstance(loader.sampler, SeededSampler)
    return loader.sampler.left_out * distributed.world_size()


def mix_seeds(*parts: int) -> int:
    """Returns one 32-bit seed from several numbers; similar numbers give unrelated seeds."""
    return int(np.random.SeedSequence([part % 2**32 for part in parts]).generate_state(1)[0])


class SeededSampler(Sampler[tuple[int, int]]):
    """This process's share of a shuffled epoch, as pairs (index of the image, seed of its augmentation).

    With `repeats` above 1 every image comes that many times in a row over the processes, each time with another
    seed. The epoch keeps its length, so it has only about one image in `repeats` (repeated augmentation, Hoffer et
    al. 2020, as in DeiT).
    """

    def __init__(self, dataset: Dataset, repeats: int, seed: int) -> None:
        share = {"num_replicas": distributed.world_size(), "rank": distributed.rank(), "shuffle": True}
        self.base = (
            RepeatAugSampler(dataset, **share, num_repeats=repeats)
            if repeats > 1
            else DistributedSampler(dataset, **share)  # pyright: ignore[reportArgumentType]
        )
        self.seed = seed
        self.epoch = 0
        self.skip = 0
        self.left_out = 0  # of the end of this process's share

    def __len__(self) -> int:
        return len(self.base) - self.left_out

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self.base.set_epoch(mix_seeds(self.seed, self.epoch))
        stream = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch, 1))
        world, rank = distributed.world_size(), distributed.rank()
        # (images a process, processes): position i of process r is number i·world + r of the epoch
        seeds = torch.randint(2**32, (len(self.base), world), generator=stream)[:, rank]
        return islice(zip(self.base, seeds.tolist(), strict=True), self.skip, len(self))


class SeededImages(Dataset[tuple[Any, ...]]):
    """Gives (image, label, box to erase) for the pairs of a `SeededSampler`: index and seed of the augmentation.

    What else `images` give of an image comes last: the names that `SubstitutedImages` tell.
    With probability `random_erase` there is a box, distributed as in torchvision's RandomErasing: 2 to 33 % of the
    area, aspect ratio 0.3 to 3.3, ten attempts. timm's (up to 33.3 % and 3.33) is almost the same.
    """

    def __init__(self, images: Dataset[Any], random_erase: float = 0.0) -> None:
        self.images = images
        self.random_erase = random_erase
        self.erasing = v2.RandomErasing()

    def __len__(self) -> int:
        return len(cast(Sized, self.images))

    def __getitem__(self, item: tuple[int, int]) -> tuple[Any, ...]:
        index, seed = item
        with drawing_from(seed):
            image, label, *more = self.images[index]
            return image, label, self._box(image), *more

    def _box(self, image: Tensor) -> Tensor:
        if not torch.rand(()) < self.random_erase:
            return torch.zeros(4, dtype=torch.int64)
        drawn = self.erasing.make_params([image])
        fits = drawn["v"] is not None
        return torch.tensor([drawn[side] if fits else 0 for side in ("i", "j", "h", "w")])


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Returns a context in which torch (on the CPU), numpy and `random` are seeded with this 32-bit seed.

    Afterwards all three generators are restored, so that loading in the main process does not change the random
    numbers of dropout and mixup. In a loader's worker process nothing else uses them, and nothing is restored.
    """
    generator = torch.default_generator  # torch.manual_seed would reseed every GPU as well
    before = None
    if get_worker_info() is None:
        before = generator.get_state(), random.getstate(), mtrand.get_bit_generator()
        mtrand.set_bit_generator(_SPARE)  # get_state and set_state would take 0.1 ms for each image
    generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed ^ NUMPY_SEED)
    try:
        yield
    finally:
        if before is not None:
            generator.set_state(before[0])
            random.setstate(before[1])
            mtrand.set_bit_generator(before[2])


def _collate(items: list[tuple[Tensor, int, Tensor]]) -> RawBatch:
    return RawBatch(*default_collate(items))


def _collate_substituted(items: list[tuple[Tensor, int, Tensor, tuple[str, ...]]]) -> tuple[RawBatch, list[str]]:
    batch = RawBatch(*default_collate([item[:3] for item in items]))
    return batch, [name for item in items for name in item[3]]
