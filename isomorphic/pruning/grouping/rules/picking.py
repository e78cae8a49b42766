"""Rules of operations that choose positions by data: indexing, scattering, sorting, embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isomorphic.pruning.grouping import axes as move
from isomorphic.pruning.grouping.axes import Axes
from isomorphic.pruning.grouping.call import Call, UnknownCallError


def index(call: Call) -> Axes:
    """x[:, idx]: the indexed axes are frozen; the index's own axes take their place.

    A mask over several axes turns them into one: h[mask] with h (B, T, C) and a mask (B, T) is (n, C).
    """
    axes, given = call.axes("self"), call["indices"]
    call.pass_on(call["self"])
    indexed = _indexed_dims(given)
    call.table.freeze_axes([axes[dim] for dim in indexed], "an index picks from it")
    rest = move.remove(call.table, axes, indexed)
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    first = indexed[0] if together else 0
    for _ in range(call.out.dim() - len(rest)):
        rest = move.insert(rest, first)
    return rest


def _indexed_dims(given: Sequence[Tensor | None]) -> list[int]:
    """The axes that a list of indices stands for; a mask stands for as many as it has."""
    found: list[int] = []
    dim = 0
    for one in given:
        width = one.dim() if one is not None and one.dtype in (torch.bool, torch.uint8) else 1
        if one is not None:
            found += range(dim, dim + width)
        dim += width
    return found


def index_put(call: Call) -> Axes:
    """x[:, idx] = values: the indexed axes are frozen, the others run along with those of the values.

    A mask over several axes counts as one: in h[mask] = token with h (B, T, C), a mask (B, T) and a token (C,), the
    channels of h are those of the token.
    """
    axes, given, shape = call.axes("self"), call["indices"], call.shape("self")
    indexed = _indexed_dims(given)
    if indexed != [*range(indexed[0], indexed[0] + len(indexed))]:
        raise UnknownCallError
    call.table.freeze_axes([axes[dim] for dim in indexed], "an index writes to it")
    rest = move.remove(call.table, axes, indexed)
    masks = [one for one in given if one is not None and one.dtype in (torch.bool, torch.uint8)]
    rank = 1 if masks else max(one.dim() for one in given if one is not None)
    for _ in range(rank):
        rest = move.insert(rest, indexed[0])
    sizes = [*shape[: indexed[0]], *[1] * rank, *shape[indexed[-1] + 1 :]]
    values = (call.axes("values"), call.shape("values"))
    if len(values[1]) > len(sizes):
        raise UnknownCallError
    full = [max(pair) for pair in zip(sizes, [1] * (len(sizes) - len(values[1])) + [*values[1]], strict=True)]
    move.broadcast(call.table, [(rest, sizes), values], full, "it meets a fixed axis in index_put")
    return move.untied(call.table, axes, indexed)


def masked_scatter(call: Call) -> Axes:
    """x[mask] = source, in order, with a mask of x's shape that does not differ along its last axis.

    x (B, T, C) and the source (n, C) have their channels in common.
    """
    x, source = call.shape("self"), call.shape("source")
    axes, mask = call.axes("self"), call.axes("mask")[-1]
    is_expanded = mask is not None and call.table.are_copies(mask.ids)
    if len(source) < 2 or source[-1] != x[-1] or not (is_expanded or call.shape("mask")[-1] == 1):
        raise UnknownCallError
    call.table.freeze_axes([*axes[:-1], *call.axes("source")[:-1]], "a mask writes to it")
    lasts = [axes[-1], call.axes("source")[-1]]
    last = move.unite_axes(call.table, lasts, [x[-1]] * 2, "it meets a fixed axis in masked_scatter")
    if is_expanded:
        move.unite_axes(call.table, [last, mask], [x[-1]] * 2, "it meets a fixed axis in masked_scatter")
    return [*move.untied(call.table, axes[:-1], range(len(axes))), last]


def index_select(call: Call) -> Axes:
    call.pass_on(call["self"])
    dim = call["dim"] % len(call.shape("self"))
    return move.fix(call.table, call.axes("self"), [dim], "an index picks from it")


def index_fill(call: Call) -> Axes:
    """Positions along one axis become a number, or a tensor of no axes."""
    dim = call["dim"] % len(call.shape("self"))
    return move.fix(call.table, call.axes("self"), [dim], "an index writes to it")


def gather(call: Call) -> Axes:
    """out[i, j] = self[index[i, j], j]: other axes are cut to the index's length, from the start."""
    shape, dim = call.shape("self"), call["dim"] % len(call.shape("self"))
    axes = move.fix(call.table, call.axes("self"), [dim], "an index picks from it")
    own = [1 if d == dim else size for d, size in enumerate(shape)]
    operands = [(axes, own), (call.axes("index"), list(call.shape("index")))]
    if any(a != b for d, (a, b) in enumerate(zip(shape, call.out.shape, strict=True)) if d != dim):
        raise UnknownCallError
    return move.broadcast(call.table, operands, call.out.shape, "it meets a fixed axis in gather")


