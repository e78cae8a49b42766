"""Copies of a model at the same MACs, in widths of different multiples; and which one is the faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isomorphic.errors import UserError
from isomorphic.measure.complexity import count_complexity
from isomorphic.measure.latency import Gain, Speedup
from isomorphic.pruning.options import PlanOptions
from isomorphic.pruning.rounding import faster_rounding, rounded_copy

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU(), nn.Conv2d(96, 64, 3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(6400, 10)).train()


@pytest.mark.parametrize("round_to", [1, 4, 16])
def test_copies_have_the_same_macs_in_widths_of_the_multiple(round_to: int):
    model = cnn()
    copy = rounded_copy(model, X, PlanOptions(macs="50%"), round_to)
    widths = [layer.out_channels for layer in copy.children() if isinstance(layer, nn.Conv2d)]
    assert all(width % round_to == 0 for width in widths) and max(widths) < 96
    share = count_complexity(copy, X).macs_paper / count_complexity(model, X).macs_paper
    assert 0.5 - 0.02 * round_to <= share <= 0.5
    assert model[0].out_channels == 64 and model.training, "the dense model is left as it was"


def test_a_multiple_that_leaves_no_choice_is_out_of_reach():
    with pytest.raises(UserError):
        rounded_copy(cnn(), X, PlanOptions(macs="20%"), 64)


def gain(speedup: float, macs_ratio: float = 1.0, error: float = 0.0) -> Gain:
    return Gain(Speedup(speedup, speedup, speedup, 10, error), macs_ratio)


def test_the_faster_rounding_is_faster_beyond_doubt_and_not_by_having_fewer_macs():
    assert faster_rounding({1: gain(1.0), 8: gain(1.1), 16: gain(1.2)}) == 16
    assert faster_rounding({1: gain(1.0), 8: gain(1.02)}) is None
    assert faster_rounding({1: gain(1.0), 8: gain(1.1, error=0.1)}) is None
    assert faster_rounding({1: gain(1.0), 8: gain(1.1), 16: gain(1.12, macs_ratio=1.1)}) == 8
    assert faster_rounding({1: gain(1.0), 8: gain(0.8)}) is None
