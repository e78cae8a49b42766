"""How long a batch takes on this device, how much that varies, and how much faster one model is than another.

Models take turns in one process, so that whatever else the machine does, and how warm it gets, meets all of them:

    round 1: dense, pruned; round 2: pruned, dense; round 3: dense, pruned; …

A turn is a call of `torch.utils.benchmark.Timer.blocked_autorange`, which begins with a run that does not count. What
else a machine does only ever adds to a run's time, so a round's ratio is that of the fastest runs of its turns, and the
speed-up is the median of the rounds. (On two cores under a load of 20, four measurements of one pair of models said
1.08 to 1.12 so, and 1.23 to 1.42 by the medians of turns.) A latency is the median of all runs, whatever disturbed
them. One model alone is measured in the same way, without the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from isomorphic.inputs import Inputs, device_of
from isomorphic.measure.execution import ExecutionMode, batch_runner, captured
from isomorphic.measure.memory import peak_bytes, weight_bytes
from isomorphic.observe import eval_mode
from isomorphic.processes import distributed
from isomorphic.progress import steps

if TYPE_CHECKING:
    from torch.utils.benchmark import Measurement

WARM_UP_RUNS, WARM_UP_SECONDS = 5, 1.0  # whichever comes first
TURN_SECONDS, TURN_RUNS, MAX_TURN_SECONDS = 0.1, 3, 1.0  # a turn is as long as so many runs, within these limits
MIN_RUNS, MIN_SECONDS = 20, 1.0  # of each model
FEW_RUNS = 3  # of slow models, for which there is no time for more
MAX_SECONDS = 20.0  # of a model alone, its runs that do not count included
MAX_SECONDS_COMPARED = 30.0  # of each of several, whose ratios have to settle
MIN_ROUNDS, SETTLED = 10, 0.02  # until the median ratio is known to 2% or so


@dataclass(frozen=True)
class Latency:
    """Seconds that one forward pass takes: the median of all runs, and the tenth and ninetieth percentile.

    Under torchrun these are means over the processes, so that all of them come to the same decisions.

    Attributes:
        median, low, high: seconds.
        batch_size: items of the batch.
        runs: how many were timed; blocks of runs, where one run is too short for the clock.
        runs_per_block: runs of a block.
        peak_memory: most bytes at a time, weights included; None if unknown, as for compiled models on a CPU.
        weights: bytes of parameters and buffers among them.
    """

    median: float
    low: float
    high: float
    batch_size: int
    runs: int
    runs_per_block: int = 1
    peak_memory: int | None = None
    weights: int | None = None

    def __str__(self) -> str:
        """`12.34 ms (batch 1; 80% of 85 runs within 12.01 ms to 13.40 ms)`."""
        within = f"{format_seconds(self.low)} to {format_seconds(self.high)}"
        runs = f"{self.runs} runs" if self.runs_per_block == 1 else f"{self.runs} blocks of {self.runs_per_block} runs"
        return f"{format_seconds(self.median)} (batch {self.batch_size}; 80% of {runs} within {within})"


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as another a model is: the median of all rounds, the tenth and ninetieth percentile.

    `error` is how far the median may be off (95%): McGill's 1.57 · IQR / √rounds.
    """

    median: float
    low: float
    high: float
    rounds: int
    error: float = 0.0

    def __str__(self) -> str:
        """`3.25× (80% of 12 rounds within 3.20× to 3.31×)`."""
        return f"{self.median:.2f}× (80% of {self.rounds} rounds within {self.low:.2f}× to {self.high:.2f}×)"


@dataclass(frozen=True)
class Gain:
    """What a model gains over another: in time, and in MACs, which is what pruning promises."""

    speedup: Speedup
    macs_ratio: float

    @property
    def kept(self) -> float:
        """Share of the promise that was kept."""
        return self.speedup.median / self.macs_ratio


@dataclass(frozen=True)
class InTurns:
    """What models that took turns took.

    Attributes:
        latencies: by the models' names.
        rounds: seconds of the fastest run of each turn, round by round, by name; of this process.
        cpu_share: share of the time that the thread that runs the models had a processor for itself, where they run on
            one: clearly less than 1 on a machine that is busy with other things. None on a GPU.
    """

    latencies: Mapping[str, Latency]
    rounds: Mapping[str, Sequence[float]]
    cpu_share: float | None = None

    def speedup(self, name: str, over: str) -> Speedup:
        """Returns how many times as fast as `over` a model was: the mean of all processes, each of which has to ask."""
        ratios = _ratios(self.rounds[over], self.rounds[name])
        middle, low, high, error = _over_processes([*_quantiles(ratios, (0.5, 0.1, 0.9)), _error(ratios)])
        return Speedup(middle, low, high, len(ratios), error)


