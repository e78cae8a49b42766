"""Loaders: who sees which image, and what becomes of images that cannot be read."""

from __future__ import annotations

import struct
import traceback
from pathlib import Path

import pytest
import torch
from torchvision.transforms import v2

from isomorphic.data.loaders import Batch, build_eval_loader, build_scoring_loader
from isomorphic.data.skipping import describe_unreadable
from isomorphic.data.sources import DataSource, LabelledImages, build_dataset
from isomorphic.data.transforms import eval_transform
from isomorphic.errors import UserError
from isomorphic.processes import distributed
from tests.unit.data.conftest import PIXELS, TINY, every, save_image, synthetic


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
