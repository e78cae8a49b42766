"""Rules of convolutions, norms and what runs over pixels."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from isomorphic.pruning.grouping import axes as move
from isomorphic.pruning.grouping.axes import Axes
from isomorphic.pruning.grouping.call import Call
from isomorphic.pruning.grouping.rules.contraction import with_bias
from isomorphic.pruning.grouping.units import Axis


def convolution(call: Call) -> Axes:
    """Input (B, C, …), weight (O, C/g, …), or (C, O/g, …) where transposed."""
    weight, shape = call.axes("weight"), call.shape("weight")
    rank = len(shape) - 2
    batched = call.out.dim() == rank + 2
    x = call.axes("input") if batched else move.insert(call.axes("input"), 0)
    groups = call["groups"]
    transposed = bool(call.get("transposed")) or "transpose" in call.name
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    reason = f"it meets a fixed axis in {call.name}"
    sizes, kept = call.shape("input")[-rank:], call.out.shape[-rank:]
    unbiased = not isinstance(call.get("bias"), Tensor)  # a bias would make zeros along such an axis count
    pointwise_dims = [d for d in range(rank) if unbiased and shape[2 + d] == 1 and sizes[d] == kept[d]]
    along = [x[2 + d] for d in range(rank) if d not in pointwise_dims or x[1] is None]
    call.recorder.runs_over(along)
    call.table.freeze_axes([x[2 + d] for d in range(rank) if d not in pointwise_dims], "a convolution runs over it")
    x = move.untied(call.table, x, range(len(x)))
    channels = call.shape("input")[1 if batched else 0]
    kind = "depthwise_conv" if groups == channels > 1 else "conv"
    roles = {("weight", out_dim): "out", ("weight", in_dim): "in", ("bias", 0): "out"}
    if kind == "depthwise_conv":
        roles = {("weight", 0): "both", ("bias", 0): "both"}
    detail = f"{'×'.join(str(size) for size in shape[2:])} kernel" + (f", {groups} groups" if groups > 1 else "")
    call.layer(kind, roles, activation=call["input"], detail=detail)
    if groups == 1:
        unite = [x[1], weight[in_dim]]
        move.unite_axes(call.table, unite, [channels, shape[in_dim]], reason)
        out = weight[out_dim]
    else:
        out = _grouped(call, x[1], weight, groups, transposed, reason)
    result: Axes = [x[0], out, *(x[2 + d] if d in pointwise_dims else None for d in range(rank))]
    return with_bias(call, result if batched else result[1:], 1 if batched else 0)


def _grouped(call: Call, x: Axis | None, weight: Axes, groups: int, transposed: bool, reason: str) -> Axis | None:
    """Output channels of a grouped convolution, and how its input channels go with them."""
    flat = weight[0]  # (O,), or (C,) where transposed
    inner = weight[1]  # (C/g,), or (O/g,)
    is_fixed = inner is None and call.shape("weight")[1] > 1
    if flat is None or x is None or (is_fixed and not transposed):
        call.table.freeze_axes([x, flat, inner], reason)
        return flat
    rows = flat.ids.reshape(groups, -1)
    if inner is not None:
        call.table.keep_equal(rows)
    if transposed:
        call.table.unite(x.ids, flat.ids)
        if inner is None:
            return Axis(rows[:, 0]) if rows.shape[1] == 1 and not is_fixed else _frozen_out(call, x)
        return Axis(np.tile(inner.ids, groups))
    if inner is None:  # one input channel a group: it goes with its filters
        call.table.unite(x.ids[:, None], rows)
    else:
        call.table.unite(x.ids.reshape(groups, -1), inner.ids[None])
    return flat


def _frozen_out(call: Call, x: Axis) -> Axis | None:
    reason = "no rule for this grouped transposed convolution"
    call.table.freeze(x.ids, reason)
    return Axis(call.table.fixed(call.out.shape[1 - len(call.shape("weight"))], reason))


def batch_norm(call: Call) -> Axes | list[Axes]:
    """Batch and instance norm: everything lies along axis 1."""
    axes, size = call.axes("input"), call.shape("input")[1]
    call.recorder.runs_over(axes[2:])
    if isinstance(call.get("bias"), Tensor):
        call.table.freeze_axes(axes[2:], "a norm's shift runs along it")
    axes = move.untied(call.table, axes, range(2, len(axes)))
    names = [n for n in ("weight", "bias", "running_mean", "running_var") if isinstance(call.get(n), Tensor)]
    call.layer("norm", {(name, 0): "both" for name in names}, activation=call["input"])
    units = [*(call.axes(name)[0] for name in names), axes[1]]
    axes[1] = move.unite_axes(call.table, units, [size] * len(units), f"it meets a fixed axis in {call.name}")
    return axes if isinstance(call.out, Tensor) else _statistics(call, axes)


def layer_norm(call: Call) -> Axes:
    """Layer and RMS norm: weight and bias lie along the last axes."""
    names = [n for n in ("weight", "bias") if isinstance(call.get(n), Tensor)]
    roles = {(name, dim): "both" for name in names for dim in range(len(call.shape(name)))}
    call.layer("norm", roles, activation=call["input"])
    if "bias" in names:
        outer = call.axes("input")[: -len(call["normalized_shape"])]
        along = [axis for axis in outer if axis is not None and not call.table.is_section(axis.ids)]
        call.table.freeze_axes(along, "a norm's shift runs along it")
    operands = [(call.axes(name), call.shape(name)) for name in (*names, "input")]
    result = move.broadcast(call.table, operands, call.shape("input"), f"it meets a fixed axis in {call.name}")
    return result if isinstance(call.out, Tensor) else _statistics(call, result)  # type: ignore[return-value]


def group_norm(call: Call) -> Axes:
    """Groups keep equally many channels."""
    axes, size = call.axes("input"), call.shape("input")[1]
    call.recorder.runs_over(axes[2:])
    names = [n for n in ("weight", "bias") if isinstance(call.get(n), Tensor)]
    call.layer("norm", {(name, 0): "both" for name in names}, activation=call["input"])
    units = [*(call.axes(name)[0] for name in names), axes[1]]
    axes[1] = axis = move.unite_axes(call.table, units, [size] * len(units), f"it meets a fixed axis in {call.name}")
    if axis is not None and 1 < call["num_groups"] < size:
        call.table.keep_equal(call.table.tie(axis, axis.rows).ids.reshape(call["num_groups"], -1))
    return axes


def _statistics(call: Call, result: Axes) -> list[Axes]:
    return [result, *([None] * tensor.dim() for tensor in call.out[1:])]


def prelu(call: Call) -> Axes:
    axes, size = call.axes("self"), call.shape("self")
    if call.shape("weight")[0] > 1:
        units = [axes[1], call.axes("weight")[0]]
        axes[1] = move.unite_axes(call.table, units, [size[1], size[1]], "it meets a fixed axis in prelu")
    return axes


def pixels(call: Call) -> Axes:
    """Pooling and resampling: the axes that change are pixels."""
    axes, before = call.axes(call.tensors[0]), call.shape(call.tensors[0])
    call.pass_on(call.tensors[0])
    spatial = int(next((d for d in call.func._schema.name if d in "123"), "2"))
    places = range(len(before) - spatial, len(before))
    call.recorder.runs_over(axes[place] for place in places)
    return move.fix(call.table, axes, places, f"{call.name} runs over it")


def regions(call: Call) -> Axes | list[Axes]:
    """roi_align, roi_pool: each region (K, 5) of the maps (N, C, H, W) becomes a small map (K, C, h, w)."""
    axes = call.axes("input")
    call.table.freeze_axes([*axes[2:], axes[0], *call.axes("rois")], f"{call.name} picks regions from it")
    result = [None, move.untied(call.table, axes, range(len(axes)))[1], None, None]
    return result if isinstance(call.out, Tensor) else [result, [None] * call.out[1].dim()]


def position_sensitive_regions(call: Call) -> list[Axes]:
    """ps_roi_align, ps_roi_pool: channels (C · h · w), a channel for each place of the small maps (K, C, h, w)."""
    axes = call.axes("input")
    call.table.freeze_axes([*axes[2:], axes[0], *call.axes("rois")], f"{call.name} picks regions from it")
    channels = move.untied(call.table, axes, range(len(axes)))[1]
    if channels is not None:
        ids = channels.ids.reshape(-1, call["pooled_height"] * call["pooled_width"])
        call.table.unite(ids[:, :1], ids)
        channels = Axis(ids[:, 0])
    return [[None, channels, None, None], [None] * call.out[1].dim()]


def deformable_convolution(call: Call) -> Axes:
    """Input (N, C, H, W), weight (O, C/g, kh, kw); offsets and mask belong to places of the kernel, which stay.

    With several offset groups, each keeps equally many of the input's channels.
    """
    weight, shape, x = call.axes("weight"), call.shape("weight"), call.axes("input")
    reason = f"{call.name} moves over it"
    call.table.freeze_axes([*weight[2:], *x[2:], *call.axes("offset"), *call.axes("mask")], reason)
    x = move.untied(call.table, x, range(len(x)))
    groups, channels = call["groups"], call.shape("input")[1]
    detail = f"{'×'.join(str(size) for size in shape[2:])} kernel" + (f", {groups} groups" if groups > 1 else "")
    call.layer(
        "conv", {("weight", 0): "out", ("weight", 1): "in", ("bias", 0): "out"}, activation=call["input"], detail=detail
    )
    if call["offset_groups"] > 1 and x[1] is not None:
        call.table.keep_equal(x[1].ids.reshape(call["offset_groups"], -1))
    fixed = f"it meets a fixed axis in {call.name}"
    if groups == 1:
        move.unite_axes(call.table, [x[1], weight[1]], [channels, shape[1]], fixed)
        out = weight[0]
    else:
        out = _grouped(call, x[1], weight, groups, False, fixed)
    return with_bias(call, [x[0], out, None, None], 1)


def grid_sample(call: Call) -> Axes:
    axes, grid = call.axes("input"), call.axes("grid")
    call.recorder.runs_over(axes[2:])
    call.table.freeze_axes([*axes[2:], *grid[1:]], "it is resampled")
    return [*move.untied(call.table, axes[:2], range(2, len(axes))), *([None] * (len(axes) - 2))]
