"""Sizes in forward code: a function mode that answers `x.shape` with traced integers and notes where calls use them.

Each size that the forward code gives to a view, a split or a factory is an equation: the expression behind it equals
the length of the axis that results. A number that goes anywhere else must stay what it is.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from isomorphic.pruning.expressions import Constant, Expression, Length, Operation, operators
from isomorphic.pruning.grouping.forward_line import forward_line
from isomorphic.pruning.grouping.integers import TracedFloat, TracedInt, as_int, expression_of, plain, traced
from isomorphic.pruning.grouping.multihead import multi_head_attention
from isomorphic.pruning.grouping.recorder import Recorder
from isomorphic.pruning.grouping.trial import Numbers, is_watched, numbers_in
from isomorphic.pruning.grouping.units import Axis, Ids

IN_MULTIHEAD = ", in nn.MultiheadAttention"  # of a line of forward code that calls one
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


@dataclass(frozen=True, eq=False)
class TracedAxis:
    """An axis of an activation as the trace saw it: ids (n,) or (rows …, n), None where it is fixed; its length."""

    ids: Ids | None
    size: int


_Rows = tuple[tuple[str, ...], Ids]  # parameters of one layer, by name, and rows of their dim 0


@dataclass(frozen=True)
class Factor:
    """A product is multiplied by a number computed from sizes.

    Attributes:
        candidates: for each factor of the product that some parameters make, the parameters' names and the rows of
            their dim 0, shape (m,); of several layers, where their results were joined.
        expression: the number, and its value in the dense model.
        holder: name of the module whose forward computes it.
        is_inside: the call that uses the product multiplies it itself, as fused attention does.
        where: the line of forward code.
    """

    candidates: tuple[Sequence[_Rows], ...]
    expression: Expression
    value: float
    holder: str
    is_inside: bool
    where: str


class SizeMode(TorchFunctionMode):
    """Collects equations and factors while a model runs.

    Args:
        recorder: of the same run.
        model: what runs.
        note_sizes: called for each function of `recorder.size_functions`; see `size_arguments.note_sizes`.
    """

    def __init__(self, recorder: Recorder, model: nn.Module, note_sizes: Callable[..., None]) -> None:
        super().__init__()
        self.recorder = recorder
        self._note_sizes = note_sizes
        self.equations: dict[tuple[Expression, TracedAxis], str] = {}  # and the line of forward code of each
        self.in_doubt: set[tuple[Expression, TracedAxis]] = set()  # of these, see `doubtful`
        self.guesses: dict[tuple[Expression, TracedAxis], Expression] = {}  # what constants in doubt may be
        self._casts: dict[Any, Expression] = {}  # by value: what the forward code has cast to it last
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
            return math.prod(self._sizes(*args, *kwargs.values()))  # their one argument is the tensor
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
        try:
            out = func(*args, **kwargs)
        finally:  # a forward may catch what is raised, and go on
            self.recorder.caller = outer
        numbers = list(_numbers([*args, *kwargs.values()]))
        if func in self.recorder.size_functions:
            self._note_sizes(self, func, out, args, kwargs)
            is_factor = func is F.scaled_dot_product_attention  # its scale, which the rule has seen to
            numbers = [] if is_factor else [number for number in numbers if isinstance(number, TracedFloat)]
        elif numbers and func in _PRODUCTS and self._is_product(func, _factors(args, kwargs), out):
            numbers = []
        for number in numbers:
            self.pin(number)
        return out

    def _line(self) -> str:
        return forward_line() + (IN_MULTIHEAD if self._inside else "")

    def _in_the_open(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Calls our own version of a function, and watches what it calls."""
        self._inside += 1
        try:
            with self:
                return func(*args, **kwargs)
        finally:
            self._inside -= 1

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
        says_something = axis.ids is not None or not isinstance(expression, Constant)
        if says_something and (expression, axis) not in self.equations:
            self.equations[expression, axis] = self._line()
        if isinstance(expression, Constant) and expression.value in self._casts:
            self.guesses.setdefault((expression, axis), self._casts[expression.value])

    def equate_all(self, values: Iterable[Any], tensor: Tensor) -> None:
        """One size for each axis of `tensor`; -1 says nothing, and neither does one that is itself a tensor."""
        for dim, value in enumerate(values):
            if isinstance(value, int) and as_int(value) != -1:
                self.equate(value, self.axis(tensor, dim))

    def pin(self, value: Any) -> None:
        """`value` stays what it is."""
        self.equalize(expression_of(value), Constant(plain(value)))

    def equalize(
        self, left: Expression, right: Expression, *, in_doubt: bool = False, where: str | None = None
    ) -> None:
        """Two expressions that are equal stay equal.

        Args:
            left, right: the expressions.
            in_doubt: the forward code has cast one to a number.
            where: the line of forward code; None: the one that runs.
        """
        if left != right and "%" not in {*operators(left), *operators(right)}:
            equation = Operation("-", left, right), self.interned(None, 0)
            if in_doubt and isinstance(right, Constant):
                self._casts[right.value] = left
                if isinstance(right.value, int):  # where it is used as a size is an equation of its own
                    return
            if in_doubt and equation not in self.equations:
                self.in_doubt.add(equation)
            elif not in_doubt:
                self.in_doubt.discard(equation)
            if equation not in self.equations:
                self.equations[equation] = self._line() if where is None else where

    def doubtful(self) -> frozenset[tuple[Expression, TracedAxis]]:
        """The equations that the cut model may well not need: the numbers in them may be computed anew there.

        These are casts, and where there are any, sizes that the forward code seems to spell out. If something was cast
        to such a number, `guesses` takes it for that: 8 in `view(b, n, 2, 8)` after `int(self.head_dim)`.
        """
        if not self._casts:
            return frozenset()
        constants = {one for one in self.equations if isinstance(one[0], Constant) and one[1].ids is not None}
        return frozenset(self.in_doubt | constants)

    def _sizes(self, tensor: Tensor, dim: int | None = None) -> Any:
        if dim is not None:
            return self._size(tensor, dim)
        return torch.Size([self._size(tensor, dim) for dim in range(tensor.dim())])

    def _size(self, tensor: Tensor, dim: int) -> int:
        axis = self.axis(tensor, dim) if tensor.dim() else None
        if axis is None or axis.ids is None:
            return tensor.size(dim)
        return traced(axis.size, Length(axis), self.equalize)  # type: ignore[arg-type]

    def _is_product(self, func: Any, args: Sequence[Any], out: Tensor) -> bool:
        """Multiplies a tensor by a number computed from sizes or attributes, which its producer makes up for."""
        tensor, number = (args[1], args[0]) if isinstance(args[1], Tensor) else args[:2]
        if not isinstance(tensor, Tensor) or not isinstance(number, (TracedInt, TracedFloat)):
            return False
        expression, value = expression_of(number), plain(number)
        if _PRODUCTS[func]:
            return self.multiplied([tensor], Operation("/", Constant(1.0), expression), 1 / value, out)
        return self.multiplied([tensor], expression, value, out)

    def multiplied(
        self, tensors: Sequence[Tensor], expression: Expression, value: float, out: Tensor | None = None
    ) -> bool:
        """Notes a factor of the product of `tensors`; False where no parameter could make up for it.

        Args:
            tensors, expression, value: as `Factor` has them.
            out: the product with the factor in it; None where a call multiplies it and goes on.
        """
        candidates: list[list[_Rows]] = []
        for tensor in tensors:
            units = self.recorder.units(tensor)
            made = [(one.tensors, self.recorder.rows_of(one, units)) for one in units.proportional_to]
            if made and all(rows.size for _, rows in made):
                if any(_share_rows(one, other) for one in made for earlier in candidates for other in earlier):
                    return False  # what makes up for it in one factor would do so in the other, too
                candidates.append(made)
        if candidates:
            holder = self._calling_module()
            factor = Factor(tuple(candidates), expression, value, holder, is_inside=out is None, where=self._line())
            self.factors.append(factor)
            if out is not None:
                units = self.recorder.units(out)
                units.factors |= {expression}
        return bool(candidates)

    def compensations(self) -> list[tuple[tuple[str, ...], Ids, Factor]]:
        """For each factor the parameters that make up for it, which nothing uses without it; the others are pinned."""
        users = Counter(
            _key(*made, factor.expression)
            for factor in self.factors
            for candidate in factor.candidates
            for made in candidate
            if factor.is_inside
        )
        found: dict[Any, tuple[tuple[str, ...], Ids, Factor]] = {}
        for factor in self.factors:
            for candidate in factor.candidates:
                keys = {_key(*made, factor.expression): made for made in candidate}
                without = {key: self.recorder.num_consumers(*made, factor.expression) for key, made in keys.items()}
                if all(count == users[key] for key, count in without.items()):
                    found |= {key: (*made, factor) for key, made in keys.items()}
                    break
            else:
                self.equalize(factor.expression, Constant(factor.value), where=factor.where)
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


def _factors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """Both arguments of a product in their order, however they were given."""
    return [*args, *(kwargs[name] for name in ("input", "other") if name in kwargs)]


def _share_rows(one: _Rows, other: _Rows) -> bool:
    return one[0] == other[0] and bool(np.isin(one[1], other[1]).any())


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
