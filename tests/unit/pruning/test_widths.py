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


class Tied(nn.Module):
    """A language model: words and output share a table, and each place adds a vector of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.hidden, self.back, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(x + self.back(self.hidden(x).relu()))


class Normed(nn.Module):
    """Weights that are computed from parameters, by all ways that torch has."""

    def __init__(self) -> None:
        super().__init__()
        new = nn.utils.parametrizations
        self.a = new.weight_norm(nn.Conv1d(3, 8, 3))
        self.b = new.spectral_norm(nn.Linear(8, 10))
        self.c = nn.utils.weight_norm(nn.Linear(10, 12), dim=1)
        self.d = nn.utils.spectral_norm(nn.Linear(12, 6))
        self.rnn = new.weight_norm(nn.GRU(6, 5), "weight_hh_l0")
        self.out = new.weight_norm(nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).mT
        x = self.d(self.c(self.b(x).relu()).relu())
        return self.out(self.rnn(x)[0])


@pytest.mark.parametrize(("build", "x", "channels"), [
    (Tied, torch.arange(12).reshape(2, 6), {"hidden.weight": 12, "back.weight": 8, "head.weight": 20}),
    (Normed, torch.randn(2, 3, 7), {
        "a.parametrizations.weight.original1": 8, "b.parametrizations.weight.original": 10, "c.weight_v": 12,
        "d.weight_orig": 6, "rnn.weight_ih_l0": 15, "rnn.parametrizations.weight_hh_l0.original1": 15,
        "out.parametrizations.weight.original1": 4,
    }),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_tied_and_computed_weights_count_once_and_what_stays_has_its_reason(build, x, channels):
    model = build().eval()
    shares = width_shares(model, iso.trace(model, x))
    assert shares.channels == channels
    assert set(shares.frozen) == {"it reaches the model's output"}
    outputs = channels.get("head.weight", 4)
    assert shares.prunable == pytest.approx(1 - outputs / sum(channels.values()))
