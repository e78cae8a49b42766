"""Step 5, cut: apply a plan to a model, once.

Every tensor is sliced at most once along each dim, by the positions that all groups together leave; the integers that
a forward reads are solved for, and what it computes from sizes keeps its effect. What results are the library's own
modules, nothing patched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.kinds import is_kind
from isomorphic.number_tables import set_number_table
from isomorphic.observe import modes_kept
from isomorphic.plain_tensors import own_plain_tensors
from isomorphic.pruning.cutting.records import followed, layer_widths
from isomorphic.pruning.cutting.sizes import AxisLengths, SizeConflictError, dense_values, solve_attributes
from isomorphic.pruning.expressions import Attribute, Number, evaluate
from isomorphic.pruning.groups import ChannelGraph, Member, Rescaling
from isomorphic.pruning.plan import PruningPlan

_Conv = nn.modules.conv._ConvNd
_DEFORMABLE = "torchvision.ops.deform_conv.DeformConv2d"
_ChannelNorm = nn.modules.batchnorm._NormBase
_Holders = dict[int, list[tuple[nn.Module, str]]]


@torch.no_grad()
def cut(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> None:
    """Removes what `plan` does not keep from `model`, in place.

    Args:
        model: the model that was traced, on any device (on "meta" only shapes change).
        graph: its groups, and what holds between them.
        plan: kept units for each group.

    Raises:
        UserError: the plan does not belong to these groups, or leaves widths that the model cannot run at.
    """
    plan.check(graph)
    values = _solved_attributes(model, graph, plan)
    holders = _holders(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    dense, widths = dense_values(model), layer_widths(graph.records, modules)
    recorded = {record.attribute: dense(record.attribute) for record in graph.records}
    _rescale(model, holders, graph, plan, values)
    for (module_name, tensor), keep in kept_positions(model, graph, plan).items():
        old = getattr(modules[module_name], tensor)
        _replace(holders, old, _sliced(old, keep))
    for attribute, value in values.items():
        _set_attribute(modules[attribute.module], attribute, value)
    for name in {member.module for group in graph.groups for member in group.all_members}:
        _update_layer(modules[name])
    for attribute, value in followed(graph.records, recorded, widths, layer_widths(graph.records, modules)):
        if attribute not in values:  # which the forward needs as it is there
            _set_attribute(modules[attribute.module], attribute, value)
    _drop_caches(model)


def _drop_caches(model: nn.Module) -> None:
    """What modules keep from eval runs, such as indexed bias tables, goes when they are told to train."""
    with modes_kept(model):
        model.train()


def kept_positions(
    model: nn.Module, graph: ChannelGraph, plan: PruningPlan
) -> dict[tuple[str, str], dict[int, Tensor]]:
    """The positions that stay, ascending int64, by (module name, tensor name) and dim.

    A tied tensor stands under the first of its names, a dim that keeps everything under none.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    masks: dict[int, dict[int, NDArray[np.bool_]]] = {}
    first_name: dict[int, tuple[str, str]] = {}
    for member, removed in removed_rows(graph, plan):
        tensor = getattr(modules[member.module], member.tensor)
        first_name.setdefault(id(tensor), (member.module, member.tensor))
        dims = masks.setdefault(id(tensor), {})
        if member.dim not in dims:
            dims[member.dim] = np.ones(tensor.shape[member.dim], bool)
        dims[member.dim][member.index.numpy()[removed.numpy()]] = False  # a fancy index takes numpy half the time
    return {
        first_name[key]: {
            dim: torch.from_numpy(np.flatnonzero(mask)) for dim, mask in sorted(dims.items()) if not mask.all()
        }
        for key, dims in masks.items()
    }


def _holders(model: nn.Module) -> _Holders:
    """Every place that holds a tensor, by the tensor's identity."""
    holders: _Holders = {}
    for module in model.modules():
        for name, tensor in _own_tensors(module):
            holders.setdefault(id(tensor), []).append((module, name))
    return holders


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)
    yield from own_plain_tensors(module)


def removed_rows(graph: ChannelGraph, plan: PruningPlan) -> Iterator[tuple[Member, Tensor]]:
    """Every member with the rows of its index that go: units, or whole heads."""
    for group in graph.groups:
        units = torch.tensor(plan.removed(group), dtype=torch.int64)
        yield from ((member, units) for member in group.members)
        if group.sections and group.sections.members:
            kept = set(plan.kept_heads(group))
            heads = torch.tensor([h for h in range(group.num_sections) if h not in kept], dtype=torch.int64)
            yield from ((member, heads) for member in group.sections.members)


def _sliced(old: Tensor, keep: dict[int, Tensor]) -> Tensor:
    if not keep:
        return old
    new = old.detach()
    if new.is_meta:
        new = new.new_empty([len(keep[dim]) if dim in keep else size for dim, size in enumerate(new.shape)])
    else:
        for dim, positions in keep.items():  # whole rows first, which are copied much the faster
            new = new.index_select(dim, positions.to(new.device))
    return _like(old, new)


def _like(old: Tensor, new: Tensor) -> Tensor:
    """`new` as a parameter where `old` is one."""
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _replace(holders: _Holders, old: Tensor, new: Tensor) -> None:
    """Puts `new` wherever `old` was: a tied tensor stays tied."""
    places = holders.pop(id(old))
    for module, name in places:
        setattr(module, name, new)
    holders[id(new)] = places


