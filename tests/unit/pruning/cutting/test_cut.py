"""Step 5: the cut model holds the kept slices, and computes what the dense one does with the removed units at zero."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

from isomorphic.errors import UserError
from isomorphic.pruning.cutting.cut import cut, kept_positions
from isomorphic.pruning.expressions import Attribute, AxisSize, Constant, Length, Operation
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import (
    ChannelGraph,
    CoupledGroup,
    LayerNode,
    Member,
    Rescaling,
    SectionStructure,
    SizeEquation,
)
from isomorphic.pruning.plan import PruningPlan
from isomorphic.skeletons import shape_copy


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
        for name in (f"{attention_of(group)}.qkv.weight", f"{attention_of(group)}.qkv.bias"):
            if name in state:
                q, k, v = state[name].chunk(3)
                state[name] = torch.cat([q * math.sqrt(head_dim / group.section_size), k, v])
    return state


def attention_of(group):
    """The module whose heads a group's units are."""
    return group.name.removesuffix(".qkv.weight:0")


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
    graph = trace_groups(model, subject.inputs, subject.tracer)
    groups = graph.groups
    second = {group.name: tuple(range(group.num_units)) for group in groups}
    for group in groups:
        if group.section_size > 2:
            width = range(1, group.section_size - 1)
            second[group.name] = tuple(h * group.section_size + d for h in range(group.num_sections) for d in width)
    cut(model, graph, PruningPlan(second))
    both = PruningPlan({name: tuple(first.kept[name][unit] for unit in units) for name, units in second.items()})
    once = subject.cut(both).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, once[name], rtol=1e-5, atol=0)


def test_a_plan_that_keeps_everything_touches_nothing(subject, keep_all):
    model = subject.copy()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    cut(model, subject.graph, keep_all(subject.groups))
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(after[name] is tensor for name, tensor in tensors.items())
    with torch.no_grad():
        assert torch.equal(model(subject.inputs), subject.output)


def test_kept_positions_intersect_groups_on_different_dims(subjects):
    """A linear's rows go with one group and its columns with another."""
    subject = subjects("deit")
    plan = subject.random_plan(6)
    positions = kept_positions(subject.model, subject.graph, plan)["blocks.0.mlp.fc1", "weight"]
    assert positions[0].tolist() == list(plan.kept["blocks.0.mlp.fc1.weight:0"])
    assert positions[1].tolist() == list(plan.kept["patch_embed.proj.weight:0"])
    assert all(kept.dtype == torch.int64 for kept in positions.values())


def test_kept_positions_intersect_groups_on_one_dim(subjects):
    """A convolution that reads a concatenation loses channels to both groups."""
    subject = subjects("cnn")
    plan = subject.random_plan(6)
    positions = kept_positions(subject.model, subject.graph, plan)["join.0", "weight"][1]
    branch = [8 + unit for unit in plan.kept["branch.0.weight:0"]]
    assert positions.tolist() == list(plan.kept["stem.0.weight:0"]) + branch


def test_kept_positions_ascend_and_leave_out_whole_dims(subject, keep_all):
    for dims in kept_positions(subject.model, subject.graph, subject.random_plan(3)).values():
        assert all((kept.diff() > 0).all() for kept in dims.values())
    assert not any(kept_positions(subject.model, subject.graph, keep_all(subject.groups)).values())


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
        attention = model.get_submodule(attention_of(group))
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
def test_a_new_classifier_fits_where_pooling_doubles_the_width(kept, tracer):
    """A pool that concatenates average and maximum: the classifier reads twice `num_features`."""
    kwargs = {"channels": (8, 8, 8, 8), "stem_width": 8, "num_classes": 10, "global_pool": "catavgmax"}
    model: Any = timm.create_model("resnet10t", **kwargs).eval()
    inputs = torch.zeros(1, 3, 32, 32)
    graph = trace_groups(model, inputs, tracer)
    cut(model, graph, PruningPlan({group.name: tuple(range(kept)) for group in graph.groups}))
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
    cut(model, subject.graph, subject.random_plan(1))
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in subject.model.named_buffers()]
    assert list(model.state_dict()) == list(subject.model.state_dict())


def test_cutting_leaves_the_mode_and_the_dense_model_alone(subject):
    before = copy.deepcopy(subject.model.state_dict())
    model = copy.deepcopy(subject.model).train()
    cut(model, subject.graph, subject.random_plan(2))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())


def test_a_model_without_data_is_cut_to_the_same_shapes(subject):
    skeleton = shape_copy(subject.model)
    plan = subject.random_plan(1)
    cut(skeleton, subject.graph, plan)
    expected = {name: tensor.shape for name, tensor in subject.cut(plan).state_dict().items()}
    assert {name: tensor.shape for name, tensor in skeleton.state_dict().items()} == expected
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())


