"""The self-check: exact for right cuts whatever mixes their channels, and loud about wrong ones.

Graphs are written by hand here, so that nothing depends on how a tracer works.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.self_check import check_cut, cut_error, masked_copy, output_errors
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup, LayerNode, Member, SectionStructure
from isomorphic.pruning.plan import PruningPlan

WIDTH, KEPT = 8, (0, 2, 3, 4, 6, 7)  # two halves lose one unit each
EXACT = 1e-12


class Hidden(nn.Module):
    """`operation` on the hidden vectors (B, N, C) of a two-layer network; its weights may be part of the group."""

    def __init__(self, operation: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.scale, self.shift = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.operation(self, self.one(x)))


def affine(model, x):
    """A scale and a shift that are masked, so that zeros stay zeros after whatever moved them."""
    return x * model.scale + model.shift


def standardized(model, x):
    """Weight standardisation of the layer that reads the channels."""
    weight = F.batch_norm(model.two.weight.reshape(1, 3, -1), None, None, training=True).view_as(model.two.weight)
    return F.linear(x, weight) @ torch.ones(3, model.one.out_features, dtype=x.dtype)


def channel_attention(model, x):
    q = x.transpose(1, 2)  # (B, C, N)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2)


def layer_norm_by_hand(model, x):
    centred = x - x.mean(-1, keepdim=True)  # not zero where x was
    return affine(model, centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt())


OPERATIONS = {
    "none": lambda model, x: x,
    "layer_norm": lambda model, x: F.layer_norm(x, (model.one.out_features,), model.scale, model.shift),
    "plain layer_norm": lambda model, x: F.layer_norm(x, (model.one.out_features,)),
    "two layer_norms": lambda model, x: F.layer_norm(
        F.gelu(F.layer_norm(x, (model.one.out_features,), model.scale, model.shift)), (model.one.out_features,)
    ),
    "rms_norm": lambda model, x: F.rms_norm(x, (model.one.out_features,), model.scale, 1e-6),
    "group_norm": lambda model, x: F.group_norm(x.transpose(1, 2), 2, model.scale, model.shift).transpose(1, 2),
    "batch_norm of batches": lambda model, x: F.batch_norm(x, None, None, training=True),
    "mean": lambda model, x: x - x.mean(),
    "mean.dim": lambda model, x: x * x.mean(-1, keepdim=True),
    "var": lambda model, x: affine(model, x / x.var(-1, keepdim=True)),
    "std": lambda model, x: affine(model, x / x.std((1, 2), unbiased=False)[:, None, None]),
    "std of all": lambda model, x: affine(model, x / x.std()),
    "var_mean": lambda model, x: affine(model, sum(t[..., None] * x for t in torch.var_mean(x, -1, unbiased=False))),
    "std_mean": lambda model, x: affine(model, sum(t * x for t in torch.std_mean(x, -1, keepdim=True))),
    "softmax": lambda model, x: x.softmax(-1),
    "log_softmax": lambda model, x: x.log_softmax(-1),
    "logsumexp": lambda model, x: x * x.logsumexp(-1, keepdim=True) + x.logsumexp((1, 2))[:, None, None],
    "amax": lambda model, x: x * (1 + x.abs().neg().amax(-1, keepdim=True)),
    "min, amin": lambda model, x: x * (1 + x.abs().min() + x.abs().amin((1, 2), keepdim=True)),
    "max, max.dim": lambda model, x: x * (2 + x.abs().neg().max(-1, keepdim=True).values + x.abs().neg().max()),
    "norm": lambda model, x: F.normalize(x, dim=-1),
    "weight standardisation": standardized,
    "layer norm by hand": layer_norm_by_hand,
    "layer norm of what is not zero": lambda model, x: F.layer_norm(x.sigmoid(), (model.one.out_features,)),
    "softmax of what is not zero": lambda model, x: x.cos().softmax(-1),
    "mean of what is not zero": lambda model, x: x * x.sigmoid().mean(-1, keepdim=True),
    "sum of what is not zero": lambda model, x: x * x.exp().sum(-1, keepdim=True) * x.exp().sum(),
    "norm of what is not zero": lambda model, x: x * x.exp().norm(dim=-1, keepdim=True),
    "random numbers": lambda model, x: x + model.scale * torch.randn_like(x) * torch.rand(x.shape, dtype=x.dtype),
    "loss": lambda model, x: x * F.mse_loss(x.cos(), x),
    "maximum of what is not zero": lambda model, x: x * x.cos().amax(-1, keepdim=True),
    "channel attention": channel_attention,
}
SAME_WHEN_MASKED = {"none", "norm"}


def the_graph() -> ChannelGraph:
    index = torch.arange(WIDTH)[:, None]
    tensors = [("one", "weight", 0), ("one", "bias", 0), ("two", "weight", 1), ("", "scale", 0), ("", "shift", 0)]
    nodes = (LayerNode("one", "linear", "out"), LayerNode("two", "linear", "in"), LayerNode("", "parameter", "both"))
    members = tuple(Member(module, name, dim, index, ("one", "two", "").index(module)) for module, name, dim in tensors)
    group = CoupledGroup("one.weight:0", WIDTH, members, nodes, frozenset(), SectionStructure(2))
    return ChannelGraph((group,), {})


def plan_of(*kept: int) -> PruningPlan:
    return PruningPlan({"one.weight:0": kept})


def cut_by_hand(model: nn.Module, graph: ChannelGraph, kept: tuple[int, ...]) -> Any:
    """A copy with the kept units' slices; written without the surgery."""
    pruned: Any = copy.deepcopy(model)
    for member in graph.groups[0].members:
        holder = pruned.get_submodule(member.module)
        tensor = getattr(holder, member.tensor).detach()
        sliced = tensor.index_select(member.dim, member.index[list(kept)].flatten())
        setattr(holder, member.tensor, nn.Parameter(sliced))
    pruned.one.out_features = len(kept)
    return pruned