def _solved_attributes(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> dict[Attribute, int]:
    """The values of the attributes that the forward code's sizes need after the cut."""
    try:
        return solve_attributes(graph.equations, AxisLengths(graph, plan), dense_values(model))
    except SizeConflictError as conflict:
        raise UserError(f"the model cannot run at the plan's widths: {conflict}") from conflict


def _set_attribute(module: nn.Module, attribute: Attribute, value: int) -> None:
    old: Any = getattr(module, attribute.name)
    if (old if attribute.entry is None else old[attribute.entry]) == value:
        return
    if attribute.entry is None:
        setattr(module, attribute.name, value)
    elif isinstance(old, dict):
        set_number_table(module, attribute.name, {**old, attribute.entry: value})
    else:
        entries: Any = list(old)
        entries[attribute.entry] = value
        setattr(module, attribute.name, type(old)(entries))


def row_scales(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> dict[str, Tensor]:
    """By what `cut` multiplies the rows of layers' weights for the sake of factors that follow sizes, shape (rows,).

    Of a weight that several layers share, which is multiplied once, this says what each of them asks for.
    """
    scales: dict[str, Tensor] = {}
    for rescaling, dense, new in _changed_factors(model, graph, plan, _solved_attributes(model, graph, plan)):
        if rescaling.tensor == "weight":
            weight = getattr(model.get_submodule(rescaling.module), rescaling.tensor)
            scales.setdefault(rescaling.module, torch.ones(len(weight)))[rescaling.index] *= dense / new
    return scales


def _changed_factors(
    model: nn.Module, graph: ChannelGraph, plan: PruningPlan, values: Mapping[Attribute, int]
) -> Iterator[tuple[Rescaling, Number, Number]]:
    """The rescalings whose factor is another one after the cut, and the factor before and after."""
    before, after = AxisLengths(graph), AxisLengths(graph, plan)
    dense_value = dense_values(model)
    for rescaling in graph.rescalings:
        dense = evaluate(rescaling.factor, before, dense_value)
        new = evaluate(rescaling.factor, after, lambda attribute: values.get(attribute, dense_value(attribute)))
        if new != dense:
            yield rescaling, dense, new


def _rescale(
    model: nn.Module, holders: _Holders, graph: ChannelGraph, plan: PruningPlan, values: Mapping[Attribute, int]
) -> None:
    """Multiplies what the forward's factors will lack, and brings stored factors in line with the cut."""
    done: dict[tuple[nn.Module, str], dict[str, Tensor]] = {}
    stored: dict[str, list[tuple[Number, Number]]] = {}
    for rescaling, dense, new in _changed_factors(model, graph, plan, values):
        old = getattr(model.get_submodule(rescaling.module), rescaling.tensor)
        index = _not_yet_rescaled(rescaling, done.setdefault(holders[id(old)][0], {}))
        rescaled = old.detach().clone()
        rescaled[index.to(old.device)] *= dense / new
        _replace(holders, old, _like(old, rescaled))
        stored.setdefault(rescaling.holder, []).append((dense, new))
    for holder, factors in stored.items():
        _update_factors(model.get_submodule(holder), factors)


def _not_yet_rescaled(rescaling: Rescaling, done: dict[str, Tensor]) -> Tensor:
    """The rows that no other module's factor has reached already, by another name of a tied tensor.

    Args:
        done: the tensor's rescaled rows by the module whose factor it was; updated.
    """
    others = [index for holder, index in done.items() if holder != rescaling.holder]
    index = rescaling.index[~torch.isin(rescaling.index, torch.cat(others))] if others else rescaling.index
    done[rescaling.holder] = torch.cat([done.get(rescaling.holder, index[:0]), index])
    return index


def _update_factors(holder: nn.Module, factors: list[tuple[Number, Number]]) -> None:
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and "scale" in name and not name.startswith("_"):
            new = next((new for dense, new in factors if math.isclose(value, dense)), value)
            setattr(holder, name, new)


def _update_layer(layer: Any) -> None:
    """Brings a layer's own records in line with its tensors."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _Conv) or is_kind(layer, _DEFORMABLE):
        widths = (layer.weight.shape[0], layer.weight.shape[1] * layer.groups)
        is_transposed = isinstance(layer, _Conv) and layer.transposed
        layer.in_channels, layer.out_channels = widths if is_transposed else widths[::-1]
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = layer.weight.shape[0]
    elif isinstance(layer, _ChannelNorm):
        layer.num_features = next(t for t in (layer.weight, layer.running_mean) if t is not None).shape[0]
    elif isinstance(layer, nn.RNNBase):
        _update_rnn(layer)
    elif isinstance(layer, nn.MultiheadAttention):
        _update_multihead(layer)
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = layer.weight.numel()
    elif hasattr(layer, "normalized_shape"):  # LayerNorm, RMSNorm and timm's own
        layer.normalized_shape = tuple(layer.weight.shape)


def _update_rnn(layer: Any) -> None:
    gates = {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
    rows, layer.input_size = layer.weight_ih_l0.shape
    layer.hidden_size = rows // gates
    if layer.proj_size:
        layer.proj_size = layer.weight_hr_l0.shape[0]
    layer.flatten_parameters()


def _update_multihead(layer: Any) -> None:
    if layer.in_proj_weight is not None:
        layer.embed_dim = layer.kdim = layer.vdim = layer.in_proj_weight.shape[1]
    else:
        layer.embed_dim, layer.kdim, layer.vdim = (
            weight.shape[1] for weight in (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        )
    layer.head_dim = layer.embed_dim // layer.num_heads