def test_tied_weights_stay_tied_and_right(tied_cnn, tracer):
    model, inputs = tied_cnn, torch.randn(2, 3, 4, 4)
    graph = trace_groups(model, inputs, tracer)
    pruned = copy.deepcopy(model)
    cut(pruned, graph, PruningPlan({"stem.weight:0": (0, 2, 5)}))
    assert pruned.two.weight is pruned.one.weight
    with torch.no_grad():
        for layer in (model.stem, model.one, model.two):
            for tensor in layer.parameters():
                tensor.index_fill_(0, torch.tensor([1, 3, 4, 6, 7]), 0.0)
    assert_same_function(pruned, model, inputs)


def test_other_precisions_keep_theirs(subjects):
    subject = subjects("vit")
    model = subject.copy().to(torch.bfloat16)
    cut(model, subject.graph, subject.random_plan(1))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_the_classifier_itself_is_no_record_of_an_old_width(tracer):
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
    graph = trace_groups(model, torch.randn(2, 3, 16, 16), tracer)
    cut(model, graph, PruningPlan({g.name: (0, 1, 2, 3) for g in graph.groups}))
    assert model.head.in_features == model.head.weight.shape[1] == 8


# --- graphs by hand: what a forward reads besides tensors ---------------------------------------------------


class Bare(nn.Module):
    """Tensors and numbers without a forward."""

    def __init__(self, tensors, **attributes):
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor))
        for name, value in attributes.items():
            setattr(self, name, value)


def by_position(module, tensor, dim, units):
    """A member whose units lie one after the other."""
    return Member(module, tensor, dim, torch.arange(units)[:, None], 0)


def one_group(units, *members, sections=None, **more):
    group = CoupledGroup("group", units, members, (LayerNode("", "linear", "out"),), frozenset(), sections)
    return ChannelGraph((group,), {}, **more)


KEPT = PruningPlan({"group": (0, 1, 3, 5)})  # of eight
HEAD_PLAN = PruningPlan({"group": (4, 6)})  # the second of two heads, and two of its four dims
UNITS, HEADS = AxisSize(0, {"group": 1}), AxisSize(0, {"group": 1}, counts_heads=True)
HEAD_DIM = AxisSize(0, {"group": 1}, rows=2, row_group="group")


def test_attributes_are_solved_and_entries_keep_their_collection():
    model: Any = Bare(
        {"weight": torch.arange(8.0)}, width=8, half=4, pair=(8, 3), sizes=[3, 8, 8], shape=torch.Size([2, 8])
    )
    named = {"pair": 0, "sizes": 2, "shape": 1}
    equations = [SizeEquation(Attribute("", name, entry), UNITS) for name, entry in named.items()]
    equations.append(SizeEquation(Attribute("", "width"), UNITS))
    equations.append(SizeEquation(Operation("*", Attribute("", "half"), Constant(2)), UNITS))
    sizes = model.sizes
    cut(model, one_group(8, by_position("", "weight", 0, 8), equations=tuple(equations)), KEPT)
    assert (model.width, model.half, model.pair, model.sizes) == (4, 2, (4, 3), [3, 8, 4])
    assert model.shape == torch.Size([2, 4])
    assert isinstance(model.shape, torch.Size)
    assert sizes == [3, 8, 8], "another module may hold the same list"


def test_sizes_that_cannot_be_had_are_refused_before_anything_is_cut():
    model: Any = Bare({"weight": torch.arange(8.0)}, width=8)
    equation = SizeEquation(Operation("*", Attribute("", "width"), Constant(3)), AxisSize(16, {"group": 1}))
    with pytest.raises(
        UserError, match=r"cannot run at the plan's widths: 1 sizes cannot be had, such as \(width \* 3\)"
    ):
        cut(model, one_group(8, by_position("", "weight", 0, 8), equations=(equation,)), KEPT)
    assert len(model.weight) == model.width == 8


def test_tensors_of_whole_heads_lose_the_heads_that_go():
    model: Any = Bare({"weight": torch.arange(8.0), "table": torch.arange(6.0).view(3, 2)}, num_heads=2)
    model.register_buffer("bias_index", torch.arange(4), persistent=False)
    members = (by_position("", "table", 1, 2), Member("", "bias_index", 0, torch.arange(4).view(2, 2), 0))
    heads = SectionStructure(2, are_heads=True, members=members)
    equations = (SizeEquation(Attribute("", "num_heads"), HEADS),)
    cut(model, one_group(8, by_position("", "weight", 0, 8), sections=heads, equations=equations), HEAD_PLAN)
    assert model.weight.tolist() == [4, 6]
    assert model.table.tolist() == [[1], [3], [5]]
    assert model.bias_index.tolist() == [2, 3]
    assert model.num_heads == 1
    assert [name for name, _ in model.named_buffers()] == ["bias_index"]
    assert "bias_index" not in model.state_dict()


