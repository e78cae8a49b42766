"""Group sparse training: what it adds to gradients, against autograd of the penalty as the paper writes it."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isomorphic as iso
from isomorphic.errors import UserError
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.scoring import score_groups

REG, ALPHA = 0.01, 4.0


class Convolutions(nn.Module):
    """Grouped, depthwise and transposed convolutions, a shortcut, and a linear layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped, self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.fc = nn.ConvTranspose2d(8, 6, 2, 2), nn.Linear(6 * 8 * 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = x + self.depthwise(F.relu(self.grouped(x)))
        return self.fc(self.up(x).flatten(1))


class Concatenation(nn.Module):
    """Two branches side by side, each read by one convolution, and one of them by another, too."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.both, self.alone = nn.Conv2d(10, 5, 1), nn.Conv2d(6, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.left(x), self.right(x)
        return (self.both(torch.cat([left, right], 1)) + self.alone(right)).mean((2, 3))


class Language(nn.Module):
    """A tied table, a token, layer norms, attention with heads, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.token = nn.Embedding(11, 12), nn.Parameter(torch.randn(1, 1, 12))
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.num_heads, self.qkv, self.proj = 3, nn.Linear(12, 36), nn.Linear(12, 12)
        self.fc1, self.fc2 = nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.token
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(batch, length, -1))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x)


IMAGE, IDS = torch.randn(2, 3, 4, 4), torch.tensor([[1, 2, 3, 4]])
MODELS = {"convolutions": (Convolutions, IMAGE), "concatenation": (Concatenation, IMAGE), "language": (Language, IDS)}


def make(name: str) -> tuple[Any, Any, Any]:
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.rand_like(parameter))  # norm scales are all ones, and would be one weak half
    return model, inputs, trace_groups(model, inputs)


def units_by_hand(graph) -> dict[str, list[list[tuple[str, int, torch.Tensor]]]]:
    """By set of units: for each unit, the (tensor, dim, positions) that it occupies; biases are left out."""

    def places(members, unit_of):
        return [(one.name, one.dim, unit_of(one.index)) for one in members if "bias" not in one.tensor]

    found = {}
    for group in graph.groups:
        found[group.name] = [places(group.members, lambda index, u=u: index[u]) for u in range(group.num_units)]
    for groups in graph.head_sets:
        n = groups[0].num_sections
        found[f"{groups[0].name} heads"] = [
            [place for group in groups for place in places(group.members, lambda i, h=h, n=n: i.chunk(n)[h].flatten())]
            for h in range(n)
        ]
    return {name: units for name, units in found.items() if len(units) > 1}


