"""One operation between two layers: what is cut through it is exact, and what cannot be cut is frozen, with a reason.

A catalogue beside the random programs: operations that keep channels in order, mix them, sort them, count them, or use
their number.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.pruning.classify import classify
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.self_check import cut_error, masked_copy
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.ranking.ranker import Ranker, RankingRules, Ratios
from isomorphic.pruning.scoring import score_groups

WIDTH = 8
LARGEST_ERROR = 1e-9

Operation = Callable[[Any, Tensor], Tensor]


class Between(nn.Module):
    """Linear, `operation`, linear, on tokens (B, N, C); what operations may use besides."""

    def __init__(self, operation: Operation, width: int) -> None:
        super().__init__()
        self.operation, self.width, self.groups = operation, WIDTH, 4
        self.one, self.two = nn.Linear(4, WIDTH), nn.Linear(width, 3)
        self.square, self.rows = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(2, WIDTH))
        self.filters = nn.Parameter(torch.randn(WIDTH, 1, 3))
        self.embedding = nn.Embedding(5, WIDTH)
        self.register_buffer("table", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.operation(self, self.one(x)))


def recurrence(model: Any, x: Tensor) -> Tensor:
    """A recurrent network, step by step."""
    state, states = torch.zeros(x.shape[0], x.shape[-1], dtype=x.dtype), []
    for step in x.unbind(1):
        state = torch.tanh(state @ model.square + step)
        states.append(state)
    return torch.stack(states, 1)


def overwritten(x: Tensor, where: Any, value: Any) -> Tensor:
    x[where] = value
    return x


EXACT: dict[str, Operation] = {
    # over tokens, whatever happens to them
    "cumsum of tokens": lambda m, x: x.cumsum(1),
    "sort tokens": lambda m, x: x.sort(1).values,
    "topk tokens": lambda m, x: x.topk(3, 1).values,
    "median token": lambda m, x: x - x.median(1, keepdim=True).values,
    "softmax over tokens": lambda m, x: x.softmax(1),
    "tril of tokens": lambda m, x: (x @ x.mT).tril() @ x,
    "distances of tokens": lambda m, x: torch.cdist(x, x).softmax(-1) @ x,
    "pool tokens": lambda m, x: F.avg_pool1d(x.mT, 5).mT,
    "depthwise over tokens": lambda m, x: F.conv1d(x.mT, m.filters, padding=1, groups=x.shape[-1]).mT,
    "pad tokens": lambda m, x: F.pad(x, (0, 0, 1, 1)),
    "recurrence": recurrence,
    # over channels, where a zero changes nothing but counts
    "cumsum": lambda m, x: x.cumsum(-1),
    "softmax": lambda m, x: x.softmax(-1),
    "softmax of all": lambda m, x: x.flatten(1).softmax(-1).view_as(x),
    "logsumexp": lambda m, x: x * x.logsumexp(-1, keepdim=True),
    "norm of all": lambda m, x: x / x.norm(),
    "largest norm": lambda m, x: F.normalize(x, float("inf"), -1),
    "variance": lambda m, x: x * x.var(-1, keepdim=True),
    "amax": lambda m, x: x * x.amax(-1, keepdim=True),
    "layer_norm": lambda m, x: F.layer_norm(x, x.shape[-1:]),
    "layer_norm by attribute": lambda m, x: F.layer_norm(x, [m.width]),
    "group_norm": lambda m, x: F.group_norm(x.mT, m.groups).mT,
    "rms_norm": lambda m, x: F.rms_norm(x, (x.size(-1),)),
    "dot products": lambda m, x: torch.einsum("bnc,bmc->bnm", x, x).softmax(-1) @ x,
    "features attend": lambda m, x: F.scaled_dot_product_attention(x.mT, x.mT, x.mT).mT,
    # movement
    "flip": lambda m, x: x.flip(-1),
    "chunks swapped": lambda m, x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "glu": lambda m, x: F.glu(x),
    "slice": lambda m, x: x[..., 1:-1],
    "upper half": lambda m, x: x[..., x.shape[-1] // 2 :],
    "first channel as gate": lambda m, x: x * x[..., 0:1],
    "tile": lambda m, x: x.tile(2),
    "interleave": lambda m, x: x.repeat_interleave(2, -1),
    "pad channels": lambda m, x: F.pad(x, (1, 1)),
    "join a constant": lambda m, x: torch.cat([x, torch.ones(2, 5, 1, dtype=x.dtype)], -1),
    "flatten all": lambda m, x: x.reshape(2, -1),
    "reorder axes, flatten": lambda m, x: x.swapaxes(1, 2).flatten(1),
    "halves added": lambda m, x: x.reshape(2, 5, 2, -1).sum(2),
    "shuffle": lambda m, x: F.channel_shuffle(x.mT, 2).mT,
    "first image for all": lambda m, x: x[:1].expand_as(x),
    # writing in place
    "scale a slice": lambda m, x: (x[..., :4].mul_(2), x)[1],
    "scale a transposed view": lambda m, x: (x.mT.mul_(2), x)[1],
    "overwrite channels": lambda m, x: overwritten(x, (..., slice(0, 3)), 0.0),
    "overwrite a token": lambda m, x: overwritten(x, (slice(None), 0), m.rows[0]),
    # parameters and buffers
    "buffer": lambda m, x: x * m.table,
    "embedding": lambda m, x: x + m.embedding(torch.arange(5)),
    "a row": lambda m, x: x * m.rows[0],
    "a slice by width": lambda m, x: x * m.rows[:1, : x.shape[-1]],
    "square": lambda m, x: x @ m.square @ m.square.t(),
    "square, softmax": lambda m, x: x @ m.square.softmax(0),
    "square, as a convolution": lambda m, x: F.conv1d(x.mT, m.square[..., None]).mT,
    "the layer's own weight": lambda m, x: x * m.one.weight.norm(dim=1) - m.one.bias,
    "new ones": lambda m, x: x * torch.full((m.width,), 2.0, dtype=x.dtype),
    # the number of channels as a factor, which the layer before takes over
    "divided by the width": lambda m, x: x / x.shape[-1],
    "divided by its root": lambda m, x: x / math.sqrt(x.shape[-1]),
}

FROZEN: dict[str, Operation] = {
    # channels in an order, or by number
    "roll": lambda m, x: x.roll(2, -1),
    "sort": lambda m, x: x.sort(-1).values,
    "topk": lambda m, x: x.topk(3, -1).values,
    "argmax": lambda m, x: x * x.argmax(-1, keepdim=True),
    "median": lambda m, x: x - x.median(-1, keepdim=True).values,
    "differences": lambda m, x: x.diff(dim=-1),
    "pool": lambda m, x: F.avg_pool1d(x, 2),
    "interpolate": lambda m, x: F.interpolate(x, scale_factor=2, mode="linear"),
    "convolve": lambda m, x: F.conv1d(x.reshape(10, 1, -1), m.filters[:1], padding=1).reshape(2, 5, -1),
    "windows": lambda m, x: x.unfold(-1, 2, 2).sum(-1),
    "reflect": lambda m, x: F.pad(x, (1, 1), mode="reflect"),
    "tril": lambda m, x: (x.mT @ x).tril(),
    "fft": lambda m, x: torch.fft.rfft(x, dim=-1).abs(),
    "pick by list": lambda m, x: x[..., [0, 3, 5]],
    "pick by number": lambda m, x: x * x.select(-1, 0)[..., None],
    "scatter": lambda m, x: torch.zeros_like(x).scatter(-1, torch.arange(WIDTH).expand(2, 5, WIDTH), x),
    "linspace": lambda m, x: x * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype),
    "arange": lambda m, x: x + torch.arange(x.shape[-1]),
    "identity matrix": lambda m, x: x @ torch.eye(m.width, dtype=x.dtype),
    "all pairs": lambda m, x: (x[..., None] * x[..., None, :]).flatten(2),
    # where a zero is not neutral
    "product": lambda m, x: x * (1 + x.prod(-1, keepdim=True)),
    "cumprod": lambda m, x: x.cumprod(-1),
    "logcumsumexp": lambda m, x: x.logcumsumexp(-1),
    "inverse": lambda m, x: x @ torch.linalg.inv(x.mT @ x + 1),
    # the number of channels in what no layer can take over
    "width added": lambda m, x: F.gelu(x) + x.shape[-1],
    "width as exponent": lambda m, x: x.abs() ** (1 / x.shape[-1]),
    "width as float": lambda m, x: F.gelu(x) * float(x.shape[-1]),
    "width as tensor": lambda m, x: F.gelu(x) * torch.tensor(x.shape[-1]),
    "width as fill": lambda m, x: F.gelu(x) * torch.full((1,), 1 / x.shape[-1], dtype=x.dtype),
    "width in where": lambda m, x: torch.where(x > 0, x, 1.0 / x.shape[-1]),
    "width as eps": lambda m, x: F.layer_norm(x, (x.shape[-1],), eps=1 / x.shape[-1]),
    "width in log": lambda m, x: x * math.log(x.shape[-1]),
    "len": lambda m, x: x * len(x[0, 0]),
    "numel": lambda m, x: F.gelu(x) * x.numel(),
    "groups by width": lambda m, x: F.group_norm(x.mT, x.shape[-1] // 2).mT,
}


def between(operation: Operation) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    probe = Between(operation, 1).double()
    with torch.no_grad():
        width = operation(probe, probe.one(x)).shape[-1]
    model = Between(operation, width).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return model, x


def first_layer_is_in(graph: ChannelGraph) -> bool:
    return any(member.name == "one.weight" and member.dim == 0 for group in graph.groups for member in group.members)


@pytest.mark.parametrize("name", EXACT)
def test_what_is_cut_through_an_operation_is_exact(name):
    model, x = between(EXACT[name])
    graph = trace_groups(model, x, tracer="exact")
    assert first_layer_is_in(graph), graph.frozen
    classes = classify(graph.groups)
    for seed, ratio in enumerate((0.3, 0.5, 0.7)):
        scores = score_groups(model, graph.groups, "random", seed=seed)
        plan = Ranker(graph, scores, classes, RankingRules("local")).plan(Ratios(ratio))
        pruned = copy.deepcopy(model)
        cut(pruned, graph, plan)
        assert cut_error(masked_copy(model, graph, plan), pruned, x) < LARGEST_ERROR


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_be_cut_is_frozen_with_a_reason(name):
    model, x = between(FROZEN[name])
    try:
        graph = trace_groups(model, x, tracer="exact")
    except UserError as error:
        assert "one.weight:0: " in str(error)
    else:
        assert not first_layer_is_in(graph)
        assert graph.frozen["one.weight:0"].reason