def test_factors_that_follow_a_size_keep_their_effect():
    """Half of the positions are rescaled; a stored factor follows, other floats do not."""
    model: Any = Bare({"weight": torch.ones(8, 2), "bias": torch.ones(8)}, scale=4**-0.5, slope=0.1)
    factor = Operation("**", Length(HEAD_DIM), Constant(-0.5))
    some = torch.tensor([0, 4, 5])
    graph = one_group(
        8,
        by_position("", "weight", 0, 8),
        by_position("", "bias", 0, 8),
        sections=SectionStructure(2, are_heads=True),
        rescalings=(Rescaling("", "weight", some, factor, ""), Rescaling("", "bias", some, factor, "")),
    )
    dense = model.weight
    cut(model, graph, HEAD_PLAN)  # keeps positions 4 and 6; from 4 dims to 2
    assert dense.tolist() == [[1.0, 1.0]] * 8, "who holds the old tensor sees no change"
    ratio = 4**-0.5 / 2**-0.5
    torch.testing.assert_close(model.bias, torch.tensor([ratio, 1.0]))
    torch.testing.assert_close(model.weight, torch.tensor([[ratio, ratio], [1.0, 1.0]]))
    assert model.scale == 2**-0.5
    assert model.slope == 0.1


def test_factors_of_attributes_are_evaluated_after_the_solution():
    model: Any = Bare({"weight": torch.ones(8)}, width=8)
    factor = Operation("/", Constant(1), Attribute("", "width"))
    equation = SizeEquation(Attribute("", "width"), UNITS)
    rescaling = Rescaling("", "weight", torch.arange(8), factor, "")
    cut(model, one_group(8, by_position("", "weight", 0, 8), equations=(equation,), rescalings=(rescaling,)), KEPT)
    assert model.weight.tolist() == [0.5] * 4


def test_a_tied_tensor_is_rescaled_once_and_two_factors_of_one_module_both_count():
    model: Any = nn.ModuleDict({name: Bare({"weight": torch.ones(8)}) for name in ("one", "two")})
    model["two"].weight = model["one"].weight
    members = [by_position(name, "weight", 0, 8) for name in ("one", "two")]
    factor = Operation("**", Length(UNITS), Constant(-1))
    both = torch.arange(8)
    for rescalings, expected in (([("one", "one"), ("two", "two")], 0.5), ([("one", "one"), ("one", "one")], 0.25)):
        pruned = copy.deepcopy(model)
        found = tuple(Rescaling(module, "weight", both, factor, holder) for module, holder in rescalings)
        cut(pruned, one_group(8, *members, rescalings=found), KEPT)
        assert pruned["one"].weight is pruned["two"].weight
        assert pruned["one"].weight.tolist() == [expected] * 4


def test_without_a_change_nothing_is_rescaled(keep_all):
    model: Any = Bare({"weight": torch.ones(8)}, scale=8**-0.5)
    factor = Operation("**", Length(UNITS), Constant(-0.5))
    graph = one_group(
        8, by_position("", "weight", 0, 8), rescalings=(Rescaling("", "weight", torch.arange(8), factor, ""),)
    )
    weight = model.weight
    cut(model, graph, keep_all(graph.groups))
    assert model.weight is weight
    assert weight.tolist() == [1.0] * 8


def rows(units, *parts):
    """Index (units, parts): the same unit in several parts of a tensor, one after the other."""
    return torch.stack([torch.arange(units) + start for start in parts], dim=1)


LAYERS = {
    "transposed": (nn.ConvTranspose2d(8, 6, 2), [("weight", 0, rows(8, 0))], (2, 8, 3, 3), {"in_channels": 4}),
    "transposed out": (
        nn.ConvTranspose2d(6, 8, 2),
        [("weight", 1, rows(8, 0)), ("bias", 0, rows(8, 0))],
        (2, 6, 3, 3),
        {"in_channels": 6, "out_channels": 4},
    ),
    "group norm": (
        nn.GroupNorm(1, 8),
        [("weight", 0, rows(8, 0)), ("bias", 0, rows(8, 0))],
        (2, 8),
        {"num_channels": 4},
    ),
    "prelu": (nn.PReLU(8), [("weight", 0, rows(8, 0))], (2, 8), {"num_parameters": 4}),
    "instance norm": (
        nn.InstanceNorm1d(8, affine=True),
        [("weight", 0, rows(8, 0)), ("bias", 0, rows(8, 0))],
        (2, 8, 5),
        {"num_features": 4},
    ),
    "rnn inputs": (nn.RNN(8, 5), [("weight_ih_l0", 1, rows(8, 0))], (3, 2, 8), {"input_size": 4, "hidden_size": 5}),
}
GATED = [("lstm", nn.LSTM, 4), ("gru", nn.GRU, 3), ("rnn", nn.RNN, 1)]


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_knows_its_new_widths_and_runs(name):
    layer, members, shape, expected = LAYERS[name]
    model: Any = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    found = [Member("layer", tensor, dim, index, 0) for tensor, dim, index in members]
    cut(model, one_group(8, *found), KEPT)
    assert {attribute: getattr(model["layer"], attribute) for attribute in expected} == expected
    model["layer"](torch.randn([4 if size == 8 else size for size in shape]))


