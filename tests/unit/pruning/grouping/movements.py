"""Random programs of data movement, and what cutting their sources must do to every tensor in them.

A program is written once, in torch. It runs on the numbers of its sources' elements, whole and cut, and on booleans
that say which elements go; the tracer says which units every axis carries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from torch import Tensor

from isomorphic.pruning.grouping import axes as move
from isomorphic.pruning.grouping.axes import Axes
from isomorphic.pruning.grouping.units import Axis, Ids, UnitTable

LARGEST = 1500  # elements of a tensor
_REASON = "it meets a fixed axis"

Shape = tuple[int, ...]


class World:
    """A run of a program: how long things are in it. This one is the program as it was drawn."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = shapes

    def length(self, number: int, dim: int) -> int:
        """How long axis `dim` of tensor `number` is."""
        return self.shapes[number][dim]

    def part(self, number: int, dim: int, end: int) -> int:
        """How many of an axis's first `end` positions there are."""
        return end

    def fresh(self, number: int, tensor: Tensor) -> Tensor:
        """Tensor `number`, whose first axis has just got units of its own."""
        return tensor


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        name: what it is.
        arguments: positions of the tensors that it takes.
        torch: from the world, the result's position and the arguments to the result.
        axes: from a table and the arguments' axes to the result's.
        parts: (argument, dim, end): a slice begins or ends here, so that rows must keep equally many up to there.
    """

    name: str
    arguments: tuple[int, ...]
    torch: Callable[[World, int, list[Tensor]], Tensor]
    axes: Callable[[UnitTable, list[Axes]], Axes]
    parts: tuple[tuple[int, int, int], ...] = ()


@dataclass
class Program:
    """Sources, and the steps whose results follow them in numbering.

    Attributes:
        sources: their shapes.
        steps: what happens.
        shapes: of every tensor.
    """

    sources: tuple[Shape, ...]
    steps: list[Step] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shapes = list(self.sources)

    def add(self, step: Step, shape: Sequence[int]) -> None:
        """Appends a step whose result has this shape."""
        self.steps.append(step)
        self.shapes.append(tuple(shape))

    def run(self, world: World, sources: Sequence[Tensor]) -> list[Tensor]:
        """All tensors, sources first."""
        tensors = list(sources)
        for step in self.steps:
            tensors.append(step.torch(world, len(tensors), [tensors[argument] for argument in step.arguments]))
        return tensors

    def __str__(self) -> str:
        lines = [f"t{number} = source {shape}" for number, shape in enumerate(self.sources)]
        for number, step in enumerate(self.steps, start=len(self.sources)):
            lines.append(f"t{number} = {step.name} of {step.arguments}: {self.shapes[number]}")
        return "\n".join(lines)


# --- drawing ------------------------------------------------------------------------------------------------


def draw_program(random: Random, length: int) -> Program:
    """A program of about `length` steps over two or three small sources, most of them equal in shape."""
    shape = tuple(random.choice((1, 2, 3, 4, 6)) for _ in range(random.randint(1, 4)))
    other = tuple(random.sample(shape, len(shape)))
    program = Program(tuple(random.choices((shape, other), (3, 1), k=random.randint(2, 3))))
    for _ in range(length):
        number = random.randrange(len(program.shapes)) if random.random() < 0.3 else len(program.shapes) - 1
        random.choice(STEPS)(program, number, random)
    return program


def _view(program: Program, number: int, random: Random) -> None:
    before = program.shapes[number]
    after = random.choice((_merged, _divided, _divided, _anything))(before, random)

    def view(world: World, out: int, given: list[Tensor]) -> Tensor:
        return given[0].reshape([world.length(out, dim) for dim in range(len(after))])

    program.add(Step("view", (number,), view, lambda table, a: move.view(table, a[0], before, after)), after)


def _merged(shape: Shape, random: Random) -> Shape:
    start, stop = sorted(random.choices(range(len(shape) + 1), k=2))
    return (*shape[:start], math.prod(shape[start:stop]), *shape[stop:])


def _divided(shape: Shape, random: Random) -> Shape:
    if not shape:
        return (1,)
    dim = random.randrange(len(shape))
    factor = random.choice([n for n in range(1, shape[dim] + 1) if shape[dim] % n == 0])
    return (*shape[:dim], factor, shape[dim] // factor, *shape[dim + 1 :])


def _anything(shape: Shape, random: Random) -> Shape:
    rest, after = math.prod(shape), []
    while rest > 1:
        after.append(random.choice([n for n in range(2, rest + 1) if rest % n == 0]))
        rest //= after[-1]
    return tuple(after)


def _permute(program: Program, number: int, random: Random) -> None:
    shape = program.shapes[number]
    order = random.sample(range(len(shape)), len(shape))
    named = [dim - len(shape) if random.random() < 0.3 else dim for dim in order]
    step = Step("permute", (number,), lambda _, __, t: t[0].permute(named), lambda _, a: move.permute(a[0], named))
    program.add(step, [shape[dim] for dim in order])


def _transpose(program: Program, number: int, random: Random) -> None:
    shape = list(program.shapes[number])
    if shape:
        dims = random.choices(range(len(shape)), k=2)
        shape[dims[0]], shape[dims[1]] = shape[dims[1]], shape[dims[0]]
        axes = lambda _, a: move.transpose(a[0], *dims)  # noqa: E731
        program.add(Step("transpose", (number,), lambda _, __, t: t[0].transpose(*dims), axes), shape)


def _slice(program: Program, number: int, random: Random) -> None:
    shape = program.shapes[number]
    dims = [dim for dim, size in enumerate(shape) if size > 1]
    if not dims:
        return
    dim = random.choice(dims)
    start, stop = sorted(random.sample(range(shape[dim] + 1), 2))

    def take(world: World, _: int, given: list[Tensor]) -> Tensor:
        first = world.part(number, dim, start)
        return given[0].narrow(dim, first, world.part(number, dim, stop) - first)

    def axes(table: UnitTable, given: list[Axes]) -> Axes:
        axis = given[0][dim]
        if axis is not None and stop - start == 1:
            table.freeze(axis.ids[..., start:stop], "one of its units is picked by number")
        return move.take(given[0], dim, slice(start, stop))

    parts = ((number, dim, start), (number, dim, stop))
    step = Step(f"[{start}:{stop}] on {dim}", (number,), take, axes, parts)
    program.add(step, (*shape[:dim], stop - start, *shape[dim + 1 :]))


def _select(program: Program, number: int, random: Random) -> None:
    shape = program.shapes[number]
    if shape:
        dim = random.randrange(len(shape))
        index = random.randrange(shape[dim])
        axes = lambda table, a: move.select(table, a[0], dim, index)  # noqa: E731
        step = Step(f"select {index} on {dim}", (number,), lambda _, __, t: t[0].select(dim, index), axes)
        program.add(step, (*shape[:dim], *shape[dim + 1 :]))


def _flip(program: Program, number: int, random: Random) -> None:
    shape = program.shapes[number]
    if shape:
        dim = random.randrange(len(shape))
        order = np.arange(shape[dim])[::-1]
        axes = lambda _, a: move.take(a[0], dim, order)  # noqa: E731
        program.add(Step(f"flip {dim}", (number,), lambda _, __, t: t[0].flip(dim), axes), shape)


def _squeeze(program: Program, number: int, random: Random) -> None:
    shape = program.shapes[number]
    gone = [dim for dim, size in enumerate(shape) if size == 1]
    if gone:
        axes = lambda table, a: move.remove(table, a[0], gone)  # noqa: E731
        step = Step("squeeze", (number,), lambda _, __, t: t[0].squeeze(gone), axes)
        program.add(step, [size for size in shape if size > 1])


def _unsqueeze(program: Program, number: int, random: Random) -> None:
    shape = program.shapes[number]
    dim = random.randint(0, len(shape))
    axes = lambda _, a: move.insert(a[0], dim)  # noqa: E731
    step = Step(f"unsqueeze {dim}", (number,), lambda _, __, t: t[0].unsqueeze(dim), axes)
    program.add(step, (*shape[:dim], 1, *shape[dim:]))


def _expand(program: Program, number: int, random: Random) -> None:
    """A new first axis with units of its own."""
    shape, size = program.shapes[number], random.choice((2, 3))
    if math.prod(shape) * size > LARGEST:
        return

    def expand(world: World, out: int, given: list[Tensor]) -> Tensor:
        return world.fresh(out, given[0].expand(world.length(out, 0), *given[0].shape))

    def axes(table: UnitTable, given: list[Axes]) -> Axes:
        return [Axis(table.new(size)), *move.insert(given[0], 0)[1:]]

    program.add(Step("expand", (number,), expand, axes), (size, *shape))


def _repeat(program: Program, number: int, random: Random) -> None:
    shape = program.shapes[number]
    repeats = [random.choice((1, 1, 2)) for _ in range(len(shape) + random.choice((0, 1)))]
    after = [n * size for n, size in zip(repeats, [1] * (len(repeats) - len(shape)) + [*shape], strict=True)]
    if math.prod(after) <= LARGEST and repeats:
        axes = lambda _, a: move.tile(a[0], shape, repeats)  # noqa: E731
        program.add(Step(f"repeat {repeats}", (number,), lambda _, __, t: t[0].repeat(repeats), axes), after)


def _cat(program: Program, number: int, random: Random) -> None:
    shape = program.shapes[number]
    if not shape or 2 * math.prod(shape) > LARGEST:
        return
    dim = random.randrange(len(shape))
    rest = [(*other[:dim], *other[dim + 1 :]) if len(other) == len(shape) else None for other in program.shapes]
    pieces = tuple(random.sample([number, random.choice([n for n, r in enumerate(rest) if r == rest[number]])], 2))
    shapes = [program.shapes[piece] for piece in pieces]

    def axes(table: UnitTable, given: list[Axes]) -> Axes:
        return move.concatenate(table, list(zip(given, shapes, strict=True)), dim, _REASON)

    after = (*shape[:dim], sum(one[dim] for one in shapes), *shape[dim + 1 :])
    program.add(Step(f"cat on {dim}", pieces, lambda _, __, t: torch.cat(t, dim), axes), after)


def _stack(program: Program, number: int, random: Random) -> None:
    shape = program.shapes[number]
    if 2 * math.prod(shape) > LARGEST:
        return
    dim = random.randint(0, len(shape))
    pieces = (number, random.choice([n for n, other in enumerate(program.shapes) if other == shape]))

    def axes(table: UnitTable, given: list[Axes]) -> Axes:
        return move.stack(table, [(one, shape) for one in given], dim, _REASON)

    step = Step(f"stack on {dim}", pieces, lambda _, __, t: torch.stack(t, dim), axes)
    program.add(step, (*shape[:dim], 2, *shape[dim:]))


def _combine(program: Program, number: int, random: Random) -> None:
    """An element-wise operation of tensors whose shapes broadcast."""
    shapes = program.shapes
    fits = [n for n, other in enumerate(shapes) if _broadcast(shapes[number], other)]
    pieces = tuple(random.sample([number, random.choice(fits)], 2))
    given_shapes = [shapes[piece] for piece in pieces]
    after = np.broadcast_shapes(*given_shapes)

    def axes(table: UnitTable, given: list[Axes]) -> Axes:
        return move.broadcast(table, list(zip(given, given_shapes, strict=True)), after, _REASON)

    program.add(Step("combine", pieces, lambda _, __, t: _combined(*t), axes), after)


def _broadcast(shape: Shape, other: Shape) -> bool:
    fit = all(a == b or 1 in (a, b) for a, b in zip(shape[::-1], other[::-1], strict=False))
    return fit and math.prod(np.broadcast_shapes(shape, other)) <= LARGEST


def _combined(first: Tensor, second: Tensor) -> Tensor:
    """An element goes where one of its operands does; numbers are mixed so that no two pairs give the same."""
    return first | second if first.dtype == torch.bool else first * 1_000_003 + second


STEPS = (
    *(_view, _view, _view, _permute, _transpose, _squeeze, _unsqueeze),
    *(_slice, _select, _flip, _expand, _repeat, _cat, _stack, _combine),
)


# --- what the tracer says -----------------------------------------------------------------------------------


@dataclass
class Trace:
    """What is known of the units of a program's tensors.

    Attributes:
        table: all ids.
        axes: of every tensor.
        parts: ids whose rows keep equally many because forward code spells out their lengths.
    """

    table: UnitTable
    axes: list[Axes]
    parts: list[Ids]


def trace(program: Program) -> Trace:
    """Follows the units of all sources' axes through a program."""
    table, parts = UnitTable(), []
    tensors: list[Axes] = [[Axis(table.new(size)) if size > 1 else None for size in shape] for shape in program.sources]
    for step in program.steps:
        for argument, dim, end in step.parts:
            axis = tensors[argument][dim]
            if axis is not None and end:
                parts.append(axis.ids[..., :end])
        tensors.append(move.drop_short(step.axes(table, [tensors[argument] for argument in step.arguments])))
    return Trace(table, tensors, parts)


