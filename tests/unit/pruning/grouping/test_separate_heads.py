"""Attention with separate q, k and v layers: a head is one set of sections over several groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.errors import UserError
from isomorphic.pruning.cutting.self_check import check_cut
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
    """Two key heads for four query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 16), nn.Linear(16, 4)
        self.q, self.k, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (f(x).view(len(x), 5, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), 5, -1)
        return self.head(x + self.o(y))


def test_heads_of_grouped_queries_stay_and_it_is_said():
    torch.manual_seed(0)
    model = GroupedQueries().eval()
    done = iso.prune(model, X, criterion="l2", ratio=0.0, head_ratio=0.5, self_check=True)
    assert done.after == done.before
    assert "heads" in "\n".join(done.plan.details())
    assert check_cut(model, done.plan.graph, done.plan, done.model, X) < 1e-9
