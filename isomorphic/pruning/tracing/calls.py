"""Sizes in forward code: a function mode that answers `x.shape` with traced integers and reads them back from calls.

Each size that the forward code gives to a view, a split or a factory is an equation: the expression behind it equals
the length of the axis that results. A number that goes anywhere else must stay what it is.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from isomorphic.pruning.expressions import Constant, Expression, Length, Operation, leaves
from isomorphic.pruning.tracing.integers import TracedFloat, TracedInt, expression_of, plain, traced
from isomorphic.pruning.tracing.multihead import multi_head_attention
from isomorphic.pruning.tracing.record import Recorder
from isomorphic.pruning.tracing.units import Axis, Ids
from isomorphic.pruning.trial import Numbers, is_watched, numbers_in


@dataclass(frozen=True, eq=False)
class TracedAxis:
    """An axis of an activation as the trace saw it: ids (n,) or (rows …, n), None where it is fixed; its length."""

    ids: Ids | None
    size: int


@dataclass(frozen=True)
class Factor:
    """A product is multiplied by a number computed from sizes.

    Attributes:
        candidates: for each factor of the product that some parameters make, the parameters' names and the rows of
            their dim 0, shape (m,).
        expression: the number, and its value in the dense model.
        holder: name of the module whose forward computes it.
    """

    candidates: tuple[tuple[tuple[str, ...], Ids], ...]
    expression: Expression
    value: float
    holder: str


class SizeMode(TorchFunctionMode):
    """Collects equations and factors while a model runs."""

    def __init__(self, recorder: Recorder, model: nn.Module) -> None:
        super().__init__()
        self.recorder = recorder
        recorder.vouched = READERS
        self.equations: dict[tuple[Expression, TracedAxis], None] = {}
        self.factors: list[Factor] = []
        self.calls: list[tuple[Any, Numbers]] = []  # of the forward code
        self._inside = 0
        self._axes: dict[Any, TracedAxis] = {}
        self._names = {module: name for name, module in model.named_modules()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _SIZES:
            return self._sizes(*args, **kwargs)
        if func in _COUNTS:
            return math.prod(self._sizes(*args))
        if func in _EXITS:
            self.recorder.table.freeze_axes(self.recorder.units(args[0]).axes, "its values leave torch")
        if func is Tensor.__len__:
            self.recorder.table.freeze_axes(self.recorder.units(args[0]).axes[:1], "its length is used as a number")
        if is_watched(func) and not self._inside:
            found = numbers_in(func, [*args, *kwargs.values()])
            self.calls.append((func, tuple(None if isinstance(n, (TracedInt, TracedFloat)) else n for n in found)))
        if func is F.multi_head_attention_forward:
            return self._in_the_open(multi_head_attention, args, kwargs)
        outer, self.recorder.caller = self.recorder.caller, func
        out = func(*args, **kwargs)
        self.recorder.caller = outer
        numbers = list(_numbers([*args, *kwargs.values()]))
        if func in READERS:
            self._read(func, out, args, kwargs)
            numbers = [number for number in numbers if isinstance(number, TracedFloat)]  # no size is one
        elif numbers and func in _PRODUCTS and len(args) > 1 and self._is_product(func, args):
            numbers = []
        for number in numbers:
            self.pin(number)
        return out

    def _read(self, func: Any, out: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Lets the function's reader read; how it cannot be called freezes what the call touches."""
        if "input" in kwargs:
            args = (kwargs["input"], *args)
        kwargs = {_SYNONYMS.get(name, name): value for name, value in kwargs.items() if name != "input"}
        try:
            READERS[func](self, out, *args, **kwargs)
        except (TypeError, IndexError):
            for tensor in tree_leaves([out, args, kwargs]):
                if isinstance(tensor, Tensor):
                    name = getattr(func, "__name__", "a function")
                    self.recorder.table.freeze_axes(
                        self.recorder.units(tensor).axes, f"no rule for this call of {name}"
                    )

    def _in_the_open(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Calls our own version of a function, and watches what it calls."""
        self._inside += 1
        with self:
            out = func(*args, **kwargs)
        self._inside -= 1
        return out

    def axes(self) -> Iterable[TracedAxis]:
        """Every axis whose length matters."""
        return self._axes.values()

    def axis(self, tensor: Tensor, dim: int) -> TracedAxis:
        """Axis `dim` of a tensor."""
        return self.interned(self.recorder.units(tensor).axes[dim], tensor.size(dim))

    def part(self, tensor: Tensor, dim: int, positions: slice) -> TracedAxis:
        """Some positions of an axis."""
        axis = self.recorder.units(tensor).axes[dim]
        part = None if axis is None else Axis(axis.ids[..., positions])
        return self.interned(part, len(range(tensor.size(dim))[positions]))

    def interned(self, axis: Axis | None, size: int) -> TracedAxis:
        """The same object for the same units."""
        key = size if axis is None else (axis.ids.tobytes(), axis.ids.shape)
        return self._axes.setdefault(key, TracedAxis(None if axis is None else axis.ids, size))

    def equate(self, value: Any, axis: TracedAxis) -> None:
        """The forward code says that `value` is the length of `axis`."""
        self.equate_expression(expression_of(value), axis)

    def equate_expression(self, expression: Expression, axis: TracedAxis) -> None:
        """`expression` is the length of `axis`, which says something unless both are fixed."""
        if axis.ids is not None or not isinstance(expression, Constant):
            self.equations[expression, axis] = None

    def equate_all(self, values: Iterable[Any], tensor: Tensor) -> None:
        """One size for each axis of `tensor`; -1 says nothing."""
        for dim, value in enumerate(values):
            if int(value) != -1:
                self.equate(value, self.axis(tensor, dim))

    def pin(self, value: Any) -> None:
        """`value` stays what it is."""
        self.equalize(expression_of(value), Constant(plain(value)))

    def equalize(self, left: Expression, right: Expression) -> None:
        """Two expressions that are equal stay equal."""
        if left != right and "%" not in _operators(left) | _operators(right):
            self.equations[Operation("-", left, right), self.interned(None, 0)] = None

    def _sizes(self, tensor: Tensor, dim: int | None = None) -> Any:
        if dim is not None:
            return self._size(tensor, dim)
        return torch.Size([self._size(tensor, dim) for dim in range(tensor.dim())])

    def _size(self, tensor: Tensor, dim: int) -> int:
        axis = self.axis(tensor, dim) if tensor.dim() else None
        if axis is None or axis.ids is None:
            return tensor.size(dim)
        return traced(axis.size, Length(axis), self.equalize)  # type: ignore[arg-type]

    def _is_product(self, func: Any, args: Sequence[Any]) -> bool:
        """Multiplies a tensor by a number that was computed from sizes, which the tensor's producer makes up for."""
        tensor, number = (args[1], args[0]) if isinstance(args[1], Tensor) else args[:2]
        if not isinstance(tensor, Tensor) or not isinstance(number, (TracedInt, TracedFloat)):
            return False
        expression = expression_of(number)
        if not any(isinstance(leaf, Length) for leaf in leaves(expression)):
            return False
        value = plain(number)
        if _PRODUCTS[func]:
            return self.multiplied([tensor], Operation("/", Constant(1.0), expression), 1 / value)
        return self.multiplied([tensor], expression, value)

    def multiplied(self, tensors: Sequence[Tensor], expression: Expression, value: float) -> bool:
        """Notes a factor of the product of `tensors`; False where no parameter could make up for it."""
        candidates = []
        for tensor in tensors:
            producer, rows = self.recorder.units(tensor).proportional_to, self.recorder.rows_of(tensor)
            if producer is not None and rows.size:
                candidates.append((producer.tensors, rows))
        if candidates:
            self.factors.append(Factor(tuple(candidates), expression, value, self._calling_module()))
        return bool(candidates)

    def compensations(self) -> list[tuple[tuple[str, ...], Ids, Factor]]:
        """For each factor the parameters that make up for it, which nothing else may read; the others are pinned."""
        users = Counter(_key(*c, factor.expression) for factor in self.factors for c in factor.candidates)
        found: dict[Any, tuple[tuple[str, ...], Ids, Factor]] = {}
        for factor in self.factors:
            for tensors, rows in factor.candidates:
                key = _key(tensors, rows, factor.expression)
                if self.recorder.num_readers(tensors, rows) == users[key]:
                    found[key] = (tensors, rows, factor)
                    break
            else:
                self.equalize(factor.expression, Constant(factor.value))
        return list(found.values())

    def _calling_module(self) -> str:
        """The innermost module of the model whose code is running."""
        frame = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and owner in self._names:
                return self._names[owner]
            frame = frame.f_back
        return ""


def _key(tensors: tuple[str, ...], rows: Ids, expression: Expression) -> Any:
    return tensors, rows.tobytes(), expression


def _numbers(values: Iterable[Any]) -> Iterator[TracedInt | TracedFloat]:
    for value in values:
        if isinstance(value, (TracedInt, TracedFloat)):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _numbers(value)
        elif isinstance(value, slice):
            yield from _numbers((value.start, value.stop, value.step))


def _operators(expression: Expression) -> set[str]:
    if not isinstance(expression, Operation):
        return set()
    return {expression.operator} | _operators(expression.left) | _operators(expression.right)


# --- readers of calls: (mode, result, arguments as called) ---------------------------------------------------


def _flat(sizes: Sequence[Any]) -> Sequence[Any]:
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _view(mode: SizeMode, out: Tensor, /, tensor: Tensor, *sizes: Any, **named: Any) -> None:
    sizes = tuple(_flat(sizes or tuple(named.values())))
    if sizes and not isinstance(sizes[0], torch.dtype):
        mode.equate_all(sizes, out)


def _unflatten(mode: SizeMode, out: Tensor, /, tensor: Tensor, dim: int, sizes: Any) -> None:
    dim %= tensor.dim()
    for offset, size in enumerate(sizes):
        if int(size) != -1:
            mode.equate(size, mode.axis(out, dim + offset))


def _split(mode: SizeMode, out: Sequence[Tensor], /, tensor: Tensor, sizes: Any, dim: int = 0) -> None:
    if not isinstance(sizes, (tuple, list)):
        if out[-1].size(dim) != int(sizes):  # as many pieces as before, the last one no longer than the others
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
        rounded = Operation("//", Operation("+", whole, Constant(int(chunks) - 1)), Constant(int(chunks)))
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


def _narrow(mode: SizeMode, out: Tensor, /, tensor: Tensor, dim: int, start: Any, length: Any) -> None:
    if int(start):
        mode.equate(start, mode.part(tensor, dim, slice(0, int(start))))
    mode.equate(length, mode.axis(out, dim))


def _getitem(mode: SizeMode, out: Any, /, tensor: Tensor, index: Any, value: Any = None) -> None:
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
    """Where a slice starts and stops."""
    for bound in (bounds.start, bounds.stop):
        if bound is not None and not isinstance(bound, Tensor):
            _bound(mode, tensor, dim, bound)


def _bound(mode: SizeMode, tensor: Tensor, dim: int, bound: int) -> None:
    """A position counted from the start or, if negative, from the end."""
    size = tensor.size(dim)
    if int(bound) >= size or int(bound) == 0:
        if isinstance(bound, TracedInt):
            mode.equate(bound, mode.axis(tensor, dim)) if int(bound) == size else mode.pin(bound)
    elif int(bound) > 0:
        mode.equate(bound, mode.part(tensor, dim, slice(0, int(bound))))
    else:
        mode.equate(bound * -1, mode.part(tensor, dim, slice(size + int(bound), size)))


def _new(mode: SizeMode, out: Tensor, /, *sizes: Any, **named: Any) -> None:
    if sizes and isinstance(sizes[0], Tensor):
        sizes = sizes[1:]
    sizes = tuple(_flat(sizes or tuple(value for key, value in named.items() if key == "size")))
    mode.equate_all([size for size in sizes if isinstance(size, int)][: out.dim()], out)


def _full(mode: SizeMode, out: Tensor, /, *arguments: Any, **named: Any) -> None:
    values = [value for value in (*arguments, *named.values()) if not isinstance(value, Tensor)]
    mode.equate_all(next(value for value in values if isinstance(value, (tuple, list))), out)
    for value in values:
        if isinstance(value, TracedInt):  # not a size
            mode.pin(value)


def _layer_norm(mode: SizeMode, out: Tensor, /, tensor: Tensor, shape: Sequence[Any], *_: Any, **__: Any) -> None:
    for offset, size in enumerate(reversed(shape), start=1):
        mode.equate(size, mode.axis(tensor, tensor.dim() - offset))


def _group_norm(mode: SizeMode, out: Tensor, /, tensor: Tensor, num_groups: Any, *_: Any, **__: Any) -> None:
    channels = mode.axis(tensor, 1)
    if isinstance(num_groups, TracedInt):
        mode.equate(
            num_groups, channels if int(num_groups) == channels.size > 1 else mode.interned(None, int(num_groups))
        )
    elif channels.size == num_groups > 1:
        mode.equate(num_groups, channels)


def _convolution(mode: SizeMode, out: Tensor, /, tensor: Tensor, weight: Tensor, *rest: Any, **named: Any) -> None:
    groups = named.get("groups", rest[4] if len(rest) > 4 else 1)  # after bias, stride, padding, dilation
    channels = mode.axis(tensor, tensor.dim() - weight.dim() + 1)
    is_depthwise = int(groups) > 1 and int(groups) == channels.size
    mode.equate(groups, channels if is_depthwise else mode.interned(None, int(groups)))


def _transposed(mode: SizeMode, out: Tensor, /, tensor: Tensor, weight: Tensor, *rest: Any, **named: Any) -> None:
    """Its arguments: bias, stride, padding, output padding, groups, dilation."""
    _convolution(mode, out, tensor, weight, groups=named.get("groups", rest[4] if len(rest) > 4 else 1))


def _pad(mode: SizeMode, out: Tensor, /, tensor: Tensor, amounts: Sequence[Any], *_: Any, **__: Any) -> None:
    for amount in amounts:
        if isinstance(amount, TracedInt):
            mode.pin(amount)


def _attention(mode: SizeMode, out: Tensor, /, query: Tensor, key: Tensor, *rest: Any, **named: Any) -> None:
    """Without a scale, fused attention divides by the root of the head dim."""
    if (named.get("scale") if len(rest) < 5 else rest[4]) is not None:
        return
    axis = mode.axis(query, query.dim() - 1)
    if axis.ids is None:
        return
    factor = Operation("**", Length(axis), Constant(-0.5))  # type: ignore[arg-type]
    if not mode.multiplied([query, key], factor, axis.size**-0.5):
        mode.equalize(factor, Constant(axis.size**-0.5))


# Arguments that torch calls differently in functions of one reader.
_SYNONYMS: dict[str, str] = {
    **dict.fromkeys(("split_size", "split_sizes", "split_size_or_sections"), "sizes"),
    **dict.fromkeys(("indices", "sections", "indices_or_sections"), "where"),
}
_SIZES = frozenset({Tensor.shape.__get__, Tensor.size})  # type: ignore[attr-defined]
_EXITS = frozenset({Tensor.numpy, Tensor.__array__, Tensor.tolist})
_COUNTS = frozenset({Tensor.numel, Tensor.nelement, torch.numel})
# Functions of a tensor and a number; True where the number divides.
_PRODUCTS = {Tensor.mul: False, Tensor.__mul__: False, Tensor.__rmul__: False, Tensor.mul_: False, torch.mul: False} | {
    Tensor.div: True,
    Tensor.__truediv__: True,
    Tensor.div_: True,
    torch.div: True,
}
READERS: dict[Any, Callable[..., None]] = {
    **dict.fromkeys(
        (Tensor.view, Tensor.reshape, torch.reshape, Tensor.expand, Tensor.broadcast_to, torch.broadcast_to), _view
    ),
    **dict.fromkeys((Tensor.unflatten, torch.unflatten), _unflatten),
    **dict.fromkeys((Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes), _split),
    **dict.fromkeys((Tensor.chunk, torch.chunk), _chunk),
    **dict.fromkeys((Tensor.tensor_split, torch.tensor_split), _tensor_split),
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