class Removal(World):
    """A program without some units, as many as may go together, or fewer; of every block something stays."""

    def __init__(self, program: Program, trace: Trace, random: Random) -> None:
        super().__init__(program.shapes)
        self.trace = trace
        self.classes = trace.table.classes()
        self.gone = np.zeros(trace.table.size, bool)  # by class
        equal = [self.classes[ids].reshape(-1, ids.shape[-1]) for ids in (*trace.table.rows.values(), *trace.parts)]
        self._equal = [rows for rows in equal if rows.size]
        self.free = self._free()
        candidates = np.flatnonzero(self.free).tolist()
        for chosen in random.sample(candidates, min(len(candidates), 12)):
            before = self.gone.copy()
            self.gone[chosen] = True
            if not self._settle(random) or self._empties():
                self.gone = before

    def _free(self) -> np.ndarray:
        """Classes that may go, all but sections."""
        free = np.zeros(self.trace.table.size, bool)
        free[self.classes] = True
        for classes, _, _ in self.trace.table.reasons(self.classes):
            free[classes] = False
        free[[self.classes[section[0]] for section, _ in self.trace.table.sections.values()]] = False
        return free

    def _settle(self, random: Random) -> bool:
        """Removes more until all rows keep equally many; False where that cannot be."""
        changed = True
        while changed:
            changed = False
            for rows in self._equal:
                kept = (~self.gone[rows]).sum(1)
                for row in rows[kept > kept.min()]:
                    candidates = np.unique(row[self.free[row] & ~self.gone[row]]).tolist()
                    if not candidates:
                        return False
                    self.gone[random.choice(candidates)] = True
                    changed = True
        return True

    def _empties(self) -> bool:
        """Whether nothing is left of a row."""
        carried = [axis for axes in self.trace.axes for axis in axes if axis is not None]
        return any(self.gone[self.classes[axis.ids]].all(-1).any() for axis in carried)

    def removed(self, number: int) -> Tensor:
        """The elements of a tensor that go by what its axes say, bool."""
        none = torch.zeros(self.shapes[number], dtype=torch.bool)
        return torch.stack([none, *self._removed_along(number).values()]).any(0)

    def _removed_along(self, number: int) -> dict[int, Tensor]:
        """By axis that carries units: which elements go because of them."""
        shape, found = self.shapes[number], {}
        for dim, axis in enumerate(self.trace.axes[number]):
            if axis is not None:
                others = tuple(d for d in range(len(shape)) if d != dim)
                gone = np.moveaxis(self.gone[self.classes[axis.over(others)]], -1, dim)
                found[dim] = torch.from_numpy(gone).expand(shape)
        return found

    def cut(self, number: int, tensor: Tensor) -> Tensor:
        """What is left of tensor `number`, axis by axis: lines along one stay equally long, whatever each keeps."""
        along = {dim: gone for dim, gone in self._removed_along(number).items() if gone.any()}
        for dim in list(along):
            kept = (
                (~along.pop(dim))
                .int()
                .argsort(dim=dim, descending=True, stable=True)
                .narrow(dim, 0, self.length(number, dim))
            )
            tensor = tensor.take_along_dim(kept, dim)
            along = {other: gone.take_along_dim(kept, dim) for other, gone in along.items()}
        return tensor

    def length(self, number: int, dim: int) -> int:
        axis = self.trace.axes[number][dim]
        return self.shapes[number][dim] if axis is None else self._kept(axis.ids)

    def part(self, number: int, dim: int, end: int) -> int:
        axis = self.trace.axes[number][dim]
        return end if axis is None or not end else self._kept(axis.ids[..., :end])

    def _kept(self, ids: Ids) -> int:
        counts = np.unique((~self.gone[self.classes[ids]]).sum(-1))
        assert len(counts) == 1, f"rows keep {counts.tolist()} units"
        return int(counts[0])


