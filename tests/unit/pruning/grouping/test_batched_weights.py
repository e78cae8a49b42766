"""Weights that are batches of matrices, one for each expert or a batch of one: their channels are a linear layer's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.pruning.grouping.halves import found, half

X = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


class Mixture(nn.Module):
    """Four experts whose answers are weighted and added up, beside a residual stream."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.stem, self.out = kind, nn.Linear(3, 6), nn.Linear(6, 5)
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 10)), nn.Parameter(torch.randn(4, 10, 6))
        self.shift, self.weights = nn.Parameter(torch.randn(4, 1, 10)), nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.kind == "matmul":
            y = (x @ self.up + self.shift).relu() @ self.down
        elif self.kind == "bmm":
            y = torch.baddbmm(self.shift, x.expand(4, *x.shape), self.up).relu().bmm(self.down)
        elif self.kind == "transposed":
            y = (x @ self.down.mT + self.shift).relu() @ self.up.mT
        else:
            y = torch.einsum("ebo,eoi->ebi", (x @ self.up + self.shift).relu(), self.down)
        return self.out(x + (y * self.weights).sum(0))


@pytest.mark.parametrize("kind", ["matmul", "bmm", "transposed", "einsum"])
def test_experts_have_their_channels_in_common(kind: str):
    widths = found(Mixture(kind), X)
    assert sorted(widths.values()) == [6, 10]
    cut: Any = half(Mixture(kind), X)
    assert (cut.up.shape, cut.down.shape, cut.shift.shape) == ((4, 3, 5), (4, 5, 3), (4, 1, 5))
    assert (cut.stem.out_features, cut.out.in_features) == (3, 3)


class Stacked(nn.Module):
    """A layer in a batch of one, as graph networks have a stack of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Parameter(torch.randn(1, 3, 8)), nn.Parameter(torch.randn(1, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.one).relu() @ self.two).mean(0)


def test_a_batch_of_one():
    assert found(Stacked(), X) == {"one:2": 8}
    cut: Any = half(Stacked(), X)
    assert (cut.one.shape, cut.two.shape) == ((1, 3, 4), (1, 4, 4))
