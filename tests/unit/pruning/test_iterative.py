"""Several cuts as one: what is told of them in sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from isomorphic.measure.complexity import count_complexity
from isomorphic.measure.latency import Latency
from isomorphic.pruning import planning
from isomorphic.pruning.apply import Applied, Recovery
from isomorphic.pruning.iterative import in_short, prune_in_steps
from isomorphic.pruning.options import PlanOptions

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def test_the_plan_of_all_steps_has_the_costs_of_the_last():
    model, seen = mlp(), []
    options = PlanOptions(macs="40%", criterion="l2", ranking="global")
    planned, applied = prune_in_steps(
        model,
        X,
        options,
        6,
        before=count_complexity(mlp(), X),
        recovery=Recovery(),
        between=lambda model, step: seen.append((step, count_complexity(model, X).macs_paper)),
    )
    dense, left = count_complexity(mlp(), X), count_complexity(model, X)
    assert (planned.before, planned.after) == (dense, left) and len(applied) == 6
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5]
    for step, macs in seen:  # each a sixth of the way from 100% to 40%, met from below
        assert macs <= (1 - 0.6 * step / 6) * dense.macs_paper
    kept = {name: len(units) for name, units in planned.kept.items()}
    assert kept == {"0.weight:0": model[0].out_features, "2.weight:0": model[2].out_features}
    assert sum(summary.kept for summary in planned.summaries()) == sum(kept.values()), "a table of the dense classes"
    assert {name: len(scores) for name, scores in planned.scores.items()} == {"0.weight:0": 16, "2.weight:0": 16}


def test_the_latency_of_all_steps_is_that_of_the_last(monkeypatch: pytest.MonkeyPatch):
    def clock(model: nn.Module, inputs: Any, options: PlanOptions) -> Latency:
        seconds = 1e-6 * sum(parameter.numel() for parameter in model.parameters())
        return Latency(seconds, seconds, seconds, 1, 20)

    monkeypatch.setattr(planning, "_latency", clock)
    model, options = mlp(), PlanOptions(latency="50%", criterion="l2")
    dense = clock(model, X, options)
    costs = {"before": count_complexity(model, X), "latency": dense}
    planned, _ = prune_in_steps(model, X, options, 3, recovery=Recovery(), **costs)
    left = clock(model, X, options)
    assert (planned.latency_before, planned.latency_after) == (dense, left) and left.median <= 0.5 * dense.median


def test_the_worst_of_several_checks_is_told():
    cuts = [Applied(check_error=error, plain=(str(error),)) for error in (2e-7, 5e-7, 1e-7)]
    assert in_short(cuts) == Applied(check_error=5e-7, plain=("1e-07",))
    assert in_short([Applied(), Applied(batch_norms=3)]) == Applied(batch_norms=3)
