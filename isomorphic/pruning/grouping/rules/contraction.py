"""Rules of products that sum over an axis: matrix products, linear layers, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import ascii_letters

import numpy as np
import torch
from torch import Tensor

from isomorphic.pruning.grouping import axes as move
from isomorphic.pruning.grouping.axes import Axes
from isomorphic.pruning.grouping.call import Call, UnknownCallError, only_if
from isomorphic.pruning.grouping.units import Axis, UnitTable

Operand = tuple[Axes, Sequence[int]]


def _contract(table: UnitTable, left: Operand, right: Operand, name: str) -> Axes:
    """(…, M, K) × (…, K, N): unites both K and the batch axes; the result keeps M and N."""
    rank = max(len(left[0]), len(right[0]))
    summed = rank  # a place of its own for K
    a = _placed(table, left, rank, {-2: rank - 2, -1: summed}, untie=(summed, rank - 2))
    b = _placed(table, right, rank, {-2: summed, -1: rank - 1}, untie=(summed, rank - 1))
    reason = f"it meets a fixed axis in {name}"
    result: Axes = []
    for dim in [*range(rank - 2), summed]:
        axis = move.unite_axes(table, [a[0][dim], b[0][dim]], [a[1].get(dim, 1), b[1].get(dim, 1)], reason)
        if dim != summed:
            result.append(axis)
            if axis is not None:
                table.heads.append(axis.ids)
    return [*result, a[0][rank - 2], b[0][rank - 1]]


def _placed(
    table: UnitTable, operand: Operand, rank: int, last: dict[int, int], untie: tuple[int, int]
) -> tuple[dict[int, Axis | None], dict[int, int]]:
    """Axes and sizes by place in the result; the two matrix axes do not depend on one another."""
    axes, shape = operand
    count = len(axes)
    place = {dim: dim + rank - count for dim in range(count - 2)} | {count + dim: new for dim, new in last.items()}
    found: dict[int, Axis | None] = dict.fromkeys(range(rank + 1))
    for dim, axis in enumerate(axes):
        found[place[dim]] = None if axis is None else table.tie(axis.moved(place), untie)
    return found, {place[dim]: size for dim, size in enumerate(shape)}


def matmul(call: Call) -> Axes:
    """matmul, mm, bmm, mv, dot."""
    left, right = call.tensors[-2:]
    (a, a_shape), (b, b_shape) = (call.axes(left), call.shape(left)), (call.axes(right), call.shape(right))
    call.pass_on(left if call.units(left).proportional_to else right, in_product=True)
    _as_linear(call, left, right)
    vector_left, vector_right = len(a) == 1, len(b) == 1
    if vector_left:
        a, a_shape = move.insert(a, 0), (1, *a_shape)
    if vector_right:
        b, b_shape = move.insert(b, 1), (*b_shape, 1)
    result = _contract(call.table, (a, a_shape), (b, b_shape), call.name)
    if vector_right:
        result = move.remove(call.table, result, [-1])
    return move.remove(call.table, result, [-1 if vector_right else -2]) if vector_left else result


def _as_linear(call: Call, activation: Tensor, weight: Tensor) -> None:
    """A matrix product with a parameter is a linear layer: x @ weight or x @ weight.t(), in batches, too.

    A batch of matrices (E, in, out), one for each expert, has its channels in common.
    """
    units = call.units(weight)
    if not units.leaf or units.leaf not in call.recorder.leaf_by_name:
        return
    leaf = call.recorder.leaf_by_name[units.leaf]
    own, used = leaf.units.axes, units.axes
    if len(own) < 2 or len(used) != len(own) or not isinstance(leaf.tensor, torch.nn.Parameter):
        return
    last = len(own) - 1
    is_transposed = _are_same(own[-2], used[-1])
    if len(own) > 2 and not _are_same(own[last - is_transposed], used[-1]):
        return
    out_dim, in_dim = (last - 1, last) if is_transposed else (last, last - 1)
    call.arguments["weight"] = weight
    roles = {("weight", out_dim): "out", ("weight", in_dim): "in"}
    call.layer("linear", roles, activation=activation, dims_of_leaf=True)


def _are_same(one: Axis | None, other: Axis | None) -> bool:
    return one is not None and other is not None and np.array_equal(one.ids, other.ids)


def add_matmul(call: Call) -> Axes:
    """addmm, baddbmm: the sum of an element-wise operand and a product."""
    first, left, right = call.tensors
    product = _contract(
        call.table, (call.axes(left), call.shape(left)), (call.axes(right), call.shape(right)), call.name
    )
    _as_linear(call, left, right)
    operands = [(product, call.out.shape), (call.axes(first), call.shape(first))]
    return move.broadcast(call.table, operands, call.out.shape, f"it meets a fixed axis in {call.name}")


def has_batched_weight(call: Call) -> bool:
    """Says whether a call of einsum multiplies an activation by a parameter of more than two dims, as it is stored.

    Other products are taken apart into permutations, views and matrix products. The views would merge a weight's
    experts with its channels. A weight that is computed on the way is not known here, and named if no layer has it.
    """
    tensors = call["tensors"]
    letters = _letters(call["equation"], [tensor.dim() for tensor in tensors])
    leaves = [call.units(tensor).leaf for tensor in tensors]
    large = [name for name in leaves if name and call.recorder.leaf_by_name[name].tensor.dim() > 2]
    if len(tensors) != 2 or len(large) != 1 or sum(map(bool, leaves)) != 1 or letters is None:
        reason = "einsum computes with it in a way that is not a layer's"
        call.recorder.without_layer.update(dict.fromkeys(large, reason))
        return False
    weight = tensors[leaves.index(large[0])]
    call.recorder.without_layer[large[0]] = "einsum computes with what is made of it"
    return id(weight) in call.recorder.leaves and _out_letter(letters, leaves.index(large[0])) is not None


def _letters(equation: str, dims: Sequence[int]) -> tuple[list[str], str] | None:
    """The letters of the operands and of the result: (["bi", "gio"], "bgo"); None for results left out, and diagonals.

    An ellipsis stands for as many new letters as it takes: "...i,gio->...go" of 3 and 3 dims is "ABi,gio->ABgo".
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    hidden = {dim - len(one) + 3 for one, dim in zip(operands, dims, strict=True) if "..." in one}
    if not arrow or len(hidden) > 1 or len(hidden) < ("..." in result):
        return None
    new = [letter for letter in ascii_letters if letter not in equation][: max(hidden, default=0)]
    *operands, result = (one.replace("...", "".join(new)) for one in (*operands, result))
    return None if any(len({*one}) < len(one) for one in operands) else (operands, result)


