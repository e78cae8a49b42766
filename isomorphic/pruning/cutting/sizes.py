"""Integers of the cut model: how long its axes are, and what its modules' integer attributes must be.

While a model is traced, every size that its forward code spells out gives an equation: this expression of attributes
and lengths is the length of that axis. After a cut the lengths are known, and the attributes are solved for.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from fractions import Fraction

from torch import nn

from isomorphic.pruning.expressions import (
    Attribute,
    AxisSize,
    Constant,
    Expression,
    Number,
    Operation,
    evaluate,
    leaves,
    operators,
)
from isomorphic.pruning.groups import ChannelGraph, SizeEquation
from isomorphic.pruning.plan import PruningPlan


class SizeConflictError(Exception):
    """No values of the attributes satisfy all equations.

    Attributes:
        conflicts: for each equation that fails, the equation and, after it, those that determined its attributes.
    """

    def __init__(self, conflicts: Sequence[tuple[SizeEquation, ...]]) -> None:
        super().__init__(f"{len(conflicts)} sizes cannot be had, such as {_text(conflicts[0][0].expression)}")
        self.conflicts = tuple(conflicts)


class AxisLengths:
    """The lengths of axes in the model that a plan leaves, or in the dense model where there is no plan."""

    def __init__(self, graph: ChannelGraph, plan: PruningPlan | None = None) -> None:
        self._units = {g.name: len(plan.kept[g.name]) if plan else g.num_units for g in graph.groups}
        self._heads = {g.name: len(plan.kept_heads(g)) if plan and g.heads else g.num_sections for g in graph.groups}
        self._dense_heads = {g.name: g.num_sections for g in graph.groups}

    def assume(self, name: str, units: int, heads: int) -> None:
        """Counts of one group that no plan says."""
        self._units[name], self._heads[name] = units, heads

    def __call__(self, axis: AxisSize) -> Number:
        """The length of `axis`: a whole number, unless its rows cannot be equally long."""
        kept = self._heads if axis.counts_heads else self._units
        total: Number | Fraction = axis.fixed + sum(positions * kept[name] for name, positions in axis.units.items())
        if not axis.by_head and not axis.row_group:  # nearly all of them: whole numbers are much the faster
            whole, rest = divmod(total, axis.rows)
            return total / axis.rows if rest else whole
        for (name, heads), positions in axis.by_head.items():
            total += positions * self._units.get(name, 1) * self._share_of_heads(heads)
        length = Fraction(total) / (axis.rows * (self._share_of_heads(axis.row_group) if axis.row_group else 1))
        return int(length) if length.denominator == 1 else float(length)

    def _share_of_heads(self, name: str) -> Fraction:
        return Fraction(self._heads[name], self._dense_heads[name])


def dense_values(model: nn.Module) -> Callable[[Attribute], int]:
    """Reads attributes as they stand in `model`, by any of a module's names."""
    modules = dict(model.named_modules(remove_duplicate=False))

    def value(attribute: Attribute) -> int:
        found = getattr(modules[attribute.module], attribute.name)
        return found if attribute.entry is None else found[attribute.entry]

    return value


class SizeEquations:
    """Equations that are solved time and again: what does not depend on the lengths is worked out once.

    Args:
        equations: expressions and the axes whose lengths they must equal.
    """

    def __init__(self, equations: Sequence[SizeEquation]) -> None:
        self.equations = tuple(equations)
        self.attributes = [_attributes(equation.expression) for equation in equations]
        self.ambiguities = [_ambiguity(equation.expression) for equation in equations]
        self.users: dict[Attribute, list[int]] = {}
        for number, attributes in enumerate(self.attributes):
            for attribute in attributes:
                self.users.setdefault(attribute, []).append(number)

    def solve(self, length: Callable[[AxisSize], Number], value_of: Callable[[Attribute], int]) -> dict[Attribute, int]:
        """As `solve_attributes`."""
        solver = _Solver(self, length, value_of)
        solver.solve()
        conflicts = solver.conflicts()
        if conflicts:
            raise SizeConflictError(conflicts)
        return solver.values


def solve_attributes(
    equations: Sequence[SizeEquation], length: Callable[[AxisSize], Number], value_of: Callable[[Attribute], int]
) -> dict[Attribute, int]:
    """The values of attributes for which every equation holds.

    An equation that is an attribute determines it. An equation with one attribute left is solved for that: first those
    with a single solution, then those with several (divisions), which keep the dense value where it will do. Where two
    or more are left, the first of them changes. Attributes that no equation needs changed keep their dense values.

    Args:
        equations: expressions and the axes whose lengths they must equal.
        length: the length of an axis in the cut model.
        value_of: an attribute's value in the dense model.

    Returns:
        The value of every attribute in the equations.

    Raises:
        SizeConflictError: there are none, or none that one attribute at a time can tell.
    """
    return SizeEquations(equations).solve(length, value_of)


