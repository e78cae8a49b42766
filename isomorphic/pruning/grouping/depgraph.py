"""Coupled groups by way of `torch_pruning.DependencyGraph`.

DepGraph (Fang et al., CVPR 2023, section 3.2) gives, for a layer's output channels, every layer side that must shrink
with them and the index mapping between the two. This adapter turns that into `CoupledGroup`s:

- its bookkeeping of units by list position becomes index tensors, checked: where a side does not hold every unit
  equally often, the whole group is frozen and the reason kept;
- its operation nodes (views, additions, activations) are contracted, which leaves a graph of layers;
- attention is described here from the module itself, head by head, because DepGraph couples equal dims of all heads;
- DepGraph guesses how channels travel through some operations, so every group is tried before it is handed out: a copy
  of the model that has shapes but no data is cut and run, and what breaks it is frozen. A permutation of channels
  (roll, flip, shuffle) keeps shapes and goes unnoticed.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch_pruning as tp
from timm.layers.attention import Attention
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call
from isomorphic.observe import modes_kept
from isomorphic.pruning.expressions import Attribute, AxisSize, Constant, Length, Operation
from isomorphic.pruning.grouping.trial import Trial
from isomorphic.pruning.grouping.width_records import find_records, head_calls
from isomorphic.pruning.groups import (
    ChannelGraph,
    CoupledGroup,
    Frozen,
    LayerNode,
    Member,
    Rescaling,
    SectionStructure,
    SizeEquation,
)
from isomorphic.skeletons import shape_copy

_Conv = nn.modules.conv._ConvNd
_BatchNorm = nn.modules.batchnorm._BatchNorm
_OUTPUT = "it reaches the model's output"
_UNMAPPED = "its units do not map one to one onto {}"
_BREAKS = "the model does not run without some of it"


class _Side(NamedTuple):
    """A layer in DepGraph, and whether its inputs ("in"), outputs ("out") or both at once ("both") are meant."""

    node: Any
    side: str


class _FrozenError(Exception):
    """A group that cannot be pruned; its text is the reason."""


def trace(model: nn.Module, inputs: Inputs) -> ChannelGraph:
    """The coupled groups of `model`; see `trace.trace_groups`."""
    graph = _with_sizes(model, *_mapped_groups(model, inputs))
    skeleton = shape_copy(model)
    trial = Trial(skeleton, inputs)
    with head_calls(skeleton, lambda tensor: np.zeros(0, np.int64)) as calls:
        trial.run_dense()
    while broken := trial.failures(graph):
        groups = [group for group in graph.groups if group.name not in broken]
        graph = _with_sizes(model, groups, {**graph.frozen, **{name: _frozen(model, name, _BREAKS) for name in broken}})
    return dataclasses.replace(graph, records=find_records(model, calls))


def _mapped_groups(model: nn.Module, inputs: Inputs) -> tuple[list[CoupledGroup], dict[str, Frozen]]:
    """DepGraph's groups in the order of the model's parameters, and the reasons of those that are frozen."""
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    names |= {parameter: name for name, parameter in model.named_parameters()}
    attention = _attention_modules(model)
    position = {name: number for number, name in enumerate(names.values())}
    groups: dict[str, CoupledGroup] = {}
    frozen: dict[str, Frozen] = {}
    for found in _dependency_groups(model, inputs):
        name = _group_name(found, names, position)
        try:
            owner = attention.get(names[found[0].dep.target.module])
            groups[name] = _attention_group(name, owner, names) if owner else _plain_group(name, found, names, model)
        except _FrozenError as reason:
            frozen[name] = _frozen(model, name, str(reason))
    for name in _groups_that_share_a_tie(model, groups.values()):
        del groups[name]
        frozen[name] = _frozen(model, name, "it shares a tied weight with other groups")
    parameters = model.named_parameters(remove_duplicate=False)
    order = {f"{name}:0": number for number, (name, _) in enumerate(parameters)}
    return [groups[name] for name in sorted(groups, key=order.__getitem__)], frozen


def _frozen(model: nn.Module, group_name: str, reason: str) -> Frozen:
    """All channels of the dim that a group is named after stay."""
    parameter, _, dim = group_name.rpartition(":")
    module, _, tensor = parameter.rpartition(".")
    size = getattr(model.get_submodule(module), tensor).shape[int(dim)]
    return Frozen(reason, size, size)


def _attention_modules(model: nn.Module) -> dict[str, Attention]:
    """timm's attention modules by the name of their joint projection."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    return {f"{name}.qkv" if name else "qkv": module for name, module in found.items()}


