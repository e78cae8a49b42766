"""What is left of a channel whose weights are zero, and products in which that counts.

A channel that is cut counts for nothing. With its weights at zero it mostly counts for nothing, too: a ReLU of zero is
zero, and what reads the channel has zeros in its place. A softmax of zero is not zero, and neither are a sigmoid and
elu(x) + 1. That matters where two activations are multiplied and summed over the channel:

    q, k of linear attention (…, 8 dims), q.softmax(-1) · k.softmax(-2): Σ over dims of what is positive everywhere

There a dim with small weights is no dim of little use, no score tells what is lost without it, and zeros are no measure
of the cut. So the channel stays. Where one of the factors is zero, as v is in softmax(q kᵀ) v over channels, it may go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from isomorphic.pruning.grouping.axes import Axes
from isomorphic.pruning.grouping.call import Call, Rule
from isomorphic.pruning.grouping.rules import contraction, elementwise, layers
from isomorphic.pruning.grouping.rules.table import find_rule

REASON = "a product sums over it, in which its zeros would count"
# Of a new tensor's values: those that are zeros, or will be written to.
_BLANK = frozenset({"zeros", "new_zeros", "zeros_like", "zero", "empty", "empty_like"})
# What operations make of zeros. No memoised function: a trace runs without the memory of those that it asks.
_known: dict[Any, bool] = {}
# The summed axis of both factors, by rule and the names of the arguments.
_FACTORS: dict[Rule, tuple[tuple[str, int], tuple[str, int]]] = {
    contraction.linear: (("input", -1), ("weight", -1)),
    contraction.attention: (("query", -1), ("key", -1)),
}


def note_zeros(call: Call) -> bool:
    """Returns True if the result need not be zero where a unit's weights are; freezes the units where that counts.

    Args:
        call: an operation that has run.
    """
    rule = find_rule(call.func)
    if rule in (contraction.matmul, contraction.add_matmul, *_FACTORS):
        return not call.is_layer and _of_product(call, rule)
    if call.is_layer:  # its rows, and the scale and shift of a norm, are zero
        return False
    if rule in (layers.layer_norm, layers.group_norm, elementwise.fixed):
        return True
    if rule in (elementwise.like, elementwise.factory):
        is_new = rule is elementwise.factory or "softmax" in call.name or call.name.endswith("_like")
        return call.name not in _BLANK if is_new else _is_kept(call, call.tensors[0])
    if rule in (elementwise.pointwise, elementwise.where):
        return _of_pointwise(call)
    return call.name == "logsumexp" or any(_is_kept(call, tensor) for tensor in call.tensors)


def _is_kept(call: Call, tensor: Tensor) -> bool:
    return call.units(tensor).nonzero


def _counts(call: Call, tensor: Tensor) -> bool:
    """True for a factor or summand that is not zero: what carries no units is not made by any."""
    units = call.units(tensor)
    return units.nonzero or not any(units.axes)


def _of_pointwise(call: Call) -> bool:
    tensors = [tensor for tensor in call.tensors if tensor.is_floating_point() or tensor.is_complex()]
    if call.name == "mul":
        return all(_counts(call, tensor) for tensor in tensors)
    if call.name == "div":
        return isinstance(call["self"], Tensor) and _counts(call, call["self"])
    if call.name == "copy":
        return _counts(call, call["src"])
    is_random = torch.Tag.nondeterministic_seeded in call.func.tags  # dropout, which leaves zeros alone
    return any(_counts(call, tensor) for tensor in tensors) or (not is_random and _is_nonzero_at_zero(call))


def _is_nonzero_at_zero(call: Call) -> bool:
    """True where the operation makes something of zeros: exp 0 = 1, 0 + 1 = 1."""
    given = tuple((name, _plain(value)) for name, value in call.arguments.items())
    try:
        return any(_at_zero(call.func, given, condition) for condition in (False, True))
    except TypeError:  # an argument that cannot be looked up, such as a generator
        return False


def _plain(value: Any) -> Any:
    return value.dtype if isinstance(value, Tensor) else tuple(value) if isinstance(value, list) else value


def _at_zero(func: Any, given: tuple[tuple[str, Any], ...], condition: bool) -> bool:
    """Does `func` of zeros give anything else, its tensors of whole numbers and conditions being `condition`?"""
    key = func, given, condition
    if key not in _known:
        with _disable_current_modes():
            _known[key] = _computed(func, given, condition)
    return _known[key]


def _computed(func: Any, given: tuple[tuple[str, Any], ...], condition: bool) -> bool:
    kinds = {argument.name: "Tensor" in str(argument.type) for argument in func._schema.arguments}
    arguments = {}
    for name, value in given:
        if kinds.get(name) and isinstance(value, torch.dtype):
            fill = 0 if value.is_floating_point or value.is_complex else int(condition)
            value = torch.full((1,), fill, dtype=value, device="cpu")
        arguments[name] = value
    arguments.pop("device", None)
    try:
        found = func(**arguments)
    except (RuntimeError, NotImplementedError, ValueError, IndexError):
        return False
    result = found if isinstance(found, Tensor) else found[0]
    return bool((result != 0).any())


def _of_product(call: Call, rule: Rule | None) -> bool:
    """Freezes the summed units where neither factor is zero; the result is kept where the factor of its axis is."""
    names = _FACTORS.get(rule) if rule else None  # type: ignore[arg-type]
    if names is None:
        left, right = call.tensors[-2:]
        summed = (left, -1), (right, -2 if len(call.axes(right)) > 1 else -1)
    else:
        summed = tuple((call[name], dim) for name, dim in names)  # type: ignore[assignment]
    if all(_is_kept(call, tensor) for tensor, _ in summed):
        call.table.freeze_axes([_axis(call.axes(tensor), dim) for tensor, dim in summed], REASON)
    if rule is contraction.attention:
        return _is_kept(call, call["value"])
    outer = [(tensor, _axis(call.axes(tensor), -2 if dim == -1 else -1)) for tensor, dim in summed]
    added = call.tensors[:-2] if rule is contraction.add_matmul else []
    return any(_is_kept(call, tensor) and axis is not None for tensor, axis in outer) or any(
        _is_kept(call, tensor) for tensor in added
    )


def _axis(axes: Axes, dim: int) -> Any:
    return axes[dim] if len(axes) >= -dim else None
