"""From units to coupled groups: members, layers, heads, and what holds between groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from isomorphic.pruning.expressions import Attribute, AxisSize, Expression, Length, Operation, leaves
from isomorphic.pruning.grouping.recorder import Recorder
from isomorphic.pruning.grouping.size_equations import SizeMode, TracedAxis
from isomorphic.pruning.grouping.topology import Topology
from isomorphic.pruning.grouping.unit_groups import Classes, Division, Place, classes_of, divide
from isomorphic.pruning.grouping.units import Ids, UnitTable
from isomorphic.pruning.groups import UNUSED, CoupledGroup, Frozen, Member, Rescaling, SectionStructure, SizeEquation

_Members = Sequence[tuple[Place, Ids]]  # of a group: the positions (units, k) in each place that it occupies


class Assembly:
    """Groups of one finished trace, and what holds between them.

    Args:
        recorder, sizes: what the trace noted.
        left_out: equations of `sizes` that need not hold.

    Attributes:
        groups: in the order in which the model makes them.
    """

    def __init__(self, recorder: Recorder, sizes: SizeMode, left_out: Collection[Any] = ()) -> None:
        self._table, self._sizes, self._left_out = recorder.table, sizes, left_out
        self._recorder = recorder
        self._compensations = sizes.compensations()  # adds to the equations what cannot be compensated for
        self._classes = classes_of(recorder)
        self._division = divide(self._classes, [axis.ids for axis in sizes.axes() if axis.ids is not None])
        heads = heads_of(self._table, self._classes, self._division)
        self.groups = build_groups(recorder.topology, self._classes, self._division, heads)
        self._head_owner = {
            label: (self.groups[numbers[0]].name, head)
            for numbers, found in heads.items()
            for head, labels in enumerate(found)
            for label in labels.tolist()
        }
        self._lengths = _Lengths(self._classes.labels, self._division, self.groups, self._head_owner)

    def equal_rows(self) -> list[set[str]]:
        """Groups whose units share rows that stay equally long."""
        group_of = self._division.group_of
        return [
            {self.groups[n].name for n in np.unique(group_of[rows]).tolist() if n >= 0} for rows in self._classes.rows
        ]

    def frozen(self) -> dict[str, Frozen]:
        """Why producing dims, or parts of them, stay."""
        reasons, stays = self._classes.reasons, self._division.group_of < 0
        stays[[*self._head_owner]] = False
        found = {}
        for place in self._classes.places:
            labels = place.labels[stays[place.labels]]
            if len(labels) and place.makes_units and place.leaf.tensor.dim() > 1:
                most_common = int(np.bincount(self._classes.reason_of[labels]).argmax())
                where = self._classes.lines[most_common]
                found[place.name] = Frozen(reasons[most_common], len(labels), len(place.labels), where)
        return found | self._without_a_layer()

    def _without_a_layer(self) -> dict[str, Frozen]:
        """Weights that no layer of the trace has: they stay, and should not do so in silence."""
        found = {}
        for leaf in self._recorder.leaves.values():
            reason = self._recorder.without_rule.get(leaf.name, "")
            if leaf.name not in self._recorder.used:
                reason = UNUSED
            if reason and isinstance(leaf.tensor, nn.Parameter) and leaf.tensor.dim() > 1 and any(leaf.units.axes):
                found[f"{leaf.name}:0"] = Frozen(reason, leaf.tensor.shape[0], leaf.tensor.shape[0])
        return found

    def frozen_heads(self) -> dict[str, str]:
        """Why attention over a group's channels keeps its heads, by the name of the group."""
        found: dict[str, str] = {}
        for units, labels in _attended_sections(self._table, self._classes):
            numbers = {int(n) for n in self._division.group_of[[*units]] if n >= 0} if min(units) >= 0 else set()
            if labels[0] in self._head_owner or not numbers:
                continue
            frozen = self._classes.reason_of[labels]
            reason = "its heads go only with other widths"
            if any(self._division.num_sections[number] == 1 for number in numbers):
                reason = "all heads share its dims, or one key head serves them all"
            elif frozen.any():
                reason = self._classes.reasons[int(frozen[frozen > 0][0])]
            found |= {self.groups[number].name: reason for number in sorted(numbers)}
        owned = {group.name for group in self.groups if group.heads}
        return {name: reason for name, reason in found.items() if name not in owned}

    def equations(self) -> list[SizeEquation]:
        """The forward code's sizes in terms of groups; those that no cut can touch are left out."""
        guesses = self._sizes.guesses
        found = [self._translated(one) for one in self._sizes.equations if one not in self._left_out]
        found += [self._translated((guesses[one], one[1])) for one in self._left_out if one in guesses]
        return [equation for equation in found if equation.axis.units or _can_change(equation.expression)]

    def together_in_doubt(self) -> list[set[str]]:
        """Groups that must keep one fraction of their units, as a left-out equation may bind them.

        After n = int(x.shape[-1]) // 2, x[..., :n] and x[..., n:] divide one dim into two groups.
        """
        split: dict[str, set[str]] = {}
        for group in self.groups:
            split.setdefault(group.split_dim or group.name, set()).add(group.name)
        found = []
        for one in self._left_out:
            names = groups_of(self._translated(one))
            dims = {group.split_dim or group.name for group in self.groups if group.name in names}
            found.append(names.union(*(split[dim] for dim in dims)))
        return found

    def left_out_with(self, names: Collection[str]) -> set[Any]:
        """The left-out equations that depend on some groups, or on none."""
        found = set()
        for one in self._left_out:
            concerned = groups_of(self._translated(one))
            if not concerned or concerned & set(names):
                found.add(one)
        return found

    def _translated(self, equation: tuple[Expression, TracedAxis]) -> SizeEquation:
        expression, axis = equation
        where = self._sizes.equations.get(equation, "")
        return SizeEquation(self._lengths.translated(expression), self._lengths.of(axis), where)

    def rescalings(self) -> list[Rescaling]:
        """Parameters that make up for numbers computed from sizes."""
        found = []
        for names, rows, factor in self._compensations:
            expression = self._lengths.translated(factor.expression)
            for name in names if _can_change(expression) else ():
                module, _, tensor = name.rpartition(".")
                found.append(Rescaling(module, tensor, torch.from_numpy(rows), expression, factor.holder))
        return found

    def freeze(self, names: Collection[str], reason: str, where: str = "") -> None:
        """Freezes whole groups in the trace; assemble again to see the effect."""
        for group, units in zip(self.groups, self._division.units, strict=True):
            if group.name in names:
                self._table.freeze(units, reason, where)

    def freeze_heads(self, names: Collection[str], reason: str, where: str = "") -> None:
        """Freezes the heads of groups, and of those that share them: their sections then stay."""
        sets = {group.head_set for group in self.groups if group.name in names}
        labels = [label for label, (owner, _) in self._head_owner.items() if owner in sets]
        self._table.freeze(np.array(labels), reason, where)


