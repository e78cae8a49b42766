"""Data movement on axes: ids follow data through views, permutations, slices, concatenations and broadcasts.

A tensor's units are one `Axis` or None for each of its axes; None means fixed (or of length 1). Functions take and
return lists of them.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from isomorphic.pruning.grouping.units import Axis, Ids, UnitTable

Axes = list[Axis | None]

INTERLEAVED = "its blocks are interleaved with other channels"


class ViewForm(enum.Enum):
    """What a view makes of channels that it takes apart."""

    ROWS = "rows of channels, along the innermost axis: (heads, dims)"
    MAP = "maps, which something runs over: (channels, height, width)"
    PARTS_INSIDE = "channels of several parts, which are picked: (channels, parts)"
    PARTS_OUTSIDE = "heads of several parts, such as q, k and v, which are picked: (heads, parts, dims)"


def permute(axes: Axes, order: Sequence[int]) -> Axes:
    """Axes in a new order: axis i of the result is axis order[i]."""
    order = [dim % len(axes) for dim in order]
    place = {old: new for new, old in enumerate(order)}
    return [None if (axis := axes[old]) is None else axis.moved(place) for old in order]


def transpose(axes: Axes, first: int, second: int) -> Axes:
    """Two axes exchanged."""
    order = list(range(len(axes)))
    if order:
        order[first], order[second] = order[second], order[first]
    return permute(axes, order)


def insert(axes: Axes, dim: int) -> Axes:
    """A new axis of length 1 at `dim`."""
    place = {old: old + (old >= dim) for old in range(len(axes))}
    moved: Axes = [None if axis is None else axis.moved(place) for axis in axes]
    return [*moved[:dim], None, *moved[dim:]]


def remove(table: UnitTable, axes: Axes, dims: Iterable[int]) -> Axes:
    """Without some axes; units that differed along them are tied."""
    gone = {dim % len(axes) for dim in dims} if axes else set()
    kept = [dim for dim in range(len(axes)) if dim not in gone]
    place = {old: new for new, old in enumerate(kept)}
    return [None if (axis := axes[dim]) is None else table.tie(axis, gone).moved(place) for dim in kept]


def untied(table: UnitTable, axes: Axes, dims: Iterable[int]) -> Axes:
    """With nothing that differs along `dims`."""
    dims = tuple(dims)
    return [None if axis is None else table.tie(axis, dims) for axis in axes]


def fix(table: UnitTable, axes: Axes, dims: Iterable[int], reason: str) -> Axes:
    """With some axes fixed: their units stay, and nothing differs along them any more."""
    dims = tuple(dims)
    table.freeze_axes((axes[dim] for dim in dims), reason)
    return [None if dim in dims else axis for dim, axis in enumerate(untied(table, axes, dims))]


def take(axes: Axes, dim: int, positions: slice | Ids) -> Axes:
    """Some positions of axis `dim`, of its units and of whatever differs along it."""
    result = list(axes)
    for number, axis in enumerate(axes):
        if axis is None:
            continue
        if number == dim:
            result[number] = Axis(axis.ids[..., positions], axis.rows)
        elif dim in axis.rows:
            index = [slice(None)] * axis.ids.ndim
            index[axis.rows.index(dim)] = positions  # type: ignore[call-overload]
            result[number] = Axis(axis.ids[tuple(index)], axis.rows)
    return drop_short(result)


def drop_short(axes: Axes) -> Axes:
    """Axes of length 1 carry nothing, and nothing differs along them."""
    result: Axes = []
    for axis in axes:
        if axis is None or axis.ids.shape[-1] == 1:
            result.append(None)
            continue
        if 1 in axis.ids.shape[:-1]:
            rows = tuple(row for row, size in zip(axis.rows, axis.ids.shape, strict=False) if size > 1)
            axis = Axis(axis.ids.reshape(*(size for size in axis.ids.shape[:-1] if size > 1), -1), rows)
        result.append(axis)
    return result


def select(table: UnitTable, axes: Axes, dim: int, index: int) -> Axes:
    """One position of axis `dim`, which disappears."""
    axis = axes[dim]
    if axis is not None:
        table.freeze(axis.ids, "one of its units is picked by number")
    return remove(table, take(axes, dim, np.array([index])), [dim])


def unite_axes(table: UnitTable, axes: Sequence[Axis | None], sizes: Sequence[int], reason: str) -> Axis | None:
    """One axis of the result of an element-wise operation.

    Args:
        axes: this axis of each operand, in the result's coordinates.
        sizes: its length in each operand; those of length 1 are broadcast and do not count.
        reason: why the others are frozen if one operand is fixed here.
    """
    carried = [axis for axis, size in zip(axes, sizes, strict=True) if size > 1]
    units = [axis for axis in carried if axis is not None]
    if len(units) < len(carried):
        table.freeze_axes(units, reason)
        return None
    if not units:
        return None
    for other in units[1:]:
        dims = tuple(sorted({*units[0].rows, *other.rows}))
        first, second = units[0].over(dims), other.over(dims)
        if bool(units[0].rows) != bool(other.rows) and any(table.are_copies(one.ids) for one in (units[0], other)):
            # copies are alike: as many as a row has, of which all rows keep equally many, and any of them
            first, second = (one.reshape(-1, one.shape[-1])[0] for one in (first, second))
        table.unite(first, second)
    return max(units, key=lambda axis: (axis.ids.ndim, table.is_section(axis.ids)))  # the most detailed, else the first


def broadcast(
    table: UnitTable, operands: Sequence[tuple[Axes, Sequence[int]]], shape: Sequence[int], reason: str
) -> Axes:
    """The axes of an element-wise result of `shape`, from (axes, shape) of each operand, aligned at the right."""
    ranks = [len(shape) - len(sizes) for _, sizes in operands]
    shifted = []
    for (axes, _), rank in zip(operands, ranks, strict=True):
        place = {old: old + rank for old in range(len(axes))}
        shifted.append([None if axis is None else axis.moved(place) for axis in axes])
    result: Axes = []
    for dim in range(len(shape)):
        here = [
            (axes[dim - rank], sizes[dim - rank])
            for axes, (_, sizes), rank in zip(shifted, operands, ranks, strict=True)
            if dim >= rank
        ]
        result.append(unite_axes(table, [axis for axis, _ in here], [size for _, size in here], reason))
    return result


def concatenate(table: UnitTable, pieces: Sequence[tuple[Axes, Sequence[int]]], dim: int, reason: str) -> Axes:
    """The axes of a concatenation along `dim`, from (axes, shape) of each piece."""
    cleaned = []
    alike = {axes[dim].rows if axes[dim] is not None else () for axes, _ in pieces}  # type: ignore[union-attr]
    for axes, _ in pieces:
        along = {row for axis in axes if axis is not None for row in axis.rows}
        rows = axes[dim].rows if axes[dim] is not None and len(alike) > 1 else ()  # type: ignore[union-attr]
        cleaned.append(untied(table, axes, {dim} & along) if not rows else _without_rows(table, axes, dim))
    result: Axes = []
    for place in range(len(pieces[0][1])):
        here = [axes[place] for axes in cleaned]
        sizes = [shape[place] for _, shape in pieces]
        result.append(_joined(table, here, sizes) if place == dim else unite_axes(table, here, sizes, reason))
    return result


def _without_rows(table: UnitTable, axes: Axes, dim: int) -> Axes:
    axis = axes[dim]
    tied = untied(table, axes, [dim])
    return [table.tie(axis, axis.rows) if place == dim and axis else other for place, other in enumerate(tied)]


def _joined(table: UnitTable, axes: Sequence[Axis | None], sizes: Sequence[int]) -> Axis | None:
    """Pieces one after the other, all of them with the same rows or with none."""
    if all(axis is None for axis in axes) and len([size for size in sizes if size]) != 1:
        return None
    ids = [
        table.fixed(size, "it is joined with positions that no layer makes") if axis is None else axis.ids
        for axis, size in zip(axes, sizes, strict=True)
    ]
    return Axis(np.concatenate(ids, axis=-1), next((axis.rows for axis in axes if axis is not None), ()))


def stack(table: UnitTable, pieces: Sequence[tuple[Axes, Sequence[int]]], dim: int, reason: str) -> Axes:
    """The axes of a stack at the new axis `dim`: pieces keep their own units, and equally many of them."""
    inserted = [(insert(axes, dim), shape) for axes, shape in pieces]
    result: Axes = []
    for place in range(len(inserted[0][0])):
        here = [axes[place] for axes, _ in inserted]
        units = [axis for axis in here if axis is not None]
        if not units:
            result.append(None)
        elif len(units) < len(here):
            table.freeze_axes(units, reason)
            result.append(units[0])
        elif any(axis.rows for axis in units) or len(units) == 1:
            sizes = [axis.ids.shape[-1] for axis in units]
            result.append(unite_axes(table, here, sizes, reason))
        else:
            rows = np.stack([axis.ids for axis in units])
            table.keep_equal(rows)
            result.append(Axis(rows, (dim,)))
    return result


class Segment(NamedTuple):
    """Consecutive axes of a view's argument that become consecutive axes of its result."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def segments(before: Sequence[int], after: Sequence[int]) -> list[Segment]:
    """Splits a view of shape `before` as `after` into the smallest independent parts; axes of length 1 are left out."""
    old = [(dim, size) for dim, size in enumerate(before) if size != 1]
    new = [(dim, size) for dim, size in enumerate(after) if size != 1]
    found, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        start_i, start_j, left, right = i, j, old[i][1], new[j][1]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * old[i][1], i + 1
            else:
                right, j = right * new[j][1], j + 1
        found.append(Segment(tuple(d for d, _ in old[start_i:i]), tuple(d for d, _ in new[start_j:j])))
    return found


