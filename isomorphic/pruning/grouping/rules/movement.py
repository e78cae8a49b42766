"""Rules of data movement: views, slices, joins, padding."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from isomorphic.pruning.grouping import axes as move
from isomorphic.pruning.grouping.axes import Axes, ViewForm
from isomorphic.pruning.grouping.call import Call, UnknownCallError
from isomorphic.pruning.grouping.rules.elementwise import keep_producer
from isomorphic.pruning.grouping.units import Axis


def _moved(call: Call, axes: Axes) -> Axes:
    call.flow = call.units(call.tensors[0]).flow
    call.pass_on(call.tensors[0])
    return axes


def view(call: Call) -> Axes:
    """Any reshape in row-major order."""
    if call.recorder.caller is None:
        call.table.freeze_axes(call.axes("self"), "TorchScript code reshapes it")
    axes, before, after = call.axes("self"), call.shape("self"), call.out.shape
    parts = move.split_axes(axes, before, after, with_rows=True)
    split = [axis for dim in parts if (axis := axes[dim]) is not None]
    form = call.recorder.form_of_view(split, [tuple(after[d] for d in part.after) for part in parts.values()])
    if form is ViewForm.MAP:
        axes = move.view_as_map(call.table, axes, before, after)
    else:
        axes = move.view(call.table, axes, before, after, form)
    return _as_other(call, _moved(call, axes))


def _as_other(call: Call, axes: Axes) -> Axes:
    """`view_as` and `expand_as` take their sizes from a tensor, whose units must go along."""
    if not isinstance(call.get("other"), Tensor):
        return axes
    operands = [(axes, call.out.shape), (call.axes("other"), call.out.shape)]
    return move.broadcast(call.table, operands, call.out.shape, f"it meets a fixed axis in {call.name}")


def permute(call: Call) -> Axes:
    return _moved(call, move.permute(call.axes("self"), call["dims"]))


def transpose(call: Call) -> Axes:
    """Two dims exchanged; `t` and `mT` name none."""
    axes = call.axes("self")
    if len(axes) < 2:
        return _moved(call, axes)
    _, *dims = call.arguments.values()
    return _moved(call, move.transpose(axes, *(dims or (-2, -1))))


def expand(call: Call) -> Axes:
    """Axes that grow from 1 have units of their own: what they meet decides, and so do the sizes' equations."""
    axes, shape = call.axes("self"), call.shape("self")
    rank = call.out.dim() - len(shape)
    place = {old: old + rank for old in range(len(axes))}
    moved: Axes = [None] * rank + [None if axis is None else axis.moved(place) for axis in axes]
    if call.recorder.caller is not None:  # TorchScript's sizes are not known
        moved = _grown(call, moved)
    return _as_other(call, _moved(call, moved))


def _grown(call: Call, axes: Axes) -> Axes:
    """New units for axes that grow from 1."""
    shape = call.shape("self")
    before = [1] * (call.out.dim() - len(shape)) + list(shape)
    grows = [old == 1 < new for old, new in zip(before, call.out.shape, strict=True)]
    return [Axis(call.table.copies(call.out.shape[dim])) if grows[dim] else axis for dim, axis in enumerate(axes)]


def repeat(call: Call) -> Axes:
    """Axes that grow from 1 have units of their own, as in `expand`."""
    axes = _moved(call, move.tile(call.axes("self"), call.shape("self"), call["repeats"]))
    return _grown(call, axes) if call.recorder.sizes_become_equations else axes


def repeat_interleave(call: Call) -> Axes:
    """Each position several times in a row."""
    if call.get("dim") is None or not isinstance(call["repeats"], int):
        raise UnknownCallError
    axes, shape, times = call.axes("self"), call.shape("self"), call["repeats"]
    dim = call["dim"] % len(shape)
    return _moved(call, move.take(axes, dim, np.repeat(np.arange(shape[dim]), times)))


def take_slice(call: Call) -> Axes:
    dim = call["dim"] % len(call.shape("self"))
    end = min(call["end"], call.shape("self")[dim]) if call["end"] is not None else None
    axes = call.axes("self")
    if call["step"] > 1 and axes[dim] is not None:
        return _moved(call, _strided(call, axes, dim, slice(call["start"], end, call["step"])))
    return _moved(call, _piece(call, axes, dim, slice(call["start"], end)))