# --- heads --------------------------------------------------------------------------------------------------


def heads_of(table: UnitTable, classes: Classes, division: Division) -> dict[tuple[int, ...], list[Ids]]:
    """The heads that may go as a whole, in the order of their sections: the section classes that stand for each.

    They are listed by the numbers of the groups whose sections they are, ascending: one where a layer makes queries,
    keys and values alike, most often two where three layers do. Queries and keys are one group then, as their product
    unites their dims, and values are another:

        class 51 holds the units {0 1 2 3} of group 4 and {0 1} of group 5: section 0 of each
        class 52 holds the units {4 5 6 7} of group 4 and {2 3} of group 5: section 1 of each
        so the heads of groups (4, 5) are [51], [52]

    Where 4 query heads are laid out as (2 key heads, 2), the class of a key head holds those of its query heads, and
    all of them stand for it: [51 53 54], [52 55 56].
    """
    found: dict[tuple[int, ...], dict[int, Ids]] = {}  # by groups: the classes of each section
    for units, labels in _attended_sections(table, classes):
        if not classes.reason_of[labels].any():
            numbers, sections = _sections_of(units, division)
            if len(set(sections)) == 1:
                found.setdefault(numbers, {})[sections[0]] = np.array(labels)
    heads: dict[tuple[int, ...], list[Ids]] = {}
    taken: set[int] = set()
    for numbers in sorted(found, key=len, reverse=True):
        by_section = found[numbers]
        is_whole = all(division.num_sections[number] == len(by_section) > 1 for number in numbers)
        if is_whole and not taken & set(numbers):
            heads[numbers] = [labels for _, labels in sorted(by_section.items())]
            taken |= set(numbers)
    return heads


