"""Integers of forward code as expressions: what `B * self.num_heads`, `C // 2` or `x.shape[1] + 1` stand for.

An expression is built while a model is traced and evaluated for the sizes of the cut model, or solved for the module
attribute in it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

Number = int | float


@dataclass(frozen=True)
class AxisSize:
    """How long one axis of an activation is, as a function of what the groups keep.

    Attributes:
        fixed: positions of the axis, over all rows, that belong to no group.
        units: by group name, positions over all rows that each of the group's units occupies.
        rows: the axis holds this many rows of equally many positions ...
        row_group: ... of which those follow the kept heads of this group ("" where rows never go).
        counts_heads: positions are whole heads: `units` counts them by head, not by unit.
        by_head: by (group, group of heads): positions over all rows that each of the group's units occupies, as many in
            each head, of which those of kept heads count. Positions of units that never go are those of the group "".
    """

    fixed: int
    units: Mapping[str, int] = field(default_factory=dict, hash=False)
    rows: int = 1
    row_group: str = ""
    counts_heads: bool = False
    by_head: Mapping[tuple[str, str], int] = field(default_factory=dict, hash=False)

    @property
    def groups(self) -> set[str]:
        """The names of the groups whose units, or heads, lie on the axis."""
        return {*self.units, *(name for pair in self.by_head for name in pair)} - {""}


@dataclass(frozen=True)
class Constant:
    """A number that the forward code spells out, or whose origin is not known."""

    value: Number


@dataclass(frozen=True)
class Attribute:
    """An integer attribute of a module, or one entry of a tuple, list or mapping of integers."""

    module: str
    name: str
    entry: int | str | None = None


@dataclass(frozen=True)
class Length:
    """The length of an axis of an activation."""

    axis: AxisSize


@dataclass(frozen=True)
class Operation:
    """`left` (operator) `right`; `operator` is a key of `OPERATORS`."""

    operator: str
    left: Expression
    right: Expression


Expression = Constant | Attribute | Length | Operation

OPERATORS: dict[str, Callable[[Number, Number], Number]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "/": operator.truediv,
    "**": operator.pow,
}


def evaluate(
    expression: Expression, length: Callable[[AxisSize], Number], attribute: Callable[[Attribute], Number]
) -> Number:
    """The value of `expression`, given the lengths of axes and the values of attributes."""
    if isinstance(expression, Constant):
        return expression.value
    if isinstance(expression, Attribute):
        return attribute(expression)
    if isinstance(expression, Length):
        return length(expression.axis)
    left, right = (evaluate(side, length, attribute) for side in (expression.left, expression.right))
    return OPERATORS[expression.operator](left, right)


def leaves(expression: Expression) -> Iterator[Constant | Attribute | Length]:
    """The constants, attributes and lengths in `expression`, left to right."""
    if isinstance(expression, Operation):
        yield from leaves(expression.left)
        yield from leaves(expression.right)
    else:
        yield expression


def operators(expression: Expression) -> Iterator[str]:
    """The operators in `expression`, as often as they occur."""
    if isinstance(expression, Operation):
        yield expression.operator
        yield from operators(expression.left)
        yield from operators(expression.right)
