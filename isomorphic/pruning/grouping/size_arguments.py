"""Size rules: which sizes each function of the forward code is given, and what they are the lengths of.

A rule is called with the mode, the call's result and its arguments as the forward code wrote them. What it cannot be
called with is a call that it does not know.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from isomorphic.pruning.expressions import Constant, Length, Operation
from isomorphic.pruning.grouping.integers import TracedFloat, TracedInt, as_int, expression_of, plain
from isomorphic.pruning.grouping.size_equations import SizeMode


def note_sizes(mode: SizeMode, func: Any, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Applies the size rule of `func`; a call that the rule does not know freezes what it touches."""
    if "input" in kwargs:
        args = (kwargs["input"], *args)
    kwargs = {_SYNONYMS.get(name, name): value for name, value in kwargs.items() if name != "input"}
    try:
        SIZE_RULES[func](mode, out, *args, **kwargs)
    except (TypeError, IndexError):
        reason = f"no rule for this call of {getattr(func, '__name__', 'a function')}"
        for tensor in tree_leaves([out, args, kwargs]):
            if isinstance(tensor, Tensor):
                mode.recorder.table.freeze_axes(mode.recorder.units(tensor).axes, reason)


def _flat(sizes: Sequence[Any]) -> Sequence[Any]:
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _view(mode: SizeMode, out: Tensor, /, tensor: Tensor, *sizes: Any, **named: Any) -> None:
    sizes = tuple(_flat(sizes or tuple(named.values())))
    if sizes and not isinstance(sizes[0], torch.dtype):
        mode.equate_all(sizes, out)


def _repeat(mode: SizeMode, out: Tensor, /, tensor: Tensor, *times: Any, **named: Any) -> None:
    """What grows from 1 is as long as it is repeated often."""
    for dim, count in enumerate(_flat(times or tuple(named.values())), start=tensor.dim() - out.dim()):
        if dim < 0 or tensor.size(dim) == 1:
            mode.equate(count, mode.axis(out, dim + out.dim() - tensor.dim()))
        elif isinstance(count, TracedInt):
            mode.pin(count)


def _unflatten(mode: SizeMode, out: Tensor, /, tensor: Tensor, dim: int, sizes: Any) -> None:
    dim %= tensor.dim()
    for offset, size in enumerate(sizes):
        if as_int(size) != -1:
            mode.equate(size, mode.axis(out, dim + offset))


def _split(mode: SizeMode, out: Sequence[Tensor], /, tensor: Tensor, sizes: Any, dim: int = 0) -> None:
    if not isinstance(sizes, (tuple, list)):
        if out[-1].size(dim) != as_int(sizes):  # as many pieces as before, the last one no longer than the others
            number, axis = len(out), mode.axis(tensor, dim)
            whole = Operation("+", Length(axis), Operation("-", expression_of(sizes), Constant(1)))  # type: ignore[arg-type]
            mode.equate_expression(Operation("//", whole, expression_of(sizes)), mode.interned(None, number))
            sizes = [sizes] * (number - 1)
        else:
            sizes = [sizes] * len(out)
    for size, piece in zip(sizes, out, strict=False):  # what is left for the last one follows
        mode.equate(size, mode.axis(piece, dim))


def _chunk(mode: SizeMode, out: Sequence[Tensor], /, tensor: Tensor, chunks: int, dim: int = 0) -> None:
    """All but the last are as long as the whole divided by their number, rounded up."""
    axis, whole = mode.axis(tensor, dim), Length(mode.axis(tensor, dim))  # type: ignore[arg-type]
    if isinstance(chunks, TracedInt):
        mode.pin(chunks)
    if axis.ids is not None and axis.size % len(out):
        rounded = Operation("//", Operation("+", whole, Constant(as_int(chunks) - 1)), Constant(as_int(chunks)))
        for piece in out[:-1]:
            mode.equate_expression(rounded, mode.axis(piece, dim))


