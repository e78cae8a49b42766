"""A scale of q by the head dim: the layer, norm, or layers of several streams that make q make up for it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.pruning.grouping.trace import trace_groups
from tests.unit.pruning.grouping.halves import FOLLOWS, half, stays, units

IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))


class NormedQueries(nn.Module):
    """qkv = norm(conv(x)), two heads of 8; q times dim ** -0.5 in the forward code."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.dim = 2, 8
        self.stem, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
        self.qkv, self.proj = nn.Sequential(nn.Conv2d(16, 48, 1), norm), nn.Conv2d(16, 16, 1)
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, _, h, w = x.shape
        q, k, v = self.qkv(x).view(b, self.heads, self.dim * 3, h * w).split([self.dim] * 3, 2)
        y = v @ ((q * self.dim**-0.5).transpose(2, 3) @ k).softmax(-1).transpose(2, 3)
        return self.head(x + self.proj(y.reshape(b, -1, h, w)))


class Channels(nn.Module):
    """A layer norm over the channels of a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "norm",
    [nn.Identity(), nn.BatchNorm2d(48), nn.GroupNorm(6, 48), nn.InstanceNorm2d(48, affine=True)],
    ids=lambda norm: type(norm).__name__,
)
def test_queries_behind_a_norm(norm: nn.Module):
    model = NormedQueries(norm)
    graph = trace_groups(model.eval(), IMAGE)
    found = units(graph)
    assert found["stem.weight:0"] == 16 and sum(n for name, n in found.items() if name.startswith("qkv")) == 32
    cut = half(model, IMAGE, head_dim_ratio=0.5)
    assert (cut.stem.out_channels, cut.qkv[0].out_channels, cut.proj.in_channels, cut.dim) == (8, 24, 8, 4)


def test_a_layer_norm_over_q_k_and_v():
    model = NormedQueries(Channels(48))
    found = units(trace_groups(model.eval(), IMAGE))
    assert found == {"stem.weight:0": 16, "qkv.0.weight:0:0": 16, "qkv.0.weight:0:16": 16}
    cut = half(model, IMAGE, head_dim_ratio=0.5)
    assert (cut.stem.out_channels, cut.qkv[0].out_channels, cut.qkv[1].norm.weight.shape, cut.dim) == (8, 24, (24,), 4)


class Joined(nn.Module):
    """Attention over the tokens of two streams together; each has its own projections."""

    def __init__(self, kind: str, join: str = "cat") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.join, self.heads, self.dim = kind, join, 2, 8
        self.a, self.b = nn.Linear(3, 16), nn.Linear(3, 16)
        self.q1, self.k1, self.v1 = (nn.Linear(16, 16) for _ in range(3))
        self.q2, self.k2, self.v2 = (nn.Linear(16, 16) for _ in range(3))
        self.o1, self.o2, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def joined(self, one: Tensor, other: Tensor) -> Tensor:
        """Two (B, 2, 5, 8) one after the other."""
        if self.join == "cat":
            return torch.cat([one, other], 2)
        return torch.stack([one, other], 2).flatten(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        streams = self.a(x), self.b(x)
        layers = ((self.q1, self.q2), (self.k1, self.k2), (self.v1, self.v2))
        q, k, v = (
            self.joined(*(f(s).view(len(x), -1, self.heads, self.dim).transpose(1, 2) for f, s in zip(pair, streams)))  # noqa: B905
            for pair in layers
        )
        if self.kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.kind == "product":
            y = ((q * self.dim**-0.5) @ k.transpose(-1, -2)).softmax(-1) @ v
        elif self.kind == "used besides":
            y = ((q * self.dim**-0.5) @ k.transpose(-1, -2)).softmax(-1) @ v + q
        else:
            y = (q @ k.transpose(-1, -2) * self.dim**-0.5).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2)
        return self.head(torch.cat([streams[0] + self.o1(y[:, :5]), streams[1] + self.o2(y[:, 5:])], 1))


@pytest.mark.parametrize("join", ["cat", "stack"])
@pytest.mark.parametrize("kind", ["sdpa", "product", "logits"])
def test_joined_queries_of_two_streams(kind: str, join: str):
    model: Any = Joined(kind, join)
    graph = trace_groups(model.eval(), X)
    assert units(graph) == {"a.weight:0": 16, "q1.weight:0": 16, "v1.weight:0": 16}
    assert {group.name: group.num_sections for group in graph.groups if group.heads} == {
        "q1.weight:0": 2,
        "v1.weight:0": 2,
    }
    narrower, alone = half(model, X, head_dim_ratio=0.5), half(model, X, head_dim_ratio=0.5, ignore=["a", "b"])
    widths = [layer.out_features for layer in (narrower.q1, narrower.q2, narrower.k1, narrower.k2, narrower.v2)]
    assert widths == [8] * 5 and narrower.dim == 4
    # the rows that stay are those of the dense layers, times √(new / old head dim) where they make q
    for layer, factor in (("q1", 0.5**0.5), ("q2", 0.5**0.5), ("k1", 1.0), ("k2", 1.0), ("v2", 1.0)):
        rows = {round(value, 4) for value in (getattr(model, layer).bias * factor).tolist()}
        assert {round(value, 4) for value in getattr(alone, layer).bias.tolist()} <= rows
    fewer = half(model, X, ratio=0.0, head_ratio=0.5)
    assert (fewer.q1.out_features, fewer.o2.in_features, fewer.heads) == (8, 8, 1)


@pytest.mark.parametrize("join", ["cat", "stack"])
def test_queries_that_are_used_without_the_scale_stay(join: str):
    model = Joined("used besides", join)
    why = stays(model, X, "head")
    assert {"q1.weight:0", "q2.weight:0"} & set(why) and set(why.values()) == {FOLLOWS}
    cut = half(model, X, head_dim_ratio=0.5)
    assert (cut.a.out_features, cut.q1.out_features, cut.k1.out_features, cut.dim) == (8, 16, 16, 8)


class ScaledInTheCall(nn.Module):
    """Fused attention with a scale that forward computes from sizes."""

    def __init__(self, scale: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.heads, self.dim, self.width = scale, 2, 8, 16
        self.stem, self.head = nn.Linear(3, 16), nn.Linear(16, 4)
        self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (f(x).view(*x.shape[:-1], -1, self.dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.scale == "attribute":
            y = F.scaled_dot_product_attention(q, k, v, scale=self.dim**-0.5)
        elif self.scale == "quotient":
            y = F.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=1 / math.sqrt(self.width / self.heads))
        elif self.scale == "shape":
            y = F.scaled_dot_product_attention(q, k, v, scale=2 * q.shape[-1] ** -0.5)
        else:
            y = F.scaled_dot_product_attention(q, q, v, scale=self.dim**-0.5)
        return self.head(x + self.proj(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("scale", ["attribute", "quotient", "shape"])
def test_a_scale_that_is_given_to_fused_attention(scale: str):
    model = ScaledInTheCall(scale)
    assert units(trace_groups(model.eval(), X)) == {"stem.weight:0": 16, "q.weight:0": 16, "v.weight:0": 16}
    cut = half(model, X, head_dim_ratio=0.5)
    assert [layer.out_features for layer in (cut.stem, cut.q, cut.k, cut.v)] == [8] * 4 and cut.dim == 4
    assert half(model, X, ratio=0.0, head_ratio=0.5).q.out_features == 8


def test_a_scale_of_q_times_itself_cannot_be_made_up_for():
    found = stays(ScaledInTheCall("itself"), X, "head", "k")
    assert found == {"q.weight:0": FOLLOWS, "v.weight:0": FOLLOWS}


class EdgeAttention(nn.Module):
    """Attention along a graph's edges, its products written out; what makes a softmax of them uses them twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.heads, self.dim = kind, 2, 8
        self.q, self.k, self.v, self.out = nn.Linear(3, 16), nn.Linear(3, 16), nn.Linear(3, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        source, target = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 0, 2])
        q, k, v = (layer(x[0]).view(-1, self.heads, self.dim) for layer in (self.q, self.k, self.v))
        q, k = (q[target], k[source]) if self.kind != "index_select" else (q.index_select(0, target), k[source])
        if self.kind == "squared":
            k = q
        weights = (q * k).sum(-1) / math.sqrt(self.dim) if self.kind != "by mul" else (k * q).sum(-1) * self.dim**-0.5
        weights = (weights - weights.amax(0)).exp()
        weights = weights / weights.sum(0)
        if self.kind == "before, too":
            weights = weights + (q * k).sum(-1)
        y = torch.zeros_like(v).index_add(0, target, weights[..., None] * v[source])
        return self.out(y.reshape(-1, self.heads * self.dim))[None]


@pytest.mark.parametrize("kind", ["index", "index_select", "by mul"])
def test_a_product_that_is_written_out_and_used_twice(kind: str):
    model: Any = EdgeAttention(kind)
    graph = trace_groups(model.eval(), X[:1])
    assert units(graph) == {"q.weight:0": 16, "v.weight:0": 16}
    cut = half(model, X[:1], ratio=0.5)
    assert (cut.q.out_features, cut.v.out_features, cut.out.in_features, cut.dim) == (8, 8, 8, 4)


@pytest.mark.parametrize("kind", ["squared", "before, too"])
def test_a_product_that_no_layer_can_make_up_for_stays(kind: str):
    with pytest.raises(UserError, match=FOLLOWS):
        trace_groups(EdgeAttention(kind).eval(), X[:1])
