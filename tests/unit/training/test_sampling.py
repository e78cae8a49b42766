"""Order and augmentation depend on seed, epoch and position alone."""

from __future__ import annotations

import math
import pickle
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

from isomorphic.data.sources import DataSource, build_dataset
from isomorphic.data.transforms import Preprocessing
from isomorphic.processes import distributed
from isomorphic.training.augment import train_transform
from isomorphic.training.recipe import AugmentRecipe, LoaderRecipe
from isomorphic.training.sampling import (
    RawBatch,
    SeededImages,
    SeededSampler,
    build_train_loader,
    drawing_from,
    images_left_out,
    mix_seeds,
    start_epoch,
)

PLAIN = AugmentRecipe()


class Numbers(Dataset):
    """Image i holds random numbers from torch, numpy and `random`, and has label i."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()]), index


class Blank(Dataset):
    """One black image, as often as you like."""

    def __init__(self, height: int = 32, width: int = 32) -> None:
        self.image = torch.zeros(3, height, width, dtype=torch.uint8)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.image, index


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


@pytest.mark.parametrize(
    ("images", "batch", "sizes"),
    [(9, 8, [8]), (9, 4, [4, 4]), (10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 1, [1, 1, 1]), (1, 8, [1])],
)
def test_a_last_batch_of_one_is_left_out_for_models_that_do_not_take_it(images: int, batch: int, sizes: list[int]):
    recipe = LoaderRecipe(batch, 0)
    whole, loader = (
        build_train_loader(Numbers(images), recipe, PLAIN, "cpu", takes_single=single) for single in (True, False)
    )
    (all_batches,), (batches,) = epochs_of(whole, 3), epochs_of(loader, 3)
    assert [len(each.labels) for each in batches] == sizes and len(loader) == len(sizes)
    assert_same(batches, all_batches[: len(sizes)])  # the others are as they were
    assert images_left_out(whole) == 0 and images_left_out(loader) == images - sum(sizes)
    (rest,) = epochs_of(loader, 3, skip=batch)
    assert_same(rest, batches[1:])
    assert epochs_of(loader, 3, skip=sum(sizes)) == [[]]


def test_another_image_is_left_out_each_time():
    loader = build_train_loader(Numbers(9), LoaderRecipe(8, 0), PLAIN, "cpu", takes_single=False)
    seen = [
        {label for batch in batches for label in batch.labels.tolist()} for batches in epochs_of(loader, *range(40))
    ]
    assert all(len(labels) == 8 for labels in seen)
    assert {label for labels in seen for label in set(range(9)) - labels} == set(range(9))


def test_each_process_leaves_one_out(as_process: Callable[[int, int], None]):
    for rank in range(2):
        as_process(rank, 2)
        loader = build_train_loader(Numbers(10), LoaderRecipe(4, 0), PLAIN, "cpu", takes_single=False)
        assert len(loader.sampler) == 4 and images_left_out(loader) == 2  # type: ignore[arg-type]


def digits(augment: AugmentRecipe, size: int = 48) -> Dataset[tuple[Tensor, int]]:
    images = build_dataset(DataSource("digits"), "train", train_transform(augment, Preprocessing(16, 18)))
    return Subset(images, range(size))


def epochs_of(loader: DataLoader[RawBatch], *epochs: int, skip: int = 0) -> list[list[RawBatch]]:
    passes = []
    for epoch in epochs:
        start_epoch(loader, epoch, skip)
        passes.append(list(loader))
    return passes


def assert_same(ours: list[RawBatch], theirs: list[RawBatch]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for part, other_part in zip(mine, other, strict=True):
            assert torch.equal(part, other_part)


@pytest.mark.parametrize("policy", ["ra", "rand-m9-mstd0.5-inc1", "augmix-m5-w2-d1", "original-mstd0.5"])
def test_augmentation_does_not_depend_on_the_workers(policy: str):
    """timm's policies and its crop draw from `random` and numpy."""
    augment = AugmentRecipe(16, train_interpolation="random", auto_augment=policy, random_erase=0.5)
    images = digits(augment)
    alone, helped = (
        build_train_loader(images, LoaderRecipe(batch_size=20, workers=w, seed=7), augment, "cpu") for w in (0, 2)
    )
    ours, theirs = epochs_of(alone, 0, 1), epochs_of(helped, 0, 1)
    for mine, other in zip(ours, theirs, strict=True):
        assert [len(batch.labels) for batch in mine] == [20, 20, 8]
        assert_same(mine, other)
    first, second = (torch.cat([batch.images for batch in batches]) for batches in ours)
    assert not torch.equal(first, second)


