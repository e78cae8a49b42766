"""Step 5, cut: apply a plan to a model, once.

Every tensor is sliced at most once along each dim, by the positions that all groups together leave; then the
attributes that a forward reads follow the new shapes. What results are the library's own modules, nothing patched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.pruning.groups import CoupledGroup
from isomorphic.pruning.plan import PruningPlan

_Conv = nn.modules.conv._ConvNd
_BatchNorm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def cut(model: nn.Module, groups: Sequence[CoupledGroup], plan: PruningPlan) -> None:
    """Removes what `plan` does not keep from `model`, in place.

    Args:
        model: the model that the groups were traced on, on any device (on "meta" only shapes change).
        groups: all of its groups.
        plan: kept units for each of them.

    Raises:
        UserError: the plan does not belong to these groups.
    """
    plan.check(groups)
    holders = _holders(model)
    for (module_name, tensor), keep in kept_positions(model, groups, plan).items():
        old = getattr(model.get_submodule(module_name), tensor)
        new = _sliced(old, keep)
        for module, name in holders[id(old)]:  # a tied tensor stays tied
            setattr(module, name, new)
    for name in {member.module for group in groups for member in group.members}:
        _update_layer(model.get_submodule(name))
    for group in groups:
        if group.heads:
            _update_attention(model.get_submodule(group.heads.module), group, plan)
    _update_widths(model)


def kept_positions(
    model: nn.Module, groups: Sequence[CoupledGroup], plan: PruningPlan
) -> dict[tuple[str, str], dict[int, Tensor]]:
    """The positions that stay, ascending int64, by (module name, tensor name) and dim.

    A tied tensor stands under the first of its names, a dim that keeps everything under none.
    """
    masks: dict[int, dict[int, Tensor]] = {}
    first_name: dict[int, tuple[str, str]] = {}
    for group in groups:
        removed = torch.tensor(plan.removed(group), dtype=torch.int64)
        for member in group.members:
            tensor = getattr(model.get_submodule(member.module), member.tensor)
            first_name.setdefault(id(tensor), (member.module, member.tensor))
            dims = masks.setdefault(id(tensor), {})
            mask = dims.setdefault(member.dim, torch.ones(tensor.shape[member.dim], dtype=torch.bool))
            mask[member.index[removed].flatten()] = False
    return {
        first_name[key]: {dim: mask.nonzero().flatten() for dim, mask in dims.items() if not mask.all()}
        for key, dims in masks.items()
    }


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place that holds a tensor, by the tensor's identity."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            holders.setdefault(id(tensor), []).append((module, name))
    return holders


def _sliced(old: Tensor, keep: dict[int, Tensor]) -> Tensor:
    new = old.detach()
    for dim, positions in keep.items():
        new = new.index_select(dim, positions.to(new.device))
    if not keep:
        return old
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _update_layer(layer: nn.Module) -> None:
    """Brings a layer's own attributes in line with its tensors."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _Conv):
        if layer.groups == layer.in_channels == layer.out_channels:  # depthwise: one group a channel
            layer.groups = layer.weight.shape[0]
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, _BatchNorm):
        layer.num_features = len(layer.running_mean if layer.weight is None else layer.weight)  # type: ignore[arg-type]
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(layer.weight.shape)


def _update_attention(attention: Any, group: CoupledGroup, plan: PruningPlan) -> None:
    """Head count and head dim follow the cut, and q·k keeps its temperature.

    timm divides q·k by √head_dim as it stands after the cut. Without the removed dims the dense model would still
    divide by the old one, so q is scaled by √(new / old): the cut model then computes what the masked one does.
    """
    num_heads = len(plan.kept_heads(group))
    head_dim = len(plan.kept[group.name]) // num_heads
    width = num_heads * head_dim
    if head_dim != group.head_dim:
        for tensor in (attention.qkv.weight, attention.qkv.bias):
            if tensor is not None:
                tensor[:width] *= math.sqrt(head_dim / group.head_dim)
    attention.num_heads, attention.head_dim, attention.attn_dim = num_heads, head_dim, width
    attention.scale = head_dim**-0.5


def _update_widths(model: Any) -> None:
    """timm's record of the width before the classifier, which `reset_classifier` builds a new head from."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    head = classifier[0] if isinstance(classifier, tuple) else classifier
    if not isinstance(head, nn.Linear):
        return
    old = getattr(model, "num_features", None)
    for attribute in ("num_features", "head_hidden_size", "embed_dim"):
        if old is not None and getattr(model, attribute, None) == old:
            setattr(model, attribute, head.in_features)