def _strided(call: Call, axes: Axes, dim: int, positions: slice) -> Axes:
    """Every so many positions of a whole axis: units between two of them stay and go together.

    x[..., ::2] and x[..., 1::2] of 8 channels have 4 units each, the pairs [0 1] [2 3] [4 5] [6 7].
    """
    axis, size, step = axes[dim], call.shape("self")[dim], positions.step
    assert axis is not None
    if size % step or (positions.start or 0) >= step or positions.stop not in (None, size):
        call.table.freeze(axis.ids, "every so many of its units are picked")
    else:
        blocks = axis.ids.reshape(*axis.ids.shape[:-1], -1, step)
        call.table.unite(blocks[..., :1], blocks)
    return move.take(axes, dim, positions)


def _piece(call: Call, axes: Axes, dim: int, positions: slice, *, stays_equal: bool = False) -> Axes:
    """Part of an axis. Its ends must be equations of the caller, unless it is one of pieces that stay equally long."""
    axis = axes[dim]
    if axis is not None and axis.ids[..., positions].shape[-1] < axis.ids.shape[-1]:
        if not stays_equal and not call.recorder.sizes_become_equations:
            name = getattr(call.recorder.caller, "__name__", "TorchScript code")
            call.table.freeze(axis.ids, f"no rule for how {name} slices it")
        if axis.ids[..., positions].shape[-1] == 1:
            call.recorder.picks_from(axes, dim)
            call.table.freeze(axis.ids[..., positions], "one of its units is picked by number")
    return move.take(axes, dim, positions)


def narrow(call: Call) -> Axes:
    dim = call["dim"] % len(call.shape("self"))
    start = call["start"] % max(call.shape("self")[dim], 1)
    return _moved(call, _piece(call, call.axes("self"), dim, slice(start, start + call["length"])))


def select(call: Call) -> Axes:
    shape = call.shape("self")
    dim = call["dim"] % len(shape)
    call.recorder.picks_from(call.axes("self"), dim)
    return _moved(call, move.select(call.table, call.axes("self"), dim, call["index"] % shape[dim]))


def unbind(call: Call) -> list[Axes]:
    axes, dim = call.axes("self"), call["dim"] % len(call.shape("self"))
    call.recorder.picks_from(axes, dim)
    _moved(call, axes)
    return [move.select(call.table, axes, dim, index) for index in range(len(call.out))]


def split(call: Call, *, equal: bool = False) -> list[Axes]:
    """Pieces one after the other; their sizes' equations come from the caller, where they need not stay equal."""
    axes, dim = call.axes("self"), call["dim"] % len(call.shape("self"))
    _moved(call, axes)
    ends = np.cumsum([piece.shape[dim] for piece in call.out]).tolist()
    bounds = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return [_piece(call, axes, dim, positions, stays_equal=equal) for positions in bounds]


