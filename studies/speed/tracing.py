"""Times the construction of a model's coupled groups for studies.speed, beside `torch_pruning.DependencyGraph`.

Four ways take turns:

- exact: the exact tracer, with all that it gives (index tensors, topology, sizes), on a copy of the model that has
  shapes but no data;
- exact, tried: the same with its trial cut, which is what `trace_groups` does;
- depgraph: `build_dependency` and `get_all_groups` on the model, without what this project's adapter adds to them;
- depgraph, shapes: the same on such a copy too, where a forward pass costs much less.

A ratio is the exact tracer's time by that of another way in the same round. Memory is what the first call in a fresh
process adds at most to its resident set (Linux).
"""

from __future__ import annotations

import gc
import multiprocessing
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch_pruning as tp
from torch import Tensor, nn

from isomorphic.files import check_writable
from isomorphic.models import ModelSpec, build_model, describe_model, example_inputs
from isomorphic.pruning.grouping import exact
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.skeletons import shape_copy
from studies.rows import write_rows

MODELS = ("swin_base_patch4_window7_224", "deit_base_patch16_224", "convnext_base", "resnet152")


def traced(model: nn.Module, inputs: Tensor) -> int:
    """The number of groups that the exact tracer finds."""
    return len(exact.trace(model, inputs, tried=False).groups)


def tried(model: nn.Module, inputs: Tensor) -> int:
    """The same, cut on trial."""
    return len(trace_groups(model, inputs, "exact").groups)


def depgraph(model: nn.Module, inputs: Tensor) -> int:
    """The number of groups that the library finds, those of the model's outputs included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tokens and layer scales, which it handles
        return len(list(tp.DependencyGraph().build_dependency(model, inputs).get_all_groups()))


WAYS = {
    "exact": traced,
    "exact, tried": tried,
    "depgraph": depgraph,
    "depgraph, shapes": lambda model, inputs: depgraph(shape_copy(model), inputs.to("meta")),
}


class TracingRow(NamedTuple):
    """One way on one model: the columns of tracing.csv. Seconds and ratios are medians over all rounds."""

    model: str
    way: str
    groups: int
    added_mib: float
    seconds: float
    ratio: float
    ratio_min: float
    ratio_max: float
    rounds: int
    threads: int


def run(models: Sequence[str], repetitions: int, threads: int, path: Path) -> None:
    """Measures each model, prints the table and writes the rows.

    Args:
        models: names of timm's.
        repetitions: rounds that count.
        threads: of torch.
        path: where the rows go.

    Raises:
        UserError: no such model, or the file cannot be written.
    """
    check_writable(path)
    torch.set_num_threads(threads)
    specs = [describe_model(name) for name in models]  # names are checked before the first is measured
    print(f"{'model':30}{'way':18}groups  seconds  exact / this (min … max)  added MiB")
    rows = []
    for spec in specs:
        seconds = take_turns(build_model(spec), example_inputs(spec), repetitions)
        for way in WAYS:
            rows.append(TracingRow(spec.name, way, *added(spec, way), *compare(seconds, way), repetitions, threads))
            print(line(rows[-1]), flush=True)
    write_rows(path, TracingRow, rows)
    print(f"Saving the rows to {path}")


def take_turns(model: nn.Module, inputs: Tensor, rounds: int) -> dict[str, list[float]]:
    """Wall-clock seconds of each round, by way."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(1 + rounds):
        for way, construct in WAYS.items():
            gc.collect()  # what the last one left behind
            start = time.perf_counter()
            construct(model, inputs)
            seconds[way].append(time.perf_counter() - start)
    return {way: times[1:] for way, times in seconds.items()}


def compare(seconds: dict[str, list[float]], way: str) -> tuple[float, float, float, float]:
    """Median seconds of a way; median, smallest and largest ratio of the exact tracer's to them."""
    ratios = [ours / other for ours, other in zip(seconds["exact"], seconds[way], strict=True)]
    return median(seconds[way]), median(ratios), min(ratios), max(ratios)


def added(spec: ModelSpec, way: str) -> tuple[int, float]:
    """How many groups one call finds, and the MiB that it adds at most to a fresh process that holds the model."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "torch_pruning", "isomorphic.pruning.grouping.trace"])  # imported once
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_added, spec, way, torch.get_num_threads()).result()


def _added(spec: ModelSpec, way: str, threads: int) -> tuple[int, float]:
    torch.set_num_threads(threads)
    model, inputs = build_model(spec), example_inputs(spec)
    before = _resident_mib("VmRSS")
    return WAYS[way](model, inputs), _resident_mib("VmHWM") - before


def _resident_mib(which: str) -> float:
    """The resident set now (VmRSS) or at most (VmHWM); `getrusage` would count the parent's up to the fork."""
    status = dict(entry.split(":", 1) for entry in Path("/proc/self/status").read_text().splitlines())
    return int(status[which].split()[0]) / 1024


def line(row: TracingRow) -> str:
    ratio = f"{row.ratio:.2f} ({row.ratio_min:.2f} … {row.ratio_max:.2f})"
    return f"{row.model:30}{row.way:18}{row.groups:6}{row.seconds:9.2f}{ratio:>26}{row.added_mib:11.0f}"
