"""Intra-Fusion: exact transport, exact merging of copies, plain selection where merging means nothing, and digits."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.measure.complexity import count_complexity
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery.batch_norm import fold
from isomorphic.pruning.recovery.fusion import (
    MASSES,
    NORMALIZATIONS,
    FusionRules,
    from_output,
    fuse,
    layer_members,
    merge_positions,
    solve,
    unit_features,
    unmergeable,
)
from isomorphic.pruning.recovery.watching import watch
from isomorphic.pruning.scoring import score_groups
from tests.unit.pruning.conftest import BatchNormCnn, TiedCnn
from tests.unit.pruning.recovery.digits_cnn import digits, top1, trained_cnn

ALL_RULES = [FusionRules(normalization, masses) for normalization in NORMALIZATIONS for masses in MASSES]
by_rules = pytest.mark.parametrize("rules", ALL_RULES, ids=lambda rules: f"{rules.normalization}-{rules.masses}")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half(groups: Any, step: int = 2) -> PruningPlan:
    """Every second unit stays; of groups with blocks, all."""
    return PruningPlan({g.name: tuple(range(0, g.num_units, step if g.sections is None else 1)) for g in groups})


def whole_but(graph: Any, **kept: tuple[int, ...]) -> PruningPlan:
    names = {group.name: group.name.rpartition(".weight")[0] for group in graph.groups}
    return PruningPlan(
        {group.name: kept.get(f"_{names[group.name]}", tuple(range(group.num_units))) for group in graph.groups}
    )


def linear_program(source: np.ndarray, target: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, float]:
    """The transport plan and its cost, by scipy."""
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    done = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([source, target]))
    assert done.success
    return done.x.reshape(n, m), done.fun


# The transport problem


@pytest.mark.parametrize(("n", "m"), [(12, 6), (13, 5), (40, 28), (7, 1)])
@pytest.mark.parametrize("importance", [None, "given"])
def test_the_map_moves_all_mass_at_the_cost_of_an_independent_solver(n: int, m: int, importance: str | None):
    features = F.normalize(random(n, 30))
    kept = torch.randperm(n, generator=torch.Generator().manual_seed(1))[:m].sort().values
    weights = torch.rand(n, generator=torch.Generator().manual_seed(2)) if importance else None
    transport = solve(features, kept, weights)
    shares = (torch.ones(n) if weights is None else weights).double()
    source, target = shares / shares.sum(), shares[kept] / shares[kept].sum()
    cost = (features[:, None] - features[kept][None]).abs().sum(-1)
    expected = linear_program(source.numpy(), target.numpy(), cost.numpy())[1]
    assert (transport.plan * cost).sum().item() == pytest.approx(expected, rel=1e-7)
    by_source, by_target = transport.by_source, transport.by_target
    assert by_source.shape == by_target.shape == (m, n)
    assert (by_source >= 0).all() and (by_target >= 0).all()
    torch.testing.assert_close(by_source.sum(0), torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(by_target.sum(1), torch.ones(m, dtype=torch.float64))
    torch.testing.assert_close(by_source @ source, target)
    if weights is None:
        torch.testing.assert_close(by_source.sum(1), torch.full((m,), n / m, dtype=torch.float64))


def test_with_all_units_kept_the_map_is_the_identity():
    transport = solve(F.normalize(random(9, 20)), torch.arange(9))
    torch.testing.assert_close(transport.by_source, torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(transport.by_target, torch.eye(9, dtype=torch.float64))


def test_units_without_mass_go_nowhere_and_nothing_is_infinite():
    importance = torch.tensor([1.0, 0.0, 3.0, 0.0])
    transport = solve(F.normalize(random(4, 5)), torch.tensor([0, 1]), importance)
    assert transport.by_source[:, 1].tolist() == transport.by_source[:, 3].tolist() == [0, 0]
    assert transport.by_target[1].tolist() == [0, 0, 0, 0] and transport.by_target.isfinite().all()
    nothing_left = solve(F.normalize(random(4, 5)), torch.tensor([1, 3]), importance)  # then kept units count alike
    assert nothing_left.target.tolist() == [0.5, 0.5] and nothing_left.by_source.isfinite().all()


def test_features_are_out_slices_with_biases_and_in_slices_of_length_one():
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    model = nn.Sequential(first, nn.ReLU(), second)
    for part in (first.weight[1], first.bias[1:2], second.weight[:, 1]):
        nn.init.zeros_(part)
    (group,) = trace_groups(model, torch.randn(2, 3)).groups
    found = unit_features(model, layer_members(group, {}))
    rows = torch.cat([first.weight, first.bias[:, None], second.weight.T], dim=1).double()
    order = [{"0.weight": slice(0, 3), "0.bias": slice(3, 4), "2.weight": slice(4, 6)}[m.name] for m in group.members]
    expected = torch.cat([rows[:, part] for part in order], dim=1)
    lengths = expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, torch.where(lengths > 0, expected / lengths, 0.0))
    assert found[1].tolist() == [0] * 6 and found[0].norm().item() == pytest.approx(1, abs=1e-12)


def test_merging_follows_the_positions_of_units():
    weight, factor = random(2, 12), random(2, 3, seed=1)
    index = torch.tensor([[4, 5], [0, 1], [8, 9]])
    expected = weight.clone()
    for k in range(2):
        for j, unit in enumerate((1, 2)):
            expected[:, index[unit, k]] = sum(factor[j, i] * weight[:, index[i, k]] for i in range(3))
        expected[:, index[0, k]] = 0
    merge_positions(weight, 1, index, torch.tensor([1, 2]), factor)
    torch.testing.assert_close(weight, expected)


# Whole models


@by_rules
def test_a_fused_perceptron_is_that_of_the_equations(rules: FusionRules):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 4)).double()
    inputs, kept = random(3, 5), [0, 3, 5]
    first, bias, second, second_bias = (tensor.detach().numpy().copy() for tensor in model.parameters())
    graph = trace_groups(model, inputs)
    importance = np.arange(1.0, 9.0)

    rows = np.concatenate([first, bias[:, None], second.T], axis=1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    a, b = np.full(8, 1 / 8), np.full(3, 1 / 3)
    if rules.masses == "importance":
        a, b = importance / importance.sum(), importance[kept] / importance[kept].sum()
    plan, _ = linear_program(a, b, np.abs(rows[:, None] - rows[kept][None]).sum(-1))
    by_source, by_target = plan.T / a, plan.T / b[:, None]
    make = by_source if rules.normalization == "source" else by_target

    scores = {"0.weight:0": torch.from_numpy(importance)}
    fusion = fuse(model, graph, whole_but(graph, _0=tuple(kept)), inputs, rules=rules, importance=scores)
    cut(model, graph, whole_but(graph, _0=tuple(kept)))
    expected = (make @ first, make @ bias, second @ by_source.T, second_bias)
    for tensor, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(tensor.detach(), torch.from_numpy(value), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(fusion.merged["0.weight:0"], torch.from_numpy(make), rtol=1e-6, atol=1e-9)
    assert fusion.plain == {}


def test_a_batch_norm_keeps_working_moments_and_no_bias_is_gained(traced: Any):
    subject = traced("resnet", "exact")
    model, plan = subject.copy(), half(subject.groups)
    folded = subject.copy()
    fold(folded, watch(folded, subject.inputs).pairs)
    fusion = fuse(model, subject.graph, plan, subject.inputs)
    cut(model, subject.graph, plan)
    dense, by_source = subject.model.layer3[0].bn1, fusion.merged["layer3.0.conv1.weight:0"].float()
    torch.testing.assert_close(model.layer3[0].bn1.bias, by_source @ dense.bias)
    torch.testing.assert_close(model.layer3[0].bn1.weight, by_source @ dense.weight.abs())
    spread = (dense.running_var + dense.eps).sqrt()
    share = by_source / by_source.sum(1, keepdim=True)
    torch.testing.assert_close(model.layer3[0].bn1.running_var + dense.eps, (share @ spread).square())
    assert not [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    # the layer with its batch norm makes what the merged, folded layer makes
    x = torch.randn(2, 12, 6, 6)
    conv = folded.layer3[0].conv1
    before = fusion.merged["layer2.0.conv2.weight:0"].float()
    weight = torch.einsum("mn,njhw,kj->mkhw", by_source, conv.weight, before)
    expected = F.conv2d(x[:, :6], weight, by_source @ conv.bias, conv.stride, conv.padding)
    with torch.no_grad():
        found = F.batch_norm(
            model.layer3[0].conv1(x[:, :6]),
            *(model.layer3[0].bn1.running_mean, model.layer3[0].bn1.running_var),
            *(model.layer3[0].bn1.weight, model.layer3[0].bn1.bias),
            eps=dense.eps,
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_plan_that_keeps_everything_changes_nothing(subject: Any, keep_all: Any):
    model = subject.copy()
    fusion = fuse(model, subject.graph, keep_all(subject.groups), subject.inputs)
    assert (fusion.merged, fusion.plain) == ({}, {})
    before = subject.model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def with_copies(subject: Any) -> nn.Module:
    """Every odd unit of every group becomes a copy of the even one before it."""
    model = subject.copy()
    with torch.no_grad():
        for group in subject.groups:
            for member in group.members:
                along = getattr(model.get_submodule(member.module), member.tensor).movedim(member.dim, 0)
                along[member.index[1::2]] = along[member.index[::2]]
    return model


@pytest.mark.parametrize(
    ("name", "masses"), [("cnn", "importance"), ("resnet", "importance"), ("mobilenet", "uniform")]
)
def test_copies_merge_without_loss_where_mass_is_preserved(name: str, masses: str, traced: Any):
    subject = traced(name, "exact")
    model = with_copies(subject)
    with torch.no_grad():
        expected = model(subject.inputs)
    generator = torch.Generator().manual_seed(4)
    plan = PruningPlan(
        {
            g.name: tuple((2 * u + int(torch.randint(2, (), generator=generator))) for u in range(g.num_units // 2))
            for g in subject.groups
        }
    )
    pruned = copy.deepcopy(model)
    importance = {g.name: torch.arange(1.0, g.num_units // 2 + 1).repeat_interleave(2) for g in subject.groups}
    fusion = fuse(model, subject.graph, plan, subject.inputs, rules=FusionRules("mass", masses), importance=importance)
    assert set(fusion.merged) == set(plan.kept)
    for fused in (model, pruned):
        cut(fused, subject.graph, plan)
    with torch.no_grad():
        assert ((model(subject.inputs) - expected).abs().max() / expected.std()).item() < 1e-5
        assert ((pruned(subject.inputs) - expected).abs().max() / expected.std()).item() > 0.1


def test_source_normalisation_scales_a_path_by_the_units_that_merge():
    torch.manual_seed(0)
    first, second = nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)
    model = nn.Sequential(first, nn.ReLU(), second).double()
    with torch.no_grad():
        first.weight[2:], second.weight[:, 2:] = first.weight[:2], second.weight[:, :2]
    inputs, graph = random(2, 5), trace_groups(model, random(2, 5))
    expected = 2 * model(inputs)
    fuse(model, graph, whole_but(graph, _0=(0, 1)), inputs)
    torch.testing.assert_close(model(inputs), expected)


@pytest.mark.parametrize("rules", [ALL_RULES[0], ALL_RULES[-1]], ids=["source-uniform", "mass-importance"])
@pytest.mark.parametrize("name", ["cnn", "resnet", "vit", "convnext", "swin"])
def test_a_fused_model_has_the_plain_ones_shapes_and_runs(name: str, rules: FusionRules, traced: Any):
    subject = traced(name, "exact")
    plan = subject.random_plan(5)
    plain, model = subject.cut(plan), subject.copy()
    importance = score_groups(model, subject.groups, "l1")
    fusion = fuse(model, subject.graph, plan, subject.inputs, rules=rules, importance=importance)
    cut(model, subject.graph, plan)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert count_complexity(model, subject.inputs[:1]) == count_complexity(plain, subject.inputs[:1])
    with torch.no_grad():
        assert model(subject.inputs).isfinite().all()
    lossy = {group.name for group in subject.groups if plan.removed(group)}
    assert set(fusion.merged) | set(fusion.plain) == lossy and not set(fusion.merged) & set(fusion.plain)
    for name, matrix in fusion.merged.items():
        assert matrix.shape == (len(plan.kept[name]), subject.group(name).num_units)


def test_what_is_merged_does_not_depend_on_the_tracer(traced: Any):
    models = []
    for tracer in ("exact", "depgraph"):
        subject = traced("cnn", tracer)
        model, plan = subject.copy(), half(subject.groups)
        fuse(model, subject.graph, plan, subject.inputs)
        cut(model, subject.graph, plan)
        models.append(model.state_dict())
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=1e-4, atol=1e-5)


@by_rules
def test_a_unit_of_zeros_leaves_everything_finite(rules: FusionRules, traced: Any):
    subject = traced("cnn", "exact")
    model = subject.copy()
    with torch.no_grad():
        for group in subject.groups:
            for member in group.members:
                along = getattr(model.get_submodule(member.module), member.tensor).movedim(member.dim, 0)
                along[member.index[:2]] = 0.0  # one that stays and one that goes
    plan = half(subject.groups)
    importance = score_groups(model, subject.groups, "l1")
    assert importance["stem.0.weight:0"][0] == 0
    fuse(model, subject.graph, plan, subject.inputs, rules=rules, importance=importance)
    cut(model, subject.graph, plan)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    with torch.no_grad():
        assert model(subject.inputs).isfinite().all()


def test_groups_are_merged_from_the_output_on_merged_weights():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)]
    model, inputs = nn.Sequential(*layers).double().eval(), random(2, 5)
    graph = trace_groups(model, inputs)
    assert [group.name for group in from_output(graph, watch(model, inputs))] == ["2.weight:0", "0.weight:0"]
    one_by_one = copy.deepcopy(model)
    for names in ({"_2": (0, 2, 5)}, {"_0": (1, 4, 6)}):
        graph_now = trace_groups(one_by_one, inputs)
        fuse(one_by_one, graph_now, whole_but(graph_now, **names), inputs)
        cut(one_by_one, graph_now, whole_but(graph_now, **names))
    at_once = whole_but(graph, _2=(0, 2, 5), _0=(1, 4, 6))
    fuse(model, graph, at_once, inputs)
    cut(model, graph, at_once)
    torch.testing.assert_close(model(inputs), one_by_one(inputs))


def test_what_is_cut_plainly_does_not_count_in_features():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    inputs = random(2, 4)
    graph, other = trace_groups(model, inputs), copy.deepcopy(model)
    both = fuse(model, graph, whole_but(graph, _0=(0, 3, 4), _2=(1, 2)), inputs)
    assert list(both.plain) == ["2.weight:0"]
    cut(other, graph, whole_but(graph, _2=(1, 2)))
    graph_now = trace_groups(other, inputs)
    alone = fuse(other, graph_now, whole_but(graph_now, _0=(0, 3, 4)), inputs)
    torch.testing.assert_close(both.merged["0.weight:0"], alone.merged["0.weight:0"])


# What cannot be merged


class Gated(nn.Module):
    """Two linears whose outputs are multiplied, and a third one that reads both in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.stem = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.out(self.gate(x).sigmoid() * self.value(x))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.scale, self.two = nn.Linear(4, 6), nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) * self.scale)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm, self.out = nn.Embedding(8, 6), nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.words(x))[0])


