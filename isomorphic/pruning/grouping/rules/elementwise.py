"""Rules of element-wise operations, reductions and new tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isomorphic.pruning.grouping import axes as move
from isomorphic.pruning.grouping.axes import Axes
from isomorphic.pruning.grouping.call import Call
from isomorphic.pruning.grouping.units import Axis

# Operations f with f(c·x) = c·f(x) for c > 0: of one argument, and of all of them together.
_HOMOGENEOUS = frozenset(
    {"mul", "div", "neg", "clone", "contiguous", "dropout", "to", "_to_copy", "alias", "detach", "relu", "leaky_relu"}
)
_LINEAR = frozenset({"add", "sub", "copy"})
_JOINING = frozenset({"cat", "concat", "concatenate", "stack"})
_FEW = 64  # rows that a new tensor's last axis may have


def pointwise(call: Call) -> Axes:
    """Element-wise, under broadcasting."""
    keep_producer(call)
    return _broadcast(call, call.out.shape if isinstance(call.out, Tensor) else call.out[0].shape)


def _broadcast(call: Call, shape: Sequence[int]) -> Axes:
    operands = [(call.axes(tensor), call.shape(tensor)) for tensor in call.tensors]
    _note_maps(call, [axes for axes, _ in operands if len(axes) > 2])
    return move.broadcast(call.table, operands, shape, f"it meets a fixed axis in {call.name}")


def _note_maps(call: Call, operands: Sequence[Axes]) -> None:
    """Where one operand has channels along axis 1 and another along its pixels, the other one is a map, too."""
    if any(axes[1] is not None and not any(axes[2:]) for axes in operands):
        for axes in operands:
            if axes[1] is None:
                call.recorder.runs_over(axes[2:])


def keep_producer(call: Call) -> None:
    """What the result is still proportional to."""
    if call.name in _HOMOGENEOUS:
        factors = [tensor for tensor in call.tensors if call.units(tensor).proportional_to]
        if len(factors) == 1 and (call.name != "div" or factors[0] is call["self"]):
            call.pass_on(*factors)
        elif call.name == "mul" and len(factors) == 2 and _are_apart(call, *factors):
            call.pass_on(factors[0], in_product=True)  # as a matrix product does: q * k, which is summed next
    elif call.name in _JOINING:
        call.pass_on(*call.tensors, joined=True)
    elif call.name in _LINEAR and isinstance(call.get("other", call.tensors[0]), Tensor):
        call.pass_on(*call.tensors)


def _are_apart(call: Call, first: Tensor, second: Tensor) -> bool:
    """True where no parameter makes both factors: by such a one the product would grow with its square."""
    made = [
        {name for producer in call.units(one).proportional_to for name in producer.tensors} for one in (first, second)
    ]
    return not made[0] & made[1]


def where(call: Call) -> Axes | list[Axes]:
    """One of two by a condition; of a condition alone, the positions where it holds."""
    if "self" in call.arguments:
        return pointwise(call)
    call.table.freeze_axes(call.axes("condition"), "where numbers its positions")
    return [[None] for _ in call.out]


def cast(call: Call) -> Axes:
    """x.type_as(y): of y only the type counts."""
    call.tensors = [call["self"]]
    call.pass_on(call["self"])
    return call.axes("self")


def normal(call: Call) -> Axes:
    """Random numbers, of given means and deviations or of a size."""
    return pointwise(call) if call.tensors else factory(call)


def like(call: Call) -> Axes:
    """A new tensor of the argument's shape, or a result that keeps its axes: softmax, cumsum."""
    return call.axes("self")


def factory(call: Call) -> Axes:
    """A tensor made from sizes: each axis has units of its own, which the sizes' equations then hold to.

    Those of the last axis differ along the first, as the initial states of a recurrent network's layers do.
    """
    shape = call.out.shape
    if call.recorder.caller is None:  # TorchScript's sizes are not known
        return fixed(call)
    axes: Axes = [Axis(call.table.new(size)) if size > 1 else None for size in shape]
    if len(shape) > 1 and 1 < shape[0] <= _FEW and shape[-1] > 1:
        rows = call.table.new(shape[0] * shape[-1]).reshape(shape[0], shape[-1])
        call.table.keep_equal(rows)
        axes[-1] = Axis(rows, (0,))
    return axes


def fixed(call: Call) -> Axes:
    """A tensor that belongs to nothing: ranges, identities, masks."""
    return [None] * call.out.dim()


def reduction(call: Call) -> Axes:
    """Sums, means, extremes, norms over dims. A product or a median misses every unit: they stay.

    So do those that `argmax` numbers, or `max` beside their largest value, if the numbers are used.
    """
    if "other" in call.arguments:
        return pointwise(call)
    axes, dims = call.axes("self"), call.get("dim")
    rank = len(axes)
    chosen = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % rank for dim in chosen} if rank else set()
    along = [axis for dim in gone if (axis := axes[dim]) is not None]
    if call.name in ("sum", "mean", "amax", "max"):
        call.pass_on(call["self"], in_product=call.name == "sum" and bool(along))
    if call.name in ("prod", "median"):
        call.table.freeze_axes(along, f"each of its units counts in {call.name}")
    if call.name in ("argmax", "argmin", "max", "min"):
        call.numbered = tuple(axis.ids for axis in along)
    if call.get("keepdim"):
        axes = move.untied(call.table, axes, gone)
        return [None if dim in gone else axis for dim, axis in enumerate(axes)]
    return move.remove(call.table, axes, gone)


def loss(call: Call) -> Axes:
    """Differences, element by element, or their sum or mean."""
    shape = torch.broadcast_shapes(*(call.shape(tensor) for tensor in call.tensors))
    axes = _broadcast(call, shape)
    return axes if call.out.dim() == len(shape) else move.remove(call.table, axes, range(len(shape)))
