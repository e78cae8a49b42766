"""Step 1: which units are coupled, named and indexed how, and what is left alone."""

from __future__ import annotations

import copy
import inspect
import re
import warnings

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from isomorphic.errors import UserError
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import SCORED_KINDS, SectionStructure
from isomorphic.skeletons import shape_copy

IMAGE = torch.zeros(1, 3, 16, 16)


class Pair(nn.Module):
    """Two convolutions with a module in between, a third one, and a classifier."""

    def __init__(self, between: nn.Module, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.between = between
        self.second = nn.Conv2d(8, 4, 3, padding=1, groups=groups)
        self.last = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.second(self.between(self.first(x))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def members_of(group):
    return {(member.name, member.dim): member.index for member in group.members}


def test_names_and_sizes_of_a_vision_transformer(subjects):
    groups = subjects("deit").groups
    assert [(group.name, group.num_units, group.num_sections) for group in groups] == [
        ("patch_embed.proj.weight:0", 48, 1),
        ("blocks.0.attn.qkv.weight:0", 48, 4),
        ("blocks.0.mlp.fc1.weight:0", 192, 1),
        ("blocks.1.attn.qkv.weight:0", 48, 4),
        ("blocks.1.mlp.fc1.weight:0", 192, 1),
    ]
    assert groups[1].heads == SectionStructure(4, are_heads=True)
    assert (groups[1].section_size, groups[2].section_size) == (12, 192)


def test_names_and_sizes_of_a_convnext(subjects):
    groups = subjects("convnext").groups
    assert [(group.name.removesuffix(".weight:0"), group.num_units) for group in groups] == [
        ("stem.0", 16),
        ("stages.0.blocks.0.mlp.fc1", 64),
        ("stages.1.downsample.1", 24),
        ("stages.1.blocks.0.mlp.fc1", 96),
        ("stages.2.downsample.1", 32),
        ("stages.2.blocks.0.mlp.fc1", 128),
        ("stages.2.blocks.1.mlp.fc1", 128),
        ("stages.3.downsample.1", 48),
        ("stages.3.blocks.0.mlp.fc1", 192),
    ]


def test_every_prunable_dim_belongs_to_exactly_one_unit(subject):
    """Every position of a layer's out and in dims is in one group, but for image channels and class outputs."""
    taken = {}
    for group in subject.groups:
        for member in group.members:
            taken.setdefault((member.name, member.dim), []).append(member.index.flatten())
    classifiers = {"head", "head_dist", "head.fc", "fc"}
    for name, layer in subject.model.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        dims = {0, 1} if layer.weight.shape[1] != 1 else {0}  # a depthwise filter has one input
        dims -= {1} if layer.weight.shape[1] == 3 else set()
        dims -= {0} if name in classifiers else set()
        for dim in dims:
            positions = torch.cat(taken[f"{name}.weight", dim]).sort().values
            assert positions.tolist() == list(range(layer.weight.shape[dim])), (name, dim)


def test_members_are_complete_and_sorted(subject):
    tensors = dict(subject.model.named_parameters()) | dict(subject.model.named_buffers())
    for group in subject.groups:
        assert len({(member.name, member.dim) for member in group.members}) == len(group.members)
        for member in group.members:
            assert member.index.dtype == torch.int64
            assert member.index.shape[0] == group.num_units
            assert member.index.min() >= 0
            assert member.index.max() < tensors[member.name].shape[member.dim]
            assert member.index.unique().numel() == member.index.numel()
            assert (member.index.diff(dim=1) > 0).all(), "a unit's positions ascend"
        assert group.scored_members(), "every group has weights that score"


def test_attention_units_lie_head_by_head_in_q_k_and_v(subjects):
    members = members_of(subjects("deit").group("blocks.1.attn.qkv.weight:0"))
    inner = torch.arange(48)
    qkv = torch.stack([inner, 48 + inner, 96 + inner], dim=1)
    assert members.keys() == {
        ("blocks.1.attn.qkv.weight", 0),
        ("blocks.1.attn.qkv.bias", 0),
        ("blocks.1.attn.proj.weight", 1),
    }
    assert torch.equal(members["blocks.1.attn.qkv.weight", 0], qkv)
    assert torch.equal(members["blocks.1.attn.qkv.bias", 0], qkv)
    assert torch.equal(members["blocks.1.attn.proj.weight", 1], inner[:, None])


def test_the_stream_of_a_distilled_transformer_holds_tokens_positions_and_both_heads(subjects):
    names = members_of(subjects("deit").groups[0]).keys()
    expected = {("cls_token", 2), ("dist_token", 2), ("pos_embed", 2), ("head.weight", 1), ("head_dist.weight", 1)}
    assert expected <= names
    assert ("blocks.0.attn.qkv.weight", 1) in names
    assert ("norm.bias", 0) in names


def test_layer_scales_and_depthwise_filters_shrink_with_the_stream(subjects):
    group = subjects("convnext").groups[0]
    names = members_of(group).keys()
    assert {("stages.0.blocks.0.gamma", 0), ("stages.0.blocks.0.conv_dw.weight", 0)} <= names
    kinds = {node.module: (node.kind, node.side) for node in group.nodes}
    assert kinds["stages.0.blocks.0.conv_dw"] == ("depthwise_conv", "both")
    assert ("parameter", "both") in kinds.values()
    assert "parameter" not in SCORED_KINDS


def test_norm_statistics_shrink_with_their_channels(subjects):
    names = members_of(subjects("cnn").group("stem.0.weight:0")).keys()
    assert {(f"stem.1.{tensor}", 0) for tensor in ("weight", "bias", "running_mean", "running_var")} <= names


def test_concatenated_channels_keep_their_places(subjects):
    subject = subjects("cnn")
    branch = members_of(subject.group("branch.0.weight:0"))
    assert branch["join.0.weight", 1].flatten().tolist() == list(range(8, 20))
    stem = members_of(subject.group("stem.0.weight:0"))
    assert stem["join.0.weight", 1].flatten().tolist() == list(range(8))


def test_a_flattened_channel_owns_all_of_its_positions(subjects):
    index = members_of(subjects("cnn").group("join.0.weight:0"))["hidden.0.weight", 1]
    assert index.shape == (6, 16)
    assert index[2].tolist() == list(range(32, 48))


def test_edges_join_layers_that_only_movement_separates(subjects):
    group = subjects("cnn").group("stem.0.weight:0")
    position = {(node.module, node.side): number for number, node in enumerate(group.nodes)}
    stem, norm = position["stem.0", "out"], position["stem.1", "both"]
    assert (stem, norm) in group.edges
    assert (norm, position["residual.0", "in"]) in group.edges  # past the ReLU
    assert (norm, position["depthwise.0", "both"]) in group.edges  # past the addition
    assert (stem, position["residual.0", "in"]) not in group.edges  # not past the norm


def test_classifiers_stay_whole(subject):
    assert subject.graph.frozen
    assert {str(frozen) for frozen in subject.graph.frozen.values()} == {"it reaches the model's output"}


def test_tracing_twice_gives_the_same_groups(subject):
    again = trace_groups(subject.model, subject.inputs, subject.tracer)
    assert [group.name for group in again.groups] == [group.name for group in subject.groups]
    for one, other in zip(again.groups, subject.groups, strict=True):
        assert (one.num_units, one.heads) == (other.num_units, other.heads)
        assert (one.nodes, one.edges) == (other.nodes, other.edges)
        assert members_of(one).keys() == members_of(other).keys()
        assert all(torch.equal(index, members_of(other)[key]) for key, index in members_of(one).items())


def test_tracing_leaves_the_model_as_it_was(subject):
    model = subject.copy().train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        trace_groups(model, subject.inputs, subject.tracer)
        assert not torch.is_grad_enabled()
    assert [parameter for parameter in model.parameters() if not parameter.requires_grad] == [first]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks for module in model.modules())
    assert [module.training for module in model.modules()] == modes


def test_tracing_needs_shapes_alone(subject):
    """On another device than the CPU, one without any data."""
    meta = trace_groups(shape_copy(subject.model), torch.empty(1, 3, 32, 32, device="meta"), subject.tracer)
    for one, other in zip(meta.groups, subject.groups, strict=True):
        assert (one.name, one.num_units, one.heads) == (other.name, other.num_units, other.heads)
        assert (one.nodes, one.edges) == (other.nodes, other.edges)
        assert all(torch.equal(index, members_of(other)[key]) for key, index in members_of(one).items())
        assert all(member.index.device.type == "cpu" for member in one.members)


def test_a_failing_forward_restores_flags_and_is_passed_on(tracer):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1).requires_grad_(False)

        def forward(self, x):
            raise ValueError("no way through")

    model = Broken()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="no way through"):
            trace_groups(model, IMAGE, tracer)
        warnings.warn("still heard", stacklevel=1)
    assert any("still heard" in str(warning.message) for warning in caught)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_nothing_to_prune_is_an_error_with_the_reason(tracer):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)).eval()
    with pytest.raises(UserError, match="nothing in this model can be pruned.*1.weight:0: it reaches"):
        trace_groups(model, IMAGE, tracer)


