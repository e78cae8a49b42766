"""Data sources: what is in them, and what users are told of those that are not what they should be."""

from __future__ import annotations

import hashlib
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.dataset import ImageDataset

from isomorphic.data.sources import (
    DIGITS_FILE,
    DataSource,
    build_dataset,
    check_classes,
    class_count,
    unlabelled_images,
)
from isomorphic.errors import UserError
from tests.unit.data.conftest import PIXELS, every, save_image, synthetic

DIGITS_ROWS_SHA256 = "f67d6a29d0e1f70e7f0cd9dcf25816b694881f4b8f27f5cc1db59551f0499fb8"
DIGITS_LABELS_SHA256 = "36901fba5c2482689f3081c3fb48dd4a4cee77655c9d0c89f799519582d4dd33"


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


def test_a_class_that_only_val_has_is_refused(folder: Path):
    """Labels are positions of folder names in train/: a class that is not there has none."""
    save_image(folder / "val" / "bird" / "0.png", (0, 255, 0))
    for split in ("train", "val"):
        with pytest.raises(UserError, match="need the same class folders; only one has: bird"):
            build_dataset(DataSource(root=str(folder)), split, PIXELS)


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
    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", lambda *args, **kwargs: opened)
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


# --- without labels ---


def test_images_without_labels_are_all_that_pillow_reads_in_a_folder(tmp_path: Path):
    for name in ("z.png", "a/b/1.JPEG", "a/2.gif", "a/notes.txt", "a/b/index"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in ("", ".txt"):
            path.write_text("no image")
        else:
            Image.new("L", (2, 3), 7).save(path)
    images = unlabelled_images(str(tmp_path), lambda image: (image.mode, image.size))
    assert [images[index][0] for index in range(len(images))] == [("RGB", (2, 3))] * 3
    assert len(images.notes) == 1 and images.notes[0].startswith(f"Left out of {tmp_path}: ")
    assert "1 .txt" in images.notes[0]


def test_folders_without_images(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    for folder, message in ((tmp_path, r"no images in .* \(left out: 1 .txt"), (tmp_path / "missing", "no folder ")):
        with pytest.raises(UserError, match=message):
            unlabelled_images(str(folder), lambda image: image)
