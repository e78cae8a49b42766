"""Latency: what is timed, how often, who takes turns with whom, and what is said about it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.measure import latency
from isomorphic.measure.execution import ExecutionMode
from isomorphic.measure.latency import Gain, InTurns, Latency, Speedup, measure_in_turns, measure_latency
from isomorphic.measure.results import busy_line, gain_line, gain_results, latency_results, memory_line, memory_results

IMAGE = torch.randn(1, 3, 2, 4, generator=torch.Generator().manual_seed(0))


class Clock:
    """Time passes only where somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    installed = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", installed)
    return installed


class Probe(nn.Module):
    """Notes how it is called, and takes its time; the times repeat."""

    def __init__(self, clock: Clock, *seconds: float, name: str = "") -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls: list[tuple[tuple[int, ...], bool, bool, torch.dtype]] = []
        self.clock, self.seconds, self.name = clock, seconds, name

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.clock.now += self.seconds[len(self.calls) % len(self.seconds)]
        self.clock.log.append(self.name)
        self.calls.append((tuple(x.shape), self.training, torch.is_grad_enabled(), y.dtype))
        return y


def test_a_batch_of_copies_runs_in_eval_mode_without_gradients(clock: Clock):
    probe = Probe(clock, 0.1).train()
    found = measure_latency(probe, IMAGE, 5)
    assert set(probe.calls) == {((5, 3, 2, 4), False, False, torch.float32)} and probe.training
    assert (found.batch_size, found.runs, found.runs_per_block) == (5, 21, 1), "seven turns of three runs"


def test_autocast(clock: Clock):
    probe = Probe(clock, 0.1)
    measure_latency(probe, IMAGE, amp_dtype=torch.bfloat16)
    measure_latency(probe, IMAGE, mode=ExecutionMode(torch.bfloat16))
    assert {dtype for *_, dtype in probe.calls} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("seconds", "runs"),
    [
        (0.0025, 400),  # for a second, in ten turns
        (0.5, 20),
        (1.5, 7),  # for twenty seconds, of which half do not count: a turn begins with a run that does not
        (30.0, 3),
    ],
)
def test_how_long_runs_go_on(clock: Clock, seconds: float, runs: int):
    found = measure_latency(Probe(clock, seconds), IMAGE)
    assert found.runs == pytest.approx(runs, abs=1, rel=0.02) and found.median == pytest.approx(seconds)


def test_runs_that_are_too_short_for_the_clock_are_timed_in_blocks(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latency, "MIN_SECONDS", 0.01)
    monkeypatch.setattr(latency, "TURN_SECONDS", 0.001)
    found = measure_latency(Probe(clock, 2e-7), IMAGE)
    assert found.runs_per_block == 100 and found.median == pytest.approx(2e-7)
    assert " blocks of 100 runs within " in str(found)


def test_the_median_and_the_spread_of_the_runs(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    seconds = [0.010 + 0.001 * n for n in range(11)]
    turns = [SimpleNamespace(times=times, median=1.0, number_per_run=1) for times in (seconds[:4], seconds[4:])]

    def take_turns(*_: object) -> dict[str, list[SimpleNamespace]]:
        clock.now += 1.0
        return {"": turns}

    monkeypatch.setattr(latency, "_take_turns", take_turns)
    found = measure_latency(Probe(clock, 0.1), IMAGE)
    assert (found.median, found.low, found.high) == pytest.approx((0.015, 0.011, 0.019)) and found.runs == 11


def test_models_take_turns_and_every_other_round_goes_backwards(clock: Clock):
    a, b, c = (Probe(clock, 0.2, name=name) for name in "abc")
    measure_in_turns({"a": (a, IMAGE), "b": (b, IMAGE), "c": (c, IMAGE)})
    turns = "".join(name for name, before in zip(clock.log, ["", *clock.log], strict=False) if name != before)
    assert turns.startswith("abc" + "abcba" + "bcba" + "bcba"), "a warm-up, and rounds abc, cba, abc, …"
    assert len(a.calls) == len(b.calls) == len(c.calls)


def test_drift_that_meets_all_models_leaves_the_ratio_alone(clock: Clock):
    class Slowing(Probe):
        def forward(self, x: Tensor) -> Tensor:  # the machine gets slower all the time
            self.clock.now += 0.05 * self.clock.now * self.seconds[0]
            return super().forward(x)

    dense, pruned = Slowing(clock, 0.04), Slowing(clock, 0.01)
    found = measure_in_turns({"dense": (dense, IMAGE), "pruned": (pruned, IMAGE)})
    assert found.latencies["dense"].high > 1.03 * found.latencies["dense"].low
    assert found.speedup("pruned", over="dense").median == pytest.approx(4, rel=0.01)
    assert found.speedup("dense", over="pruned").median == pytest.approx(1 / 4, rel=0.01)


def test_a_ratio_that_does_not_settle_takes_all_the_time_there_is(clock: Clock):
    steady, restless = Probe(clock, 0.05), Probe(clock, *[0.05] * 6, *[0.2] * 5)
    still = measure_in_turns({"a": (steady, IMAGE), "b": (Probe(clock, 0.05), IMAGE)})
    before = clock.now
    restless_found = measure_in_turns({"a": (steady, IMAGE), "b": (restless, IMAGE)})
    assert still.speedup("b", over="a").rounds == latency.MIN_ROUNDS
    assert restless_found.speedup("b", over="a").rounds > latency.MIN_ROUNDS
    assert clock.now - before < 2 * latency.MAX_SECONDS_COMPARED + 2


def test_speed_up_by_hand():
    latencies = {name: Latency(1.0, 1.0, 1.0, 1, 1) for name in "ab"}
    found = InTurns(latencies, {"a": [2.0, 3.0, 4.0, 5.0, 6.0], "b": [1.0] * 5}).speedup("b", over="a")
    assert (found.median, found.low, found.high, found.rounds) == (4.0, pytest.approx(2.4), pytest.approx(5.6), 5)
    assert found.error == pytest.approx(1.57 * 2 / 5**0.5)


def test_peak_memory_is_the_weights_and_what_lives_at_once():
    class TwoHalves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))
            self.tied = self.weight
            self.register_buffer("scale", torch.ones(10))

        def forward(self, x: Tensor) -> Tensor:
            first = x + self.weight  # 4000 bytes
            second = first * 2  # 4000 more
            del first
            return second + 1  # 4000, while `second` lives: 8000 at a time

    found = measure_latency(TwoHalves(), torch.ones(1, 1000))
    assert found.weights == 4040 and found.peak_memory == 4040 + 8000
    assert measure_latency(TwoHalves(), torch.ones(1, 1000), 3).peak_memory == 4040 + 3 * 8000


