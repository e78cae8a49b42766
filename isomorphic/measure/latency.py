"""How long a batch takes on this device, and how much that varies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from isomorphic.errors import UserError
from isomorphic.inputs import Inputs, call, device_of
from isomorphic.measure.first_image import first_image, is_batch
from isomorphic.observe import eval_mode
from isomorphic.processes import distributed

WARM_UP_RUNS = 5
MIN_RUNS, MIN_SECONDS = 20, 1.0
MAX_SECONDS = 20.0  # of slow models: then a few runs have to do
FEW_RUNS = 3


@dataclass(frozen=True)
class Latency:
    """Seconds that one forward pass takes: the median of all runs, and the tenth and ninetieth percentile.

    Under torchrun these are means over the processes, so that all of them come to the same decisions.
    """

    median: float
    low: float
    high: float
    batch_size: int
    runs: int

    def __str__(self) -> str:
        """`12.34 ms (batch 1; 80% of 85 runs within 12.01 ms to 13.40 ms)`."""
        spread = f"{format_seconds(self.low)} to {format_seconds(self.high)}"
        return f"{format_seconds(self.median)} (batch {self.batch_size}; 80% of {self.runs} runs within {spread})"


def format_seconds(seconds: float) -> str:
    """`12.34 ms`, and what is less than 0.01 ms with as many digits as it takes."""
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.2f} ms" if milliseconds >= 0.01 else f"{milliseconds:.2g} ms"


@torch.no_grad()
def measure_latency(
    model: nn.Module, inputs: Inputs, batch_size: int = 1, *, amp_dtype: torch.dtype | None = None
) -> Latency:
    """Times `model`, in eval mode, on one batch: after a warm-up, at least 20 runs and at least one second, but no
    more than 20 seconds where three runs fit into them.

    Args:
        model: on the device of `inputs`; its train or eval mode is put back.
        inputs: what the model takes; a batch holds its first item `batch_size` times. What is no batch (see `is_batch`)
            is taken as it is given.
        amp_dtype: run under autocast in this type; None is the model's own precision.

    Raises:
        UserError: several at once are asked for, of inputs that are no batch.
    """
    batch, device = _batch(model, inputs, batch_size), device_of(inputs)
    with eval_mode(model), torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
        for _ in range(WARM_UP_RUNS):
            call(model, batch)
        seconds = list(_timed_runs(model, batch, device))
    levels = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    found = torch.quantile(torch.tensor(seconds, dtype=torch.float64), levels)
    median, low, high = (distributed.all_reduce_sum(found.to(device)) / distributed.world_size()).tolist()
    return Latency(median, low, high, batch_size, len(seconds))


def _batch(model: nn.Module, inputs: Inputs, batch_size: int) -> Inputs:
    if is_batch(model, inputs):
        return first_image(inputs, copies=batch_size)
    if batch_size > 1:
        raise UserError(
            f"there is no batch of {batch_size} for a latency: the model does not run on the first item of its inputs "
            "alone. Measure batch 1, the inputs as they are given, or give larger ones"
        )
    return inputs


def _timed_runs(model: nn.Module, batch: Inputs, device: torch.device) -> Iterator[float]:
    begin, runs, elapsed = time.perf_counter(), 0, 0.0
    while runs < FEW_RUNS or (elapsed < MAX_SECONDS and (runs < MIN_RUNS or elapsed < MIN_SECONDS)):
        _wait_for(device)
        start = time.perf_counter()
        call(model, batch)
        _wait_for(device)
        end = time.perf_counter()
        yield end - start
        runs, elapsed = runs + 1, end - begin


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