def squared_norm(model: nn.Module, places) -> torch.Tensor:
    tensors, seen, total = dict(model.named_parameters(remove_duplicate=False)), set(), torch.zeros(())
    for name, dim, positions in places:
        key = name in tensors and (id(tensors[name]), dim, tuple(positions.tolist()))
        if key and key not in seen:  # a tied weight counts once
            seen.add(key)
            total = total + tensors[name].index_select(dim, positions).square().sum()
    return total


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def with_gradients(model: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(inputs).square().mean().backward()
    return gradients_of(model)


def assert_added(model: nn.Module, before: dict[str, torch.Tensor], penalty: torch.Tensor) -> None:
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = torch.autograd.grad(penalty, parameters, allow_unused=True, retain_graph=True)
    after = gradients_of(model)
    for name, gradient in zip(names, wanted, strict=True):
        added = torch.zeros_like(before[name]) if gradient is None else gradient
        torch.testing.assert_close(after[name], before[name] + added, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_the_group_penalty_is_the_paper_s(name: str):
    """½ · reg · Σ γ_k · I_k with γ held constant, over every set of units, one unit after the other."""
    model, inputs, graph = make(name)
    before = with_gradients(model, inputs)
    penalty = torch.zeros(())
    for units in units_by_hand(graph).values():
        squares = torch.stack([squared_norm(model, places) for places in units])
        norms = squares.detach().sqrt()
        gamma = 2 ** (ALPHA * (norms.max() - norms) / (norms.max() - norms.min()))
        assert gamma.max() == pytest.approx(16) and gamma.min() == 1
        penalty = penalty + REG / 2 * (gamma * squares).sum()

    iso.sparsify(model, graph, reg=REG)()

    assert_added(model, before, penalty)


def test_the_models_above_have_what_they_are_for():
    graphs = {name: make(name)[2] for name in MODELS}
    kinds = {node.kind for graph in graphs.values() for group in graph.groups for node in group.nodes}
    assert kinds >= {"conv", "depthwise_conv", "linear", "norm", "embedding"}
    assert len(graphs["language"].head_sets) == 1
    wide = [m for group in graphs["convolutions"].groups for m in group.members if m.index.shape[1] > 1]
    assert any(member.name == "fc.weight" and member.index.shape == (6, 64) for member in wide)


def test_norms_are_told_by_group_and_by_head():
    model, _, graph = make("language")
    norms = iso.sparsify(model, graph).unit_norms()
    by_hand = units_by_hand(graph)
    assert norms.keys() == by_hand.keys()
    for name, units in by_hand.items():
        wanted = torch.stack([squared_norm(model, places) for places in units]).sqrt().detach()
        torch.testing.assert_close(norms[name], wanted)


def test_channels_last_and_half_precision_have_the_same_norms():
    model, inputs, graph = make("convolutions")
    plain = iso.sparsify(model, graph).unit_norms()
    before = with_gradients(model, inputs)
    iso.sparsify(model, graph, reg=REG)()
    wanted = gradients_of(model)
    model = model.to(memory_format=torch.channels_last)
    assert not model.grouped.weight.is_contiguous()
    regularizer = iso.sparsify(model, graph, reg=REG)
    for name, parameter in model.named_parameters():
        parameter.grad = before[name].clone()
    regularizer()
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, wanted[name])
    for name, norms in regularizer.unit_norms().items():
        torch.testing.assert_close(norms, plain[name])
    half = iso.sparsify(model.bfloat16(), graph).unit_norms()
    for name, norms in half.items():
        assert norms.dtype == torch.float32
        torch.testing.assert_close(norms, plain[name], rtol=1e-2, atol=0)


def test_the_growing_penalty_grows_where_units_are_weak_and_goes_on_from_its_state():
    model, inputs, graph = make("concatenation")
    regularizer = iso.sparsify(model, graph, kind="growing", reg=REG, delta=0.5)
    twin = iso.sparsify(model, graph, kind="growing", reg=REG, delta=0.5)
    units = units_by_hand(graph).values()
    weakness = []
    for places in units:
        norms = torch.stack([squared_norm(model, one) for one in places]).sqrt().detach()
        weakness.append((norms.max() - norms) / (norms.max() - norms.min()))

    for epoch, times in [(0, 0), (0, 0), (1, 1), (1, 1), (2, 2)]:
        before = with_gradients(model, inputs)
        regularizer(epoch)
        penalty = torch.zeros(())
        for places, weak in zip(units, weakness, strict=True):
            strength = REG + times * 0.5 * weak
            penalty = penalty + (strength * torch.stack([squared_norm(model, one) for one in places])).sum() / 2
        assert_added(model, before, penalty)
        twin.load_state_dict(copy.deepcopy(regularizer.state_dict()))
        with_gradients(model, inputs)
        twin(epoch)  # the epoch that its state is from: it does not grow again
        assert_added(model, before, penalty)


def test_the_bn_penalty_is_of_scales_alone():
    model, inputs, graph = make("convolutions")
    before = with_gradients(model, inputs)
    with torch.no_grad():
        model.stem_norm.weight[2] = -0.5
    iso.sparsify(model, graph, kind="bn", reg=REG)()
    assert_added(model, before, REG * model.stem_norm.weight.abs().sum())
    with pytest.raises(UserError, match="no batch norm whose channels can go.*take 'group'"):
        language, _, groups = make("language")
        iso.sparsify(language, groups, kind="bn")


def test_what_is_zero_or_all_alike_stays_finite_and_what_is_alone_is_left_alone():
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(1, 2))
    graph = trace_groups(model, torch.randn(2, 3))
    with torch.no_grad():
        for parameter in model[:2].parameters():
            parameter.zero_()
        model[2].weight.fill_(0.5)  # the second group: four units of the same norm
    model[0](torch.randn(2, 3)).sum().backward()
    for layer in model[1:]:
        layer.weight.grad, layer.bias.grad = torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)
    before = gradients_of(model)

    iso.sparsify(model, graph, reg=REG)()

    after = gradients_of(model)
    assert torch.equal(after["0.weight"], before["0.weight"])  # factor · 0
    torch.testing.assert_close(after["2.weight"], REG * model[2].weight.detach())  # γ = 1
    assert torch.equal(after["3.weight"], before["3.weight"])  # one unit, which cannot go
    assert all(gradient.isfinite().all() for gradient in after.values())


