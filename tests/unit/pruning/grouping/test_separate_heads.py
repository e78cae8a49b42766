"""Attention with separate q, k and v layers: a head is one set of sections over several groups."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.errors import UserError
from isomorphic.pruning.plan import PruningPlan

X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """One layer on a stream of 16; 4 heads of 4 for q and k, of `value` for v."""

    def __init__(self, kind: str = "plain", value: int = 4) -> None:
        super().__init__()
        self.kind, self.num_heads, self.head_dim = kind, 4, 4
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)
        self.v, self.o = nn.Linear(16, 4 * value), nn.Linear(4 * value, 16)
        self.bias = nn.Parameter(torch.randn(4, 5, 5))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, n, _ = x.shape
        if self.kind == "counts heads":
            q, k, v = (f(c).view(b, n, self.num_heads, -1).transpose(1, 2) for f, c in
                       ((self.q, x), (self.k, context), (self.v, context)))  # fmt: skip
        else:
            q, k = (f(c).view(b, n, -1, self.head_dim).transpose(1, 2) for f, c in ((self.q, x), (self.k, context)))
            v = self.v(context).view(b, n, q.shape[1], -1).transpose(1, 2)
        mask = self.bias if self.kind == "bias" else None
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, n, -1))


class Net(nn.Module):
    def __init__(self, kind: str = "plain", value: int = 4, depth: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embed, self.other, self.head = kind, nn.Linear(3, 16), nn.Linear(3, 16), nn.Linear(16, 4)
        self.layers = nn.ModuleList(Attention(kind, value) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        for layer in self.layers:
            stream = stream + layer(stream, self.other(x) if self.kind == "cross" else stream)
        return self.head(stream)


def pruned(model: nn.Module, **options: Any) -> Any:
    return iso.prune(model.eval(), X, criterion="l2", self_check=True, **{"ratio": 0.0, **options})


@pytest.mark.parametrize(
    ("kind", "value"), [("plain", 4), ("counts heads", 4), ("bias", 4), ("cross", 4), ("plain", 6)]
)
@pytest.mark.parametrize("ranking", ["isomorphic", "global", "local"])
def test_the_same_heads_go_from_all_projections(kind: str, value: int, ranking: str):
    model: Any = Net(kind, value)
    done = pruned(model, head_ratio=0.5, ranking=ranking)
    layer = done.model.layers[0]
    assert [f.out_features for f in (layer.q, layer.k, layer.v)] == [8, 8, 2 * value]
    assert layer.o.in_features == 2 * value and done.model(X).shape == (2, 5, 4)
    assert len(layer.bias) == (2 if kind == "bias" else 4)
    # the two of least mean square over the units of q, k and v, each group relative to its own mean
    groups = {group.name: group for group in done.plan.graph.groups}
    q, v = groups["layers.0.q.weight:0"], groups["layers.0.v.weight:0"]
    kept = done.plan.kept_heads(q)
    assert kept == done.plan.kept_heads(v) and len(kept) == 2
    scores = [done.plan.scores[group.name] / done.plan.scores[group.name].mean() for group in (q, v)]
    by_head = torch.cat([score.view(4, -1) for score in scores], dim=1).mean(dim=1)
    assert kept == sorted(by_head.topk(2).indices.tolist())
    dense = model.layers[0]
    rows = torch.arange(16).view(4, 4)[kept].flatten()
    assert torch.equal(layer.q.weight, dense.q.weight[rows]) and torch.equal(layer.k.weight, dense.k.weight[rows])
    assert "Heads of layers: 4 => 2" in str(done)


def test_heads_and_dims_and_budgets_together():
    done = iso.prune(Net(depth=2).eval(), X, criterion="l2", macs="50%", self_check=True)
    assert done.after.macs_paper <= 0.5 * done.before.macs_paper
    assert sum(len(done.plan.kept_heads(first)) for first, *_ in done.plan.graph.head_sets) < 8
    steps = pruned(Net(depth=2), head_ratio=0.5, ratio=0.25, steps=3)
    heads = [len(steps.plan.kept_heads(first)) for first, *_ in steps.plan.graph.head_sets]
    assert sum(heads) == 4 and steps.plan.check(steps.plan.graph) is None


def test_a_spared_projection_keeps_the_heads_of_all():
    done = pruned(Net(depth=2), head_ratio=0.5, ignore=["layers.0.v"])
    assert [layer.k.out_features for layer in done.model.layers] == [16, 8]


def test_a_plan_that_keeps_other_heads_is_refused():
    model = Net().eval()
    graph = iso.trace(model, X)
    kept = {group.name: tuple(range(group.num_units)) for group in graph.groups}
    kept |= {"layers.0.q.weight:0": tuple(range(8)), "layers.0.v.weight:0": tuple(range(8, 16))}
    with pytest.raises(UserError, match="keeps other heads of layers.0.q.weight:0 than of layers.0.v.weight:0"):
        iso.prune(model, X, plan=PruningPlan(kept))


class GroupedQueries(nn.Module):
    """Four query heads of 4 dims; each of the key heads serves several of them in a row.

    Args:
        form: how keys and values come to the query heads.
        counts: how the forward code knows the numbers of heads.
        key_heads: 2 or 1.
    """

    def __init__(self, form: str, counts: str = "attributes", key_heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.counts, self.head_dim = form, counts, 4
        self.num_heads, self.num_key_heads, self.repeats = 4, key_heads, 4 // key_heads
        self.embed, self.head = nn.Linear(3, 16), nn.Linear(16, 4)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 4 * key_heads), nn.Linear(16, 4 * key_heads)
        self.o = nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.randn(4, 5, 5))  # a head each

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        heads, key_heads = {
            "attributes": (self.num_heads, self.num_key_heads),
            "minus one": (-1, -1),
            "widths": (self.q.out_features // self.head_dim, self.k.out_features // self.head_dim),
        }[self.counts]
        q = self.q(x).view(b, n, heads, self.head_dim).transpose(1, 2)
        k, v = (f(x).view(b, n, key_heads, self.head_dim).transpose(1, 2) for f in (self.k, self.v))
        y = self.attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return self.head(x + self.o(y))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, key_heads, n, dim = k.shape
        if self.form == "enable_gqa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, enable_gqa=True)
        if self.form in ("five axes", "einsum"):
            q = q.reshape(b, key_heads, self.repeats, n, dim)
            if self.form == "einsum":
                logits = torch.einsum("bgrnd,bgmd->bgrnm", q, k) / self.head_dim**0.5
                return torch.einsum("bgrnm,bgmd->bgrnd", logits.softmax(-1), v).reshape(b, -1, n, dim)
            logits = q @ k.unsqueeze(2).transpose(-1, -2) / self.head_dim**0.5
            return (logits.softmax(-1) @ v.unsqueeze(2)).reshape(b, -1, n, dim)
        if self.form == "repeat_interleave":
            k, v = (one.repeat_interleave(q.size(1) // key_heads, dim=1) for one in (k, v))
        else:
            k, v = (one[:, :, None].expand(b, key_heads, self.repeats, n, dim).reshape(b, -1, n, dim) for one in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)


@pytest.mark.parametrize("counts", ["attributes", "minus one", "widths"])
@pytest.mark.parametrize("form", ["expand", "repeat_interleave", "enable_gqa", "five axes", "einsum"])
def test_query_heads_go_with_their_key_head(form: str, counts: str):
    model = GroupedQueries(form, counts).eval()
    done = pruned(model, head_ratio=0.5)
    assert [f.out_features for f in (done.model.q, done.model.k, done.model.v)] == [8, 4, 4]
    assert done.model.o.in_features == 8 and done.model(X).shape == (2, 5, 4)
    if form not in ("five axes", "einsum"):
        assert len(done.model.bias) == 2
    (kept,) = done.plan.kept_heads(done.plan.graph.head_sets[0][0])
    assert torch.equal(done.model.q.weight, model.q.weight[8 * kept : 8 * kept + 8])
    assert torch.equal(done.model.k.weight, model.k.weight[4 * kept : 4 * kept + 4])
    narrower = pruned(model, ratio=0.5, head_dim_ratio=0.5)
    assert [f.out_features for f in (narrower.model.q, narrower.model.k)] == [8, 4]


@pytest.mark.parametrize("form", ["expand", "enable_gqa", "five axes"])
def test_query_heads_go_from_their_only_key_head(form: str):
    model = GroupedQueries(form, key_heads=1).eval()
    done = pruned(model, head_ratio=0.5)
    assert [f.out_features for f in (done.model.q, done.model.k, done.model.v)] == [8, 4, 4]
    assert done.model.o.in_features == 8 and done.model(X).shape == (2, 5, 4)
    kept = done.plan.kept["q.weight:0:heads"]
    rows = torch.arange(16).view(4, 4)[list(kept)].flatten()
    assert torch.equal(done.model.q.weight, model.q.weight[rows])
    assert torch.equal(done.model.o.weight, model.o.weight[:, rows])
    assert pruned(model, ratio=0.5).model.k.out_features == 2


class Mixed(nn.Module):
    """Three layers of attention that share `num_heads`, which the second spells out; the third normalises."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(3, 16), nn.Linear(16, 4)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.proj = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.norms, self.num_heads = nn.ModuleList(nn.LayerNorm(4) for _ in range(2)), 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        for number, (qkv, proj) in enumerate(zip(self.qkv, self.proj, strict=True)):
            heads = 4 if number == 1 else self.num_heads
            q, k, v = qkv(x).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
            if number == 2:
                q, k = self.norms[0](q), self.norms[1](k)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            x = x + proj(y.reshape(b, n, -1))
        return self.head(x)


