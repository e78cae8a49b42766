"""From units to coupled groups: members, layers, heads, and what holds between groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch

from isomorphic.pruning.expressions import Attribute, AxisSize, Expression, Length, Operation, leaves
from isomorphic.pruning.grouping.recorder import Recorder
from isomorphic.pruning.grouping.size_equations import SizeMode, TracedAxis
from isomorphic.pruning.grouping.topology import Topology
from isomorphic.pruning.grouping.unit_groups import Classes, Division, Place, classes_of, divide
from isomorphic.pruning.grouping.units import Ids, UnitTable
from isomorphic.pruning.groups import CoupledGroup, Member, Rescaling, SectionStructure, SizeEquation

_Members = Sequence[tuple[Place, Ids]]  # of a group: the positions (units, k) in each place that it occupies


class Assembly:
    """Groups of one finished trace, and what holds between them.

    Attributes:
        groups: in the order in which the model makes them.
    """

    def __init__(self, recorder: Recorder, sizes: SizeMode) -> None:
        self._table, self._sizes = recorder.table, sizes
        self._compensations = sizes.compensations()  # adds to the equations what cannot be compensated for
        self._classes = classes_of(recorder)
        self._division = divide(self._classes, [axis.ids for axis in sizes.axes() if axis.ids is not None])
        heads = heads_of(self._table, self._classes, self._division)
        self.groups = build_groups(recorder.topology, self._classes, self._division, heads)
        self._head_owner = {label: self.groups[number].name for number, labels in heads.items() for label in labels}
        self._lengths = _Lengths(self._classes.labels, self._division, self.groups, self._head_owner)

    def equal_rows(self) -> list[set[str]]:
        """Groups whose units share rows that stay equally long."""
        group_of = self._division.group_of
        return [
            {self.groups[n].name for n in np.unique(group_of[rows]).tolist() if n >= 0} for rows in self._classes.rows
        ]

    def frozen(self) -> dict[str, str]:
        """Why producing dims, or parts of them, stay."""
        reasons, stays = self._classes.reasons, self._division.group_of < 0
        stays[[*self._head_owner]] = False
        found = {}
        for place in self._classes.places:
            labels = place.labels[stays[place.labels]]
            if len(labels) and place.makes_units and place.leaf.tensor.dim() > 1:
                most_common = int(np.bincount(self._classes.reason_of[labels]).argmax())
                part = f" ({len(labels)} of {len(place.labels)})" if len(labels) < len(place.labels) else ""
                found[place.name] = reasons[most_common] + part
        return found

    def equations(self) -> list[SizeEquation]:
        """The forward code's sizes in terms of groups; those that no cut can touch are left out."""
        found = [
            SizeEquation(self._lengths.translated(expression), self._lengths.of(axis))
            for expression, axis in self._sizes.equations
        ]
        return [equation for equation in found if equation.axis.units or _can_change(equation.expression)]

    def rescalings(self) -> list[Rescaling]:
        """Parameters that make up for numbers computed from sizes."""
        found = []
        for names, rows, factor in self._compensations:
            expression = self._lengths.translated(factor.expression)
            for name in names if _can_change(expression) else ():
                module, _, tensor = name.rpartition(".")
                found.append(Rescaling(module, tensor, torch.from_numpy(rows), expression, factor.holder))
        return found

    def freeze(self, names: Collection[str], reason: str) -> None:
        """Freezes whole groups in the trace; assemble again to see the effect."""
        for group, units in zip(self.groups, self._division.units, strict=True):
            if group.name in names:
                self._table.freeze(units, reason)

    def freeze_heads(self, names: Collection[str], reason: str) -> None:
        """Freezes the heads of groups, whose sections then stay."""
        labels = [label for label, owner in self._head_owner.items() if owner in names]
        self._table.freeze(np.array(labels), reason)


# --- heads --------------------------------------------------------------------------------------------------


def heads_of(table: UnitTable, classes: Classes, division: Division) -> dict[int, list[int]]:
    """By number of a group whose sections are heads that may go as a whole: the class of each section."""
    row_of = _rows_of_sections(table, classes)
    attended = {int(label) for ids in table.heads for label in np.unique(classes.labels[ids])}
    heads = {}
    for number, (units, num_sections) in enumerate(zip(division.units, division.num_sections, strict=True)):
        found = [row_of.get(frozenset(section.tolist()), -1) for section in units.reshape(num_sections, -1)]
        may_go = all(label in attended and not classes.reason_of[label] for label in found)
        if num_sections > 1 and may_go and len(set(found)) == num_sections:
            heads[number] = found
    return heads


def _rows_of_sections(table: UnitTable, classes: Classes) -> dict[frozenset[int], int]:
    """The section class whose rows, all together, hold exactly these units and nothing else."""
    held: dict[int, set[int]] = {}
    for section, row in table.sections.values():
        labels = classes.labels[row]
        units = labels.tolist() if classes.is_unit[labels].any() else [-1]  # not a group's: there may be very many
        held.setdefault(int(classes.labels[section[0]]), set()).update(units)
    return {frozenset(units): label for label, units in held.items()}


# --- groups -------------------------------------------------------------------------------------------------


def build_groups(
    topology: Topology, classes: Classes, division: Division, heads: Mapping[int, Sequence[int]]
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
    groups = []
    for number, (name, pool) in enumerate(_names(members)):
        nodes = sorted({place.node for place, _ in members[number]})
        rank = {node: position for position, node in enumerate(nodes)}
        edges = {(rank[a], rank[b]) for a in nodes for b in targets.get(a, ()) if b in rank}
        found = [one for place, index in members[number] for one in _members(place, index, rank[place.node])]
        layers = tuple(topology.nodes[node] for node in nodes)
        sections = _sections(division.num_sections[number], heads.get(number), places_of_sections)
        size = len(division.units[number])
        groups.append(CoupledGroup(name, size, tuple(found), layers, frozenset(edges), sections, pool))
    return groups


def _sections(count: int, heads: Sequence[int] | None, places: Sequence[Place]) -> SectionStructure | None:
    if count < 2:
        return None
    if heads is None:
        return SectionStructure(count)
    return SectionStructure(count, are_heads=True, members=tuple(_head_members(places, heads)))


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


def _head_members(places: Sequence[Place], heads: Sequence[int]) -> Iterator[Member]:
    """Tensors with positions of whole heads: bias tables, temperatures."""
    for place in places:
        if np.isin(place.labels, heads).any():
            index = np.stack([np.flatnonzero(place.labels == label) for label in heads])
            yield from _members(place, index, -1)


# --- lengths of axes ----------------------------------------------------------------------------------------


class _Lengths:
    """Axes of the forward code, and expressions of their lengths, in terms of groups.

    Args:
        labels: the class of every id.
        division, groups: of the units.
        head_owner: by class of a head: its group's name.
    """

    def __init__(
        self, labels: Ids, division: Division, groups: Sequence[CoupledGroup], head_owner: Mapping[int, str]
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
        owners = [self._head_owner.get(int(label)) for label in labels[0]]
        if all(owners) and len(set(owners)) == 1:  # one position a head
            heads = len(set(labels[0].tolist()))
            return AxisSize(0, {owners[0]: labels.size // heads}, len(labels), counts_heads=True)  # type: ignore[dict-item]
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


def groups_in(expression: Expression) -> set[str]:
    """The names of groups that an expression depends on."""
    return {name for leaf in leaves(expression) if isinstance(leaf, Length) for name in leaf.axis.units}


def _can_change(expression: Expression) -> bool:
    return bool(groups_in(expression)) or any(isinstance(leaf, Attribute) for leaf in leaves(expression))
