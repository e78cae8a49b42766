"""Data sources, transforms and loaders: what is in them, who sees it, and what users are told."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.dataset import ImageDataset
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from isomorphic.data.loaders import Batch, build_eval_loader, build_scoring_loader, describe_unreadable
from isomorphic.data.sources import (
    DIGITS_FILE,
    DataSource,
    LabelledImages,
    Split,
    build_dataset,
    check_classes,
    class_count,
)
from isomorphic.data.transforms import Preprocessing, eval_transform
from isomorphic.data.workers import loader_options, naming_dead_workers
from isomorphic.errors import UserError
from isomorphic.processes import distributed

PIXELS = v2.PILToTensor()
DIGITS_ROWS_SHA256 = "f67d6a29d0e1f70e7f0cd9dcf25816b694881f4b8f27f5cc1db59551f0499fb8"
DIGITS_LABELS_SHA256 = "36901fba5c2482689f3081c3fb48dd4a4cee77655c9d0c89f799519582d4dd33"
TINY = Preprocessing(input_size=8, resize_size=8)


def save_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def every(dataset: LabelledImages) -> list[tuple[torch.Tensor, int]]:
    return [dataset[index] for index in range(len(dataset))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ with 2 + 1 images and val/ with 1 + 1, classes cat and dog."""
    for split, name, colour in [
        ("train", "cat/0.png", (255, 0, 0)),
        ("train", "cat/1.png", (250, 0, 0)),
        ("train", "dog/0.png", (0, 0, 255)),
        ("val", "cat/0.png", (200, 0, 0)),
        ("val", "dog/0.png", (0, 0, 200)),
    ]:
        save_image(tmp_path / split / name, colour)
    return tmp_path


# --- digits ---


def test_digits_file_holds_the_1797_images_unchanged():
    with np.load(DIGITS_FILE) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    assert images.shape == (1797, 8, 8) and images.dtype == np.uint8 and images.max() == 16
    assert labels.shape == (1797,) and labels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # the set of rows as scikit-learn gives them, in an order that does not depend on the split
    rows = sorted(image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True))
    assert hashlib.sha256(b"".join(rows)).hexdigest() == DIGITS_ROWS_SHA256
    assert hashlib.sha256(labels.tobytes()).hexdigest() == DIGITS_LABELS_SHA256
    assert DIGITS_FILE.stat().st_size < 60_000


def test_digits_split_is_fixed_and_stratified():
    train, val = (build_dataset(DataSource("digits"), split, PIXELS) for split in ("train", "val"))
    train_labels, val_labels = ([label for _, label in every(part)] for part in (train, val))
    assert (len(train_labels), len(val_labels)) == (1437, 360)
    assert np.bincount(val_labels).tolist() == [36] * 10
    assert np.bincount(train_labels).min() == 138
    assert val_labels[:40] != sorted(val_labels[:40])


def test_digits_are_grey_rgb_images_with_the_full_range():
    image, label = build_dataset(DataSource("digits"), "train", PIXELS).load(0)
    assert (image.mode, image.size) == ("RGB", (8, 8)) and isinstance(label, int)
    stacked = torch.stack([pixels for pixels, _ in every(build_dataset(DataSource("digits"), "val", PIXELS))])
    assert (stacked[:, 0] == stacked[:, 1]).all() and (stacked[:, 0] == stacked[:, 2]).all()
    assert stacked.unique().tolist() == [round(level * 255 / 16 + 1e-9) for level in range(17)]


def test_digits_are_recognisable():
    """Nearest class mean gets about 90% of real digits right: labels belong to their images."""
    flat = {}
    for split in ("train", "val"):
        pairs = every(build_dataset(DataSource("digits"), split, PIXELS))
        flat[split] = (
            torch.stack([pixels[0].flatten().float() for pixels, _ in pairs]),
            torch.tensor([label for _, label in pairs]),
        )
    pixels, labels = flat["train"]
    means = torch.stack([pixels[labels == digit].mean(0) for digit in range(10)])
    guesses = torch.cdist(flat["val"][0], means).argmin(1)
    assert (guesses == flat["val"][1]).float().mean() > 0.85


