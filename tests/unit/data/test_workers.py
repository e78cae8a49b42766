"""Loading processes: how many, how they are seeded, and what they outlive."""

from __future__ import annotations

import os
import pickle
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from isomorphic.data.sources import DataSource, build_dataset
from isomorphic.data.transforms import eval_transform
from isomorphic.data.workers import loader_options, naming_dead_workers
from isomorphic.errors import UserError
from tests.unit.data.conftest import TINY, synthetic


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