def split_axes(
    axes: Axes, before: Sequence[int], after: Sequence[int], *, with_rows: bool = False
) -> dict[int, Segment]:
    """The axes with units that a view takes apart, and what each becomes; `with_rows` counts those with rows, too."""
    part_of = {dim: part for part in segments(before, after) for dim in part.before} if 0 not in before else {}
    carried = {dim for dim, axis in enumerate(axes) if axis is not None and (with_rows or not axis.rows)}
    return {d: part for d, part in part_of.items() if d in carried and part.before == (d,) and len(part.after) > 1}


def view_as_map(table: UnitTable, axes: Axes, before: Sequence[int], after: Sequence[int]) -> Axes:
    """The axes of a view that makes maps, which a convolution runs over, of rows of numbers.

    A channel of the map is all of its pixels, which a linear layer makes one by one; as `flatten` has it the other way:

        x (1, 256)                axis 1 has ids [0 1 … 255]
        x.view(1, 16, 4, 4)       axis 1 has ids [0 16 … 240]; 0 is united with 1 … 15, 16 with 17 … 31, …
    """
    result: Axes = [None] * len(after)
    split = split_axes(axes, before, after)
    for dim, part in split.items():
        axis = axes[dim]
        assert axis is not None
        pixels = axis.ids.reshape(after[part.after[0]], -1)
        table.unite(pixels[:, :1], pixels)
        result[part.after[0]] = Axis(pixels[:, 0])
    others = view(table, [None if dim in split else axis for dim, axis in enumerate(axes)], before, after)
    return [mine or other for mine, other in zip(result, others, strict=True)]