def test_missing_digits_file_says_how_to_restore_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("isomorphic.data.sources.DIGITS_FILE", tmp_path / "digits.npz")
    with pytest.raises(UserError, match=r"digits\.npz is missing: restore it with"):
        build_dataset(DataSource("digits"), "val", PIXELS)


# --- synthetic ---


def synthetic(
    split: Split = "val", *, size: int = 64, seed: int = 0, num_classes: int | None = 10, image_size: int = 8
) -> LabelledImages:
    source = DataSource("synthetic", synthetic_size=size, seed=seed)
    return build_dataset(source, split, PIXELS, num_classes=num_classes, image_size=image_size)


def test_synthetic_image_depends_on_seed_split_and_index_alone():
    short, long = synthetic(size=4), synthetic(size=64)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    for index in (3, 0, 2):
        assert torch.equal(short[index][0], long[index][0]) and short[index][1] == long[index][1]
    image = long[0][0]
    for other in (long[1], synthetic(seed=1)[0], synthetic("train")[0]):
        assert not torch.equal(image, other[0])


def test_synthetic_size_classes_and_range():
    dataset = synthetic(num_classes=7, image_size=24)
    assert len(dataset) == 64
    assert len(every(dataset)) == 64
    assert dataset[5][0].shape == (3, 24, 24)
    assert {label for _, label in every(dataset)} == set(range(7))
    assert max(label for _, label in every(synthetic(num_classes=None))) in range(900, 1000)
    values = torch.stack([pixels for pixels, _ in every(dataset)]).float()
    assert values.mean() == pytest.approx(127.5, abs=1.5)


# --- folders ---


def test_image_folder_gives_both_splits(folder: Path):
    source = DataSource(root=str(folder))
    assert [label for _, label in every(build_dataset(source, "train", PIXELS))] == [0, 0, 1]
    val = build_dataset(source, "val", PIXELS)
    assert [label for _, label in val] == [0, 1]
    assert val[1][0].shape == (3, 10, 12) and val[1][0][:, 0, 0].tolist() == [0, 0, 200]


def test_grey_and_transparent_images_become_rgb(folder: Path):
    Image.new("L", (4, 4), 77).save(folder / "val" / "cat" / "0.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 100)).save(folder / "val" / "dog" / "0.png")
    images = [pixels for pixels, _ in every(build_dataset(DataSource(root=str(folder)), "val", PIXELS))]
    assert [image[:, 0, 0].tolist() for image in images] == [[77, 77, 77], [1, 2, 3]]


def test_evaluation_needs_no_train_folder(folder: Path):
    (folder / "train").rename(folder / "elsewhere")
    source = DataSource(root=str(folder))
    assert class_count(source) == 2
    assert len(build_dataset(source, "val", PIXELS)) == 2


def test_missing_folder_names_the_flag_and_the_way_out(tmp_path: Path):
    source = DataSource(root=str(tmp_path / "nowhere"))
    for call in (lambda: build_dataset(source, "train", PIXELS), lambda: class_count(source)):
        with pytest.raises(UserError, match=r"nowhere/(train|val): --data-path .*--dataset digits"):
            call()


def test_empty_class_folders_are_named(folder: Path):
    (folder / "train" / "dog" / "0.png").unlink()
    with pytest.raises(UserError, match="no images in class folder .*train/dog: fill or remove"):
        build_dataset(DataSource(root=str(folder)), "train", PIXELS)
    for number in range(7):
        for split in ("train", "val"):
            (folder / split / f"empty{number}").mkdir()
    with pytest.raises(UserError, match="train/empty0, .* and 3 more"):
        build_dataset(DataSource(root=str(folder)), "train", PIXELS)


def test_images_without_class_folders_are_explained(tmp_path: Path):
    save_image(tmp_path / "val" / "ILSVRC2012_val_00000001.png", (0, 0, 0))
    with pytest.raises(UserError, match="no class folders in .*val: each class needs a folder"):
        build_dataset(DataSource(root=str(tmp_path)), "val", PIXELS)


def test_splits_with_different_classes_are_refused(folder: Path):
    """Labels are positions of folder names: with a class missing, all behind it would shift silently."""
    save_image(folder / "train" / "bird" / "0.png", (0, 255, 0))
    for split in ("train", "val"):
        with pytest.raises(UserError, match="need the same class folders; only one has: bird"):
            build_dataset(DataSource(root=str(folder)), split, PIXELS)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "gone", "bad_chunk", "unknown_encoding"])