class Divided(nn.Module):
    """Half of a stream comes from one convolution, half from another one."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 2, 1)
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.left(x), self.right(x)], dim=1) + self.both(x))


IMAGES = torch.randn(2, 3, 8, 8)
UNSUPPORTED = {
    "multiplied": (Gated, random(2, 5).float(), {"gate.weight:0": "multiplied"}),
    "scaled": (Scaled, random(2, 4).float(), {"one.weight:0": "scale acts on it"}),
    "tied": (TiedCnn, IMAGES, {"stem.weight:0": "shared"}),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
        random(2, 4).float(),
        {"0.weight:0": "1 normalises it"},
    ),
    "batch norm after an activation": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)),
        IMAGES,
        {"0.weight:0": "2 normalises it"},
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1)),
        IMAGES,
        {"0.weight:0": "several outputs of 0", "1.weight:0": "blocks"},
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 2), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        IMAGES,
        {"0.weight:1": "not a plain"},
    ),
    "recurrent": (
        Recurrent,
        torch.arange(8).view(2, 4),
        {"words.weight:1": "not a plain", "lstm.weight_ih_l0:0": "lstm"},
    ),
    "divided": (Divided, IMAGES, {"both.weight:0:0": "shares a dim", "both.weight:0:4": "shares a dim"}),
    "shuffled": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 2, 1)),
        IMAGES,
        {"0.weight:0": "several outputs of 0"},
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_merged_is_named_and_left_alone(name: str):
    build, inputs, reasons = UNSUPPORTED[name]
    model = build().eval()
    graph = trace_groups(model, inputs)
    wanted = [group for group in graph.groups if group.name in reasons]
    assert [group.name for group in wanted] == list(reasons)
    kept = {g.name: tuple(range(g.num_units)) for g in graph.groups}
    for group in wanted:
        block = range(0, group.section_size, 2)
        kept[group.name] = tuple(b * group.section_size + u for b in range(group.num_sections) for u in block)
    plan, before = PruningPlan(kept), copy.deepcopy(model.state_dict())
    fusion = fuse(model, graph, plan, inputs)
    assert not fusion.merged and set(fusion.plain) == set(reasons)
    for group, reason in reasons.items():
        assert reason in fusion.plain[group]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_of_a_transformer_only_the_hidden_units_are_merged(traced: Any):
    for name in ("vit", "swin", "convnext"):
        subject = traced(name, "exact")
        reasons = unmergeable(subject.model, subject.graph, watch(subject.model, subject.inputs))
        assert {g.name for g in subject.groups} - set(reasons) == {
            g.name for g in subject.groups if "mlp.fc1" in g.name
        }


@pytest.mark.parametrize("side", ["make", "read"])
def test_what_other_groups_lose_plainly_is_no_feature(side: str):
    torch.manual_seed(0)
    maker, reader = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8)), nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    merged = nn.Linear(8, 6)
    model, inputs = nn.Sequential(maker, merged, reader, nn.Linear(8, 3)), random(2, 5).float()
    graph = trace_groups(model, inputs)
    plan = whole_but(graph, **{"_0.0": (0, 2, 5), "_1": (1, 2, 4), "_2.0": (1, 3)})
    first = fuse(copy.deepcopy(model), graph, plan, inputs)
    if side == "make":
        merged.weight.data[:, [1, 3, 4, 6, 7]] = random(6, 5).float()  # of units that LayerNorm 0.1 loses
    else:
        reader.get_submodule("0").get_parameter("weight").data[[0, 2, 4, 5, 6, 7]] = random(6, 6).float()
    second = fuse(model, graph, plan, inputs)
    assert set(first.plain) == {"0.0.weight:0", "2.0.weight:0"} and set(first.merged) == {"1.weight:0"}
    assert torch.equal(first.merged["1.weight:0"], second.merged["1.weight:0"])


def test_a_reader_of_both_factors_does_not_make_a_product():
    model, inputs = Gated(), random(2, 5).float()
    assert set(unmergeable(model, trace_groups(model, inputs), watch(model, inputs))) == {"gate.weight:0"}


def test_bad_rules_and_plans_are_refused():
    model, inputs = BatchNormCnn().eval(), torch.randn(1, 3, 32, 32)
    graph = trace_groups(model, inputs)
    with pytest.raises(ValueError, match="normalization is of"):
        fuse(model, graph, half(graph.groups), inputs, rules=FusionRules("target"))
    with pytest.raises(ValueError, match="need the importance"):
        fuse(model, graph, half(graph.groups), inputs, rules=FusionRules(masses="importance"))
    with pytest.raises(UserError, match="belongs to another model"):
        fuse(model, graph, PruningPlan({}), inputs)


# The specification's check on trained weights


def top1_without_finetuning(dense: nn.Module, which: tuple[int, ...], sparsity: float) -> tuple[float, float]:
    """Plain and fused, by the ℓ1 importance of the folded model; groups are counted from the output."""
    inputs = digits("train")[0][:2]
    graph, watched = trace_groups(dense, inputs), watch(dense, inputs)
    folded = copy.deepcopy(dense)
    fold(folded, watched.pairs)
    groups = [
        dataclasses.replace(group, members=tuple(layer_members(group, watched.pairs)))
        for group in from_output(graph, watched)
    ]
    scores, kept = score_groups(folded, groups, "l1"), {g.name: tuple(range(g.num_units)) for g in groups}
    for number in which:
        name, count = groups[number].name, int(groups[number].num_units * (1 - sparsity) + 1e-9)
        kept[name] = tuple(sorted(scores[name].argsort(descending=True)[:count].tolist()))
    plain, fused = copy.deepcopy(dense), copy.deepcopy(dense)
    fuse(fused, graph, PruningPlan(kept), inputs)
    for model in (plain, fused):
        cut(model, graph, PruningPlan(kept))
    return top1(plain), top1(fused)


@pytest.mark.slow
def test_on_digits_fusion_beats_plain_pruning_by_the_margins_of_the_specification():
    models = [trained_cnn(seed) for seed in range(3)]
    assert min(map(top1, models)) > 98
    for which, sparsity, margin in (((1,), 0.5, 10), ((2,), 0.5, 10), ((0, 1, 2), 0.3, 20)):
        found = [top1_without_finetuning(model, which, sparsity) for model in models]
        plain, fused = (statistics.fmean(column) for column in zip(*found, strict=True))
        assert fused >= plain + margin, (which, sparsity, plain, fused)


def test_layers_that_no_merge_touches_keep_weights_under_a_zero_gamma(traced: Any):
    subject = traced("resnet", "exact")
    model = subject.copy()
    nn.init.zeros_(model.layer4[0].bn2.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = whole_but(subject.graph, **{"_layer1.0.conv1": (0, 2)})
    fusion = fuse(model, subject.graph, kept, subject.inputs)
    assert set(fusion.merged) == {"layer1.0.conv1.weight:0"}
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= {f"layer1.0.{name}" for name in ("conv1.weight", "conv2.weight")} | {
        f"layer1.0.bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var")
    }
