"""Step 5: the cut model holds the kept slices, and computes what the dense one does with the removed units at zero."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

from isomorphic.pruning.graph import trace_groups
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.surgery import cut, kept_positions, shape_copy


def sliced_by_hand(subject, plan):
    """The dense state dict without the removed positions; q at the temperature of the new head dim."""
    removed = {}
    for group in subject.groups:
        for unit in set(range(group.num_units)) - set(plan.kept[group.name]):
            for member in group.members:
                removed.setdefault((member.name, member.dim), set()).update(member.index[unit].tolist())
    state = dict(subject.model.state_dict())
    for (name, dim), positions in removed.items():
        size = subject.model.state_dict()[name].shape[dim]
        keep = torch.tensor([position for position in range(size) if position not in positions])
        state[name] = state[name].index_select(dim, keep)
    for group in (group for group in subject.groups if group.heads):
        head_dim = len(plan.kept[group.name]) // len(plan.kept_heads(group))
        for name in (f"{group.heads.module}.qkv.weight", f"{group.heads.module}.qkv.bias"):
            if name in state:
                q, k, v = state[name].chunk(3)
                state[name] = torch.cat([q * math.sqrt(head_dim / group.head_dim), k, v])
    return state


def is_maskable(subject, group):
    """Zeroed units change nothing but themselves, unless a layer norm takes its mean and variance over them."""
    layers = [subject.model.get_submodule(member.module) for member in group.members]
    return not any(isinstance(layer, nn.LayerNorm) for layer in layers)


def masked(subject, plan):
    """The dense model with the removed units at zero where they are made: rows, biases, norm scales and shifts."""
    model = subject.copy()
    with torch.no_grad():
        for group in subject.groups:
            removed = torch.tensor(plan.removed(group), dtype=torch.int64)
            for member in group.members:
                if group.nodes[member.node].side != "in" and not member.tensor.startswith("running"):
                    tensor = getattr(model.get_submodule(member.module), member.tensor)
                    tensor.index_fill_(member.dim, member.index[removed].flatten(), 0.0)
    return model


def assert_same_function(one, other, inputs):
    with torch.no_grad():
        torch.testing.assert_close(one(inputs), other(inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_cut_is_one_index_select_a_dim(subject, seed):
    plan = subject.random_plan(seed)
    state = subject.cut(plan).state_dict()
    expected = sliced_by_hand(subject, plan)
    assert list(state) == list(expected)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_the_cut_model_computes_what_the_masked_one_does(subject, seed):
    """For all units that can be masked: every group of a batch-norm CNN, and the MLPs and heads of the others.

    Streams under a layer norm cannot be masked: the norm's mean and variance run over the removed channels, too, so
    zeroing them is another function than leaving them out. Their cut is held to its slices alone, above.
    """
    plan = subject.random_plan(seed, only=lambda group: is_maskable(subject, group))
    pruned, zeroed = subject.cut(plan), masked(subject, plan)
    assert_same_function(pruned, zeroed, subject.inputs)
    with torch.no_grad():
        assert (pruned(subject.inputs) - subject.output).abs().max() > 1e-2, "the removed units mattered"


def test_what_can_be_masked(subjects):
    count = {name: sum(is_maskable(subjects(name), g) for g in subjects(name).groups) for name in ("cnn", "resnet")}
    assert count == {name: len(subjects(name).groups) for name in ("cnn", "resnet")}
    for name, kinds in (("deit", (".mlp.", ".attn.")), ("vit", (".mlp.", ".attn.")), ("convnext", (".mlp.",))):
        subject = subjects(name)
        found = {group.name for group in subject.groups if is_maskable(subject, group)}
        assert found == {group.name for group in subject.groups if any(kind in group.name for kind in kinds)}


@pytest.mark.parametrize("name", ["deit", "vit"])
def test_whole_heads_alone_and_head_dims_alone(subjects, keep_all, name):
    """Head dims: q is scaled by √(new / old), so that q·k keeps the dense model's temperature."""
    subject = subjects(name)
    units = {
        "heads": tuple(range(12, 24)) + tuple(range(36, 48)),
        "head dims": tuple(head * 12 + dim for head in range(4) for dim in range(head, head + 3)),
    }
    for kept in units.values():
        plan = keep_all(subject.groups)
        attention = {group.name: kept for group in subject.groups if group.heads}
        plan = PruningPlan({**plan.kept, **attention})
        assert_same_function(subject.cut(plan), masked(subject, plan), subject.inputs)