class _Solver:
    """Determines attributes one after the other; an equation waits until one of its attributes is left."""

    def __init__(
        self, system: SizeEquations, length: Callable[[AxisSize], Number], value_of: Callable[[Attribute], int]
    ) -> None:
        self.values: dict[Attribute, int] = {}
        self._cause: dict[Attribute, int] = {}  # the equation that determined an attribute
        self._equations = system.equations
        self._length = length
        self._value_of = value_of
        self._targets = [length(equation.axis) for equation in self._equations]
        self._attributes, self._users, self._ambiguities = system.attributes, system.users, system.ambiguities
        self._unknown = [len(attributes) for attributes in self._attributes]
        self._ready = [(self._ambiguities[n], n) for n, unknown in enumerate(self._unknown) if unknown == 1]
        heapq.heapify(self._ready)

    def solve(self) -> None:
        """Gives every attribute a value."""
        self._settle_ready()
        for may_change in (False, True):  # first those that the dense values satisfy
            for number, attributes in enumerate(self._attributes):
                if self._unknown[number] > 1 and (may_change or self._holds(number, {})):
                    unknown = [attribute for attribute in attributes if attribute not in self.values]
                    changes = self._changing(number, unknown) if may_change else None
                    for attribute in unknown:
                        if attribute != changes:
                            self._settle(attribute, self._value_of(attribute), number)
                    self._settle_ready()
        for attribute in self._users:
            self.values.setdefault(attribute, self._value_of(attribute))

    def _changing(self, number: int, unknown: Sequence[Attribute]) -> Attribute:
        """The first of several unknown attributes that solves an equation while the others stay dense."""
        return next((attribute for attribute in unknown if self._solution(number, attribute) is not None), unknown[0])

    def conflicts(self) -> list[tuple[SizeEquation, ...]]:
        """Each equation that fails, followed by the equations that determined its attributes."""
        failed = [number for number in range(len(self._equations)) if not self._holds(number, {})]
        return [tuple(self._equations[n] for n in self._causes(number)) for number in failed]

    def _settle_ready(self) -> None:
        while self._ready:
            _, number = heapq.heappop(self._ready)
            unknown = [attribute for attribute in self._attributes[number] if attribute not in self.values]
            if unknown:
                value = self._solution(number, unknown[0])
                if value is not None:
                    self._settle(unknown[0], value, number)

    def _settle(self, attribute: Attribute, value: int, cause: int | None = None) -> None:
        self.values[attribute] = value
        if cause is not None:
            self._cause[attribute] = cause
        for number in self._users[attribute]:
            self._unknown[number] -= 1
            if self._unknown[number] == 1:
                heapq.heappush(self._ready, (self._ambiguities[number], number))

    def _solution(self, number: int, attribute: Attribute) -> int | None:
        """The value of the one unknown attribute of an equation, None where there is none."""
        dense = self._value_of(attribute)
        expression = self._equations[number].expression
        if self._holds(number, {attribute: dense}):
            return dense
        if sum(leaf == attribute for leaf in leaves(expression)) > 1:
            return next((value for value in range(dense - 1, 0, -1) if self._holds(number, {attribute: value})), None)
        try:
            value = self._inverted(expression, attribute, self._targets[number])
        except ZeroDivisionError:
            return None
        return value if value is not None and self._holds(number, {attribute: value}) else None

    def _inverted(self, expression: Expression, attribute: Attribute, target: Number | None) -> int | None:
        """The value of `attribute`, which occurs once in `expression`, that makes it `target`; not checked."""
        while isinstance(expression, Operation) and target is not None:
            on_left = attribute in leaves(expression.left)
            inside, outside = (expression.left, expression.right)[:: 1 if on_left else -1]
            target = _operand(expression.operator, target, self._evaluate(outside, {}), on_left)
            expression = inside
        return None if target is None or target != int(target) else int(target)

    def _holds(self, number: int, assumed: dict[Attribute, int]) -> bool:
        try:
            return self._evaluate(self._equations[number].expression, assumed) == self._targets[number]
        except ZeroDivisionError:
            return False

    def _evaluate(self, expression: Expression, assumed: dict[Attribute, int]) -> Number:
        def value(attribute: Attribute) -> int:
            known = assumed.get(attribute, self.values.get(attribute))
            return self._value_of(attribute) if known is None else known

        return evaluate(expression, self._length, value)

    def _causes(self, number: int) -> list[int]:
        found = {number: None}
        pending = [number]
        while pending:
            for attribute in self._attributes[pending.pop()]:
                cause = self._cause.get(attribute)
                if cause is not None and cause not in found:
                    found[cause] = None
                    pending.append(cause)
        return list(found)


def _attributes(expression: Expression) -> tuple[Attribute, ...]:
    """The attributes in `expression`, each once, left to right."""
    return tuple(dict.fromkeys(leaf for leaf in leaves(expression) if isinstance(leaf, Attribute)))


def _ambiguity(expression: Expression) -> int:
    """0 for an attribute itself, 1 where there is one solution at most, 2 where there may be several."""
    if isinstance(expression, Attribute):
        return 0
    exact = all(operator in ("+", "-", "*") for operator in operators(expression))
    repeated = len(_attributes(expression)) < sum(isinstance(leaf, Attribute) for leaf in leaves(expression))
    return 1 if exact and not repeated else 2


def _operand(operator: str, result: Number, other: Number, on_left: bool) -> Number | None:
    """The operand x of `x (operator) other`, or of `other (operator) x`, that may give `result`."""
    if operator == "+":
        return result - other
    if operator == "-":
        return result + other if on_left else other - result
    if operator == "*":
        return result // other if other else None
    if operator in ("//", "/"):
        return result * other if on_left else (other // result if result else None)
    return None


def _text(expression: Expression) -> str:
    if isinstance(expression, Operation):
        return f"({_text(expression.left)} {expression.operator} {_text(expression.right)})"
    if isinstance(expression, Attribute):
        entry = "" if expression.entry is None else f"[{expression.entry}]"
        return ".".join(filter(None, (expression.module, expression.name))) + entry
    return str(expression.value) if isinstance(expression, Constant) else "a length"