def case(name: str) -> tuple[Any, ChannelGraph, Tensor]:
    torch.manual_seed(0)
    return Hidden(OPERATIONS[name]).eval(), the_graph(), torch.randn(4, 5, 6)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_right_cut_is_exact_whatever_mixes_its_channels(name):
    model, graph, x = case(name)
    masked, pruned = masked_copy(model, graph, plan_of(*KEPT)), cut_by_hand(model, graph, KEPT)
    with torch.no_grad():
        plain = (masked(x) - pruned(x)).abs().max()
    assert (plain < 1e-5) == (name in SAME_WHEN_MASKED), "the counts are what makes the two equal"
    assert cut_error(masked, pruned, x) < EXACT
    assert check_cut(model, graph, plan_of(*KEPT), pruned, x) < EXACT


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_wrong_channel_shows(name):
    model, graph, x = case(name)
    wrong = cut_by_hand(model, graph, (0, 1, 3, 4, 6, 7))  # unit 1 for unit 2
    assert cut_error(masked_copy(model, graph, plan_of(*KEPT)), wrong, x) > 1e-3


@pytest.mark.parametrize("lost", [0, 4])
def test_an_element_that_only_a_statistic_lacks_shows(lost):
    """Statistics are handed over only where what is missing was removed."""

    def operation(model, x):
        position = [n for n in range(model.one.out_features) if n != lost or model.one.out_features == WIDTH]
        return x * x.sigmoid()[..., position].mean(-1, keepdim=True)

    torch.manual_seed(0)
    model, graph, x = Hidden(operation).eval(), the_graph(), torch.randn(4, 5, 6)
    pruned = cut_by_hand(model, graph, KEPT)
    assert cut_error(masked_copy(model, graph, plan_of(*KEPT)), pruned, x) > 1e-3


def test_a_wrong_order_shows_and_the_message_says_where():
    model, graph, x = case("layer_norm")
    wrong = cut_by_hand(model, graph, KEPT)
    with torch.no_grad():
        wrong.two.weight[:, [0, 1]] = wrong.two.weight[:, [1, 0]]
    with pytest.raises(UserError, match=r"self-check: the cut model differs .* in output by [\d.]+ of its spread"):
        check_cut(model, graph, plan_of(*KEPT), wrong, x)


def test_a_cut_model_that_crashes_is_a_users_error():
    model, graph, x = case("layer_norm")
    pruned = cut_by_hand(model, graph, KEPT)
    pruned.one.out_features = WIDTH
    with pytest.raises(UserError, match="self-check: the cut model does not run"):
        check_cut(model, graph, plan_of(*KEPT), pruned, x)


def test_a_mask_covers_all_members_and_nothing_else():
    model, graph, _ = case("none")
    masked: Any = masked_copy(model, graph, plan_of(*KEPT))
    for name, dim in (("one.weight", 0), ("one.bias", 0), ("two.weight", 1), ("scale", 0), ("shift", 0)):
        dense, zeroed = model.get_parameter(name), masked.get_parameter(name)
        gone, stay = torch.tensor([1, 5]), torch.tensor(KEPT)
        assert zeroed.index_select(dim, gone).count_nonzero() == 0
        assert torch.equal(zeroed.index_select(dim, stay), dense.index_select(dim, stay))
        assert dense.count_nonzero() == dense.numel(), "the dense model is left as it was"
    assert torch.equal(masked.two.bias, model.two.bias)