def format_seconds(seconds: float) -> str:
    """`12.34 ms`, and what is less than 0.01 ms with as many digits as it takes."""
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.2f} ms" if milliseconds >= 0.01 else f"{milliseconds:.2g} ms"


def measure_latency(
    model: nn.Module,
    inputs: Inputs,
    batch_size: int = 1,
    *,
    amp_dtype: torch.dtype | None = None,
    mode: ExecutionMode | None = None,
) -> Latency:
    """Times `model`, in eval mode, on one batch: after a warm-up, at least 20 runs and at least one second, but no
    more than 20 seconds where three runs fit into them.

    Args:
        model: on the device of `inputs`; its train or eval mode is put back.
        inputs: what the model takes; a batch holds its first item `batch_size` times. What is no batch (see `is_batch`)
            is taken as it is given.
        batch_size: items of the batch.
        amp_dtype: run under autocast in this type; None is the model's own precision. Short for a mode of it alone.
        mode: how to run it.

    Raises:
        UserError: it cannot be run that way here; several at once are asked for, of inputs that are no batch.
    """
    found = measure_in_turns({"": (model, inputs)}, batch_size, mode=mode or ExecutionMode(amp_dtype))
    return found.latencies[""]


@torch.no_grad()
def measure_in_turns(
    models: Mapping[str, tuple[nn.Module, Inputs]],
    batch_size: int = 1,
    *,
    mode: ExecutionMode | None = None,
    max_seconds: float | None = None,
) -> InTurns:
    """Times several models, in eval mode, in turns, until the ratio of each to the first is known to 2% or so.

    That takes ten rounds, 20 runs and one second of each at least, and no more than 30 seconds of each where three
    rounds fit into them.

    Args:
        models: each by a name, with what it takes; all on one device. Their train or eval modes are put back.
        batch_size: items of each batch: the first item of a model's inputs so many times.
        mode: how to run all of them.
        max_seconds: of each model, instead of 30, or of 20 for one alone.

    Raises:
        UserError: as `measure_latency`, of any of them.
    """
    mode = mode or ExecutionMode()
    patience = len(models) * (max_seconds or (MAX_SECONDS_COMPARED if len(models) > 1 else MAX_SECONDS))
    device = device_of(next(iter(models.values()))[1])
    mode.check(device)
    with ExitStack() as stack:
        for model, _ in models.values():
            stack.enter_context(eval_mode(model))
        stack.enter_context(torch.autocast(device.type, mode.amp_dtype, enabled=mode.amp_dtype is not None))
        ready = {name: _prepare(*subject, batch_size, mode) for name, subject in models.items()}
        begin, cpu_begin = time.perf_counter(), time.thread_time()
        turns = _take_turns(ready, device, patience)
        cpu_share = (time.thread_time() - cpu_begin) / (time.perf_counter() - begin)
    latencies = {
        name: replace(_latency(turns[name], batch_size), peak_memory=subject.peak, weights=subject.weights)
        for name, subject in ready.items()
    }
    rounds = {name: _fastest(turns[name]) for name in models}
    return InTurns(latencies, rounds, min(cpu_share, 1.0) if device.type == "cpu" else None)


@dataclass(frozen=True)
class _Ready:
    """A model that is warm: what runs its batch, how long its turns are to be, and the bytes that a batch takes."""

    run: Callable[[], Any]
    turn_seconds: float
    peak: int | None
    weights: int


def _prepare(model: nn.Module, inputs: Inputs, batch_size: int, mode: ExecutionMode) -> _Ready:
    device = device_of(inputs)
    run = batch_runner(model, inputs, batch_size, mode)
    run_seconds = _warm_up(run, device)
    weights = weight_bytes(model)
    seen = device.type == "cuda" or not mode.compiled  # what compiled code allocates, a CPU does not tell
    peak = weights + peak_bytes(run, device) if seen else None
    turn_seconds = min(max(TURN_SECONDS, (TURN_RUNS - 0.5) * run_seconds), MAX_TURN_SECONDS)
    return _Ready(captured(run, inputs) if mode.cuda_graph else run, turn_seconds, peak, weights)