def _tensor_split(mode: SizeMode, out: Sequence[Tensor], /, tensor: Tensor, where: Any, dim: int = 0) -> None:
    """At positions counted from the start, or into so many pieces, the first ones longer by one if need be."""
    if isinstance(where, int):
        axis = mode.axis(tensor, dim)
        if isinstance(where, TracedInt):
            mode.pin(where)
        for number, piece in enumerate(out if axis.ids is not None else ()):
            longer = Operation("+", Length(axis), Constant(len(out) - 1 - number))  # type: ignore[arg-type]
            mode.equate_expression(Operation("//", longer, Constant(len(out))), mode.axis(piece, dim))
    else:
        for position in where:
            _bound(mode, tensor, dim, position)


def _hsplit(mode: SizeMode, out: Sequence[Tensor], /, tensor: Tensor, where: Any) -> None:
    _tensor_split(mode, out, tensor, where, min(tensor.dim() - 1, 1))


def _narrow(mode: SizeMode, out: Tensor, /, tensor: Tensor, dim: int, start: Any, length: Any) -> None:
    if as_int(start) < 0:
        _bound(mode, tensor, dim, start)
    elif as_int(start):
        mode.equate(start, mode.part(tensor, dim, slice(0, as_int(start))))
    mode.equate(length, mode.axis(out, dim))


def _getitem(mode: SizeMode, out: Any, /, tensor: Tensor, index: Any, *_: Any) -> None:
    entries = list(index) if isinstance(index, tuple) else [index]
    used = sum(_width(entry) for entry in entries if entry is not None and entry is not Ellipsis)
    dim = 0
    for entry in entries:
        if entry is Ellipsis:
            dim += tensor.dim() - used
        elif entry is not None:
            if isinstance(entry, slice) and dim < tensor.dim():
                _bounds(mode, tensor, dim, entry)
            elif isinstance(entry, TracedInt):
                mode.pin(entry)
            dim += _width(entry)


def _width(entry: Any) -> int:
    """How many axes an entry of an index stands for."""
    return entry.dim() if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1


def _bounds(mode: SizeMode, tensor: Tensor, dim: int, bounds: slice) -> None:
    """Where a slice starts and stops; of one with steps, the start inside the first step is no length."""
    step, start = as_int(bounds.step or 1), bounds.start
    if step > 1 and not isinstance(start, Tensor) and 0 <= as_int(start or 0) < step:
        if isinstance(start, TracedInt):
            mode.pin(start)
        start = None
    if isinstance(bounds.step, TracedInt):
        mode.pin(bounds.step)
    for bound in (start, bounds.stop):
        if bound is not None and not isinstance(bound, Tensor):
            _bound(mode, tensor, dim, bound)


def _bound(mode: SizeMode, tensor: Tensor, dim: int, bound: int) -> None:
    """A position counted from the start or, if negative, from the end."""
    size = tensor.size(dim)
    if as_int(bound) >= size or as_int(bound) == 0:
        if isinstance(bound, TracedInt):
            mode.equate(bound, mode.axis(tensor, dim)) if as_int(bound) == size else mode.pin(bound)
    elif as_int(bound) > 0:
        mode.equate(bound, mode.part(tensor, dim, slice(0, as_int(bound))))
    else:
        mode.equate(bound * -1, mode.part(tensor, dim, slice(size + as_int(bound), size)))


def _new(mode: SizeMode, out: Tensor, /, *sizes: Any, **named: Any) -> None:
    if sizes and isinstance(sizes[0], Tensor):
        sizes = sizes[1:]
    sizes = tuple(_flat(sizes or tuple(value for key, value in named.items() if key == "size")))
    mode.equate_all(sizes[: out.dim()], out)


def _full(mode: SizeMode, out: Tensor, /, *arguments: Any, **named: Any) -> None:
    values = [value for value in (*arguments, *named.values()) if not isinstance(value, Tensor)]
    mode.equate_all(next(value for value in values if isinstance(value, (tuple, list))), out)
    for value in values:
        if isinstance(value, TracedInt):  # not a size
            mode.pin(value)


def _layer_norm(
    mode: SizeMode, out: Tensor, /, tensor: Tensor, normalized_shape: Sequence[Any], *_: Any, **__: Any
) -> None:
    for offset, size in enumerate(reversed(normalized_shape), start=1):
        mode.equate(size, mode.axis(tensor, tensor.dim() - offset))