def test_batches_are_bytes_labels_and_boxes():
    batch = next(iter(build_train_loader(digits(AugmentRecipe(16)), LoaderRecipe(8, 0), PLAIN, "cpu")))
    assert isinstance(batch, RawBatch)
    assert [(part.dtype, tuple(part.shape)) for part in batch] == [
        (torch.uint8, (8, 3, 16, 16)),
        (torch.int64, (8,)),
        (torch.int64, (8, 4)),
    ]
    assert not batch.boxes.any()


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_skipped_is_missing_from_the_epoch_and_nothing_else(workers: int, repeats: int):
    augment = AugmentRecipe(16, random_erase=0.5)
    recipe = LoaderRecipe(batch_size=20, workers=workers, ra_reps=repeats, seed=1)
    loader = build_train_loader(digits(augment, 300), recipe, augment, "cpu")
    (whole,) = epochs_of(loader, 2)
    (rest,) = epochs_of(loader, 2, skip=4 * 20)
    assert len(loader) == len(whole) == len(rest) + 4
    assert_same(rest, whole[4:])
    (again,) = epochs_of(loader, 2)
    assert_same(again, whole)
    assert epochs_of(loader, 2, skip=len(whole) * 20) == [[]]


def test_skipped_images_are_not_loaded(monkeypatch: pytest.MonkeyPatch):
    loaded = []
    monkeypatch.setattr(Numbers, "__getitem__", lambda self, index: (loaded.append(index) or torch.zeros(1), index))
    loader = build_train_loader(Numbers(12), LoaderRecipe(batch_size=4, workers=0), PLAIN, "cpu")
    ((batch,),) = epochs_of(loader, 0, skip=8)
    assert sorted(loaded) == sorted(batch.labels.tolist()) and len(loaded) == 4


def global_states() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),
    ]


def test_loading_leaves_the_global_generators_alone():
    loader = build_train_loader(Numbers(12), LoaderRecipe(batch_size=4, workers=0), PLAIN, "cpu")
    passes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = global_states()
        numbers = torch.cat([batch.images for batch in loader])
        assert global_states() == before
        expected = torch.rand(()).item(), random.random(), np.random.rand()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        assert expected == (torch.rand(()).item(), random.random(), np.random.rand())
        assert len(set(numbers.flatten().tolist())) == 36
        passes.append(numbers)
    assert torch.equal(*passes)


def test_generators_come_back_after_an_error():
    before = global_states()
    with pytest.raises(ZeroDivisionError), drawing_from(3):
        print(random.random(), np.random.rand(), torch.rand(()), 1 / 0)
    assert global_states() == before


def test_the_three_generators_are_unrelated():
    draws = []
    for seed in range(2000):
        with drawing_from(seed):
            draws.append([torch.rand((), dtype=torch.float64).item(), np.random.rand(), random.random()])
    correlation = np.corrcoef(np.array(draws).T)
    assert np.abs(correlation - np.eye(3)).max() < 0.1  # σ = 0.022


# --- boxes to erase ---


def test_boxes_are_those_of_torchvision():
    """The same generator, in the same state, makes torchvision erase the same rectangle."""
    images = SeededImages(Blank(), random_erase=0.6)
    theirs = v2.RandomErasing(0.6)
    boxes = 0
    for seed in range(200):
        top, left, height, width = images[0, seed][2].tolist()
        torch.manual_seed(seed)
        erased = theirs(torch.ones(1, 32, 32))[0] == 0
        expected = torch.zeros(32, 32, dtype=torch.bool)
        expected[top : top + height, left : left + width] = True
        assert torch.equal(erased, expected)
        boxes += height > 0
    assert 100 <= boxes <= 140


def test_boxes_are_distributed_as_timms():
    images, theirs = SeededImages(Blank(64, 64), random_erase=1.0), RandomErasing(1.0, mode="pixel", device="cpu")
    mine = np.array([images[0, seed][2].tolist() for seed in range(1500)], dtype=float)
    random.seed(0)
    other = []
    for _ in range(1500):
        rows, columns = (theirs(torch.zeros(1, 64, 64))[0] != 0).nonzero().T.numpy()
        other.append([rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1])
    for measure in (
        lambda b: b[:, 0] / 64,
        lambda b: b[:, 1] / 64,
        lambda b: b[:, 2] * b[:, 3] / 64**2,
        lambda b: np.log(b[:, 2] / b[:, 3]),
    ):
        a, b = measure(mine), measure(np.array(other, dtype=float))
        assert abs(a.mean() - b.mean()) < 4 * math.hypot(a.std(), b.std()) / math.sqrt(1500)
        assert a.std() == pytest.approx(b.std(), rel=0.1)


def test_a_box_that_never_fits_is_none():
    assert SeededImages(Blank(1, 100), random_erase=1.0)[0, 0][2].tolist() == [0, 0, 0, 0]


def test_erasing_leaves_the_transform_its_numbers():
    plain, erased = (SeededImages(Numbers(9), p)[4, 11] for p in (0.0, 0.0001))
    assert torch.equal(plain[0], erased[0])


def test_images_travel_to_worker_processes():
    augment = AugmentRecipe(16, train_interpolation="random", auto_augment="augmix-m5-w2-d1", random_erase=1.0)
    images = SeededImages(digits(augment), 1.0)
    for part, copy in zip(images[3, 5], pickle.loads(pickle.dumps(images))[3, 5], strict=True):
        assert np.array_equal(part, copy)


def test_neighbouring_seeds_mix_to_unrelated_ones():
    seeds = [mix_seeds(seed, epoch) for seed in range(20) for epoch in range(20)]
    assert len(set(seeds)) == 400 and all(0 <= seed < 2**32 for seed in seeds)
    assert mix_seeds(-1, 2**40) == mix_seeds(-1, 2**40)
