"""Step 5, cut: apply a plan to a model, once.

Every tensor is sliced at most once along each dim, by the positions that all groups together leave; then the
attributes that a forward reads follow the new shapes. What results are the library's own modules, nothing patched.
"""

from __future__ import annotations

import copy
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
    classifier = _classifier(model)
    width = classifier.in_features if classifier else 0
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
    if classifier:
        _update_widths([model, getattr(model, "head", None)], classifier, width)


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


def shape_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device; the data is never copied."""
    memo = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


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


def _update_layer(layer: Any) -> None:
    """Brings a layer's own attributes in line with its tensors."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _Conv):
        if layer.groups == layer.in_channels == layer.out_channels:  # depthwise: one group a channel
            layer.groups = layer.weight.shape[0]
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, _BatchNorm):
        layer.num_features = next(t for t in (layer.weight, layer.running_mean) if t is not None).shape[0]
    elif hasattr(layer, "normalized_shape"):  # LayerNorm, RMSNorm and timm's own
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


def _classifier(model: Any) -> nn.Linear | None:
    """timm's classifier, the first where there are two."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else None
    first = found[0] if isinstance(found, tuple) else found
    return first if isinstance(first, nn.Linear) else None


def _update_widths(holders: list[Any], classifier: nn.Linear, old: int) -> None:
    """timm's records of the classifier's input width, or of the width that was pooled to it twice over.

    `reset_classifier` builds a new head from them. A ViT's `embed_dim` is such a record, a Swin's is not.
    """
    record = getattr(holders[0], "num_features", old)
    for holder in holders:
        for attribute in ("num_features", "head_hidden_size", "in_features", "embed_dim"):
            value = getattr(holder, attribute, None)
            if holder is not classifier and isinstance(value, int) and value in (record, old) and old % value == 0:
                setattr(holder, attribute, value * classifier.in_features // old)
