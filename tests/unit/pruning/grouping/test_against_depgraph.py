"""What the exact tracer and DepGraph both find is the same; what only one finds, or finds otherwise, is named here.

The exact tracer is held against two things: the groups of `tracer="depgraph"`, an adapter that freezes what it cannot
vouch for, and `torch_pruning.DependencyGraph` itself, asked which positions of which tensors go with one channel.
They differ on Swin alone, where what the exact tracer says is shown by perturbing the model:

- Patch merging lays four neighbours' channels side by side, so that channel c of C is read at c, c + C, c + 2C and
  c + 3C. DependencyGraph names c alone. A model that is cut like that does not run: the adapter freezes the stream.
- Each head has its column in a table of position biases. DependencyGraph takes these columns for head dims, and cuts
  column u with unit u, which most of the time does not exist. What it says of q, k, v and the projection behind them
  is right, but three rows to a column are no plain units, and the adapter knows the heads of timm's `Attention` only:
  it freezes `WindowAttention`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import warnings
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from timm.models.swin_transformer import PatchMerging, WindowAttention
from torch import nn

from isomorphic.pruning.classify import classify
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.self_check import cut_error, masked_copy
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.ranking.ranker import Ranker, RankingRules, Ratios
from isomorphic.pruning.scoring import normalize, score_groups

NAMES = ("deit", "vit", "swin", "convnext", "resnet", "mobilenet")
# By model: groups that the exact tracer finds, and groups that both find.
FULL_SIZE = {
    "deit_base_distilled_patch16_224": (25, 25),
    "swin_base_patch4_window7_224": (52, 25),
    "convnext_base": (40, 40),
    "resnet152": (105, 105),
}
RATIOS = (Ratios(0.5), Ratios(0.5, heads=0.5), Ratios(0.5, heads=0.25, head_dims=0.5))
UNMAPPED = "its units do not map one to one onto {}.proj"
BREAKS = "the model does not run without some of it"


@pytest.fixture(params=NAMES)
def pair(request, traced):
    """A small model, traced by each tracer."""
    return traced(request.param, "exact"), traced(request.param, "depgraph")


def in_common(one, other):
    """The graph of `one` without the groups that `other` does not have."""
    names = {group.name for group in other.groups}
    return dataclasses.replace(one, groups=tuple(group for group in one.groups if group.name in names))


def described(group):
    """A group as plain data, the same for any order of its members and layers."""

    def positions(members):
        return sorted((member.name, member.dim, member.index.tolist()) for member in members)

    layers = []
    for number, node in enumerate(group.nodes):
        tensors = sorted((member.tensor, member.dim) for member in group.members if member.node == number)
        layers.append((node.module, node.kind, node.side, tensors))
    blocks = group.sections and (
        group.sections.num_sections,
        group.sections.are_heads,
        positions(group.sections.members),
    )
    edges = sorted((layers[source], layers[target]) for source, target in group.edges)
    return {
        "units": group.num_units,
        "pool": group.split_dim,
        "blocks": blocks,
        "members": positions(group.members),
        "layers": sorted(layers),
        "edges": edges,
    }


def kept_units(model, graph, ratios, criterion):
    """What isomorphic ranking keeps of each group."""
    scores = score_groups(model, graph.groups, criterion, seed=5)
    normalized = {name: normalize(values, "mean") for name, values in scores.items()}
    return Ranker(graph, normalized, classify(graph.groups), RankingRules("isomorphic")).plan(ratios).kept


def with_the_rest_whole(graph, kept):
    """A plan for all groups of `graph`."""
    return PruningPlan({group.name: kept.get(group.name, tuple(range(group.num_units))) for group in graph.groups})


def dependency_graph(model, inputs):
    """The library's own graph of a copy, and the names of the layers and parameters in it."""
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tokens and layer scales, which it handles
        graph = tp.DependencyGraph().build_dependency(model, inputs)
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    return graph, names | {parameter: name for name, parameter in model.named_parameters()}


