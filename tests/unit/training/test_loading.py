"""Batches on their way to the device: all of them, in order, and what users are told when loading fails."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from isomorphic.data.sources import DataSource, build_dataset
from isomorphic.data.transforms import Preprocessing
from isomorphic.errors import UserError
from isomorphic.training.augment import build_preparation, train_transform
from isomorphic.training.loading import _copied_ahead, prefetch
from isomorphic.training.recipe import AugmentRecipe, LoaderRecipe
from isomorphic.training.sampling import RawBatch, build_train_loader, start_epoch

PLAIN = AugmentRecipe()


class Numbers(Dataset):
    """Image i is filled with i; the process that loads image `fatal` kills itself."""

    def __init__(self, size: int, fatal: int | None = None) -> None:
        self.size = size
        self.fatal = fatal

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == self.fatal and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((3, 2, 2), index, dtype=torch.uint8), index


def three_batches(log: list[str]) -> Iterator[RawBatch]:
    """Batches of one image, labels 0 to 2, which say when they are loaded."""
    for number in range(3):
        log.append(f"load {number}")
        yield RawBatch(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.tensor([number]), torch.zeros(1, 4).long())


def failure(loader: DataLoader[RawBatch]) -> str:
    """What a pass over the loader is stopped by."""
    try:
        list(prefetch(loader, "cpu"))
    except UserError as error:
        # frees the loader's workers here and now: they take seconds to go when the garbage collector finds them
        traceback.clear_frames(error.__traceback__)
        return str(error)
    return "nothing"


@pytest.mark.parametrize("workers", [0, 2])
def test_all_batches_come_in_order(workers: int):
    loader = build_train_loader(Numbers(23), LoaderRecipe(batch_size=4, workers=workers), PLAIN, "cpu")
    expected = list(loader)
    batches = list(prefetch(loader, "cpu"))
    assert [len(batch.labels) for batch in batches] == [4, 4, 4, 4, 4, 3]
    for batch, same in zip(batches, expected, strict=True):
        assert isinstance(batch, RawBatch)
        assert all(torch.equal(part, other) for part, other in zip(batch, same, strict=True))
    assert list(prefetch([], "cpu")) == []


def test_on_the_cpu_nothing_is_loaded_before_it_is_asked_for():
    log = []
    for batch in prefetch(three_batches(log), "cpu"):
        log.append(f"use {batch.labels.item()}")
    assert log == ["load 0", "use 0", "load 1", "use 1", "load 2", "use 2"]


def test_on_a_gpu_the_next_batch_is_copied_before_this_one_is_used(monkeypatch: pytest.MonkeyPatch):
    """With streams that only write down what happens: a batch is waited for by its own event, after the next copy."""
    log: list[str] = []

    class Event:
        def record(self, stream: Stream) -> None:
            self.name = log[-1].replace("load", "copy")

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def wait_event(self, event: Event) -> None:
            log.append(f"wait for {event.name}")

    kept = []
    for name, stand_in in (("Stream", Stream), ("Event", Event), ("current_stream", Stream), ("stream", nullcontext)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: kept.append(tensor))
    for batch in _copied_ahead(three_batches(log), torch.device("cpu")):
        log.append(f"use {batch.labels.item()}")
        assert [id(part) for part in kept[-3:]] == [id(part) for part in batch]
    assert log == [
        *("load 0", "load 1", "wait for copy 0", "use 0", "load 2", "wait for copy 1", "use 1"),
        *("wait for copy 2", "use 2"),
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["const", "pixel"])
def test_a_gpu_gets_the_same_batches_and_never_makes_the_host_wait(mode: str):
    augment = AugmentRecipe(random_erase=0.5, random_erase_mode=mode, mixup_alpha=0.8, cutmix_alpha=1.0)
    loader = build_train_loader(Numbers(200), LoaderRecipe(batch_size=32, workers=2), augment, "cuda")
    prepare = build_preparation(augment, Preprocessing(), 200, "cuda", channels_last=True)
    expected = list(loader)
    batches = []
    try:
        for batch in prefetch(loader, "cuda"):
            torch.cuda.set_sync_debug_mode("error")
            images, labels = prepare(batch)
            torch.cuda.set_sync_debug_mode("default")
            assert images.is_cuda and labels.shape == (len(images), 200)
            batches.append(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, same in zip(batches, expected, strict=True):
        assert all(torch.equal(part.cpu(), other) for part, other in zip(batch, same, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_is_broken_off_leaves_the_next_one_whole(workers: int):
    loader = build_train_loader(Numbers(40), LoaderRecipe(batch_size=4, workers=workers), PLAIN, "cpu")
    start_epoch(loader, 1)
    whole = [batch.labels.tolist() for batch in prefetch(loader, "cpu")]
    for steps in (1, 3):
        batches = prefetch(loader, "cpu")
        assert [next(batches).labels.tolist() for _ in range(steps)] == whole[:steps]
        batches.close()
    assert [batch.labels.tolist() for batch in prefetch(loader, "cpu")] == whole


def test_a_worker_that_is_killed_is_one_line():
    loader = build_train_loader(Numbers(40, fatal=17), LoaderRecipe(batch_size=4, workers=2), PLAIN, "cpu")
    message = failure(loader)
    assert "\n" not in message and message.startswith("a data loader process died (killed by signal: Killed")
    assert message.endswith("lower --workers or --batch-size")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_in_one_line(tmp_path: Path, workers: int):
    for number in range(8):
        path = tmp_path / "train" / "cat" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (number, 0, 0)).save(path)
    path.write_text("not an image")
    augment = AugmentRecipe(8, auto_augment="rand-m9", random_erase=0.5)
    images = build_dataset(DataSource(root=str(tmp_path)), "train", train_transform(augment, Preprocessing(8, 8)))
    loader = build_train_loader(images, LoaderRecipe(batch_size=3, workers=workers), augment, "cpu")
    assert failure(loader) == (
        f"cannot read image {path}: not an image; replace or remove it, or leave out such images with "
        "--skip-unreadable (python tools/check_images.py DIR names all of them)"
    )