def test_without_fused_attention_it_is_the_same(subjects):
    subject = subjects("deit")
    pruned = subject.cut(subject.random_plan(2))
    with torch.no_grad():
        fused = pruned(subject.inputs)
        for block in pruned.blocks:
            block.attn.fused_attn = False
        torch.testing.assert_close(pruned(subject.inputs), fused, rtol=0, atol=1e-5)


def test_cutting_twice_is_cutting_once(subject):
    first = subject.random_plan(0)
    model = subject.cut(first)
    groups = trace_groups(model, subject.inputs).groups
    second = {group.name: tuple(range(group.num_units)) for group in groups}
    for group in groups:
        if group.head_dim > 2:
            width = range(1, group.head_dim - 1)
            second[group.name] = tuple(h * group.head_dim + d for h in range(group.num_heads) for d in width)
    cut(model, groups, PruningPlan(second))
    both = PruningPlan({name: tuple(first.kept[name][unit] for unit in units) for name, units in second.items()})
    once = subject.cut(both).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, once[name], rtol=1e-5, atol=0)


def test_a_plan_that_keeps_everything_touches_nothing(subject, keep_all):
    model = subject.copy()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    cut(model, subject.groups, keep_all(subject.groups))
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(after[name] is tensor for name, tensor in tensors.items())
    with torch.no_grad():
        assert torch.equal(model(subject.inputs), subject.output)


def test_kept_positions_intersect_groups_on_different_dims(subjects):
    """A linear's rows go with one group and its columns with another."""
    subject = subjects("deit")
    plan = subject.random_plan(6)
    positions = kept_positions(subject.model, subject.groups, plan)["blocks.0.mlp.fc1", "weight"]
    assert positions[0].tolist() == list(plan.kept["blocks.0.mlp.fc1.weight:0"])
    assert positions[1].tolist() == list(plan.kept["patch_embed.proj.weight:0"])
    assert all(kept.dtype == torch.int64 for kept in positions.values())


def test_kept_positions_intersect_groups_on_one_dim(subjects):
    """A convolution that reads a concatenation loses channels to both groups."""
    subject = subjects("cnn")
    plan = subject.random_plan(6)
    positions = kept_positions(subject.model, subject.groups, plan)["join.0", "weight"][1]
    branch = [8 + unit for unit in plan.kept["branch.0.weight:0"]]
    assert positions.tolist() == list(plan.kept["stem.0.weight:0"]) + branch


def test_kept_positions_ascend_and_leave_out_whole_dims(subject, keep_all):
    for dims in kept_positions(subject.model, subject.groups, subject.random_plan(3)).values():
        assert all((kept.diff() > 0).all() for kept in dims.values())
    assert not any(kept_positions(subject.model, subject.groups, keep_all(subject.groups)).values())


def test_the_modules_stay_the_librarys_own(subject):
    model = subject.cut(subject.random_plan(1))
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in subject.model.named_modules()
    ]
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_layers_know_their_new_widths(subject):
    model = subject.cut(subject.random_plan(1))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        elif isinstance(module, nn.Conv2d):
            assert module.out_channels == module.weight.shape[0]
            assert module.in_channels == module.weight.shape[1] * module.groups
            assert module.bias is None or len(module.bias) == module.out_channels
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.weight.shape == (module.num_features,)
            assert module.running_var is not None
            assert module.running_var.shape == (module.num_features,)
        elif isinstance(module, nn.LayerNorm):
            assert tuple(module.normalized_shape) == tuple(module.weight.shape)


