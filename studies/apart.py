"""Measuring many models, each in a process of its own, which may crash, take too long, or too much memory."""

from __future__ import annotations

import csv
import dataclasses
import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from isomorphic.files import atomic_write

OK = "ok"
# Address space for data, so that a model that takes too much fails alone.
MEMORY_LIMIT = 8 * 2**30


class Row(Protocol):
    """What was measured of one model, a dataclass; its status is "ok", or the stage that failed and why."""

    status: str


AnyRow = TypeVar("AnyRow", bound=Row)
# (what to measure, a function that takes the row as far as it is known) -> the row
Measure = Callable[[Any, Callable[[AnyRow], None]], AnyRow]


def measure_all(
    measure: Measure[AnyRow], started: Sequence[tuple[Any, AnyRow]], jobs: int, time_limit: float
) -> Iterator[AnyRow]:
    """One row a model, in their order; `jobs` processes at a time, of one thread each.

    Args:
        measure: a function of a module, which another process can import.
        started: what to measure, and its row as yet, whose status is what comes first.
        jobs: processes at a time.
        time_limit: seconds for each model.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "torchvision", "networkx"])  # imported once, not once a model
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the processes start
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_measure_apart, context, measure, case, row, time_limit) for case, row in started]
        try:
            yield from (future.result() for future in futures)
        finally:
            pool.shutdown(cancel_futures=True)


def _measure_apart(
    context: ForkServerContext, measure: Measure[AnyRow], case: Any, row: AnyRow, time_limit: float
) -> AnyRow:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_child, args=(measure, case, sender))
    process.start()
    sender.close()
    deadline = time.monotonic() + time_limit
    try:
        while receiver.poll(max(deadline - time.monotonic(), 0)):
            row = receiver.recv()
        row.status += f": took longer than {time_limit:g} s"
        process.kill()
    except EOFError:  # it has ended
        process.join()
        if process.exitcode:
            row.status += f": the process ended with status {process.exitcode}"
    process.join()
    return row


def _run_child(measure: Measure[Any], case: Any, connection: Connection) -> None:
    """Measures in a process of its own; sends the row at the start of each stage, and at the end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process: this one goes without a word
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    connection.send(measure(case, connection.send))


@contextmanager
def noting(row: Row, failures: list[str]) -> Iterator[None]:
    """Inside, an exception becomes a line of `failures`, with the stage that the row's status names."""
    try:
        yield
    except Exception as error:  # any failure of a model is a result
        reason = " ".join(str(error).split())[:300]
        failures.append(f"{row.status}: {type(error).__name__}: {reason}")


def write_csv(path: Path, kind: type[Any], rows: Iterable[Any]) -> None:
    """All rows, one column a field of their dataclass.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(kind)])
        writer.writeheader()
        writer.writerows([dataclasses.asdict(row) for row in rows])