@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named_in_one_line(folder: Path, damage: str, workers: int):
    bad = folder / "val" / "dog" / "0.png"
    source = DataSource(root=str(folder))
    dataset = build_dataset(source, "val", eval_transform(TINY))
    content = bad.read_bytes()
    damaged = {
        "truncated": content[:-30],
        "text": b"<html>Not found</html>",
        "empty": b"",
        "unknown_encoding": b"BLP2" + struct.pack("<i4b2I", 1, 9, 0, 0, 0, 8, 8) + bytes(2000),
        "bad_chunk": content[:33] + b"\x00\x00\x00\x04\xd1cQ\x8d" + content[33:],
    }
    bad.unlink() if damage == "gone" else bad.write_bytes(damaged[damage])
    with pytest.raises(UserError) as caught:
        list(build_eval_loader(dataset, 4, workers, "cpu"))
    assert str(caught.value).startswith(f"cannot read image {bad}: ")
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    # frees the loader's workers here and now: they take seconds to go when the garbage collector finds them
    traceback.clear_frames(caught.value.__traceback__)


def mark_images(root: Path, count: int, damaged: set[int]) -> LabelledImages:
    """`count` images in one class, of which each has its own red; some are text."""
    for number in range(count):
        path = root / "val" / "cat" / f"{number:03}.png"
        save_image(path, (number, 0, 0), (8, 8))
        if number in damaged:
            path.write_text("not an image")
    return build_dataset(DataSource(root=str(root)), "val", v2.Compose([PIXELS, v2.ToDtype(torch.float32)]))