def _group_norm(mode: SizeMode, out: Tensor, /, tensor: Tensor, num_groups: Any, *_: Any, **__: Any) -> None:
    channels = mode.axis(tensor, 1)
    if isinstance(num_groups, TracedInt):
        mode.equate(
            num_groups, channels if as_int(num_groups) == channels.size > 1 else mode.interned(None, as_int(num_groups))
        )
    elif channels.size == num_groups > 1:
        mode.equate(num_groups, channels)


def _convolution(mode: SizeMode, out: Tensor, /, tensor: Tensor, weight: Tensor, *rest: Any, **named: Any) -> None:
    groups = named.get("groups", rest[4] if len(rest) > 4 else 1)  # after bias, stride, padding, dilation
    channels = mode.axis(tensor, tensor.dim() - weight.dim() + 1)
    is_depthwise = as_int(groups) > 1 and as_int(groups) == channels.size
    mode.equate(groups, channels if is_depthwise else mode.interned(None, as_int(groups)))


def _transposed(mode: SizeMode, out: Tensor, /, tensor: Tensor, weight: Tensor, *rest: Any, **named: Any) -> None:
    """Its arguments: bias, stride, padding, output padding, groups, dilation."""
    _convolution(mode, out, tensor, weight, groups=named.get("groups", rest[4] if len(rest) > 4 else 1))


def _pad(mode: SizeMode, out: Tensor, /, tensor: Tensor, pad: Sequence[Any], *_: Any, **__: Any) -> None:
    for amount in pad:
        if isinstance(amount, TracedInt):
            mode.pin(amount)


def _attention(mode: SizeMode, out: Tensor, /, query: Tensor, key: Tensor, *rest: Any, **named: Any) -> None:
    """Fused attention multiplies q·kᵀ by a scale; without one, it divides by the root of the head dim."""
    scale = named.get("scale") if len(rest) < 5 else rest[4]
    axis = mode.axis(query, query.dim() - 1)
    if scale is None:
        if axis.ids is None:
            return
        factor, value = Operation("**", Length(axis), Constant(-0.5)), axis.size**-0.5  # type: ignore[arg-type]
    elif isinstance(scale, (TracedInt, TracedFloat)):
        factor, value = expression_of(scale), plain(scale)
    else:
        return
    if not mode.multiplied([query, key], factor, value):
        mode.equalize(factor, Constant(value))


# Arguments that torch names differently in functions of one rule.
_SYNONYMS: dict[str, str] = {
    **dict.fromkeys(("split_size", "split_sizes", "split_size_or_sections"), "sizes"),
    **dict.fromkeys(("indices", "sections", "indices_or_sections"), "where"),
}
SIZE_RULES: dict[Any, Callable[..., None]] = {
    **dict.fromkeys(
        (Tensor.view, Tensor.reshape, torch.reshape, Tensor.expand, Tensor.broadcast_to, torch.broadcast_to), _view
    ),
    Tensor.repeat: _repeat,
    **dict.fromkeys((Tensor.unflatten, torch.unflatten), _unflatten),
    **dict.fromkeys((Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes), _split),
    **dict.fromkeys((Tensor.chunk, torch.chunk), _chunk),
    **dict.fromkeys((Tensor.tensor_split, torch.tensor_split), _tensor_split),
    **dict.fromkeys((Tensor.hsplit, torch.hsplit), _hsplit),
    **dict.fromkeys((Tensor.vsplit, torch.vsplit), functools.partial(_tensor_split, dim=0)),
    **dict.fromkeys((Tensor.dsplit, torch.dsplit), functools.partial(_tensor_split, dim=2)),
    **dict.fromkeys((Tensor.narrow, torch.narrow), _narrow),
    **dict.fromkeys((Tensor.__getitem__, Tensor.__setitem__), _getitem),
    **dict.fromkeys((torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn), _new),
    **dict.fromkeys((Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty), _new),
    **dict.fromkeys((torch.full, Tensor.new_full), _full),
    **dict.fromkeys((F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm), _layer_norm),
    **dict.fromkeys((F.group_norm, torch.group_norm), _group_norm),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed),
    F.pad: _pad,
    F.scaled_dot_product_attention: _attention,
}