def chunk(call: Call) -> list[Axes]:
    """Equal pieces stay equal; unequal ones have equations."""
    axis = call.axes("self")[call["dim"] % len(call.shape("self"))]
    equal = len({piece.shape[call["dim"]] for piece in call.out}) == 1
    if axis is not None and equal:  # (heads, 3 · dim): each head's pieces stay as long as all others
        call.table.keep_equal(axis.ids.reshape(axis.ids.size // axis.ids.shape[-1] * len(call.out), -1))
    return split(call, equal=equal)


def insert(call: Call) -> Axes:
    dim = call["dim"] % call.out.dim()
    return _moved(call, move.insert(call.axes("self"), dim))


def squeeze(call: Call) -> Axes:
    shape, dims = call.shape("self"), call.get("dim")
    chosen = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = [dim for dim in chosen if shape and shape[dim] == 1]
    return _moved(call, move.remove(call.table, call.axes("self"), gone) if gone else call.axes("self"))


def flip(call: Call) -> Axes:
    axes, shape = call.axes("self"), call.shape("self")
    for dim in call["dims"]:
        axes = move.take(axes, dim % len(shape), np.arange(shape[dim])[::-1])
    return _moved(call, axes)


def roll(call: Call) -> Axes:
    axes = call.axes("self")
    rolled = {dim % len(axes) for dim in call["dims"]} or set(range(len(axes)))
    call.table.freeze_axes([axes[dim] for dim in rolled], "its units are rolled")
    return _moved(call, move.untied(call.table, axes, rolled))


def cat(call: Call) -> Axes:
    keep_producer(call)
    pieces = [(call.axes(t), call.shape(t)) for t in call["tensors"] if t.dim() > 1 or t.numel()]
    dim = call["dim"] % call.out.dim()
    return move.concatenate(call.table, pieces, dim, "it meets a fixed axis in cat")


def stack(call: Call) -> Axes:
    keep_producer(call)
    pieces = [(call.axes(t), call.shape(t)) for t in call["tensors"]]
    return move.stack(call.table, pieces, call["dim"] % call.out.dim(), "it meets a fixed axis in stack")


def pad(call: Call) -> Axes:
    """Padding of pixels leaves channels alone; padding of channels adds fixed positions."""
    amounts = call["pad"]
    axes, rank = call.axes("self"), call.out.dim()
    for number in range(len(amounts) // 2):
        dim, (left, right) = rank - 1 - number, amounts[2 * number : 2 * number + 2]
        axis = axes[dim]
        if axis is None or not (left or right):
            continue
        call.recorder.runs_over([axis])
        if min(left, right) < 0 or call.get("mode") not in (None, "constant"):
            axes = move.fix(call.table, axes, [dim], "it is padded with itself")
            continue
        rows, reason = axis.ids.shape[:-1], "it is padded with a fixed number of channels"
        ends = [call.table.fixed(math.prod(rows) * n, reason).reshape(*rows, n) for n in (left, right)]
        axes[dim] = Axis(np.concatenate([ends[0], axis.ids, ends[1]], axis=-1), axis.rows)
    return axes


def pixel_shuffle(call: Call) -> Axes:
    """(…, C·r², H, W) to (…, C, H·r, W·r): the r² channels behind each output channel are one unit."""
    *rest, channels, _, _ = call.axes("self")
    if channels is not None:
        ids = call.table.tie(channels, channels.rows).ids.reshape(-1, call["upscale_factor"] ** 2)
        call.table.unite(ids[:, :1], ids)
        channels = Axis(ids[:, 0])
    return [*move.untied(call.table, rest, range(len(rest), call.out.dim())), channels, None, None]


def pixel_unshuffle(call: Call) -> Axes:
    *rest, channels, _, _ = call.axes("self")
    if channels is not None:
        ids = call.table.tie(channels, channels.rows).ids
        channels = Axis(np.repeat(ids, call["downscale_factor"] ** 2))
    return [*rest, channels, None, None]


def channel_shuffle(call: Call) -> Axes:
    axes = call.axes("self")
    if axes[1] is not None:
        rows = call.table.tie(axes[1], axes[1].rows).ids.reshape(call["groups"], -1)
        call.table.unite(rows[:1], rows)
        axes[1] = Axis(rows.T.ravel())
    return axes


def im2col(call: Call) -> Axes:
    """(B, C, H, W) to (B, C·k², L)."""
    *batch, channels, _, _ = call.axes("self")
    if channels is not None:
        ids = call.table.tie(channels, channels.rows).ids
        channels = Axis(np.repeat(ids, call.out.shape[-2] // len(ids)))
    return [*batch, channels, None]


def col2im(call: Call) -> Axes:
    """(B, C·k², L) to (B, C, H, W)."""
    *batch, columns, _ = call.axes("self")
    if columns is not None:
        ids = call.table.tie(columns, columns.rows).ids.reshape(call.out.shape[-3], -1)
        call.table.unite(ids[:, :1], ids)
        columns = Axis(ids[:, 0])
    return [*batch, columns, None, None]


def as_complex(call: Call) -> Axes:
    """(…, 2) to (…): the last axis holds real and imaginary parts."""
    return _moved(call, move.remove(call.table, call.axes("self"), [-1]))


def as_real(call: Call) -> Axes:
    return _moved(call, [*call.axes("self"), None])


def fourier(call: Call) -> Axes:
    """Fourier transforms over some axes."""
    axes = call.axes("self")
    return move.fix(call.table, axes, [dim % len(axes) for dim in call["dim"]], "it is transformed")


def unfold(call: Call) -> Axes:
    """Sliding windows along one axis: a new last axis."""
    dim = call["dimension"] % len(call.shape("self"))
    return [*move.fix(call.table, call.axes("self"), [dim], "windows slide over it"), None]