def reds(batches: list[Batch]) -> list[list[int]]:
    return [batch.images[:, 0, 0, 0].int().tolist() if len(batch.labels) else [] for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_can_be_left_out_and_named_instead(tmp_path: Path, workers: int):
    dataset = mark_images(tmp_path, 8, {1, 3, 4, 5})
    batches = list(build_eval_loader(dataset, 3, workers, "cpu", collect_unreadable=True))
    assert all(isinstance(batch, Batch) for batch in batches)
    assert reds(batches) == [[0, 2], [], [6, 7]]
    assert [len(batch.labels) for batch in batches] == [2, 0, 2]
    expected = [f"{tmp_path}/val/cat/{number:03}.png: not an image" for number in (1, 3, 4, 5)]
    assert [list(batch.unreadable) for batch in batches] == [expected[:1], expected[1:], []]


def test_each_process_names_the_unreadable_images_of_its_own_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    dataset = mark_images(tmp_path, 7, {0, 3, 6})
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        batches = list(build_eval_loader(dataset, 2, 0, "cpu", collect_unreadable=True))
        names = [Path(name.partition(": ")[0]).stem for batch in batches for name in batch.unreadable]
        seen.append((reds(batches), names))
    assert seen == [([[2], [4]], ["000", "006"]), ([[1], [5]], ["003"])]


def test_unreadable_images_are_described_in_one_line(tmp_path: Path):
    assert describe_unreadable(["a.png: not an image"]) == "image a.png: not an image"
    assert describe_unreadable(["a: x", "b: y"]) == "2 images: a: x; b: y"
    line = describe_unreadable([f"{number}: x" for number in range(12)])
    assert line == "12 images: " + "; ".join(f"{number}: x" for number in range(10)) + "; and 2 more"
    assert "more" not in describe_unreadable(["a: x"] * 10)


# --- timm's names ---


def test_timm_names_are_opened_from_disk(folder: Path):
    source = DataSource("torch/image_folder", root=str(folder))
    assert class_count(source) == 2
    assert [label for _, label in every(build_dataset(source, "train", PIXELS))] == [0, 0, 1]
    assert [label for _, label in every(build_dataset(source, "val", PIXELS))] == [0, 1]
    (folder / "val" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read image .*val/cat/0.png: "):
        build_dataset(source, "val", PIXELS)[0]


def test_grey_images_of_timm_names_become_rgb(tmp_path: Path):
    """Three images in the format of MNIST, which has one channel."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(3 * 28 * 28, dtype=np.uint8)
    for part in ("train", "t10k"):
        images = struct.pack(">4i", 2051, 3, 28, 28) + pixels.tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 3) + bytes([7, 2, 9]))
    source = DataSource("torch/mnist", root=str(tmp_path))
    dataset = build_dataset(source, "val", PIXELS)
    assert class_count(source) == 10
    assert [label for _, label in every(dataset)] == [7, 2, 9]
    assert dataset[0][0].shape == (3, 28, 28) and dataset[0][0][:, 0, 5].tolist() == [5, 5, 5]


def test_a_timm_reader_never_skips_an_unreadable_image(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """timm's ImageDataset (which hfds/ names give) would hand out the neighbour instead."""
    opened = ImageDataset(str(folder / "train"))
    monkeypatch.setattr("isomorphic.data.sources.create_dataset", lambda *args, **kwargs: opened)
    source = DataSource("hfds/some/name", root=str(folder))
    dataset = build_dataset(source, "train", PIXELS)
    assert class_count(source) == 2
    assert [label for _, label in every(dataset)] == [0, 0, 1]
    (folder / "train" / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read image .*train/cat/1.png"):
        dataset[1]


@pytest.mark.parametrize("name", ["digit", "cifar10", "imagenet", "tfds/mnist", "wds/shards"])
def test_unknown_names_are_refused_even_where_the_folder_exists(folder: Path, name: str):
    """timm opens any name without a prefix as a folder: a misspelt name would give other data."""
    for call in (
        lambda: build_dataset(DataSource(name, root=str(folder)), "val", PIXELS),
        lambda: class_count(DataSource(name, root=str(folder))),
    ):
        with pytest.raises(UserError, match=f"unknown dataset '{name}': use digits, synthetic"):
            call()


@pytest.mark.parametrize("name", ["torch/no_such_name", "torch/cifar10", "torch/mnist", "torch/imagenet"])
def test_timm_failures_are_one_line(tmp_path: Path, name: str):
    with pytest.raises(UserError) as caught:
        build_dataset(DataSource(name, root=str(tmp_path)), "val", PIXELS)
    assert str(caught.value).startswith(f"cannot open dataset '{name}' under {tmp_path}: ")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.rglob("*.gz")) == [], "nothing is downloaded"


# --- classes ---


def test_class_counts(folder: Path):
    assert class_count(DataSource("digits")) == 10
    assert class_count(DataSource("synthetic")) is None
    assert class_count(DataSource(root=str(folder))) == 2
    for split in ("train", "val"):
        save_image(folder / split / "emu" / "0.png", (9, 9, 9))
    assert class_count(DataSource(root=str(folder))) == 3


def test_check_classes_names_both_numbers():
    check_classes(10, DataSource("digits"))
    check_classes(123, DataSource("synthetic"))
    with pytest.raises(UserError, match="the model has 1000 classes but dataset 'digits' has 10"):
        check_classes(1000, DataSource("digits"))


# --- transforms ---


def test_eval_transform_is_pillow_resize_crop_and_normalise():
    pixels = np.random.default_rng(0).integers(256, size=(300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    tensor = eval_transform(Preprocessing(input_size=224, resize_size=256))(image)
    resized = image.resize((341, 256), Image.Resampling.BICUBIC)  # 400·256/300 = 341.3
    left, top = round((341 - 224) / 2), round((256 - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert tensor.shape == (3, 224, 224) and tensor.dtype == torch.float32
    assert type(tensor) is torch.Tensor
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_eval_transform_follows_interpolation_mean_and_std():
    image = Image.fromarray(np.random.default_rng(1).integers(256, size=(20, 20, 3), dtype=np.uint8))
    plain = Preprocessing(8, 9, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    bilinear = eval_transform(plain)(image)
    expected = np.asarray(image.resize((9, 9), Image.Resampling.BILINEAR), dtype=np.float32)[:8, :8] / 255
    np.testing.assert_allclose(bilinear.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    shifted = eval_transform(Preprocessing(8, 9, "bilinear", (0.5, 0.0, 0.0), (0.25, 1.0, 1.0)))(image)
    torch.testing.assert_close(shifted[0], (bilinear[0] - 0.5) / 0.25)
    torch.testing.assert_close(shifted[1:], bilinear[1:])


def test_eval_transform_enlarges_digits():
    dataset = build_dataset(DataSource("digits"), "val", eval_transform(Preprocessing(32, 36)))
    assert dataset[0][0].shape == (3, 32, 32)


def test_eval_transform_refuses_what_would_spoil_images():
    with pytest.raises(UserError, match="256 are too small for an input of 288.*--val-resize-size 288"):
        eval_transform(Preprocessing(input_size=288))
    with pytest.raises(UserError, match="unknown interpolation 'cubic': choose one of .*bicubic"):
        eval_transform(Preprocessing(interpolation="cubic"))


# --- loaders ---


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 361])
def test_shards_cover_each_image_once(monkeypatch: pytest.MonkeyPatch, world_size: int, size: int):
    whole = synthetic(size=size, num_classes=10**6)
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    labels: list[int] = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shard = [batch for _, batch in build_eval_loader(whole, 32, 0, "cpu")]
        assert all(len(batch) == 32 for batch in shard[:-1])
        labels += torch.cat(shard).tolist() if shard else []
    assert sorted(labels) == sorted(label for _, label in whole)


def test_eval_loader_keeps_order_and_leaves_the_global_random_state_alone():
    dataset = synthetic(size=50)
    before = torch.get_rng_state()
    labels = torch.cat([batch for _, batch in build_eval_loader(dataset, 16, 1, "cpu")]).tolist()
    assert labels == [label for _, label in every(dataset)]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_scoring_batches_are_the_same_for_any_number_of_processes(monkeypatch: pytest.MonkeyPatch, world_size: int):
    dataset = synthetic(size=50, num_classes=10**6)

    def batches(rank: int = 0, world_size: int = 1, seed: int = 0, num_batches: int = 5) -> list[list[int]]:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world_size)
        loader = build_scoring_loader(dataset, 8, num_batches, 0, "cpu", seed=seed)
        return [labels.tolist() for _, labels in loader]

    alone = batches()
    assert [len(batch) for batch in alone] == [8] * 5
    assert len({label for batch in alone for label in batch}) == 40, "no image twice"
    assert alone != batches(seed=1)
    shares = [batches(rank, world_size) for rank in range(world_size)]
    assert [shares[number % world_size][number // world_size] for number in range(5)] == alone
    assert sum(len(share) for share in shares) == 5
    assert [len(batch) for batch in batches(num_batches=100)] == [8] * 6 + [2]


class Draws(torch.utils.data.Dataset):
    """Each item is a draw from the three random states that an augmentation may use."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()).item(), np.random.rand(), random.random()])


def test_workers_and_order_repeat_with_the_seed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("isomorphic.data.workers._available_cores", lambda: 2)

    def run(seed: int) -> torch.Tensor:
        return torch.cat(list(DataLoader(Draws(), 2, shuffle=True, **loader_options(2, "cpu", seed=seed))))

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first, again)
    for column in range(4):
        assert not torch.equal(first[:, column], other[:, column])


def test_no_more_workers_than_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("isomorphic.data.workers._available_cores", lambda: 3)
    assert loader_options(8, "cpu")["num_workers"] == 3
    assert loader_options(1, "cpu")["num_workers"] == 1
    assert not loader_options(0, "cpu")["pin_memory"] and loader_options(0, "cuda")["pin_memory"]


class ProcessGroups(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return os.getpgid(0)


def test_workers_are_spared_signals_to_the_process_group():
    """Ctrl-C and torchrun's SIGTERM reach whole groups; a run that saves itself first still needs its workers."""
    assert os.getpgid(0) not in torch.cat(list(DataLoader(ProcessGroups(), 1, **loader_options(2, "cpu")))).tolist()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_workers_outlive_signals_that_a_scheduler_sends_to_all(number: signal.Signals):
    batches = iter(DataLoader(torch.arange(6), 1, **loader_options(1, "cpu")))  # type: ignore[arg-type]
    seen = [next(batches)]
    worker = batches._workers[0]  # type: ignore[attr-defined]
    subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)  # the scheduler is another process
    seen += batches
    assert torch.cat(seen).tolist() == list(range(6))


def test_workers_heed_the_process_that_they_load_for():
    """Python terminates and then awaits them when it ends with an exception."""
    batches = iter(DataLoader(synthetic(size=64), 2, **loader_options(1, "cpu")))
    worker = batches._workers[0]  # type: ignore[attr-defined]
    next(batches)
    worker.terminate()
    worker.join(timeout=60)
    assert worker.exitcode == 0
    torch._C._remove_worker_pids(id(batches))
    batches._shutdown = True  # type: ignore[attr-defined]  # the worker may have died with a lock that this would wait for


DEATH = """
import os, signal, sys, time
from torch.utils.data import DataLoader
from isomorphic.commands import entry
from isomorphic.data.sources import DataSource, build_dataset
from isomorphic.data.workers import loader_options, naming_dead_workers

def main():
    images = build_dataset(DataSource("synthetic"), "train", lambda image: 0, image_size=8)
    batches = iter(DataLoader(images, 2, **loader_options(1, "cpu")))
    with naming_dead_workers():
        for _ in batches:
            os.kill(batches._workers[0].pid, signal.SIGKILL)
            time.sleep(60)  # the batch is used: torch raises in the middle of this

entry.run(main)
"""


def test_a_worker_that_dies_while_a_batch_is_used_ends_the_command_in_one_line():
    """In a process of its own: torch raises wherever it is when any child ends, as long as the loader is there."""
    done = subprocess.run([sys.executable, "-c", DEATH], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.match(r"-c: a data loader process died \(killed by signal: Killed.*lower --workers", done.stderr)


@pytest.mark.parametrize("error", [RuntimeError("something else"), UserError("a message"), KeyError("k")])
def test_other_errors_pass(error: Exception):
    with pytest.raises(type(error)) as caught, naming_dead_workers():
        raise error
    assert caught.value is error


def test_want_of_shared_memory_is_one_line():
    text = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    with (
        pytest.raises(UserError, match=r"\(unable to allocate shared memory\).*lower --workers"),
        naming_dead_workers(),
    ):
        raise RuntimeError(f"{text}RuntimeError: unable to allocate shared memory(shm) for file </torch_1_2>: ... (28)")


def test_datasets_travel_to_worker_processes(folder: Path):
    """Where workers are not forked (macOS, Windows, newer Pythons), dataset and transform are pickled."""
    for source in (DataSource("digits"), DataSource("synthetic"), DataSource(root=str(folder))):
        dataset = build_dataset(source, "val", eval_transform(TINY))
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(dataset[1][0], copy[1][0])