def _attended_sections(table: UnitTable, classes: Classes) -> Iterator[tuple[frozenset[int], list[int]]]:
    """The sections that attention runs over; see `_sections_by_units`."""
    attended = {int(label) for ids in table.heads for label in np.unique(classes.labels[ids])}
    for units, labels in _sections_by_units(table, classes).items():
        if labels[0] in attended and units:
            yield units, labels


def _sections_of(units: Collection[int], division: Division) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The groups that some units are one section each of, ascending, and the section's number in each; else nothing."""
    classes = np.array(sorted(units))
    if classes[0] < 0:
        return (), ()
    groups, numbers, sections = division.group_of[classes], [], []
    if groups.min() < 0:
        return (), ()
    for number in np.unique(groups).tolist():
        here = np.sort(division.unit_of[classes[groups == number]])
        size = len(division.units[number]) // division.num_sections[number]
        first = int(here[0])
        if first % size or not np.array_equal(here, np.arange(first, first + size)):
            return (), ()
        numbers.append(number)
        sections.append(first // size)
    return tuple(numbers), tuple(sections)


def _sections_by_units(table: UnitTable, classes: Classes) -> dict[frozenset[int], list[int]]:
    """By units: the section class whose rows, all together, hold exactly these, and the section classes inside it."""
    held: dict[int, set[int]] = {}  # by section class: what lies in its rows
    for section, row in table.sections.values():
        labels = classes.labels[row]
        matters = classes.is_unit[labels].any() or classes.is_section[labels].any()
        inside = labels.tolist() if matters else [-1]  # not a group's: there may be very many
        held.setdefault(int(classes.labels[section[0]]), set()).update(inside)
    found: dict[frozenset[int], list[int]] = {}
    for label in held:
        inside = _all_inside(label, held)
        sections = [one for one in inside if one in held]
        found[frozenset(inside.difference(sections))] = [label, *sorted(sections)]
    return found


def _all_inside(label: int, held: Mapping[int, Collection[int]]) -> set[int]:
    """What lies in a section, and in the sections that lie in it."""
    found: set[int] = set()
    waiting = [label]
    while waiting:
        new = set(held[waiting.pop()]) - found - {label}
        found |= new
        waiting += [one for one in new if one in held]
    return found


# --- groups -------------------------------------------------------------------------------------------------


def build_groups(
    topology: Topology, classes: Classes, division: Division, heads: Mapping[tuple[int, ...], Sequence[Ids]]
) -> list[CoupledGroup]:
    """The coupled groups of a division, with `heads` as `heads_of` finds them."""
    members: list[list[tuple[Place, Ids]]] = [[] for _ in division.units]
    for place in classes.places:
        for number, positions in division.positions(place):
            members[number].append((place, positions))
    targets: dict[int, list[int]] = {}
    for source, target in topology.edges:
        targets.setdefault(source, []).append(target)
    places_of_sections = [place for place in classes.places if classes.is_section[place.labels].any()]
    names = _names(members)
    set_of = {number: numbers for numbers in heads for number in numbers}
    groups = []
    for number, (name, pool) in enumerate(names):
        nodes = sorted({place.node for place, _ in members[number]})
        rank = {node: position for position, node in enumerate(nodes)}
        edges = {(rank[a], rank[b]) for a in nodes for b in targets.get(a, ()) if b in rank}
        found = [one for place, index in members[number] for one in _members(place, index, rank[place.node])]
        layers = tuple(topology.nodes[node] for node in nodes)
        count, head_set = division.num_sections[number], set_of.get(number, ())
        sections = SectionStructure(count) if count > 1 else None
        if head_set:
            is_first, shared_by = number == head_set[0], names[head_set[0]][0] if len(head_set) > 1 else ""
            with_heads = tuple(_head_members(places_of_sections, heads[head_set])) if is_first else ()
            sections = SectionStructure(count, are_heads=True, members=with_heads, head_set=shared_by)
        size = len(division.units[number])
        groups.append(CoupledGroup(name, size, tuple(found), layers, frozenset(edges), sections, pool))
    return groups


def _names(members: Sequence[_Members]) -> list[tuple[str, str]]:
    """Name and pool of each group: where it is made first, by a weight if there is one."""
    made = [[(place, index) for place, index in found if place.makes_units] for found in members]
    made = [next((pair for pair in found if pair[0].leaf.tensor.dim() > 1), found[0]) for found in made]
    shared = Counter(place.name for place, _ in made)
    return [
        (f"{place.name}:{int(index.min())}", place.name) if shared[place.name] > 1 else (place.name, "")
        for place, index in made
    ]


def _members(place: Place, index: Ids, node: int) -> Iterator[Member]:
    """The same positions of a tensor by each of its names."""
    for name in place.leaf.names:
        module, _, tensor = name.rpartition(".")
        yield Member(module, tensor, place.dim, torch.from_numpy(index), node)


def _head_members(places: Sequence[Place], heads: Sequence[Ids]) -> Iterator[Member]:
    """Tensors with positions of whole heads: bias tables, temperatures."""
    for place in places:
        if np.isin(place.labels, np.concatenate(heads)).any():
            index = np.stack([np.flatnonzero(np.isin(place.labels, labels)) for labels in heads])
            yield from _members(place, index, -1)


# --- lengths of axes ----------------------------------------------------------------------------------------


class _Lengths:
    """Axes of the forward code, and expressions of their lengths, in terms of groups.

    Args:
        labels: the class of every id.
        division, groups: of the units.
        head_owner: by class of a head: its group's name, and the head's number there.
    """

    def __init__(
        self, labels: Ids, division: Division, groups: Sequence[CoupledGroup], head_owner: Mapping[int, tuple[str, int]]
    ) -> None:
        self._labels, self._division, self._groups, self._head_owner = labels, division, groups, head_owner
        self._known: dict[TracedAxis, AxisSize] = {}

    def translated(self, expression: Expression) -> Expression:
        """An expression of traced axes' lengths as one of groups' sizes."""
        if isinstance(expression, Operation):
            left, right = self.translated(expression.left), self.translated(expression.right)
            return Operation(expression.operator, left, right)
        if isinstance(expression, Length):
            return Length(self.of(expression.axis))  # type: ignore[arg-type]
        return expression

    def of(self, axis: TracedAxis) -> AxisSize:
        """How long an axis is."""
        if axis not in self._known:
            self._known[axis] = AxisSize(axis.size) if axis.ids is None else self._units_on(axis.ids)
        return self._known[axis]

    def _units_on(self, ids: Ids) -> AxisSize:
        """The groups' units on an axis with ids (rows …, n)."""
        labels = self._labels[ids].reshape(-1, ids.shape[-1])
        owners = {self._head_owner.get(int(label)) for label in np.unique(labels)}
        names = {owner[0] for owner in owners if owner}
        if None not in owners and len(names) == 1:  # its positions are heads, equally many a head
            name = names.pop()
            rows_are_heads = len(labels) > 1 and all(
                len({self._head_owner[int(n)] for n in row}) == 1 for row in labels
            )
            units = {name: labels.size // len(owners)}
            return AxisSize(0, units, len(labels), name if rows_are_heads else "", counts_heads=True)
        groups = self._division.group_of[labels]
        numbers, counts = np.unique(groups, return_counts=True)
        positions = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        fixed = positions.pop(-1, 0)
        units = {self._groups[n].name: count // self._groups[n].num_units for n, count in positions.items()}
        return AxisSize(fixed, units, len(labels), self._row_group(groups, labels))

    def _row_group(self, groups: Ids, labels: Ids) -> str:
        """The attention group of whose heads each row holds one."""
        for number in np.unique(groups[0][groups[0] >= 0]).tolist():
            group = self._groups[number]
            here = self._division.unit_of[labels[0][groups[0] == number]]
            if group.heads and len(set((here // group.section_size).tolist())) == 1 < len(labels):
                return group.name
        return ""


def groups_of(equation: SizeEquation) -> set[str]:
    """The names of groups that an equation depends on."""
    axis = equation.axis
    return groups_in(equation.expression) | set(axis.units) | ({axis.row_group} if axis.row_group else set())


def groups_in(expression: Expression) -> set[str]:
    """The names of groups that an expression depends on."""
    return {name for leaf in leaves(expression) if isinstance(leaf, Length) for name in leaf.axis.units}


def _can_change(expression: Expression) -> bool:
    return bool(groups_in(expression)) or any(isinstance(leaf, Attribute) for leaf in leaves(expression))