@pytest.mark.parametrize("name", ["cnn", "convnext"])
def test_depthwise_convolutions_have_a_group_a_channel(subjects, name):
    subject = subjects(name)
    plan = subject.random_plan(1)
    model = subject.cut(plan)
    depthwise = [n for n, m in subject.model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert depthwise
    for layer in map(model.get_submodule, depthwise):
        assert layer.groups == layer.in_channels == layer.out_channels == layer.weight.shape[0]


def test_attention_knows_its_heads(subjects):
    subject = subjects("deit")
    plan = subject.random_plan(2)
    model = subject.cut(plan)
    for group in (group for group in subject.groups if group.heads):
        attention = model.get_submodule(group.heads.module)
        heads = len(plan.kept_heads(group))
        head_dim = len(plan.kept[group.name]) // heads
        assert (attention.num_heads, attention.head_dim) == (heads, head_dim)
        assert attention.attn_dim == heads * head_dim == attention.proj.in_features
        assert attention.qkv.out_features == 3 * heads * head_dim
        assert attention.scale == head_dim**-0.5


@pytest.mark.parametrize("name", ["deit", "vit", "convnext", "resnet"])
def test_a_new_classifier_fits_the_pruned_width(subjects, name):
    subject = subjects(name)
    model = subject.cut(subject.random_plan(3))
    model.reset_classifier(7)
    with torch.no_grad():
        assert model(subject.inputs).shape == (2, 7)


@pytest.mark.parametrize("kept", [4, 5])
def test_a_new_classifier_fits_where_pooling_doubles_the_width(kept):
    """A pool that concatenates average and maximum: the classifier reads twice `num_features`."""
    kwargs = {"channels": (8, 8, 8, 8), "stem_width": 8, "num_classes": 10, "global_pool": "catavgmax"}
    model: Any = timm.create_model("resnet10t", **kwargs).eval()
    inputs = torch.zeros(1, 3, 32, 32)
    groups = trace_groups(model, inputs).groups
    cut(model, groups, PruningPlan({group.name: tuple(range(kept)) for group in groups}))
    assert (model.num_features, model.fc.in_features) == (kept, 2 * kept)
    model.reset_classifier(7)
    assert model(inputs).shape == (1, 7)


def test_one_unit_of_everything_still_runs(subject):
    smallest = PruningPlan({group.name: (group.num_units - 1,) for group in subject.groups})
    model = subject.cut(smallest)
    with torch.no_grad():
        output = model(subject.inputs)
    assert output.shape == (2, 10)
    assert torch.isfinite(output).all()


def test_the_cut_model_can_be_trained(subject):
    model = subject.cut(subject.random_plan(1)).train()
    outputs = model(subject.inputs)  # a distilled transformer's two heads in train mode
    torch.stack(outputs if isinstance(outputs, tuple) else [outputs]).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.is_leaf
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape


def test_parameters_keep_their_flags_and_buffers_stay_buffers(subject):
    model = subject.copy()
    frozen = {name for number, (name, _) in enumerate(model.named_parameters()) if number % 3 == 0}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    cut(model, subject.groups, subject.random_plan(1))
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in subject.model.named_buffers()]
    assert list(model.state_dict()) == list(subject.model.state_dict())


def test_cutting_leaves_the_mode_and_the_dense_model_alone(subject):
    before = copy.deepcopy(subject.model.state_dict())
    model = copy.deepcopy(subject.model).train()
    cut(model, subject.groups, subject.random_plan(2))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())


def test_a_model_without_data_is_cut_to_the_same_shapes(subject):
    skeleton = shape_copy(subject.model)
    plan = subject.random_plan(1)
    cut(skeleton, subject.groups, plan)
    expected = {name: tensor.shape for name, tensor in subject.cut(plan).state_dict().items()}
    assert {name: tensor.shape for name, tensor in skeleton.state_dict().items()} == expected
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())


def test_tied_weights_stay_tied_and_right(tied_cnn):
    model, inputs = tied_cnn, torch.randn(2, 3, 4, 4)
    groups = trace_groups(model, inputs).groups
    pruned = copy.deepcopy(model)
    cut(pruned, groups, PruningPlan({"stem.weight:0": (0, 2, 5)}))
    assert pruned.two.weight is pruned.one.weight
    with torch.no_grad():
        for layer in (model.stem, model.one, model.two):
            for tensor in layer.parameters():
                tensor.index_fill_(0, torch.tensor([1, 3, 4, 6, 7]), 0.0)
    assert_same_function(pruned, model, inputs)


def test_other_precisions_keep_theirs(subjects):
    subject = subjects("vit")
    model = subject.copy().to(torch.bfloat16)
    cut(model, subject.groups, subject.random_plan(1))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_the_classifier_itself_is_no_record_of_an_old_width():
    """With a doubled pool that is cut by half, its new width equals the dense model's `num_features`."""

    class Doubled(nn.Module):
        num_features = 8

        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Linear(16, 5)

        def get_classifier(self):
            return self.head

        def forward(self, x):
            x = self.conv(x)
            return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))

    model = Doubled().eval()
    groups = trace_groups(model, torch.randn(2, 3, 16, 16)).groups
    cut(model, groups, PruningPlan({g.name: (0, 1, 2, 3) for g in groups}))
    assert model.head.in_features == model.head.weight.shape[1] == 8