class Marks(World):
    """A program on booleans: which elements go because what they were made of goes."""

    def __init__(self, removal: Removal) -> None:
        super().__init__(removal.shapes)
        self._removal = removal

    def fresh(self, number: int, tensor: Tensor) -> Tensor:
        axis = self._removal.trace.axes[number][0]
        assert axis is not None and not axis.rows
        gone = torch.from_numpy(self._removal.gone[self._removal.classes[axis.ids]])
        return tensor | gone.reshape(-1, *[1] * (tensor.dim() - 1))


def check(program: Program, trace: Trace, random: Random) -> tuple[int, int]:
    """Removes some units and holds what the axes say of every tensor against the program run on what is left.

    Returns:
        How many units went, and how many are not frozen.
    """
    removal = Removal(program, trace, random)
    sizes = [math.prod(shape) for shape in program.sources]
    starts = np.cumsum([0, *sizes]).tolist()
    sources = [torch.arange(a, a + n).reshape(s) for a, n, s in zip(starts, sizes, program.sources, strict=False)]
    going = [removal.removed(number) for number in range(len(sources))]
    whole, marks = program.run(World(program.shapes), sources), program.run(Marks(removal), going)
    left = [removal.cut(number, source) for number, source in enumerate(sources)]
    for number, found in enumerate(program.run(removal, left)):
        where = f"t{number} of\n{program}"
        assert whole[number].shape == program.shapes[number], where
        assert torch.equal(removal.removed(number), marks[number]), where
        assert torch.equal(removal.cut(number, whole[number]), found), where
    return int(removal.gone.sum()), int(removal.free.sum())
