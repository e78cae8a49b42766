"""Heads lose their weakest directions: what they do not use costs nothing, whichever dims it lies in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isomorphic.processes import distributed
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery.head_rotation import query_key_directions
from isomorphic.pruning.recovery.rotation import Rotation, rotate
from tests.processes import run_together
from tests.unit.pruning.recovery.test_compensation import distance, random, randomized

WIDTH, HEADS, DIMS, RANK = 24, 3, 8, 5
IMAGES = random(48, 7, WIDTH, seed=3)


class Attention(nn.Module):
    """Attention as timm writes it, and a head that reads it."""

    def __init__(self, *, bias: bool = True, value_norm: bool = False, bounded: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, DIMS
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIMS)
        self.value_norm = nn.LayerNorm(HEADS * DIMS) if value_norm else nn.Identity()
        self.proj = nn.Linear(HEADS * DIMS, WIDTH, bias=bias)
        self.head = nn.Linear(WIDTH, 6)
        self.bounded = bounded

    def forward(self, x: Tensor) -> Tensor:
        made = self.qkv(x).reshape(len(x), x.shape[1], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = made[0].tanh() if self.bounded else made[0], made[1], made[2]
        logits = query @ key.transpose(-2, -1) * DIMS**-0.5
        given = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return self.head(self.proj(self.value_norm(given)).relu()).mean(1)


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    return randomized(Attention(**options), 0.3)


@torch.no_grad()
def flattened(model: Any) -> Any:
    """The same with queries and values that fill `RANK` of a head's dims beside their mean, none of which is a dim."""
    weight, bias = model.qkv.weight.view(3, HEADS, DIMS, WIDTH), model.qkv.bias.view(3, HEADS, DIMS)
    for part in (0, 2):
        for head in range(HEADS):
            basis = torch.linalg.qr(random(DIMS, DIMS, seed=10 * part + head))[0][:, :RANK]
            weight[part, head] = basis @ basis.T @ weight[part, head]
            bias[part, head] = basis @ basis.T @ bias[part, head] if part == 0 else 0.5 + bias[part, head]
    return model


def turned(model: Any, count: int, heads: int = HEADS) -> tuple[Any, Rotation, Any, PruningPlan, Any]:
    """The cut model, what was turned, the graph, the plan, and the turned model before the cut."""
    graph = trace_groups(model, IMAGES[:2], "exact")
    kept = {group.name: tuple(range(group.num_units)) for group in graph.groups}
    group = next(group for group in graph.groups if group.heads is not None)
    first = HEADS - heads
    dims = [DIMS * head + dim for head in range(first, HEADS) for dim in range(1, 1 + count)]
    plan = PruningPlan({**kept, group.name: tuple(dims)})
    whole = copy.deepcopy(model)
    rotation = rotate(whole, graph, plan, IMAGES[:2], IMAGES)
    pruned = copy.deepcopy(whole)
    cut(pruned, graph, plan)
    return pruned, rotation, graph, plan, whole


def test_heads_that_use_few_dims_are_cut_to_them_without_loss():
    """Also where what is constant in values fills dims of its own: it goes into the bias of what reads them."""
    model = flattened(net())
    pruned, rotation, graph, plan, _ = turned(model, RANK)
    assert rotation.groups == ["qkv.weight:0"]
    plain = copy.deepcopy(model)
    cut(plain, graph, plan)
    assert distance(pruned, model, IMAGES) < 1e-8 < 1e-3 < distance(plain, model, IMAGES)
    assert distance(turned(model, RANK - 1)[0], model, IMAGES) > 1e-6


@torch.no_grad()
def test_what_layers_make_and_read_is_told_of_the_dense_ones():
    """With one head gone and nothing else lost, the maps give what the cut layers make and read."""
    model = flattened(net())
    model.proj.weight[:, :DIMS] = 0.0  # nobody misses the first head
    pruned, rotation, graph, plan, whole = turned(model, RANK, heads=2)
    mixed = rotation.mixed(model, whole, graph, plan)
    made = mixed.outputs["qkv"]
    assert made.factor.shape == (3 * 2 * RANK, 3 * HEADS * DIMS)
    wanted = model.qkv(IMAGES).double() @ made.factor.T
    torch.testing.assert_close(pruned.qkv(IMAGES).double(), wanted, rtol=1e-3, atol=1e-4)
    read: dict[int, Tensor] = {}
    for place, one in enumerate((model, pruned)):
        one.proj.register_forward_pre_hook(lambda module, inputs, key=place: read.update({key: inputs[0]}))
        one(IMAGES)
    given = mixed.inputs["proj"]
    torch.testing.assert_close(read[1].double(), read[0].double() @ given.factor.T, rtol=1e-3, atol=1e-4)
    assert distance(pruned, model, IMAGES) < 1e-8


