"""Weights that are batches of matrices, one for each expert or a batch of one: their channels are a linear layer's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.pruning.grouping.halves import found, half, stays

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


class Routed(nn.Module):
    """Experts in the notation of einsum, in several ways of writing it; every item goes to all of them."""

    def __init__(self, up: str, down: str, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.equations, self.stem, self.head = (up, down), nn.Linear(3, 6), nn.Linear(5, 3)
        self.u, self.d = nn.Parameter(torch.randn(4, 6, 10)), nn.Parameter(torch.randn(4, 10, 5))
        if transposed:
            self.u, self.d = (nn.Parameter(weight.detach().mT.contiguous()) for weight in (self.u, self.d))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        up, down = self.equations
        first, second = (x, self.u) if up.replace(" ", "").count(",g") else (self.u, x)
        y = torch.einsum(up, first, second).relu()
        return self.head(torch.einsum(down, y, self.d).sum(-2))


@pytest.mark.parametrize(
    ("up", "down", "transposed"),
    [
        ("bi,gio->bgo", "bgo,gop->bgp", False),
        ("gio,bi->bgo", "bgo,gop->bgp", False),
        ("bi, gio -> bgo", "...go,gop->...gp", False),
        ("...i,gio->...go", "bgo,gop->bgp", False),
        ("bi,goi->bgo", "bgo,gpo->bgp", True),
    ],
)
def test_experts_by_einsum(up: str, down: str, transposed: bool):
    model = Routed(up, down, transposed)
    assert sorted(found(model, X).values()) == [5, 6, 10] and stays(model, X, "head") == {}
    cut: Any = half(model, X, ratio=0.4)
    assert (cut.stem.out_features, cut.head.in_features) == (4, 3)
    wanted = [(4, 4, 6), (4, 6, 3)] if not transposed else [(4, 6, 4), (4, 3, 6)]
    assert [tuple(weight.shape) for weight in (cut.u, cut.d)] == wanted


class Projected(nn.Module):
    """Attention whose projections have an axis of heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(8, 2, 4)) for _ in range(3))
        self.o = nn.Parameter(torch.randn(2, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (torch.einsum("bnd,dhk->bnhk", x, weight) for weight in (self.q, self.k, self.v))
        weights = torch.einsum("bnhk,bmhk->bhnm", q, k).softmax(-1)
        y = torch.einsum("bhnm,bmhk->bnhk", weights, v)
        return self.head(x + torch.einsum("bnhk,hkd->bnd", y, self.o))


def test_projections_with_an_axis_of_heads():
    cut: Any = half(Projected(), X[None], ratio=0.5)
    assert cut.stem.out_features == 4 and cut.q.shape == (4, 2, 2) == cut.k.shape
    assert (cut.v.shape, cut.o.shape) == ((4, 2, 2), (2, 2, 4))


class Normalised(nn.Module):
    """Experts whose weights are computed on the way."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.w, self.stem, self.head, self.equation = (
            nn.Parameter(torch.randn(4, 6, 10)),
            nn.Linear(3, 6),
            nn.Linear(10, 3),
            equation,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.einsum(self.equation, self.stem(x), self.w.tanh()).sum(1))


@pytest.mark.parametrize("equation", ["bi,gio->bgo", "bi,gio"])
def test_what_is_not_followed_is_named(equation: str):
    told = stays(Normalised(equation), X, "head")
    assert "w:0" in told and told["w:0"].startswith("einsum computes with")


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