def test_features_that_are_also_returned_are_frozen(tracer):
    class Returning(Pair):
        def forward(self, x):
            features = F.relu(self.first(x))
            return features, self.head(F.relu(self.last(F.relu(self.second(features)))).mean((2, 3)))

    graph = trace_groups(Returning(nn.Identity()).eval(), IMAGE, tracer)
    assert "first.weight:0" in graph.frozen
    assert [group.name for group in graph.groups] == ["second.weight:0", "last.weight:0"]


def test_a_module_called_twice_is_one_layer(tracer):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.again(F.relu(self.again(F.relu(self.first(x))))).mean((2, 3)))

    (group,) = trace_groups(Twice().eval(), IMAGE, tracer).groups
    assert {("again.weight", 0), ("again.weight", 1), ("first.weight", 0), ("head.weight", 1)} <= members_of(
        group
    ).keys()


def test_a_cut_model_is_traced_again_at_its_new_widths(subject):
    plan = subject.random_plan(8)
    again = {g.name: g for g in trace_groups(subject.cut(plan), subject.inputs, subject.tracer).groups}
    for dense in subject.groups:
        width = len(plan.kept[dense.name])
        if width > 1 or subject.tracer == "depgraph":  # one unit cannot be less: nothing to trace
            group = again.pop(dense.name)
            assert group.num_units == width
            assert not dense.heads or group.num_sections == len(plan.kept_heads(dense))
    assert not again


