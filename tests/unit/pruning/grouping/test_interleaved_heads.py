"""q, k and v that a fused layer makes head by head: (heads, 3, dim), (heads, dim, 3), (heads, 3 · dim)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.pruning.grouping.trace import trace_groups
from tests.unit.pruning.grouping.cutting import error_of_random_cut, randomized
from tests.unit.pruning.grouping.halves import half, units

X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


class Fused(nn.Module):
    """Attention with 4 heads of 6 dims over a stream of 16; `layout` says how q, k and v lie, and are taken."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layout, self.num_heads, self.head_dim = layout, 4, 6
        self.embed, self.head = nn.Linear(3, 16), nn.Linear(16, 4)
        self.qkv, self.proj = nn.Linear(16, 72), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (part.transpose(1, 2) for part in self.parts(self.qkv(x)))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.head(x + self.proj(y.reshape(*x.shape[:2], -1)))

    def parts(self, qkv: Tensor) -> Any:
        b, n, _ = qkv.shape
        if self.layout == "unbind":
            return qkv.view(b, n, self.num_heads, 3, self.head_dim).unbind(3)
        if self.layout == "select":
            qkv = qkv.view(b, n, -1, 3, self.head_dim)
            return [qkv[..., part, :] for part in range(3)]
        if self.layout == "split":
            return [part.squeeze(3) for part in qkv.view(b, n, self.num_heads, 3, self.head_dim).split(1, dim=3)]
        if self.layout == "chunk":
            return qkv.view(b, n, self.num_heads, -1).chunk(3, -1)
        if self.layout == "slices":
            qkv, d = qkv.view(b, n, self.num_heads, -1), self.head_dim
            return qkv[..., :d], qkv[..., d : 2 * d], qkv[..., 2 * d :]
        if self.layout == "last":
            return qkv.view(b, n, self.num_heads, self.head_dim, 3).unbind(-1)
        return tuple(qkv.view(b, n, -1, self.head_dim, 3).permute(4, 0, 1, 2, 3))  # "permuted"


@pytest.mark.parametrize("layout", ["unbind", "select", "split", "chunk", "slices"])
def test_heads_of_parts_that_lie_inside_them(layout: str):
    model = randomized(Fused(layout).float())
    graph = trace_groups(model, X)
    assert units(graph) == {"embed.weight:0": 16, "qkv.weight:0:0": 24, "qkv.weight:0:12": 24}
    assert [[g.num_sections for g in groups] for groups in graph.head_sets] == [[4, 4]]
    assert all(error_of_random_cut(model, graph, X, seed) < 1e-5 for seed in range(4))
    heads = half(Fused(layout), X, ratio=0.0, head_ratio=0.5)
    assert (heads.qkv.out_features, heads.proj.in_features) == (36, 12)
    dims = half(Fused(layout), X, head_dim_ratio=0.5)
    assert (dims.qkv.out_features, dims.proj.in_features, dims.embed.out_features) == (36, 12, 8)


@pytest.mark.parametrize("layout", ["last", "permuted"])
def test_parts_of_a_dim_go_with_it(layout: str):
    model = randomized(Fused(layout).float())
    graph = trace_groups(model, X)
    assert units(graph) == {"embed.weight:0": 16, "qkv.weight:0": 24}
    assert [groups[0].num_sections for groups in graph.head_sets] == [4]
    assert all(error_of_random_cut(model, graph, X, seed) < 1e-5 for seed in range(4))
    kept: Any = iso.prune(Fused(layout).eval(), X, ratio=0.0, head_ratio=0.5, criterion="l2").model
    assert (kept.qkv.out_features, kept.proj.in_features) == (36, 12)


class Pairs(nn.Module):
    """Two values a channel, (channels, 2), or (groups, channels, 2), of which one scales the other."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.groups, self.up, self.down = groups, nn.Linear(3, 24), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        x = x.view(*x.shape[:-1], self.groups, -1, 2) if self.groups > 1 else x.view(*x.shape[:-1], -1, 2)
        return self.down((x[..., 0].relu() * x[..., 1]).flatten(2))


@pytest.mark.parametrize("groups", [1, 3])
def test_pairs_are_units(groups: int):
    model = randomized(Pairs(groups).float())
    graph = trace_groups(model, X)
    assert units(graph) == {"up.weight:0": 12} and graph.groups[0].members[0].index.shape == (12, 2)
    assert all(error_of_random_cut(model, graph, X, seed) < 1e-5 for seed in range(4))


class Strided(nn.Module):
    """Every second or third channel apart from the others: a gate, a rotary embedding, an assignment."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.up, self.down = kind, nn.Linear(3, 24), nn.Linear(12 if kind == "gate" else 24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "gate":
            x = x[..., ::2].relu() * x[..., 1::2]
        elif self.kind == "rotary":
            x = x * 0.6 + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * 0.8
        else:
            y = torch.zeros_like(x)
            y[:, :, 0::3], y[:, :, 1::3], y[:, :, 2::3] = x[..., 2::3], x[..., 0::3] * 2, x[..., 1::3]
            x = y
        return self.down(x)


@pytest.mark.parametrize(("kind", "units_in_all"), [("gate", 12), ("rotary", 12), ("assignment", 8)])
def test_every_so_many_channels(kind: str, units_in_all: int):
    model = randomized(Strided(kind).float())
    graph = trace_groups(model, X)
    assert units(graph) == {"up.weight:0": units_in_all}
    assert all(error_of_random_cut(model, graph, X, seed) < 1e-5 for seed in range(4))