def _warm_up(run: Callable[[], Any], device: torch.device) -> float:
    """Returns the seconds of the last run."""
    clock = clock_of(device)
    begin = clock()
    seconds = 0.0
    for _ in range(WARM_UP_RUNS):
        start = clock()
        run()
        seconds = clock() - start
        if clock() - begin > WARM_UP_SECONDS:
            break
    return seconds


def _take_turns(ready: Mapping[str, _Ready], device: torch.device, patience: float) -> dict[str, list[Measurement]]:
    """Lets models take turns until enough is known; every other round goes backwards, so that drift cancels."""
    turns: dict[str, list[Measurement]] = {name: [] for name in ready}
    order, begin = list(ready), time.perf_counter()
    with steps("timing", unit="round") as bar:  # until they agree
        while not _enough(turns, is_late=time.perf_counter() - begin >= patience):
            for name in order:
                turns[name].append(_turn(ready[name], device))
            order.reverse()
            bar.update()
    return turns


def _turn(subject: _Ready, device: torch.device) -> Measurement:
    names, threads = {"run": subject.run}, torch.get_num_threads()
    timer = _timer_class()("run()", globals=names, timer=clock_of(device), num_threads=threads)
    return timer.blocked_autorange(min_run_time=subject.turn_seconds)


def _timer_class() -> Any:
    """Imports torch's timer without the line about CUDA that its import logs on machines with a toolkit and no GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torch.utils.benchmark import Timer
    finally:
        logger.setLevel(level)
    return Timer


def _enough(turns: Mapping[str, Sequence[Measurement]], *, is_late: bool) -> bool:
    """Returns True once all models have had turns enough, or all the time that there is."""
    runs = min(sum(len(turn.times) for turn in mine) for mine in turns.values())
    seconds = min(sum(sum(turn.raw_times) for turn in mine) for mine in turns.values())
    if is_late and runs >= FEW_RUNS:
        return True
    if runs < MIN_RUNS or seconds < MIN_SECONDS:
        return False
    first, *others = map(_fastest, turns.values())
    return all(_settled(_ratios(first, other)) for other in others)


def _settled(ratios: Sequence[float]) -> bool:
    """Returns True where the median of so many ratios is known to `SETTLED`."""
    return len(ratios) >= MIN_ROUNDS and _error(ratios) <= SETTLED * median(ratios)


def _error(ratios: Sequence[float]) -> float:
    """McGill's half-width of the median's confidence interval (95%): 1.57 · IQR / √n."""
    low, high = _quantiles(ratios, (0.25, 0.75))
    return 1.57 * (high - low) / len(ratios) ** 0.5


def _fastest(turns: Sequence[Measurement]) -> list[float]:
    return [min(turn.times) for turn in turns]


def _ratios(slower: Sequence[float], faster: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(slower, faster, strict=True)]


def _latency(turns: Sequence[Measurement], batch_size: int) -> Latency:
    seconds = [seconds for turn in turns for seconds in turn.times]
    middle, low, high = _over_processes(_quantiles(seconds, (0.5, 0.1, 0.9)))
    per_block = round(median(turn.number_per_run for turn in turns))
    return Latency(middle, low, high, batch_size, len(seconds), per_block)


def _quantiles(values: Sequence[float], levels: Sequence[float]) -> list[float]:
    return torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor(levels, dtype=torch.float64)).tolist()


def _over_processes(values: Sequence[float]) -> list[float]:
    """Each number's mean over all processes."""
    everybodys = distributed.gather_objects(list(values))
    return [fmean(numbers) for numbers in zip(*everybodys, strict=True)]


def clock_of(device: torch.device) -> Callable[[], float]:
    """Returns a clock in seconds; a GPU's tells when all that it was given so far is done, by events of its own."""
    return _EventClock(device) if device.type == "cuda" else lambda: time.perf_counter()


class _EventClock:
    """Seconds since it was made, on the GPU's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        event.synchronize()
        return event

    def __call__(self) -> float:
        return 1e-3 * self._start.elapsed_time(self._now())
