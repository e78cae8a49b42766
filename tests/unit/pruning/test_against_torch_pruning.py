"""The same L2 scores give the same cut as `torch_pruning`'s isomorphic pruner, where its known defects stay out.

What keeps them out: weights without ties; quotas that are whole numbers, no layer near its end, no rounding and no
largest share; classes that its tag in discovery order tells apart as isomorphism does (all MLPs alike, each stream
alone); heads given by name and cut without their dims, since it removes equal dims of all heads and ours are chosen
per head; fresh dictionaries instead of its shared default arguments; a width ratio above 0. Its magnitude leaves out
depthwise filters, so these members are left out of our scores, too (that ours count them is tested elsewhere).
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import NamedTuple

import pytest
import timm
import torch
import torch_pruning as tp
from timm.layers.attention import Attention

from isomorphic.pruning.classify import classify
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.ranking.ranker import Ranker, RankingRules, Ratios
from isomorphic.pruning.scoring import normalize, score_groups

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 10}
CONVNEXT = {"depths": (1, 1, 3, 1), "dims": (16, 24, 32, 48), "num_classes": 10}


class Reference(NamedTuple):
    """What the library's pruner saw and did: normalised scores and removed units by our group's name."""

    scores: dict[str, torch.Tensor]
    removed: dict[str, list[int]]
    pruned: torch.nn.Module


def build(name, kwargs):
    """Random weights of unequal spread, so that layers and heads differ."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            spread = torch.rand(tensor.shape[0], *[1] * (tensor.dim() - 1)) + 0.1
            tensor.copy_(torch.randn_like(tensor) * spread)
    return model


def ours(model, inputs, ratios):
    """Groups, normalised L2 scores without depthwise filters, the plan, and the cut model."""
    graph = trace_groups(model, inputs, "depgraph")
    groups = graph.groups
    raw = score_groups(model, [without_depthwise(group) for group in groups], "l2")
    scores = {name: normalize(values, "mean") for name, values in raw.items()}
    plan = Ranker(graph, scores, classify(groups), RankingRules()).plan(ratios)
    pruned = copy.deepcopy(model)
    cut(pruned, graph, plan)
    return groups, scores, plan, pruned


def without_depthwise(group):
    members = [member for member in group.members if group.nodes[member.node].kind != "depthwise_conv"]
    return dataclasses.replace(group, members=tuple(members))


def theirs(model, inputs, groups, ratios):
    """Prunes a copy by the library, listening to its importance and to what it removes."""
    model = copy.deepcopy(model)
    importance = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean", normalizer="mean")
    names = {module: name for name, module in model.named_modules()}
    scores, removed = {}, {}

    def listen(group):
        scores[owner(group, groups, names)] = values = importance(group)
        return values

    heads: dict[torch.nn.Module, int] = {
        module.qkv: module.num_heads for module in model.modules() if isinstance(module, Attention)
    }
    classifiers = [module for name, module in model.named_modules() if name in {"head", "head_dist", "head.fc"}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            inputs,
            importance=listen,
            isomorphic=True,
            global_pruning=True,
            pruning_ratio=ratios.width,
            ignored_layers=[layer for layer in classifiers if isinstance(layer, torch.nn.Linear)],
            num_heads=heads,
            prune_num_heads=ratios.heads > 0,
            prune_head_dims=False,
            head_pruning_ratio=ratios.heads,
            in_channel_groups={},
            out_channel_groups={},
        )
        for group in list(pruner.step(interactive=True) or ()):
            removed[owner(group, groups, names)] = sorted(group[0].idxs)
            group.prune()
    return Reference(scores, removed, model)


def owner(found, groups, names):
    """Our group that has the root of the library's group as a member."""
    root, handler = found[0].dep.target.module, found[0].dep.handler.__name__
    dim = 1 if handler.endswith("in_channels") else 0
    (name,) = [
        group.name
        for group in groups
        if any(member.name == f"{names[root]}.weight" and member.dim == dim for member in group.members)
    ]
    return name


DEIT = "deit_tiny_distilled_patch16_224"
CASES = [
    pytest.param(DEIT, VIT, Ratios(0.25, heads=0.25, head_dims=0.0), id="deit quarter"),
    pytest.param(DEIT, VIT, Ratios(0.5, heads=0.5, head_dims=0.0), id="deit half"),
    pytest.param("vit_tiny_patch16_224", VIT, Ratios(0.5, heads=0.0, head_dims=0.0), id="vit half, all heads"),
    pytest.param("convnext_tiny", CONVNEXT, Ratios(0.25), id="convnext quarter"),
    pytest.param("convnext_tiny", CONVNEXT, Ratios(0.5), id="convnext half"),
]


@pytest.mark.parametrize(("name", "kwargs", "ratios"), CASES)
def test_the_same_scores_give_the_same_cut(name, kwargs, ratios):
    model, inputs = build(name, kwargs), torch.zeros(1, 3, 32, 32)
    groups, scores, plan, pruned = ours(model, inputs, ratios)
    reference = theirs(model, inputs, groups, ratios)

    assert reference.scores.keys() == scores.keys()
    for group in groups:
        torch.testing.assert_close(scores[group.name], reference.scores[group.name], rtol=1e-5, atol=0)

    for group in groups:
        assert plan.removed(group) == reference.removed.get(group.name, []), group.name

    expected = reference.pruned.state_dict()
    assert pruned.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pruned.state_dict().items())


@pytest.mark.parametrize(("name", "kwargs", "ratios"), [CASES[1], CASES[4]])
def test_the_comparison_is_not_trivial(name, kwargs, ratios):
    """Layers of a class lose unequal shares, heads too, and every quota is a whole number."""
    groups, _, plan, _ = ours(build(name, kwargs), torch.zeros(1, 3, 32, 32), ratios)
    mlps = {len(plan.kept[group.name]) / group.num_units for group in groups if ".mlp." in group.name}
    assert len(mlps) > 2
    attention = [group for group in groups if group.heads]
    assert not attention or len({len(plan.kept_heads(group)) for group in attention}) > 1
    assert (ratios.width * sum(group.num_units for group in groups if ".mlp." in group.name)).is_integer()