@pytest.mark.parametrize(("name", "kind", "gates"), GATED, ids=lambda value: value if isinstance(value, str) else "")
def test_recurrent_layers_compute_with_their_new_weights(name, kind, gates):
    """Zero rows for the removed hidden units: they stay at zero, or at what nobody reads."""
    model: Any = nn.ModuleDict({"layer": kind(3, 8)})
    index = rows(8, *(8 * gate for gate in range(gates)))
    dims = {"weight_ih_l0": (0,), "weight_hh_l0": (0, 1), "bias_ih_l0": (0,), "bias_hh_l0": (0,)}
    members = [
        Member("layer", tensor, dim, index if dim == 0 else rows(8, 0), 0) for tensor in dims for dim in dims[tensor]
    ]
    pruned, inputs = copy.deepcopy(model), torch.randn(5, 2, 3)
    cut(pruned, one_group(8, *members), KEPT)
    assert (pruned["layer"].input_size, pruned["layer"].hidden_size) == (3, 4)
    with torch.no_grad():
        model["layer"].weight_hh_l0[:, [2, 4, 6, 7]] = 0.0  # nobody reads them
        torch.testing.assert_close(pruned["layer"](inputs)[0], model["layer"](inputs)[0][..., [0, 1, 3, 5]])


def test_multihead_attention_knows_its_new_widths():
    """Its inner width is that of its input, so both shrink together: two of four dims of both heads."""
    model: Any = nn.ModuleDict({"layer": nn.MultiheadAttention(8, 2, batch_first=True)})
    joint = rows(8, 0, 8, 16)
    members = [Member("layer", "in_proj_weight", 0, joint, 0), Member("layer", "in_proj_bias", 0, joint, 0)]
    members += [by_position("layer", "in_proj_weight", 1, 8)]
    members += [by_position("layer.out_proj", "weight", dim, 8) for dim in (0, 1)]
    members += [by_position("layer.out_proj", "bias", 0, 8)]
    cut(model, one_group(8, *members, sections=SectionStructure(2)), PruningPlan({"group": (0, 1, 4, 6)}))
    layer = model["layer"]
    assert (layer.embed_dim, layer.kdim, layer.vdim, layer.head_dim) == (4, 4, 4, 2)
    assert (layer.out_proj.in_features, layer.out_proj.out_features) == (4, 4)
    x = torch.randn(2, 5, 4)
    assert layer(x, x, x)[0].shape == (2, 5, 4)


def test_grouped_convolutions_follow_their_groups_attribute():
    """Two groups of four stay two; a depthwise convolution has as many as it has channels."""
    model: Any = nn.ModuleDict({"grouped": nn.Conv2d(8, 6, 1, groups=2), "depthwise": nn.Conv2d(8, 8, 3, groups=8)})
    members = (
        Member("grouped", "weight", 1, torch.arange(8)[:, None] % 4, 0),  # a unit of both groups at one position
        by_position("depthwise", "weight", 0, 8),
        by_position("depthwise", "bias", 0, 8),
    )
    equations = (
        SizeEquation(Attribute("grouped", "groups"), AxisSize(2)),
        SizeEquation(Attribute("depthwise", "groups"), UNITS),
    )
    graph = one_group(8, *members, sections=SectionStructure(2), equations=equations)
    cut(model, graph, PruningPlan({"group": (0, 1, 4, 5)}))
    assert (model["grouped"].in_channels, model["grouped"].groups) == (4, 2)
    assert (model["depthwise"].in_channels, model["depthwise"].out_channels, model["depthwise"].groups) == (4, 4, 4)
    for layer, channels in ((model["grouped"], 6), (model["depthwise"], 4)):
        assert layer(torch.randn(2, 4, 5, 5)).shape[1] == channels


def test_embeddings_know_their_new_widths():
    model: Any = nn.ModuleDict({"layer": nn.Embedding(5, 8)})
    cut(model, one_group(8, by_position("layer", "weight", 1, 8)), KEPT)
    assert (model["layer"].num_embeddings, model["layer"].embedding_dim) == (5, 4)


def test_one_tensor_under_two_names_of_a_module_stays_one():
    model: Any = Bare({"weight": torch.arange(8.0)})
    model.alias = model.weight
    cut(model, one_group(8, by_position("", "weight", 0, 8)), KEPT)
    assert model.alias is model.weight
    assert len(model.weight) == 4