def test_each_layer_whose_heads_stay_is_named():
    graph = iso.trace(Mixed().eval(), X)
    assert [group.name for group, *_ in graph.head_sets] == []
    assert graph.frozen_heads == {
        "qkv.0.weight:0": "its heads' number is fixed in the forward code",
        "qkv.1.weight:0": "its heads' number is fixed in the forward code",
        "qkv.2.weight:0": "its heads' number is fixed in the forward code",
    }


class FullWidth(nn.Module):
    """Attention whose output the forward code gives the width of the stream."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.num_heads, self.head_dim = form, 4, 4
        self.embed, self.head = nn.Linear(3, 16), nn.Linear(16, 4)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True) if form == "torch" else None
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, c = x.shape
        if self.attention is not None:
            return self.head(x + self.attention(x, x, x)[0])
        shape = (b, n, 3, self.num_heads, c // self.num_heads if self.form == "quotient" else self.head_dim)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        y = y.reshape(x.shape) if self.form == "shape" else y.reshape(b, n, c)
        return self.head(x + self.proj(y))


@pytest.mark.parametrize("form", ["quotient", "attribute", "shape", "torch"])
def test_heads_as_wide_as_the_stream_stay_and_the_line_is_named(form: str):
    graph = iso.trace(FullWidth(form).eval(), X)
    assert [group.name for group, *_ in graph.head_sets] == []
    ((name, reason),) = graph.frozen_heads.items()
    where = graph.frozen_head_lines[name]
    source, start = inspect.getsourcelines(FullWidth)
    line = source[int(where.partition(",")[0].rpartition(":")[2]) - start].strip()
    if form == "torch":
        assert (
            reason == "nn.MultiheadAttention makes its heads as wide as its input" and "self.attention(x, x, x)" in line
        )
        assert name == "attention.in_proj_weight:0"
    else:
        assert reason == "the forward code makes its heads as wide as another axis: -1 there would let them go"
        first = "q, k, v = self.qkv(x)" if form == "quotient" else "y = y.reshape"  # of the lines in the way
        assert line.startswith(first) and name == "qkv.weight:0"
    text = str(iso.trace(FullWidth(form).eval(), X))
    assert f"Kept: heads of {name.replace('.weight:0', '')} ({reason}, {where})" in text.splitlines()
