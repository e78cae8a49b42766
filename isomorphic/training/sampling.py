"""Who sees which training image, when, and with which random numbers.

Order and augmentation are functions of (seed, epoch, position in the epoch) alone. So a run repeats whatever the
number of loader workers, an interrupted run continues with the very images it would have seen, and n processes
together see the batches that one process with an n times larger batch sees.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from isomorphic import distributed
from isomorphic.data import loader_options
from isomorphic.training.recipe import LoaderRecipe


def build_train_loader(
    dataset: Dataset[tuple[Tensor, int]], recipe: LoaderRecipe, device: torch.device | str
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Shuffled batches of this process's share, the last one ragged; `start_epoch` picks the epoch.

    Every process gets the same number of batches: a share that would fall short repeats an image or two.
    """
    return DataLoader(
        SeededImages(dataset),
        batch_size=recipe.batch_size,
        sampler=SeededSampler(dataset, recipe.ra_reps, recipe.seed),
        persistent_workers=recipe.workers > 0,
        **loader_options(recipe.workers, device, seed=recipe.seed),
    )


def start_epoch(loader: DataLoader, epoch: int) -> None:
    """The next pass over `loader` is that of `epoch`, counted from 0."""
    assert isinstance(loader.sampler, SeededSampler)
    loader.sampler.epoch = epoch


def mix_seeds(*parts: int) -> int:
    """One 32-bit seed from several numbers: neighbours give unrelated seeds."""
    return int(np.random.SeedSequence([part % 2**32 for part in parts]).generate_state(1)[0])


class SeededSampler(Sampler[tuple[int, int]]):
    """This process's share of a shuffled epoch, as pairs (index of the image, seed of its augmentation).

    With `repeats` above 1 every image comes that many times in a row over the processes, each time with another
    seed, and the epoch keeps its length: about one image in `repeats` is seen (repeated augmentation, Hoffer et
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

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self.base.set_epoch(mix_seeds(self.seed, self.epoch))
        stream = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch, 1))
        world, rank = distributed.world_size(), distributed.rank()
        # (images a process, processes): position i of process r is number i·world + r of the epoch
        seeds = torch.randint(2**32, (len(self), world), generator=stream)[:, rank]
        return zip(self.base, seeds.tolist(), strict=True)


class SeededImages(Dataset):
    """Images asked for by a `SeededSampler`: each one's transform draws from its own seed.

    The global generator comes back as it was, so that loading in this process leaves dropout's numbers alone.
    """

    def __init__(self, images: Dataset[tuple[Tensor, int]]) -> None:
        self.images = images

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = item
        generator = torch.default_generator  # torch.manual_seed would reseed every GPU as well
        before = generator.get_state()
        generator.manual_seed(seed)
        try:
            return self.images[index]
        finally:
            generator.set_state(before)