def pruned_together(graph, names, group, unit):
    """(tensor, dim, position) of all that the library prunes with one output channel of the group's first producer."""
    (root,) = [module for module, name in names.items() if name == group.name.removesuffix(".weight:0")]
    found = set()
    for dependency, positions in graph.get_pruning_group(
        root, graph.get_pruner_of_module(root).prune_out_channels, [unit]
    ):
        node = dependency.target
        found |= {(*dim, position) for dim in dims_of(node, dependency.handler, names) for position in positions}
    return found


def dims_of(node, handler, names):
    """(tensor, dim) of all that shrinks with a side of a layer; nothing for operations."""
    module = node.module
    if module not in names:
        return set()
    if isinstance(module, nn.Parameter):
        return {(names[module], node.pruning_dim % module.dim())}
    depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
    if isinstance(module, (nn.Conv2d, nn.Linear)) and handler.__name__ == "prune_in_channels" and not depthwise:
        return {(f"{names[module]}.weight", 1)}
    tensors = ("weight", "bias", "running_mean", "running_var")
    return {(f"{names[module]}.{tensor}", 0) for tensor in tensors if getattr(module, tensor, None) is not None}


def errors_of_the_library(model, group, unit):
    """On Swin: positions that DependencyGraph leaves out, and positions that it adds; see above."""
    tensors = {member.name for member in group.members}
    missing, added = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, PatchMerging) and f"{name}.norm.weight" in tensors:
            dims = [(f"{name}.norm.weight", 0), (f"{name}.norm.bias", 0), (f"{name}.reduction.weight", 1)]
            missing = {(*dim, unit + neighbour * group.num_units) for dim in dims for neighbour in (1, 2, 3)}
        if isinstance(module, WindowAttention) and group.name == f"{name}.qkv.weight:0":
            added = {(f"{name}.relative_position_bias_table", 1, unit)}
    return missing, added


