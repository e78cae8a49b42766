"""The processes that load images: how many, which signals they heed, and what is said when one dies."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch

from isomorphic.errors import UserError


class DeadWorker(UserError):
    """A loader's worker process died. It may have held a lock that torch waits for when the loader goes."""


def loader_options(workers: int, device: torch.device | str, *, seed: int = 0) -> dict[str, Any]:
    """Settings that every DataLoader here shares: worker processes, pinned memory and a seeded generator.

    The generator decides the order of a shuffled loader and seeds torch, numpy and random in each worker, so
    that augmentation repeats with the seed; it also keeps a loader from drawing on the global random state.
    More workers than cores only slow each other down, so `workers` is an upper limit. A worker is sent for two
    batches ahead, as by default.
    """
    return {
        "num_workers": min(workers, _available_cores()),
        "pin_memory": torch.device(device).type == "cuda",
        "generator": torch.Generator().manual_seed(seed),
        "worker_init_fn": _outlive_signals,
    }


@contextlib.contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turns the death of a loader's worker process into a `DeadWorker`.

    torch hears of it by a signal and raises wherever the main process happens to be: this must enclose the body of a
    loop over a loader as well.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"DataLoader worker \(pid|unable to allocate shared memory", str(error)):
            raise
        reason = re.search(r"killed by signal: \w[\w ]*|unable to allocate shared memory", f"{error} {error.__cause__}")
        raise DeadWorker(
            f"a data loader process died ({reason[0] if reason else 'unexpectedly'}), most likely for want of memory "
            "or of shared memory (/dev/shm): lower --workers or --batch-size"
        ) from error


_OUTLIVED = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP}


def _outlive_signals(worker: int) -> None:
    """Ctrl-C, torchrun and schedulers signal whole groups, or all processes of a job.

    The main process decides what follows, and needs its workers until then. They notice by themselves that it is gone;
    while it is there, its own SIGTERM ends them: Python waits for that when it ends with an exception.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    if hasattr(signal, "sigwaitinfo"):  # tells who sent a signal, which a handler is not told
        signal.pthread_sigmask(signal.SIG_BLOCK, _OUTLIVED)
        threading.Thread(target=_heed_the_parent_alone, daemon=True).start()


def _heed_the_parent_alone() -> None:
    while True:
        signalled = signal.sigwaitinfo(_OUTLIVED)
        if signalled.si_signo == signal.SIGTERM and signalled.si_pid == os.getppid():
            os._exit(0)


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