def _with_sizes(model: nn.Module, groups: Sequence[CoupledGroup], frozen: dict[str, Frozen]) -> ChannelGraph:
    """The graph of some groups, with the attributes and factors that follow their sizes."""
    equations: list[SizeEquation] = []
    rescalings: list[Rescaling] = []
    attention = _attention_modules(model)
    for group in groups:
        if group.heads:
            projection = group.nodes[0].module
            owner = projection.rpartition(".")[0]
            equations += _attention_sizes(group, owner)
            rescalings += _temperature(group, owner, projection, attention[projection])
        depthwise = [node.module for node in group.nodes if node.kind == "depthwise_conv"]
        equations += [SizeEquation(Attribute(name, "groups"), AxisSize(0, {group.name: 1})) for name in depthwise]
    return ChannelGraph(tuple(groups), frozen, equations=tuple(equations), rescalings=tuple(rescalings))


def _attention_sizes(group: CoupledGroup, owner: str) -> list[SizeEquation]:
    sizes = {
        "num_heads": AxisSize(0, {group.name: 1}, counts_heads=True),
        "head_dim": _head_dim(group),
        "attn_dim": AxisSize(0, {group.name: 1}),
    }
    return [SizeEquation(Attribute(owner, name), axis) for name, axis in sizes.items()]


def _head_dim(group: CoupledGroup) -> AxisSize:
    return AxisSize(0, {group.name: 1}, rows=group.num_sections, row_group=group.name)


def _temperature(group: CoupledGroup, owner: str, projection: str, attention: Attention) -> list[Rescaling]:
    """timm divides q·k by the root of the head dim as it stands after the cut."""
    factor = Operation("**", Length(_head_dim(group)), Constant(-0.5))
    queries = torch.arange(group.num_units)
    tensors = ["weight"] if attention.qkv.bias is None else ["weight", "bias"]
    return [Rescaling(projection, tensor, queries, factor, owner) for tensor in tensors]


def _dependency_groups(model: nn.Module, inputs: Inputs) -> list[Any]:
    """DepGraph's groups for every convolution and linear.

    Tracing follows gradients and switches to eval mode: both are put back.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with modes_kept(model), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tokens and layer scales, which it handles
            model.requires_grad_(True)
            graph = tp.DependencyGraph().build_dependency(model, cast(Any, inputs), forward_fn=cast(Any, call))
            return list(graph.get_all_groups(root_module_types=(_Conv, nn.Linear)))
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _groups_that_share_a_tie(model: nn.Module, groups: Iterable[CoupledGroup]) -> set[str]:
    """Groups that would cut one tensor, under several names, along the same dim for different reasons."""
    users: dict[tuple[int, int], list[tuple[CoupledGroup, Member]]] = {}
    for group in groups:
        for member in group.members:
            tensor = getattr(model.get_submodule(member.module), member.tensor)
            users.setdefault((id(tensor), member.dim), []).append((group, member))
    return {
        group.name
        for uses in users.values()
        if len({group.name for group, _ in uses}) > 1 and len({member.name for _, member in uses}) > 1
        for group, _ in uses
    }


def _group_name(found: Any, names: dict[Any, str], position: dict[str, int]) -> str:
    """The group's first producing weight, by the position of each name in the model."""
    producers = [
        names[item.dep.target.module]
        for item in found
        if isinstance(item.dep.target.module, (_Conv, nn.Linear)) and _side(item.dep) != "in"
    ]
    return f"{min(producers, key=position.__getitem__)}.weight:0"


def _plain_group(name: str, found: Any, names: dict[Any, str], model: nn.Module) -> CoupledGroup:
    num_units = len(found[0].idxs)
    positions: dict[_Side, Tensor] = {}
    for item in found:
        if _reaches_output(item.dep):
            raise _FrozenError(_OUTPUT)
        if item.dep.target.module in names:
            side = _Side(item.dep.target, _side(item.dep))
            positions[side] = _unit_positions(item, num_units, names[item.dep.target.module])
    sides = sorted(positions, key=lambda side: (names[side.node.module], side.side))
    nodes = tuple(LayerNode(*_owner(side, names, model), side.side) for side in sides)
    members = tuple(
        Member(nodes[position].module, tensor, dim, positions[side], position)
        for position, side in enumerate(sides)
        for tensor, dim in _tensors(side, names)
    )
    for member in members:
        if int(member.index.max()) >= getattr(model.get_submodule(member.module), member.tensor).shape[member.dim]:
            raise _FrozenError(_UNMAPPED.format(member.module))
    edges = _contracted_edges(sides, {item.dep.target for item in found})
    return CoupledGroup(name, num_units, members, nodes, edges)


