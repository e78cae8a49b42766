"""Latency: what is timed, how often, and what is said about it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isomorphic.measure import latency
from isomorphic.measure.latency import Latency, measure_latency
from isomorphic.measure.results import latency_results


class Probe(nn.Module):
    """Notes how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls: list[tuple[tuple[int, ...], bool, bool, torch.dtype]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.calls.append((tuple(x.shape), self.training, torch.is_grad_enabled(), y.dtype))
        return y


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Every look at the clock finds it one step later; the steps repeat."""

    def install(steps: list[float]) -> None:
        now, looks = 0.0, 0

        def tick() -> float:
            nonlocal now, looks
            now, looks = now + steps[looks % len(steps)], looks + 1
            return now

        monkeypatch.setattr(latency.time, "perf_counter", tick)

    return install


def test_a_batch_of_copies_runs_in_eval_mode_without_gradients(clock):
    clock([0.1])
    probe = Probe().train()
    found = measure_latency(probe, torch.randn(1, 3, 2, 4), 5)
    assert set(probe.calls) == {((5, 3, 2, 4), False, False, torch.float32)} and probe.training
    assert len(probe.calls) == latency.WARM_UP_RUNS + latency.MIN_RUNS == 25
    assert (found.batch_size, found.runs) == (5, 20)


def test_autocast(clock):
    clock([0.1])
    probe = Probe()
    measure_latency(probe, torch.randn(1, 3, 2, 4), amp_dtype=torch.bfloat16)
    assert {dtype for *_, dtype in probe.calls} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("seconds", "runs"),
    [
        (0.0025, 200),  # for a second, two looks at the clock a run
        (0.5, 20),
        (1.5, 7),  # for twenty seconds
        (30.0, 3),
    ],
)
def test_how_long_runs_go_on(clock, seconds: float, runs: int):
    clock([seconds])
    found = measure_latency(Probe(), torch.randn(1, 3, 2, 4))
    assert found.runs == pytest.approx(runs, abs=1) and found.median == pytest.approx(seconds)


def test_the_median_and_the_spread_of_the_runs(clock, monkeypatch):
    monkeypatch.setattr(latency, "_timed_runs", lambda *_: iter([0.010 + 0.001 * n for n in range(11)]))
    found = measure_latency(Probe(), torch.randn(1, 3, 2, 4))
    assert (found.median, found.low, found.high) == pytest.approx((0.015, 0.011, 0.019))


def test_what_is_printed_and_written():
    found = Latency(median=0.01234, low=0.012, high=0.0134, batch_size=8, runs=85)
    assert str(found) == "12.34 ms (batch 8; 80% of 85 runs within 12.00 ms to 13.40 ms)"
    assert latency_results(found) == {
        "latency_ms": 12.34,
        "latency_ms_p10": 12.0,
        "latency_ms_p90": 13.4,
        "latency_batch_size": 8,
    }