def ordered(call: Call) -> Axes:
    """topk, sort, argsort, running products: the order of units counts."""
    axes = call.axes("self")
    if not axes:
        return axes
    return move.fix(call.table, axes, [call["dim"] % len(axes)], f"its units have an order in {call.name}")


def embedding(call: Call) -> Axes:
    weight = call.axes("weight")
    call.layer("embedding", {("weight", 1): "out"}, activation=call["indices"])
    place = {0: 0, 1: call.out.dim() - 1}
    last = weight[1]
    return [*call.axes("indices"), None if last is None else last.moved(place)]


def scatter(call: Call) -> Axes:
    """index_add, scatter and their like: positions along one axis are data, all others run along with the source's."""
    rank = call.out.dim()
    dim = call["dim"] % rank
    operands: list[tuple[Axes, Sequence[int]]] = []
    for tensor in call.tensors:
        axes, shape = call.axes(tensor), list(call.shape(tensor))
        if len(axes) == rank:
            axes, shape[dim] = move.fix(call.table, axes, [dim], "an index writes to it"), 1
            if any(size not in (1, call.out.shape[d]) for d, size in enumerate(shape)):
                raise UnknownCallError
            operands.append((axes, shape))
    return move.broadcast(call.table, operands, call.out.shape, f"it meets a fixed axis in {call.name}")


def pack_sequence(call: Call) -> list[Axes]:
    """(B, T, …) or (T, B, …) to (positions, …): sequences of different lengths, without their padding."""
    axes = move.remove(call.table, call.axes("input"), [0, 1])
    call.flow = call.units("input").flow
    return [move.insert(axes, 0), [None]]


def embedding_bag(call: Call) -> list[Axes]:
    """Sums or means of embeddings (B, D)."""
    call.layer("embedding", {("weight", 1): "out"}, activation=call["indices"])
    return [[None, call.axes("weight")[1]], *([None] * tensor.dim() for tensor in call.out[1:])]


def weight_norm(call: Call) -> list[Axes]:
    """v·g/‖v‖, and the norms."""
    operands = [(call.axes(name), call.shape(name)) for name in ("v", "g")]
    axes = move.broadcast(call.table, operands, call.shape("v"), "it meets a fixed axis in weight_norm")
    return [axes, call.axes("g")]


def triangle(call: Call) -> Axes:
    """tril, triu: rows and columns have an order."""
    axes = call.axes("self")
    call.table.freeze_axes(axes[-2:], f"it has an order in {call.name}")
    return axes


def diagonal(call: Call) -> Axes:
    """The two axes have an order, and become one: the last."""
    axes, rank = call.axes("self"), len(call.shape("self"))
    if rank == 1 or call.out.dim() != rank - 1:  # `diag` of a vector is a matrix
        raise UnknownCallError
    gone = {call.get("dim1", 0) % rank, call.get("dim2", 1) % rank}
    call.table.freeze_axes([axes[dim] for dim in gone], "it has an order in diagonal")
    return [*move.remove(call.table, axes, gone), None]