def view(
    table: UnitTable, axes: Axes, before: Sequence[int], after: Sequence[int], form: ViewForm = ViewForm.ROWS
) -> Axes:
    """The axes of a view (a reshape in row-major order) of shape `before` as `after`.

    Channels that are split into (rows, n) keep their ids, differing along the rows: each row keeps equally many, each
    its own choice, and each row is a section that may go as a whole. With more than one outer axis (3, heads, head dim)
    the outer ones are tied. Merging axes in another order than the one they were split in ties them, too. Two other
    forms are known later than the view itself:

        parts outside    (heads, 3, head dim): nothing is tied; the sections, along the outermost axis, are whole heads
        parts inside     (heads, head dim, 3): the units are those of the axis before the parts, which are tied
    """
    if 0 in before:
        return [None] * len(after)
    parts = segments(before, after)
    part_of = {dim: part for part in parts for dim in part.before}
    result: list[list[tuple[Axis, int]]] = [[] for _ in after]
    for dim, axis in enumerate(axes):
        if axis is not None:
            moved, place = _view_axis(table, axes, dim, part_of, before, after, form)
            result[place].append((moved, dim))
    return [_resolve(table, axes, found) for found in _with_sections(table, result, form)]


def _view_axis(
    table: UnitTable,
    axes: Axes,
    dim: int,
    part_of: dict[int, Segment],
    before: Sequence[int],
    after: Sequence[int],
    form: ViewForm,
) -> tuple[Axis, int]:
    """One axis with its rows after a view, and where it lands.

    Attention with 12 heads of 64 dims takes 768 channels apart and puts them together again. The ids of the channels:

        x (1, 5, 768)                  axis 2 has ids [0 1 … 767], and no rows
        x.view(1, 5, 12, 64)           axis 3 has ids [[0 … 63] [64 … 127] … [704 … 767]], one row for each
                                       position of axis 2: shape (12, 64), rows (2,)
          .transpose(1, 2)             (1, 12, 5, 64): axis 3 has the same ids, rows (1,); no view, see `permute`
          .transpose(1, 2)             (1, 5, 12, 64): rows (2,) again
          .reshape(1, 5, 768)          axis 2 has ids [0 1 … 767], and no rows
    """
    axis, own = axes[dim], part_of[dim]
    assert axis is not None
    if axis.rows and axis.rows[-1] in own.before and axis.rows[-1] > dim:  # merged against the order of the split
        table.freeze_axes([axes[axis.rows[-1]]], INTERLEAVED)
        axis = table.tie(axis, axis.rows[-1:])
    parts = sorted({own, *(part_of[row] for row in axis.rows)})
    if all(len(part.before) == len(part.after) == 1 for part in parts):  # nothing is split or merged
        place = {part.before[0]: part.after[0] for part in parts}
        return axis.moved(place), place[dim]
    # The ids at every position of all axes that take part: what the view does to data, numpy does to them.
    old = [d for part in parts for d in part.before]  # [2] for the view, [2, 3] for the reshape back
    new = [d for part in parts for d in part.after]  # [2, 3] for the view, [2] for the reshape back
    ids = np.moveaxis(axis.over(tuple(d for d in old if d != dim)), -1, old.index(dim))
    ids = np.broadcast_to(ids, [before[d] for d in old]).reshape([after[d] for d in new])  # (768,) -> (12, 64), or back
    row_dims = [d for row in axis.rows for d in part_of[row].after]
    return _axis_of(table, ids, new, own.after, row_dims, form)


