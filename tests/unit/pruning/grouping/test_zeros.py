"""Channels that are not zero where their weights are: they stay where a product of two activations would count them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.pruning.grouping import exact
from isomorphic.pruning.grouping.rules.zeros import REASON
from tests.unit.pruning.grouping.cutting import error_of_random_cut, randomized

X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
Summed = Callable[[Tensor, Tensor, Tensor], Tensor]


class Mixed(nn.Module):
    """Three layers' results (B, 5, 8), a function of them to (B, 5, 8), and a layer that reads it."""

    def __init__(self, function: Summed) -> None:
        super().__init__()
        self.function = function
        self.q, self.k, self.v, self.out = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self.q(x), self.k(x), self.v(x)))


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.mT @ v)


def linear_by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    context = torch.einsum("bnd,bne->bde", k, v)
    return torch.einsum("bde,bnd->bne", context, q)


def over_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v @ (k.mT @ q).softmax(-2)


STAY: dict[str, Summed] = {
    "softmax of both": lambda q, k, v: linear(q.softmax(-1), k.softmax(1), v),
    "softmax of both by einsum": lambda q, k, v: linear_by_einsum(q.softmax(-1), k.softmax(1), v),
    "elu + 1": lambda q, k, v: linear(F.elu(q) + 1, 1 + F.elu(k), v),
    "sigmoid and exp": lambda q, k, v: linear(q.sigmoid(), k.exp(), v),
    "cosine of a shifted factor": lambda q, k, v: linear((q - 0.5) * 2, k.cos(), v),
    "norms without a scale": lambda q, k, v: linear(F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:]), v),
    "fused attention": lambda q, k, v: F.scaled_dot_product_attention(q.sigmoid(), k.sigmoid(), v, scale=1.0),
    "written to a new tensor": lambda q, k, v: linear(torch.empty_like(q).copy_(q.sigmoid()), k.exp(), v),
    "batched sum": lambda q, k, v: torch.baddbmm(q.new_ones(1, 1, 5), q.sigmoid(), k.sigmoid().mT) @ v,
}
GO: dict[str, Summed] = {
    "softmax of one": lambda q, k, v: linear(q.softmax(-1), k, v),
    "ReLU of one": lambda q, k, v: linear(F.relu(q), k.softmax(1), v),
    "softmax over tokens": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "softmax over channels": over_channels,
    "gated": lambda q, k, v: linear(q * k.sigmoid(), k.exp(), v),
    "SiLU and GELU": lambda q, k, v: linear(F.silu(q), F.gelu(k), v),
    "hard activations": lambda q, k, v: linear(F.hardswish(q), F.hardtanh(k), v),
    "unit lengths": lambda q, k, v: linear(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v),
    "masked": lambda q, k, v: linear(q.masked_fill(q > 1, 0.0), torch.where(k > 0, k, 0.5 * k), v),
    "nowhere summed": lambda q, k, v: q.sigmoid() * k.softmax(-1) + v.cos(),
}


@pytest.mark.parametrize("name", STAY)
def test_what_a_product_would_count_stays(name: str):
    graph = exact.trace(randomized(Mixed(STAY[name])), X)
    frozen = {name: one.reason for name, one in graph.frozen.items()}
    assert frozen["q.weight:0"] == frozen["k.weight:0"] == REASON
    assert [group.name for group in graph.groups] == ["v.weight:0"]


@pytest.mark.parametrize("name", GO)
def test_where_one_factor_is_zero_the_channel_goes(name: str):
    model = randomized(Mixed(GO[name]))
    graph = exact.trace(model, X)
    assert set(graph.frozen) == {"out.weight:0"}
    assert error_of_random_cut(model, graph, X) < 1e-9