class Tied(nn.Module):
    """A batch norm, and a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.table = nn.Parameter(torch.ones(3, 2))
        with torch.no_grad():
            self.norm.running_mean.fill_(3.0)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        return {"norm": self.norm(x), "both": [self.one(x), self.two(x)]}


def test_a_mask_reaches_buffers_ties_and_tables_of_heads():
    index, node = torch.arange(4)[:, None], (LayerNode("one", "linear", "out"),)
    members = [Member("norm", name, 0, index, 0) for name in ("weight", "bias", "running_mean", "running_var")]
    heads = SectionStructure(2, True, (Member("", "table", 1, torch.tensor([[0], [1]]), 0),))
    group = CoupledGroup("g", 4, (*members, Member("two", "weight", 0, index, 0)), node, frozenset(), heads)
    masked: Any = masked_copy(Tied(), ChannelGraph((group,), {}), PruningPlan({"g": (2, 3)}))
    assert masked.norm.running_mean.tolist() == [0, 0, 3, 3]
    assert masked.norm.running_var.tolist() == [1, 1, 1, 1]
    assert masked.one.weight is masked.two.weight
    assert masked.one.weight.count_nonzero(dim=1).tolist() == [0, 0, 4, 4]
    assert masked.table.tolist() == [[0, 1]] * 3


def test_outputs_are_named_and_compared_one_by_one():
    torch.manual_seed(0)
    model = Tied()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.two.bias.add_(1.0)
    errors = output_errors(model, other, torch.randn(5, 4))
    assert list(errors) == ["output['norm']", "output['both'][0]", "output['both'][1]"]
    spread = model.double().two(torch.randn(5, 4).double()).std().item()
    assert errors["output['norm']"] == errors["output['both'][0]"] == 0.0
    assert 0.2 / spread < errors["output['both'][1]"] < 5 / spread


@dataclass
class Result:
    """An output as libraries of language models have it."""

    logits: Tensor


def test_objects_are_compared_by_their_attributes():
    class Wrapped(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return Result(super().forward(x))

    model = Wrapped(4, 3)
    assert output_errors(model, copy.deepcopy(model), torch.randn(2, 4)) == {"output.logits": 0.0}


class Twice(nn.Module):
    """Takes two inputs, and another way through its code where `width` is odd."""

    def __init__(self, width: int, out: int = 3, layers: int = 1) -> None:
        super().__init__()
        self.width, self.out, self.layers = width, out, layers

    def forward(self, x: Tensor, scale: float) -> Tensor:
        for _ in range(self.layers):
            x = x.softmax(-1) if self.width % 2 else F.layer_norm(x, (6,))
        return x[:, : self.out] * scale


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Twice(5), r"after 0 operations .* aten._softmax.default follows instead of aten.var_mean"),
        (Twice(4, layers=2), "after 1 operations .* aten.var_mean.correction follows instead of the end"),
        (Twice(4, layers=0), "after 0 operations .* the end follows instead of aten.var_mean.correction"),
    ],
)
def test_another_way_through_the_code_is_an_error(other, message):
    with pytest.raises(UserError, match=message):
        cut_error(Twice(4), other, (torch.randn(2, 6), 2.0))


def test_another_shape_differs_by_infinity():
    assert cut_error(Twice(4), Twice(4, out=2), (torch.randn(2, 6), 2.0)) == float("inf")
    assert cut_error(Twice(4), Twice(4), (torch.randn(2, 6), 2.0)) == 0.0


def test_nothing_to_compare_with_is_an_error():
    with pytest.raises(UserError, match="nothing to compare with"):
        cut_error(Twice(4), Twice(4), (torch.randn(2, 6), float("nan")))


class Stubborn(nn.Module):
    """Draws random numbers, and asks for single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x + torch.rand(x.shape)).float())


def test_forward_code_that_names_a_dtype_is_compared_in_it():
    model, x = Stubborn(), torch.randn(4, 6)
    other = copy.deepcopy(model)
    assert cut_error(model, other, x) == 0.0
    with torch.no_grad():
        other.layer.weight[0, 0] += 1e-3
    assert 1e-5 < cut_error(model, other, x) < 1e-2


def test_the_check_leaves_no_trace():
    model, x = nn.Sequential(nn.Linear(6, 3), nn.Dropout()).train(), torch.randn(4, 6)
    state = torch.get_rng_state()
    assert cut_error(model, model, x) == 0.0
    assert torch.backends.mha.get_fastpath_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model[0].weight.dtype == torch.float32


class Threshold(nn.Module):
    """A detector that returns what scores above a threshold, nested in a list."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 5, 1)
        self.threshold = threshold

    def forward(self, x):
        boxes = self.head(self.b(self.a(x).relu()).relu()).flatten(2).transpose(1, 2).flatten(0, 1)
        return [{"boxes": boxes[boxes[:, 4] > self.threshold]}]


@pytest.mark.parametrize("threshold", [100.0, -100.0])
def test_empty_outputs_compare_nothing_and_say_so(threshold):
    torch.manual_seed(0)
    model, x = Threshold(threshold).eval(), torch.randn(1, 3, 12, 12)
    graph = trace_groups(model, x)
    plan = PruningPlan({group.name: (0, 3, 5, 8, 11) for group in graph.groups})
    pruned = copy.deepcopy(model)
    cut(pruned, graph, plan)
    if threshold < 0:
        assert check_cut(model, graph, plan, pruned, x) < 1e-9
    else:
        with pytest.raises(UserError, match=r"self-check: the outputs .* \(output\[0\]\['boxes'\]\): there is nothing"):
            check_cut(model, graph, plan, pruned, x)