class Spelled(nn.Module):
    """Nothing can go: the only hidden width is a number in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.two(self.one(x).view(-1, 2, 4).flatten(1))


def test_a_size_that_is_spelled_out_has_its_line_and_an_advice():
    with pytest.raises(UserError) as caught:
        trace_groups(Spelled().eval(), torch.randn(2, 3))
    line = inspect.getsourcelines(Spelled.forward)[1] + 1
    reason = "one.weight:0: a size in the forward code depends on it and cannot follow"
    assert re.search(rf"{reason}, [\w/]*test_trace.py:{line};", str(caught.value))
    assert str(caught.value).endswith("write -1, x.shape or an attribute of the module instead")


def test_of_a_converted_graph_the_node_is_named():
    model = torch.fx.symbolic_trace(Spelled().eval())
    with pytest.raises(UserError) as caught:
        trace_groups(model, torch.randn(2, 3))
    assert "cannot follow, node view = one.view(-1, 2, 4);" in str(caught.value)
    assert str(caught.value).endswith("convert what is left, or convert it with dynamic shapes")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_model_prepared_for_quantization_says_what_to_do_first():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)).train()
    prepared = prepare_qat_fx(model, get_default_qat_qconfig_mapping(), (torch.randn(2, 3),))
    with pytest.raises(UserError, match="prepared for quantization. Prune the model first, then prepare what is left"):
        trace_groups(prepared.eval(), torch.randn(2, 3))


def test_many_reasons_are_counted():
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4 if n else 3, 4) for n in range(7))

        def forward(self, x):
            for position, layer in enumerate(self.layers):
                x = layer(x)
                if position == 0:
                    x = x.roll(1, -1)
                elif position == 1:
                    x = x.flip(-1).cumprod(-1)
                elif position == 2:
                    x = x.sort(-1).values
                elif position == 3:
                    x = x.view(-1, 4)
                elif position == 4:
                    x = torch.fft.fft(x).real
                elif position == 5:
                    x = x[:, [1, 0, 3, 2]]
            return x

    with pytest.raises(UserError, match="; 3 more reasons") as caught:
        trace_groups(Many().eval(), torch.randn(2, 3))
    assert str(caught.value).count("layers.") == 4
