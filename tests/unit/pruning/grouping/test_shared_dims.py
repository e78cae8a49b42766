"""Attention whose heads share their dims: a dim goes from all heads, and heads go as a whole besides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.pruning.grouping.trace import trace_groups
from tests.unit.pruning.grouping.cutting import error_of_random_cut, randomized
from tests.unit.pruning.grouping.halves import half

X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Four heads of 8 dims on a stream of 16.

    Args:
        kind: what the heads share: "rotary", "norms" over the dims of q and k, "pooled" q, k and v, or nothing.
        key_heads: each serves as many query heads in a row.
        fused: one layer makes q, k and v.
        counts: the forward code knows the number of heads from an attribute; else from the width.
    """

    def __init__(self, kind: str, key_heads: int = 4, fused: bool = False, counts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.fused, self.counts = kind, fused, counts
        self.num_heads, self.key_heads, self.head_dim, self.repeats = 4, key_heads, 8, 4 // key_heads
        self.embed, self.head = nn.Linear(3, 16), nn.Linear(16, 4)
        if fused:
            self.qkv = nn.Linear(16, 96)
        else:
            self.q, self.k, self.v = (nn.Linear(16, 8 * n) for n in (4, key_heads, key_heads))
        self.o = nn.Linear(32, 16)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)] if kind == "norms" else [])
        self.pools = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1, groups=8) for _ in range(3 if kind == "pooled" else 0))
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.tensor([1.0, 0.3, 0.1, 0.03]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.projected(x)
        if self.kind == "norms":
            q, k = self.norms[0](q), self.norms[1](k)
        if self.kind == "pooled":
            q, k, v = (pool(one.flatten(0, 1).mT).mT.view(one.shape) for pool, one in zip(self.pools, (q, k, v)))  # noqa: B905
        if self.kind == "rotary":
            angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * self.frequencies
            angles = torch.cat((angles, angles), dim=-1)
            q, k = (one * angles.cos() + turned(one) * angles.sin() for one in (q, k))
        if self.repeats > 1:
            k, v = (one.repeat_interleave(self.repeats, dim=1) for one in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head(x + self.o(y.transpose(1, 2).reshape(*x.shape[:2], -1)))

    def projected(self, x: Tensor) -> Any:
        """q (B, 4, N, 8), k and v (B, key heads, N, 8)."""
        b, n, _ = x.shape
        if self.fused:
            number = self.num_heads if self.counts else -1
            return self.qkv(x).view(b, n, 3, number, self.head_dim).permute(2, 0, 3, 1, 4)
        numbers = (self.num_heads, self.key_heads, self.key_heads) if self.counts else (-1, -1, -1)
        layers = zip((self.q, self.k, self.v), numbers, strict=True)
        return [layer(x).view(b, n, number, self.head_dim).transpose(1, 2) for layer, number in layers]


def turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


CASES: list[dict[str, Any]] = [
    {"kind": "rotary"},
    {"kind": "rotary", "counts": True},
    {"kind": "rotary", "key_heads": 2},
    {"kind": "rotary", "fused": True},
    {"kind": "norms"},
    {"kind": "norms", "key_heads": 2, "counts": True},
    {"kind": "pooled"},
    {"kind": "pooled", "fused": True, "counts": True},
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
def test_heads_that_share_dims_go(options: dict[str, Any]):
    model: Any = randomized(Attention(**options).float())
    graph = trace_groups(model, X)
    key_heads = options.get("key_heads", 4)
    assert [groups[0].num_sections for groups in graph.head_sets] == [key_heads] and not graph.frozen_heads
    assert all(error_of_random_cut(model, graph, X, seed) < 1e-4 for seed in range(6))
    heads: Any = iso.prune(
        Attention(**options).eval(), X, ratio=0.0, head_ratio=0.5, criterion="l2", self_check=True
    ).model
    made = [heads.qkv.out_features // 3] if options.get("fused") else [heads.q.out_features, heads.k.out_features]
    assert made == ([16] if options.get("fused") else [16, 4 * key_heads]) and heads.o.in_features == 16
    dims: Any = half(Attention(**options), X, head_dim_ratio=0.5)
    assert dims.o.in_features == 16 and dims.embed.out_features == 8


class PartsOfHeads(Attention):
    """q, k and v lie head by head, (heads, 3, dims)."""

    def projected(self, x: Tensor) -> Any:
        qkv = self.qkv(x).view(*x.shape[:2], self.num_heads, 3, self.head_dim).transpose(1, 2)
        return [qkv[..., part, :].reshape(len(x), self.num_heads, -1, self.head_dim) for part in range(3)]


@pytest.mark.parametrize("kind", ["rotary", "norms", "pooled"])
def test_shared_dims_of_parts_of_heads(kind: str):
    model: Any = randomized(PartsOfHeads(kind, fused=True).float())
    graph = trace_groups(model, X)
    assert [groups[0].num_sections for groups in graph.head_sets] == [4] and not graph.frozen_heads
    assert all(error_of_random_cut(model, graph, X, seed) < 1e-4 for seed in range(6))


@pytest.mark.parametrize("options", [{"kind": "rotary"}, {"kind": "norms", "key_heads": 2}, {"kind": "pooled"}])
def test_dims_and_heads_in_two_steps(options: dict[str, Any]):
    dense = Attention(**options).eval()
    done: Any = iso.prune(
        dense, X, ratio=0.5, head_ratio=0.5, criterion="l2", ranking="local", steps=2, self_check=True
    )
    assert done.model.o.in_features == 8 and done.plan.check(done.plan.graph) is None
    whole = next(group for group in done.plan.graph.groups if not group.has_width)
    assert len(done.plan.kept[whole.name]) == whole.num_units // 2
    again: Any = iso.prune(dense, X, plan=done.plan)
    assert torch.equal(again.model.o.weight, done.model.o.weight)