def _axis_of(
    table: UnitTable, ids: Ids, dims: Sequence[int], own: Sequence[int], row_dims: Sequence[int], form: ViewForm
) -> tuple[Axis, int]:
    """The axis with rows that a view has made of another one, and where it lies.

    Of the axes that the old one has become, the innermost along which ids differ is the new one. The others along which
    they differ are new rows: of ids (12, 64) over `dims` [2, 3], all of them its own, axis 3 is the new one and axis 2
    its row.

    Args:
        ids: at every position of the result's axes `dims`, in this order.
        own: those of `dims` that the old axis has become.
        row_dims: those that its rows have become, outermost first.
        form: see `view`.
    """
    varied = [d for position, d in enumerate(dims) if _varies(ids, position)]
    split = [d for d in own if d in varied]
    parts = [split.pop()] if form is ViewForm.PARTS_INSIDE and len(split) > 1 else []
    place, new_rows = (split[-1], split[:-1]) if split else (own[-1], [])
    old_rows = dict.fromkeys(d for d in row_dims if d in varied and d not in own)  # each of them once
    order = (*parts, *old_rows, *new_rows, place)
    ids = ids[tuple(slice(None) if d in order else 0 for d in dims)]  # along the others they are all alike
    left = [d for d in dims if d in order]
    ids = np.ascontiguousarray(ids.transpose([left.index(d) for d in order]))
    if parts:
        table.unite_outer(ids)
    if new_rows and form is ViewForm.PARTS_OUTSIDE:
        table.keep_equal(ids.reshape(-1, ids.shape[-1]))
    elif new_rows:
        _split(table, ids)
    return Axis(ids, order[:-1]), place


def _varies(ids: Ids, dim: int) -> bool:
    first = ids.take([0], axis=dim)
    return bool((ids != first).any())


def _split(table: UnitTable, ids: Ids) -> None:
    """Units (…, r, n) that a view has just arranged in rows: tied over the outer axes, equally many in each row."""
    while ids.ndim > 2:
        table.unite_outer(ids)
        ids = ids[0]
    table.keep_equal(ids)