def test_the_criterion_scores_what_the_regularizer_shrinks():
    """A tied table counts once in both."""
    for name in MODELS:
        model, _, graph = make(name)
        norms = iso.sparsify(model, graph).unit_norms()
        scores = score_groups(model, graph.groups, "group_norm")
        for group in graph.groups:
            if group.has_width and group.num_units > 1:
                torch.testing.assert_close(scores[group.name], norms[group.name].square(), msg=group.name)


def test_a_call_without_gradients_is_an_error():
    model, _, graph = make("concatenation")
    regularize = iso.sparsify(model, graph)
    with pytest.raises(UserError, match=r"no gradients to add to: call it after backward\(\).*make it anew"):
        regularize()


def test_frozen_parameters_count_and_stay():
    model, inputs, graph = make("convolutions")
    model.stem.requires_grad_(False)
    model.zero_grad()
    model(inputs).sum().backward()
    regularizer = iso.sparsify(model, graph, reg=REG)
    whole = regularizer.unit_norms()
    regularizer()
    assert model.stem.weight.grad is None
    with torch.no_grad():
        model.stem.weight.zero_()
    assert all((regularizer.unit_norms()[name] <= norms).all() for name, norms in whole.items())
    assert any((regularizer.unit_norms()[name] < norms).any() for name, norms in whole.items())


def test_the_weak_half_holds_less_and_less_as_training_goes_on():
    model: Any = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    graph = trace_groups(model, torch.randn(1, 3))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]))
    regularizer = iso.sparsify(model, graph, reg=0.1)
    assert regularizer.weak_half() == pytest.approx((1 + 4) / (1 + 4 + 9 + 16))
    shares = [regularizer.weak_half()]
    for _ in range(5):
        model.zero_grad()
        (0 * model(torch.ones(1, 3)).sum()).backward()
        regularizer()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        shares.append(regularizer.weak_half())
    assert all(later < earlier for earlier, later in itertools.pairwise(shares))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "l1"}, "kind = 'l1' is none of group, bn, growing"),
        ({"reg": -1.0}, "reg = -1.0 is not a number of at least 0"),
        ({"reg": math.nan}, "reg = nan is not a number of at least 0"),
        ({"alpha": "4"}, "alpha = '4' is not a number of at least 0"),
        ({"delta": True}, "delta = True is not a number of at least 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str):
    model, _, graph = make("concatenation")
    with pytest.raises(UserError, match=message):
        iso.sparsify(model, graph, **arguments)


def test_a_graph_of_another_model():
    _, _, graph = make("concatenation")
    with pytest.raises(UserError, match="the graph is of another model: this one has no "):
        iso.sparsify(Convolutions(), graph)
    smaller: Any = Concatenation()
    smaller.left = nn.Conv2d(3, 2, 1)
    with pytest.raises(UserError, match=r"the graph is of another model: left.weight is \(2, 3, 1, 1\) here"):
        iso.sparsify(smaller, graph)


def test_wrapped_models_are_refused_by_name():
    model, _, graph = make("concatenation")
    with pytest.raises(UserError, match="the model is wrapped in DataParallel: sparsify model.module"):
        iso.sparsify(nn.DataParallel(model), graph)