def test_a_gpu_is_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch):
    class Event:
        milliseconds = 0.0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "stream of cuda:1"
            Event.milliseconds += 250.0
            self.at = Event.milliseconds

        def synchronize(self) -> None:
            self.done = True

        def elapsed_time(self, later: Event) -> float:
            assert self.done and later.done, "asked before the GPU was there"
            return later.at - self.at

    monkeypatch.setattr(latency.torch.cuda, "Event", Event)
    monkeypatch.setattr(latency.torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = latency.clock_of(torch.device("cuda:1"))
    assert [clock(), clock(), clock()] == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("mode", [ExecutionMode(cuda_graph=True), ExecutionMode(torch.float16)])
def test_what_only_a_gpu_has_is_refused_before_anything_runs(clock: Clock, mode: ExecutionMode):
    probe = Probe(clock, 0.1)
    with pytest.raises(UserError, match="cannot be timed: (cuda_graph|fp16) needs a CUDA device and this is cpu"):
        measure_latency(probe, IMAGE, mode=mode)
    assert not probe.calls


def test_what_is_printed_and_written():
    found = Latency(median=0.01234, low=0.012, high=0.0134, batch_size=8, runs=85)
    assert str(found) == "12.34 ms (batch 8; 80% of 85 runs within 12.00 ms to 13.40 ms)"
    assert latency_results(found) == {
        "latency_ms": 12.34,
        "latency_ms_p10": 12.0,
        "latency_ms_p90": 13.4,
        "latency_batch_size": 8,
    }
    assert (memory_line(found), memory_results(found)) == ("", {})
    known = Latency(1.0, 1.0, 1.0, 1, 1, peak_memory=3 << 20, weights=1 << 20)
    assert memory_line(known) == "Peak memory: 3.0 MiB, of which 1.0 MiB are weights"
    assert memory_results(known) == {"peak_memory_mib": 3.0}


def test_a_busy_machine_is_said(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latency.time, "thread_time", lambda: 0.6 * clock.now)
    found = measure_in_turns({"a": (Probe(clock, 0.1), IMAGE)})
    assert found.cpu_share == pytest.approx(0.6)
    told = "Busy: other processes had the processor for 40% of the time; only a quiet machine gives figures to stand by"
    assert busy_line(found) == told
    assert busy_line(InTurns({}, {}, 0.95)) == busy_line(InTurns({}, {})) == ""


def test_the_share_of_the_promise_that_was_kept():
    gain = Gain(Speedup(3.0, 2.9, 3.2, rounds=12, error=0.01), macs_ratio=4.0)
    assert gain.kept == 0.75
    assert gain_line(gain, "paper") == (
        "Speed-up: 3.00× (80% of 12 rounds within 2.90× to 3.20×), 75% of the 4.00× that MACs promise (paper counter)"
    )
    assert gain_results(gain) == {
        "speedup": 3.0,
        "speedup_p10": 2.9,
        "speedup_p90": 3.2,
        "macs_ratio": 4.0,
        "kept_share": 0.75,
    }
