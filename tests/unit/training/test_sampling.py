"""Order and augmentation depend on seed, epoch and position alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from isomorphic import distributed
from isomorphic.data import DataSource, Preprocessing, build_dataset
from isomorphic.training.augment import train_transform
from isomorphic.training.recipe import AugmentRecipe, LoaderRecipe
from isomorphic.training.sampling import SeededSampler, build_train_loader, mix_seeds, start_epoch


class Numbers(Dataset):
    """Image i is i, and a random number from whatever generator is current."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(()), index


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def become(rank: int, world_size: int) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world_size)

    return become


def epoch_of(sampler: SeededSampler, epoch: int) -> list[tuple[int, int]]:
    sampler.epoch = epoch
    return list(sampler)


def test_an_epoch_is_a_permutation_that_repeats_with_seed_and_epoch_only():
    sampler = SeededSampler(Numbers(50), 1, seed=3)
    first = epoch_of(sampler, 0)
    assert sorted(index for index, _ in first) == list(range(50))
    assert epoch_of(SeededSampler(Numbers(50), 1, seed=3), 0) == first
    second, other = epoch_of(sampler, 1), epoch_of(SeededSampler(Numbers(50), 1, seed=4), 0)
    for different in (second, other):
        assert [i for i, _ in different] != [i for i, _ in first]
        assert not {s for _, s in different} & {s for _, s in first}


@pytest.mark.parametrize("repeats", [1, 3])
def test_processes_together_see_the_epoch_of_one(as_process: Callable[[int, int], None], repeats: int):
    whole = epoch_of(SeededSampler(Numbers(60), repeats, seed=1), 5)
    parts = []
    for rank in range(3):
        as_process(rank, 3)
        parts.append(epoch_of(SeededSampler(Numbers(60), repeats, seed=1), 5))
    assert [item for items in zip(*parts, strict=True) for item in items] == whole


def test_processes_have_equally_many_images_where_the_data_does_not_divide(as_process: Callable[[int, int], None]):
    seen = Counter()
    for rank in range(4):
        as_process(rank, 4)
        share = epoch_of(SeededSampler(Numbers(10), 1, seed=0), 0)
        assert len(share) == 3
        seen.update(index for index, _ in share)
    assert set(seen) == set(range(10)) and seen.total() == 12


def test_repeated_augmentation_keeps_the_epochs_length_and_seeds_each_repeat_apart():
    sampler = SeededSampler(Numbers(300), 3, seed=0)
    items = epoch_of(sampler, 0)
    assert len(items) == len(sampler) == 256  # as published: cut to a multiple of 256
    counts = Counter(index for index, _ in items)
    assert sorted(counts.values(), reverse=True)[:85] == [3] * 85 and len(counts) == 86
    assert len({seed for _, seed in items}) == 256


@pytest.mark.parametrize("workers", [1, 2])
def test_augmentation_does_not_depend_on_the_workers(workers: int):
    images = build_dataset(
        DataSource("digits"), "train", train_transform(AugmentRecipe(16, random_erase=0.5), Preprocessing(16, 18))
    )
    images = torch.utils.data.Subset(images, range(48))
    ours, theirs = (
        build_train_loader(images, LoaderRecipe(batch_size=20, workers=w, seed=7), "cpu") for w in (0, workers)
    )
    epochs = []
    for epoch in (0, 1):
        for loader in (ours, theirs):
            start_epoch(loader, epoch)
        mine, other = list(ours), list(theirs)
        assert [len(labels) for _, labels in mine] == [20, 20, 8]
        for (images_a, labels_a), (images_b, labels_b) in zip(mine, other, strict=True):
            assert torch.equal(images_a, images_b) and torch.equal(labels_a, labels_b)
        epochs.append(torch.cat([batch for batch, _ in mine]))
    assert not torch.equal(*epochs)


def test_loading_leaves_the_global_generator_alone():
    loader = build_train_loader(Numbers(12), LoaderRecipe(batch_size=4, workers=0), "cpu")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    numbers = torch.cat([batch for batch, _ in loader])
    assert torch.equal(torch.rand(3), expected)
    assert len(set(numbers.tolist())) == 12


def test_neighbouring_seeds_mix_to_unrelated_ones():
    seeds = [mix_seeds(seed, epoch) for seed in range(20) for epoch in range(20)]
    assert len(set(seeds)) == 400 and all(0 <= seed < 2**32 for seed in seeds)
    assert mix_seeds(-1, 2**40) == mix_seeds(-1, 2**40)