def check_against_the_library(model, inputs, groups):
    graph, names = dependency_graph(model, inputs)
    for group in groups:
        for unit in sorted({0, group.num_units // 3, group.num_units - 1}):
            ours = {(m.name, m.dim, position) for m in group.members for position in m.index[unit].tolist()}
            missing, added = errors_of_the_library(model, group, unit)
            assert missing <= ours and not added & ours
            assert pruned_together(graph, names, group, unit) == (ours - missing) | added, (group.name, unit)


def changed_channels(model, inputs, layer, change):
    """Where the last dim of a layer's input changes while `change` is in effect."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(inputs)
        change()
        model(inputs)
    handle.remove()
    return (seen[0] != seen[1]).flatten(0, -2).any(0).nonzero().flatten().tolist()


def test_what_both_find_is_the_same(pair):
    exact, depgraph = pair
    ours, theirs = in_common(exact.graph, depgraph.graph).groups, depgraph.groups
    assert [group.name for group in ours] == [group.name for group in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert described(one) == described(other), one.name


def test_classes_of_what_both_find_are_the_same(pair):
    exact, depgraph = pair
    assert classify(in_common(exact.graph, depgraph.graph).groups) == depgraph.classes


@pytest.mark.parametrize("criterion", ["l2", "random"])
@pytest.mark.parametrize("ratios", RATIOS)
def test_the_same_units_are_kept(pair, ratios, criterion):
    exact, depgraph = pair
    common = in_common(exact.graph, depgraph.graph)
    assert not common.shrink_together and not depgraph.graph.shrink_together
    kept = kept_units(exact.model, common, ratios, criterion)
    assert kept == kept_units(depgraph.model, depgraph.graph, ratios, criterion)
    share = sum(map(len, kept.values())) / sum(group.num_units for group in common.groups)
    assert 0.3 < share < 0.55  # less than half where heads and dims of the others go


def test_the_same_plan_cuts_the_same_model(pair):
    exact, depgraph = pair
    kept = kept_units(depgraph.model, depgraph.graph, RATIOS[2], "l2")
    ours, theirs = (one.cut(with_the_rest_whole(one.graph, kept)) for one in pair)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    with torch.no_grad():
        assert torch.equal(ours(exact.inputs), theirs(exact.inputs))


def test_each_channel_takes_along_what_the_library_says(pair):
    exact, _ = pair
    check_against_the_library(exact.model, exact.inputs, exact.groups)


def test_only_the_streams_and_attention_of_swin_are_found_by_one_tracer_alone(pair):
    exact, depgraph = pair
    alone = {group.name for group in exact.groups} - {group.name for group in depgraph.groups}
    expected = {}
    if exact.name == "swin":
        blocks = [f"layers.{stage}.blocks.{block}" for stage, block in itertools.product(range(3), range(2))]
        expected = {f"{block}.attn.qkv.weight:0": UNMAPPED.format(f"{block}.attn") for block in blocks}
        expected |= {"patch_embed.proj.weight:0": BREAKS, "layers.1.downsample.reduction.weight:0": BREAKS}
    assert {name: str(depgraph.graph.frozen[name]) for name in alone} == expected
    assert {group.name for group in depgraph.groups} <= {group.name for group in exact.groups}
    assert {str(frozen) for frozen in exact.graph.frozen.values()} == {"it reaches the model's output"}


@pytest.mark.parametrize(("stage", "stream"), [(0, "patch_embed.proj"), (1, "layers.1.downsample.reduction")])
@pytest.mark.parametrize("channel", [0, 5, 15])
def test_patch_merging_reads_a_channel_where_the_exact_tracer_says(traced, stage, stream, channel):
    subject = traced("swin", "exact")
    model: Any = subject.copy()
    merging = model.layers[stage + 1].downsample

    def change():
        model.layers[stage].register_forward_hook(lambda _, args, output: output.index_add(3, where, noise))

    where, noise = torch.tensor([channel]), torch.randn(2, 16 >> stage, 16 >> stage, 1)
    changed = changed_channels(model, subject.inputs, merging.norm, change)
    members = {m.name: m.index for m in subject.group(f"{stream}.weight:0").members}
    assert members[f"layers.{stage + 1}.downsample.norm.weight"][channel].tolist() == changed
    assert len(changed) == 4


@pytest.mark.parametrize("head", range(4))
def test_a_column_of_the_position_biases_is_for_the_head_that_the_exact_tracer_says(traced, head):
    subject = traced("swin", "exact")
    model: Any = subject.copy()
    group = subject.group("layers.1.blocks.1.attn.qkv.weight:0")
    attention = model.layers[1].blocks[1].attn
    (member,) = group.heads.members
    table = attention.relative_position_bias_table

    def change():
        table[:, member.index[head]] += torch.randn(len(table), 1)

    changed = changed_channels(model, subject.inputs, attention.proj, change)
    (projection,) = [m for m in group.members if m.name == "layers.1.blocks.1.attn.proj.weight"]
    assert projection.index.view(4, 8)[head].tolist() == changed
    assert (member.name, member.dim) == ("layers.1.blocks.1.attn.relative_position_bias_table", 1)


@pytest.mark.parametrize("ratios", RATIOS)
def test_swin_is_cut_exactly_where_only_one_tracer_finds_the_groups(traced, ratios):
    subject = traced("swin", "exact")
    plan = PruningPlan(kept_units(subject.model, subject.graph, ratios, "l2"))
    assert len(plan.kept["patch_embed.proj.weight:0"]) < 16
    assert cut_error(masked_copy(subject.model, subject.graph, plan), subject.cut(plan), subject.inputs) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_models_are_traced_and_ranked_alike(name):
    torch.manual_seed(0)
    model, inputs = timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)
    exact, depgraph = trace_groups(model, inputs, "exact"), trace_groups(model, inputs, "depgraph")
    common = in_common(exact, depgraph)
    assert (len(exact.groups), len(depgraph.groups)) == FULL_SIZE[name]
    assert [described(group) for group in common.groups] == [described(group) for group in depgraph.groups]
    assert classify(common.groups) == classify(depgraph.groups)
    check_against_the_library(model, inputs, exact.groups)
    for criterion, ratios in itertools.product(("l2", "random"), RATIOS):
        kept = kept_units(model, common, ratios, criterion)
        assert kept == kept_units(model, depgraph, ratios, criterion)
    cut(model, exact, PruningPlan(kept_units(model, exact, RATIOS[2], "l2")))
    with torch.no_grad():
        assert model(inputs).isfinite().all()