def _out_letter(letters: tuple[list[str], str], weight: int) -> str | None:
    """The letter of a weight's output channels, the last of the result that it has alone; None without inputs."""
    operands, result = letters
    own = [letter for letter in result if letter in operands[weight] and letter not in operands[1 - weight]]
    summed = [letter for letter in operands[weight] if letter not in result and letter in operands[1 - weight]]
    return own[-1] if own and summed else None


@only_if(has_batched_weight)
def einsum(call: Call) -> Axes:
    """A linear layer for each of several experts: "bi,gio->bgo" of x (B, in) and a weight (experts, in, out).

    Every letter has a place, the result's first: b 0, g 1, o 2, and i, which is summed over, 3. Axes of one letter
    are united. The weight's o is made by the layer and its i is read; g is a batch, which both matrices may have.
    """
    tensors = call["tensors"]
    found = _letters(call["equation"], [tensor.dim() for tensor in tensors])
    assert found is not None
    operands, result = found
    weight = next(n for n, tensor in enumerate(tensors) if call.units(tensor).leaf)
    call.pass_on(tensors[1 - weight], in_product=True)
    places = {letter: place for place, letter in enumerate(dict.fromkeys(result + "".join(operands)))}
    shared = {letter for letter in result if all(letter in one for one in operands)}
    apart = [place for letter, place in places.items() if letter not in shared]
    axes: dict[str, list[Axis | None]] = {letter: [] for letter in places}
    sizes: dict[str, list[int]] = {letter: [] for letter in places}
    for letters, tensor in zip(operands, tensors, strict=True):
        new_place = {dim: places[letter] for dim, letter in enumerate(letters)}
        for letter, axis, size in zip(letters, call.axes(tensor), call.shape(tensor), strict=True):
            axes[letter].append(None if axis is None else call.table.tie(axis.moved(new_place), apart))
            sizes[letter].append(size)
    out = _out_letter(found, weight)
    roles = {
        ("weight", dim): "out" if letter == out else "in"
        for dim, letter in enumerate(operands[weight])
        if letter == out or letter not in result
    }
    call.arguments["weight"] = tensors[weight]
    call.layer("linear", roles, activation=tensors[1 - weight], dims_of_leaf=True)
    united = {
        letter: move.unite_axes(call.table, axes[letter], sizes[letter], "it meets a fixed axis in einsum")
        if len(axes[letter]) > 1
        else axes[letter][0]
        for letter in places
    }
    call.table.heads += [axis.ids for letter in sorted(shared) if (axis := united[letter]) is not None]
    return [united[letter] for letter in result]


