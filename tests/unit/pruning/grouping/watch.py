"""Runs a few lines of forward code as the tracer does, and says in words what it noted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from isomorphic.pruning.expressions import Attribute, Constant, Expression, Operation
from isomorphic.pruning.grouping.integers import traced_attributes, traced_math
from isomorphic.pruning.grouping.recorder import Recorder
from isomorphic.pruning.grouping.rules.table import find_rule
from isomorphic.pruning.grouping.size_arguments import SIZE_RULES, note_sizes
from isomorphic.pruning.grouping.size_equations import SizeMode, TracedAxis
from isomorphic.pruning.grouping.unit_mode import UnitMode
from isomorphic.pruning.grouping.units import Axis, Ids

Shapes = dict[str, Sequence[int]]


class Code(nn.Module):
    """Parameters of some shapes, other attributes, and a function of this module as its forward."""

    def __init__(self, function: Callable[[Any], Any], shapes: Shapes, **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(*shape)))
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self) -> Any:
        return self.function(self)


@dataclass
class Watch:
    """What the tracer noted of some code.

    Attributes:
        recorder, sizes: the tracer's own notes.
        out: what the code returned.
    """

    recorder: Recorder
    sizes: SizeMode
    out: Any

    def equations(self) -> list[str]:
        """What the sizes in the code must equal: "heads = blocks (3)", "len(x.0) // heads = x.0 as (3, 4)"."""
        return [f"{self._text(expression)} = {self._axis(axis)}" for expression, axis in self.sizes.equations]

    def axes(self, tensor: Any = None) -> list[str | None]:
        """The units along each axis of a tensor, or of what the code returned."""
        found = self.recorder.units(self.out if tensor is None else tensor).axes
        return [None if axis is None else self._ids(axis.ids) for axis in found]

    def frozen(self) -> dict[str, str]:
        """The first reason by units, united ones included: {"x.0": "…"}."""
        table = self.recorder.table
        classes, found = table.classes(), {}
        for ids, reason, _ in table.reasons(classes):
            frozen = np.isin(classes[self._positions()[0]], ids)
            for name in self._names(frozen):
                found.setdefault(name, reason)
        return found

    def united(self) -> set[frozenset[str]]:
        """Positions that are one unit, where there are several."""
        ids, names = self._positions()
        classes = self.recorder.table.classes()[ids]
        sets = [frozenset(names[n] for n in np.flatnonzero(classes == label)) for label in np.unique(classes)]
        return {one for one in sets if len(one) > 1}

    def equal(self) -> list[str]:
        """Rows that keep equally many units."""
        return [self._ids(rows) for rows in self.recorder.table.rows.values()]

    def _positions(self) -> tuple[Ids, list[str]]:
        """Ids and names of all positions of parameters: "x.0[3]"."""
        ids, names = [np.zeros(0, np.int64)], []
        for leaf in self.recorder.leaves.values():
            for dim, axis in enumerate(leaf.units.axes):
                if axis is not None:
                    ids.append(axis.ids)
                    names += [f"{leaf.name}.{dim}[{n}]" for n in range(len(axis.ids))]
        return np.concatenate(ids), names

    def _names(self, chosen: np.ndarray) -> list[str]:
        """Whole dims of parameters that are chosen, or single positions."""
        _, names = self._positions()
        dims: dict[str, list[str]] = {}
        for name in names:
            dims.setdefault(name.partition("[")[0], []).append(name)
        found = {name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen}
        return [
            n for dim, all_ in dims.items() for n in ([dim] if found >= {*all_} else [n for n in all_ if n in found])
        ]

    def _text(self, expression: Expression) -> str:
        if isinstance(expression, Operation):
            sides = (expression.left, expression.right)
            left, right = (f"({t})" if isinstance(s, Operation) else t for s in sides for t in [self._text(s)])
            return f"{left} {expression.operator} {right}"
        if isinstance(expression, Attribute):
            return expression.name + ("" if expression.entry is None else f"[{expression.entry}]")
        axis: Any = None if isinstance(expression, Constant) else expression.axis
        return f"len({self._axis(axis)})" if axis else str(expression.value)  # type: ignore[union-attr]

    def _axis(self, axis: TracedAxis) -> str:
        return str(axis.size) if axis.ids is None else self._ids(axis.ids)

    def _ids(self, ids: Ids) -> str:
        """Which positions of parameters these are: "x.0", "x.0[2:5]", "x.0 as (3, 4)", "blocks (3)", "new (5)"."""
        shape = "" if ids.ndim == 1 else f" as {ids.shape}"
        if self.recorder.table.is_section(ids):
            return f"blocks {ids.shape}"
        flat = ids.ravel()
        for leaf in self.recorder.leaves.values():
            for dim, axis in enumerate(leaf.units.axes):
                if axis is not None and np.isin(flat, axis.ids).all():
                    places = (flat - axis.ids[0]).tolist()
                    start, stop = places[0], places[-1] + 1
                    if places != list(range(start, stop)):
                        return f"{leaf.name}.{dim}{places}{shape}"
                    whole = stop - start == len(axis.ids)
                    return f"{leaf.name}.{dim}{'' if whole else f'[{start}:{stop}]'}{shape}"
        known, _ = self._positions()
        return f"{'mixed' if np.isin(flat, known).any() else 'new'} {ids.shape}"


def watch(function: Callable[[Any], Any], shapes: Shapes, **attributes: Any) -> Watch:
    """Runs `function(module)`, whose parameters have these shapes; every position of their dims is a unit."""
    module = Code(function, shapes, **attributes)
    recorder = Recorder(module, SIZE_RULES)
    sizes = SizeMode(recorder, module, note_sizes)
    integers = traced_attributes(module, sizes.equalize)
    with torch.inference_mode(), traced_math(), integers, sizes, UnitMode(recorder, find_rule):
        out = module()
    return Watch(recorder, sizes, out)


def axis_of(watch: Watch, name: str, dim: int) -> Axis | None:
    """Axis `dim` of a parameter."""
    return watch.recorder.leaf_by_name[name].units.axes[dim]