def _with_sections(
    table: UnitTable, result: list[list[tuple[Axis, int]]], form: ViewForm
) -> list[list[tuple[Axis, int]]]:
    """Gives each axis that new rows run along, and that carries nothing else, the ids of the blocks."""
    for found in list(result):
        for axis, _ in found:
            if form is ViewForm.PARTS_OUTSIDE and len(axis.rows) > 1 and not any(result[row] for row in axis.rows):
                ids = table.section_ids(axis.ids.reshape(axis.ids.shape[0], -1), apart=True)
                result[axis.rows[0]].append((Axis(ids), -1))
            elif axis.rows and not result[axis.rows[-1]] and not _are_apart(table, result, axis):
                ids = table.section_ids(axis.ids.reshape(-1, *axis.ids.shape[-2:])[0])  # outer axes are tied
                result[axis.rows[-1]].append((Axis(ids), -1))
    return result


def _are_apart(table: UnitTable, result: list[list[tuple[Axis, int]]], axis: Axis) -> bool:
    """Whether the sections of an axis, such as whole heads with q, k and v, lie along another one than its last row."""
    return any(table.are_apart(outer.ids) for row in axis.rows[:-1] for outer, _ in result[row])


def _resolve(table: UnitTable, axes: Axes, found: list[tuple[Axis, int]]) -> Axis | None:
    """What one axis of a view's result carries, where several axes of its argument have been merged into it.

    Sections merge into their units. Sections of units that are tied over them stay; other kinds of units cannot share.
    Copies go with what they are copies of, however many there are:

        2 key heads, each for 3 query heads     (1, 2, 1, 5, 64) -> expand (1, 2, 3, 5, 64) -> reshape (1, 6, 5, 64)
        sections of axis 1                      [a b]               [a b]                      [a a a b b b]
    """
    rows = {row for _, dim in found for row in _rows_of(axes, dim)}
    found = [(axis, dim) for axis, dim in found if dim not in rows or not table.is_section(axis.ids)]
    originals = [(axis, dim) for axis, dim in found if not table.are_copies(axis.ids)]
    if originals:
        table.freeze_axes((axis for axis, _ in found if table.are_copies(axis.ids)), "its number is that of copies")
        found = originals
    if len(found) == 2 and (merged := _dims_of_heads(table, *(axis for axis, _ in found))):
        return merged
    units = [item for item in found if not table.is_section(item[0].ids)] or found[-1:]
    table.freeze_axes((axis for axis, _ in found if axis is not units[0][0]), "two kinds of units share one axis")
    if len(units) > 1:
        table.freeze(units[0][0].ids, "two kinds of units share one axis")
    return units[0][0] if units else None


def _dims_of_heads(table: UnitTable, first: Axis, second: Axis) -> Axis | None:
    """One axis of sections and of units that are the same in each of them; None for anything else.

    With one key head for all, the dims of the values are the same for every head:

        y (1, 4 heads, 5, 8)          axis 1 has sections [a b c d], axis 3 has ids [0 1 … 7], and no rows
        y.transpose(1, 2).flatten(2)  axis 2 has new ids [8 … 15] for a, [16 … 23] for b …, all united with [0 … 7]
    """
    if first.rows or second.rows or table.is_section(first.ids) == table.is_section(second.ids):
        return None
    sections, units = (first.ids, second.ids) if table.is_section(first.ids) else (second.ids, first.ids)
    heads, counts = np.unique(sections, return_counts=True)
    if (counts != counts[0]).any():
        return None
    rows = np.argsort(sections, kind="stable").reshape(len(heads), -1)  # (heads, dims): positions
    if (units[rows] != units[rows[0]]).any():
        return None
    merged = table.new(len(units))
    table.unite(units[rows[:1]], merged[rows])
    for head, row in zip(heads, merged[rows], strict=True):
        table.sections[row.tobytes()] = np.array([head]), row
    return Axis(merged)


def _rows_of(axes: Axes, dim: int) -> tuple[int, ...]:
    axis = axes[dim] if dim >= 0 else None
    return axis.rows if axis is not None else ()


def tile(axes: Axes, shape: Sequence[int], repeats: Sequence[int]) -> Axes:
    """`Tensor.repeat`: the whole axis again and again."""
    extra = len(repeats) - len(shape)
    result = list(axes)
    for _ in range(extra):
        result = insert(result, 0)
    for dim, times in enumerate(repeats):
        size = shape[dim - extra] if dim >= extra else 1
        if times != 1 and size > 1:
            result = take(result, dim, np.tile(np.arange(size), times))
    return result