def linear(call: Call) -> Axes:
    weight, x = call.axes("weight"), (call.axes("input"), call.shape("input"))
    if len(weight) == 1:  # one output, without an axis
        raise UnknownCallError
    call.layer("linear", {("weight", 0): "out", ("weight", 1): "in", ("bias", 0): "out"}, activation=call["input"])
    if len(x[0]) == 1:
        x = (move.insert(x[0], 0), (1, *x[1]))
    transposed = (move.transpose(weight, 0, 1), call.shape("weight")[::-1])
    result = _contract(call.table, x, transposed, "linear")
    result = result[-1:] if call.out.dim() == 1 else result
    return with_bias(call, result, call.out.dim() - 1)


def with_bias(call: Call, result: Axes, dim: int) -> Axes:
    """Unites axis `dim` of a layer's result with its bias."""
    if isinstance(call.get("bias"), Tensor):
        bias = call.axes("bias")[0]
        size = call.out.shape[dim]
        result[dim] = move.unite_axes(
            call.table, [result[dim], bias], [size, size], f"it meets a fixed bias in {call.name}"
        )
    return result


def attention(call: Call) -> Axes:
    """softmax(q·kᵀ)·v with q (…, L, E), k (…, S, E), v (…, S, D)."""
    q, k, v = ((call.axes(name), call.shape(name)) for name in ("query", "key", "value"))
    if call.get("enable_gqa"):
        k, v = (_grouped_heads(one, q[1][-3]) for one in (k, v))
    transposed = (move.transpose(k[0], -2, -1), (*k[1][:-2], k[1][-1], k[1][-2]))
    logits = _contract(call.table, q, transposed, "attention")
    shape = (*call.out.shape[:-1], k[1][-2])
    if isinstance(call["attn_mask"], Tensor):
        operands = [(logits, shape), (call.axes("attn_mask"), call.shape("attn_mask"))]
        logits = move.broadcast(call.table, operands, shape, "it meets a fixed mask in attention")
    return _contract(call.table, (logits, shape), v, "attention")


def _grouped_heads(operand: Operand, heads: int) -> Operand:
    """Grouped-query attention: each key head serves several query heads in a row."""
    axes, shape = operand
    if shape[-3] == 1:  # the only key head serves all of them, as under broadcasting
        return operand
    repeated = move.take(axes, len(shape) - 3, np.repeat(np.arange(shape[-3]), heads // shape[-3]))
    return repeated, (*shape[:-3], heads, *shape[-2:])


def grouped_matmul(call: Call) -> Axes:
    """Mixture of experts: rows (T, K), those of one expert after the other, by the experts' weights (E, K, N).

    Both matrices may have the experts' axis, as the rows (E, T, K) of equally many tokens do. `offs` counts rows. The
    kernel wants rows of a multiple of 16 bytes, which is 8 numbers in half precision: channels go 8 at a time.
    """
    left, right = call["self"], call["mat2"]
    a, b = call.axes(left), call.axes(right)
    call.table.freeze_axes([*a[:-1], *b[:-2]], "experts take turns along it")
    a, b = move.untied(call.table, a, range(len(a))), move.untied(call.table, b, range(len(b)))
    call.layer("linear", {("mat2", len(b) - 1): "out", ("mat2", len(b) - 2): "in"}, activation=left)
    sizes = [call.shape(left)[-1], call.shape(right)[-2]]
    move.unite_axes(call.table, [a[-1], b[-2]], sizes, f"it meets a fixed axis in {call.name}")
    for axis in (a[-1], b[-1]):
        if axis is not None:
            blocks = axis.ids.reshape(-1, math.gcd(len(axis.ids), 8))
            call.table.unite(blocks[:, :1], blocks)
    return [*[None] * (call.out.dim() - 1), b[-1]]


def cdist(call: Call) -> Axes:
    """Distances of points (…, P, M) and (…, R, M)."""
    b = call.axes("x2")
    right = (move.transpose(b, -2, -1), (*call.shape("x2")[:-2], call.shape("x2")[-1], call.shape("x2")[-2]))
    return _contract(call.table, (call.axes("x1"), call.shape("x1")), right, "cdist")


def glu(call: Call) -> Axes:
    axes = call.axes("self")
    dim = call["dim"] % len(axes)
    size = call.shape("self")[dim]
    first, second = (move.take(axes, dim, slice(start, start + size // 2)) for start in (0, size // 2))
    operands = [(first, call.out.shape), (second, call.out.shape)]
    return move.broadcast(call.table, operands, call.out.shape, "it meets a fixed axis in glu")
