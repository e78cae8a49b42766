"""How much of a model's width can go."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup, Frozen, Member
from isomorphic.pruning.widths import width_shares


class Widths(nn.Module):
    """8 + 6 + 12 + 5 channels, a depthwise convolution between, and 5 outputs made by another linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8)
        self.grouped = nn.Conv2d(16, 6, 1, groups=2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.hidden, self.head = nn.Linear(6, 5), nn.Linear(5, 5)


def frozen_and_grouped(frozen: Mapping[str, Frozen], positions: Mapping[str, int]) -> ChannelGraph:
    groups = [
        CoupledGroup(name, num, (Member(name, "weight", 0, torch.arange(num)[:, None], 0),), (), frozenset())
        for name, num in positions.items()
    ]
    return ChannelGraph(tuple(groups), frozen)


def test_width_counts_each_channel_once_where_it_is_made():
    frozen = {
        "grouped.weight:0": Frozen("whole", 6, 6),
        "stem.weight:0": Frozen("half", 4, 8),
        "attention.out_proj.weight:0": Frozen("whole", 4, 4),
    }
    shares = width_shares(Widths(), frozen_and_grouped(frozen, {"stem": 4, "hidden": 5}), num_outputs=5)
    assert shares.width == 8 + 6 + 12 + 4 + 5
    assert shares.prunable == pytest.approx(9 / 35)
    assert shares.frozen == pytest.approx({"no reason given": 12 / 35, "whole": 10 / 35, "half": 4 / 35})
    assert list(shares.frozen) == ["no reason given", "whole", "half"]


class OwnWeight(nn.Module):
    """Forward code that uses a parameter as a weight; 6 + 12 channels, and 4 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 6), nn.Linear(12, 4)
        self.weight = nn.Parameter(torch.randn(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.embed(x) @ self.weight.t()).relu())


def test_parameters_that_forward_code_uses_as_weights_count():
    model, x = OwnWeight(), torch.randn(2, 3)
    shares = width_shares(model, iso.trace(model, x))
    assert shares.channels == {"embed.weight": 6, "head.weight": 4, "weight": 12}
    assert shares.prunable == pytest.approx(18 / 22)
    assert shares.frozen == pytest.approx({"it reaches the model's output": 4 / 22})


def test_a_graph_says_how_much_of_the_width_can_go():
    model, x = OwnWeight(), torch.randn(2, 3)
    *_, kept, last = str(iso.trace(model, x)).splitlines()
    assert kept == "Kept: head (it reaches the model's output), 18.2% of the width"
    assert last == "Width: 18 of 22 channels can go (81.8%)"