def _attention_group(name: str, attention: Attention, names: dict[Any, str]) -> CoupledGroup:
    """Heads × head dims of timm's attention: unit h·D + d is row h·D + d of the q, k and v parts of `qkv`."""
    extras = [part for part in ("q_norm", "k_norm", "norm") if not isinstance(getattr(attention, part), nn.Identity)]
    if extras or getattr(attention, "gate", None) is not None:  # timm has gates from 1.0.28 on
        raise _FrozenError(f"attention with {', '.join(extras) or 'gate'} shares weights between its heads")
    width = attention.num_heads * attention.head_dim
    inner = torch.arange(width).unsqueeze(1)  # (n, 1)
    joint = torch.cat([inner, inner + width, inner + 2 * width], dim=1)  # (n, 3): q, k, v
    owner = names[attention]
    nodes = (LayerNode(f"{owner}.qkv", "linear", "out"), LayerNode(f"{owner}.proj", "linear", "in"))
    members = [Member(nodes[0].module, "weight", 0, joint, 0), Member(nodes[1].module, "weight", 1, inner, 1)]
    if attention.qkv.bias is not None:
        members.insert(1, Member(nodes[0].module, "bias", 0, joint, 0))
    heads = SectionStructure(attention.num_heads, are_heads=True)
    return CoupledGroup(name, width, tuple(members), nodes, frozenset({(0, 1)}), heads)


def _side(dependency: Any) -> str:
    """Norms, depthwise filters and bare parameters have one set of channels, which pass through."""
    module = dependency.target.module
    if not isinstance(module, (_Conv, nn.Linear)) or _is_depthwise(module):
        return "both"
    return "in" if "prune_in" in dependency.handler.__name__ else "out"


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _Conv) and module.groups == module.out_channels == module.in_channels > 1


def _reaches_output(dependency: Any) -> bool:
    return _side(dependency) != "in" and not dependency.target.outputs


def _unit_positions(item: Any, num_units: int, layer: str) -> Tensor:
    """Positions by unit, shape (n, k), from DepGraph's pairs of root index and own index."""
    roots, own = torch.tensor(item.root_idxs), torch.tensor(item.idxs)
    order = torch.argsort(roots * (int(own.max()) + 1) + own)
    counts = torch.bincount(roots, minlength=num_units)
    if int(counts.min()) != int(counts.max()) or own.unique().numel() != own.numel():
        raise _FrozenError(_UNMAPPED.format(layer))
    return own[order].reshape(num_units, -1)


def _owner(side: _Side, names: dict[Any, str], model: nn.Module) -> tuple[str, str]:
    """Name of the module that holds the side's tensors, and the layer's kind."""
    module, name = side.node.module, names[side.node.module]
    if isinstance(module, nn.Parameter):
        holder = name.rpartition(".")[0]
        is_norm = hasattr(model.get_submodule(holder), "normalized_shape")  # RMS norms reach DepGraph as parameters
        return holder, "norm" if is_norm else "parameter"
    if isinstance(module, _Conv):
        return name, "depthwise_conv" if _is_depthwise(module) else "conv"
    if isinstance(module, nn.Linear):
        return name, "linear"
    if isinstance(module, (_BatchNorm, nn.LayerNorm)):
        return name, "norm"
    raise _FrozenError(f"no rule for {type(module).__name__} ({name})")


def _tensors(side: _Side, names: dict[Any, str]) -> list[tuple[str, int]]:
    """(tensor name, dim) of everything that shrinks with one side of a layer."""
    module = side.node.module
    if isinstance(module, nn.Parameter):
        return [(names[module].rpartition(".")[2], side.node.pruning_dim % module.dim())]
    _check_cuttable(module, names[module])
    if side.side == "in":
        return [("weight", 1)]
    candidates = ("weight", "bias", "running_mean", "running_var")
    return [(tensor, 0) for tensor in candidates if getattr(module, tensor, None) is not None]


def _check_cuttable(module: nn.Module, name: str) -> None:
    """Freezes the groups of layers that slicing along their first two dims would break."""
    if isinstance(module, _Conv) and module.transposed:
        raise _FrozenError(f"transposed convolution ({name})")
    if isinstance(module, _Conv) and module.groups > 1 and not _is_depthwise(module):
        raise _FrozenError(f"grouped convolution ({name})")
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        raise _FrozenError(f"a norm over several dims ({name})")
    if isinstance(module, _BatchNorm) and module.running_mean is not None:
        return
    if not isinstance(getattr(module, "weight", None), nn.Parameter):
        raise _FrozenError(f"no weight of its own to cut ({name})")


def _contracted_edges(sides: list[_Side], traced: set[Any]) -> frozenset[tuple[int, int]]:
    """Layer-to-layer edges inside the group: operation nodes between two layers are walked through."""
    consumers = {side.node: position for position, side in enumerate(sides) if side.side != "out"}
    edges = set()
    for source, side in enumerate(sides):
        if side.side == "in":
            continue
        pending, seen = list(side.node.outputs), set()
        while pending:
            node = pending.pop()
            if node in seen or node not in traced:
                continue
            seen.add(node)
            if node in consumers:
                edges.add((source, consumers[node]))
            else:
                pending.extend(node.outputs)
    return frozenset(edges)
