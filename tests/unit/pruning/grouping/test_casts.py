"""`int()`, `float()`, `round()` and `math.ceil` of sizes and attributes: what the cut model computes anew follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.unit.pruning.grouping.halves import FOLLOWS, OUTPUT, found, half, stays

X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Tokens (B, 5, 16), and what `code` does with them."""

    def __init__(self, code: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.code, self.heads, self.dim = code, 2, 8
        self.a, self.b, self.c, self.head = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.code(self, self.a(x)))

    def attention(self, x: Tensor, dim: int, scale: Callable[[int], float] = lambda dim: dim**-0.5) -> Tensor:
        """Attention of two heads of `dim`."""
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, dim).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-1, -2) * scale(q.shape[-1])).softmax(-1) @ v
        return x + self.o(y.transpose(1, 2).reshape(b, n, -1))


def _turned(x: Tensor, half: int) -> Tensor:
    return torch.cat([x[..., half:], x[..., :half]], -1)


def _viewed(net: Any, x: Tensor) -> Tensor:
    b, n, d = x.shape
    return x.reshape(int(b) * int(n), int(d)).view(int(b), int(n), int(d))


SIZES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "int": lambda net, x: F.layer_norm(x, [int(x.shape[-1])]),
    "float": lambda net, x: F.layer_norm(x, [int(float(x.shape[-1]))]),
    "round": lambda net, x: F.layer_norm(x, [round(x.shape[-1] * 1.0)]),
    "ceil": lambda net, x: F.layer_norm(x, [math.ceil(x.shape[-1] * 1.0)]),
    "floor": lambda net, x: F.layer_norm(x, [math.floor(x.shape[-1] / 1)]),
    "trunc": lambda net, x: F.layer_norm(x, [math.trunc(x.shape[-1] * 1.0)]),
    "of a size": lambda net, x: F.layer_norm(x, [int(x.size(2))]),
    "view": _viewed,
}
HALVES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "times a half": lambda net, x: _turned(x, int(x.shape[-1] * 0.5)),
    "int over two": lambda net, x: _turned(x, int(x.shape[-1]) // 2),
    "int of a fraction": lambda net, x: _turned(x, int(x.shape[-1] / 2)),
    "round of a fraction": lambda net, x: _turned(x, round(x.shape[-1] / 2)),
}


@pytest.mark.parametrize("code", SIZES)
def test_a_size_is_cast(code: str):
    model = Net(SIZES[code])
    assert found(model, X)["a.weight:0"] == 16
    cut = half(model, X)
    assert (cut.a.out_features, cut.head.in_features) == (8, 8)


@pytest.mark.parametrize("code", HALVES)
def test_half_a_size_is_cast(code: str):
    model = Net(HALVES[code])
    assert found(model, X) == {"a.weight:0:0": 8, "a.weight:0:8": 8}
    assert half(model, X).a.out_features == 8


HEAD_DIMS: dict[str, Callable[[Any], int]] = {
    "int": lambda net: int(net.dim),
    "round of float": lambda net: round(float(net.dim)),
    "int of a fraction": lambda net: int(net.qkv.out_features / 6),
    "int times a fraction": lambda net: int(net.o.in_features * 0.5),
    "round of a fraction": lambda net: round(net.qkv.weight.shape[0] / net.heads / 3),
}


@pytest.mark.parametrize("code", HEAD_DIMS)
def test_a_head_dim_is_cast(code: str):
    model = Net(lambda net, x: net.attention(x, HEAD_DIMS[code](net)))
    assert found(model, X) == {"a.weight:0": 16, "qkv.weight:0": 16}
    cut = half(model, X, head_dim_ratio=0.5)
    assert (cut.a.out_features, cut.qkv.in_features, cut.qkv.out_features) == (8, 8, 24)
    assert (HEAD_DIMS[code](cut), cut.heads) == (4, 2)


# What stays.


def _constant(net: Any, x: Tensor) -> Tensor:
    int(x.shape[-1])
    return net.c(net.b(x).relu()).reshape(len(x), -1, 16) + x


def _head_constant(net: Any, x: Tensor) -> Tensor:
    b, n, d = x.shape
    int(d)
    q = net.b(x).view(b, n, -1, 4).transpose(1, 2)
    return x + net.o(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(b, n, -1))


def _attention_constant(net: Any, x: Tensor) -> Tensor:
    int(x.shape[-1])
    return net.attention(x, 8)


@pytest.mark.parametrize(
    ("code", "frozen", "left"),
    [
        (_constant, {"a.weight:0", "c.weight:0"}, {"b.weight:0": 16}),
        (_head_constant, {"b.weight:0"}, {"a.weight:0": 16, "b.weight:0:heads": 4}),
        (_attention_constant, {"qkv.weight:0"}, {"a.weight:0": 16, "qkv.weight:0:heads": 2}),
    ],
    ids=["width", "head dim", "head dim of attention"],
)
def test_a_number_beside_a_cast_stays(code: Any, frozen: set[str], left: dict[str, int]):
    model = Net(code)
    why = stays(model, X, "head")
    assert set(why.values()) == {FOLLOWS} and set(why) <= frozen and why
    assert found(model, X) == left
    half(model, X)


@pytest.mark.parametrize(
    ("code", "frozen"),
    [
        (lambda net, x: net.b(x) * float(x.shape[-1]) ** -0.5, "a.weight:0"),
        (lambda net, x: net.b(x) * float(x.shape[-1]) + net.c(x), "a.weight:0"),
        (lambda net, x: net.attention(x, net.dim, lambda dim: float(dim) ** -0.5), "qkv.weight:0"),
    ],
    ids=["scale", "sum", "attention"],
)
def test_a_float_that_scales_does_not_follow(code: Any, frozen: str):
    model = Net(code)
    assert stays(model, X, "head") == {frozen: FOLLOWS}
    assert stays(model, X)["head.weight:0"] == OUTPUT
    half(model, X)