def test_values_stay_where_something_else_than_a_sum_reads_them():
    model = net(value_norm=True)
    pruned, rotation, *_ = turned(model, RANK)
    assert "proj" not in rotation.inputs
    kept = [2 * HEADS * DIMS + DIMS * head + dim for head in range(HEADS) for dim in range(1, 1 + RANK)]
    torch.testing.assert_close(pruned.qkv.weight[2 * HEADS * RANK :], model.qkv.weight[kept])


def test_queries_and_keys_stay_where_something_lies_between():
    model = net(bounded=True)
    pruned, rotation, *_ = turned(model, RANK)
    assert list(rotation.inputs) == ["proj"]
    kept = [DIMS * head + dim for head in range(2 * HEADS) for dim in range(1, 1 + RANK)]
    torch.testing.assert_close(pruned.qkv.weight[: 2 * HEADS * RANK], model.qkv.weight[kept])


def test_without_a_bias_what_is_constant_is_a_direction_like_others():
    pruned, *_ = turned(flattened(net(bias=False)), RANK + 1)
    assert distance(pruned, flattened(net(bias=False)), IMAGES) < 1e-8


def test_queries_and_keys_lose_the_least_of_their_products():
    """E|qᵀk − q̃ᵀk̃|² is the sum of the squared singular values that went, and all dims together lose nothing."""
    query, key = (random(2, 500, 6, seed=seed).double() @ random(2, 6, 6, seed=seed + 9).double() for seed in (1, 2))
    moments = [one.mT @ one / one.shape[1] for one in (query, key)]
    for count in (6, 4):
        of_query, of_key = query_key_directions(moments[0], moments[1], count)
        change = torch.eye(6).double() - of_query.mT @ of_key  # qᵀ (I − Aᵀ B) k
        error = torch.einsum("hij,hik,hjl,hkl->h", change, moments[0], moments[1], change)
        roots = [torch.linalg.cholesky(moment).mT for moment in moments]
        values = torch.linalg.svdvals(roots[0] @ roots[1].mT)
        assert error.tolist() == pytest.approx(values[:, count:].square().sum(1).tolist(), abs=1e-8)


# Two processes: moments are of the images of both


def one_process() -> list[float]:
    return _turned_by(IMAGES)


def its_share() -> list[float]:
    distributed.init("cpu")
    values = _turned_by((IMAGES[20:], IMAGES[:20])[distributed.rank()])
    distributed.shutdown()
    return values


def _turned_by(images: Tensor) -> list[float]:
    """What a model gives on all images whose heads, and the stream before the last norm, were turned by some."""
    torch.manual_seed(0)
    model: Any = randomized(nn.Sequential(Attention(), nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 4)), 0.3)
    graph = trace_groups(model, IMAGES[:2], "exact")
    kept = {group.name: tuple(range(group.num_units)) for group in graph.groups}
    heads = tuple(DIMS * head + dim for head in range(HEADS) for dim in range(RANK))
    plan = PruningPlan({**kept, "0.qkv.weight:0": heads, "1.weight:0": tuple(range(8))})
    rotation = rotate(model, graph, plan, IMAGES[:2], images)
    assert set(rotation.groups) == {"0.qkv.weight:0", "1.weight:0"}
    cut(model, graph, plan)
    with torch.no_grad():
        return model(IMAGES).flatten().tolist()


@pytest.mark.slow
def test_two_processes_turn_what_one_turns():
    outcomes = run_together(__name__, {"one_process": 1, "its_share": 2})
    found = [*outcomes["one_process"], *outcomes["its_share"]]
    assert [outcome.status for outcome in found] == [0, 0, 0], [outcome.err for outcome in found]
    one, left, right = (torch.tensor(outcome.value) for outcome in found)
    assert torch.equal(left, right)
    torch.testing.assert_close(left, one, rtol=1e-3, atol=1e-3)
