"""From units to coupled groups: members, layers, heads, and what holds between groups."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from isomorphic.pruning.expressions import Attribute, AxisSize, Expression, Length, Operation, leaves
from isomorphic.pruning.grouping.heads import Heads, HeadSet, attended_sections, find_heads
from isomorphic.pruning.grouping.recorder import Leaf, Recorder
from isomorphic.pruning.grouping.size_equations import SizeMode, TracedAxis
from isomorphic.pruning.grouping.topology import Topology
from isomorphic.pruning.grouping.unit_groups import Classes, Division, Place, classes_of, divide
from isomorphic.pruning.grouping.units import Ids
from isomorphic.pruning.groups import (
    UNUSED,
    CoupledGroup,
    Frozen,
    LayerNode,
    Member,
    Rescaling,
    SectionStructure,
    SizeEquation,
)

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
        self._heads = find_heads(self._table, self._classes, self._division)
        self.groups, set_names = build_groups(recorder.topology, self._classes, self._division, self._heads)
        self._head_owner = {
            label: (name, head)
            for name, found in zip(set_names, self._heads.sets, strict=True)
            for head, labels in enumerate(found.labels)
            for label in labels.tolist()
        }
        self._lengths = _Lengths(
            self._classes.labels, self._division, self.groups, self._head_owner, self._heads, set_names
        )

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
        unused = {*self.unused()}
        for leaf in self._recorder.leaves.values():
            reason = self._recorder.without_rule.get(leaf.name, "")
            if leaf.name in unused:
                reason = UNUSED
            elif leaf.name in self._recorder.without_layer and not self._has_a_layer(leaf):
                reason = self._recorder.without_layer[leaf.name]
            if reason and isinstance(leaf.tensor, nn.Parameter) and leaf.tensor.dim() > 1 and any(leaf.units.axes):
                found[f"{leaf.name}:0"] = Frozen(reason, leaf.tensor.shape[0], leaf.tensor.shape[0])
        return found

    def _has_a_layer(self, leaf: Leaf) -> bool:
        """Says whether a layer has made or read the channels of a parameter."""
        topology = self._recorder.topology
        nodes = [topology.roles.get((leaf.name, dim)) for dim in range(leaf.tensor.dim())]
        return any(node is not None and topology.nodes[node].kind != "parameter" for node in nodes)

    def unused(self) -> tuple[str, ...]:
        """Names of the parameters that the forward code does not use on the traced inputs."""
        recorder = self._recorder
        leaves = (leaf for leaf in recorder.leaves.values() if isinstance(leaf.tensor, nn.Parameter))
        return tuple(leaf.name for leaf in leaves if leaf.name not in recorder.used)

    def frozen_heads(self) -> dict[str, str]:
        """Why attention over a group's channels keeps its heads, by the name of the group."""
        return {name: reason for name, (reason, _) in self._heads_that_stay.items()}

    def frozen_head_lines(self) -> dict[str, str]:
        """The line of forward code behind each of these reasons, where there is one."""
        return {name: where for name, (_, where) in self._heads_that_stay.items() if where}

    @functools.cached_property
    def _heads_that_stay(self) -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        for units, labels in attended_sections(self._table, self._classes):
            numbers = {int(n) for n in self._division.group_of[[*units]] if n >= 0} if min(units) >= 0 else set()
            if labels[0] in self._head_owner or not numbers:
                continue
            frozen = self._classes.reason_of[labels]
            reason, where = "its heads go only with other widths", ""
            if frozen.any():
                first = int(frozen[frozen > 0][0])
                reason, where = self._classes.reasons[first], self._classes.lines[first]
            elif any(self._division.num_sections[number] == 1 for number in numbers):
                reason = "its heads share dims with something that cannot lose them"
            found |= {self.groups[number].name: (reason, where) for number in sorted(numbers)}
        owned = {group.name for group in self.groups if group.heads}
        return {name: why for name, why in found.items() if name not in owned}

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
        for group, units in zip(self.groups, self._division.units, strict=False):  # those of whole heads come last
            if group.name in names:
                self._table.freeze(units, reason, where)

    def freeze_heads(self, names: Collection[str], reason: str, where: str = "") -> None:
        """Freezes the heads of groups, and of those that share them: their sections then stay."""
        sets = {group.head_set for group in self.groups if group.name in names}
        labels = [label for label, (owner, _) in self._head_owner.items() if owner in sets]
        self._table.freeze(np.array(labels), reason, where)


# --- groups -------------------------------------------------------------------------------------------------


def build_groups(
    topology: Topology, classes: Classes, division: Division, heads: Heads
) -> tuple[list[CoupledGroup], list[str]]:
    """The coupled groups of a division, those of whole heads last, and the name of each set of heads."""
    members: list[list[tuple[Place, Ids]]] = [[] for _ in division.units]
    for place in classes.places:
        for number, positions in division.positions(place):
            members[number].append((place, positions))
    names = _names(members, topology.nodes)
    whole_names = _names_of_whole_heads(heads.sets)
    set_names = [
        names[one.groups[0]][0] if one.groups else whole for one, whole in zip(heads.sets, whole_names, strict=True)
    ]
    places_of_sections = [place for place in classes.places if classes.is_section[place.labels].any()]
    with_heads = [tuple(_head_members(places_of_sections, one.labels)) for one in heads.sets]
    set_of = {number: position for position, one in enumerate(heads.sets) for number in one.groups}
    shape = _Shape(topology)
    groups = []
    for number, (name, pool) in enumerate(names):
        count, position = division.num_sections[number], set_of.get(number)
        sections = SectionStructure(count) if count > 1 else None
        if position is not None:
            one, is_first = heads.sets[position], name == set_names[position]
            shared_by = set_names[position] if len(one.groups) > 1 or one.shared else ""
            sections = SectionStructure(count, True, with_heads[position] if is_first else (), shared_by)
        groups.append(shape.group(name, len(division.units[number]), members[number], sections, pool))
    for one, name, set_name, others in zip(heads.sets, whole_names, set_names, with_heads, strict=True):
        if one.shared:
            alone = not one.groups
            sections = SectionStructure(
                len(one.labels), True, others if alone else (), "" if alone else set_name, are_units=True
            )
            groups.append(shape.group(name, len(one.labels), one.shared, sections, ""))
    return groups, set_names


class _Shape:
    """Makes groups of places: their layers, and the edges between these."""

    def __init__(self, topology: Topology) -> None:
        self._nodes, self._also = topology.nodes, topology.also
        self._targets: dict[int, list[int]] = {}
        for source, target in topology.edges:
            self._targets.setdefault(source, []).append(target)

    def group(
        self, name: str, size: int, members: _Members, sections: SectionStructure | None, pool: str
    ) -> CoupledGroup:
        """The group of `size` units with these positions (units, k) in each place."""
        nodes = sorted({place.node for place, _ in members})
        rank = {node: position for position, node in enumerate(nodes)}
        edges = {(rank[a], rank[b]) for a in nodes for b in self._targets.get(a, ()) if b in rank}
        found = [
            one
            for place, index in members
            for one in _members(place, index, rank[place.node], self._also.get((place.leaf.name, place.dim), ""))
        ]
        layers = tuple(self._nodes[node] for node in nodes)
        return CoupledGroup(name, size, tuple(found), layers, frozenset(edges), sections, pool)


def _names_of_whole_heads(sets: Sequence[HeadSet]) -> list[str]:
    """The name of the group of whole heads, by set, "" where a set has none: where heads are made first."""
    made = [next((pair for pair in one.shared if pair[0].makes_units), None) for one in sets]
    first = [pair or (one.shared[0] if one.shared else None) for pair, one in zip(made, sets, strict=True)]
    shared = Counter(pair[0].name for pair in first if pair)
    return [
        "" if pair is None
        else f"{pair[0].name}:heads" if shared[pair[0].name] == 1
        else f"{pair[0].name}:heads from {int(pair[1].min())}"
        for pair in first
    ]  # fmt: skip


def _names(members: Sequence[_Members], nodes: Sequence[LayerNode]) -> list[tuple[str, str]]:
    """Name and pool of each group: where it is made first, by a weight if there is one."""
    made = [_naming([(place, index) for place, index in found if place.makes_units], nodes) for found in members]
    shared = Counter(place.name for place, _ in made)
    return [
        (f"{place.name}:{int(index.min())}", place.name) if shared[place.name] > 1 else (place.name, "")
        for place, index in made
    ]


def _naming(made: _Members, nodes: Sequence[LayerNode]) -> tuple[Place, Ids]:
    """The place that a group is named by: its first weight in the order of the model's parameters, or any first place.

    Models often register a table of positions or biases first, and add it to what a layer has made: such an embedding
    gives way to the layer that the forward code calls first.
    """
    first = next((pair for pair in made if pair[0].leaf.tensor.dim() > 1), made[0])
    return min(made, key=lambda pair: pair[0].node) if nodes[first[0].node].kind == "embedding" else first


def _members(place: Place, index: Ids, node: int, also: str = "") -> Iterator[Member]:
    """The same positions of a tensor by each of its names; `also` is of the first, see `Member`."""
    for number, name in enumerate(place.leaf.names):
        module, _, tensor = name.rpartition(".")
        yield Member(module, tensor, place.dim, torch.from_numpy(index), node, "" if number else also)


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
        head_owner: by class of a head: the name of its set, and the head's number there.
        heads, set_names: all sets of heads.
    """

    def __init__(
        self,
        labels: Ids,
        division: Division,
        groups: Sequence[CoupledGroup],
        head_owner: Mapping[int, tuple[str, int]],
        heads: Heads,
        set_names: Sequence[str],
    ) -> None:
        self._labels, self._division, self._groups, self._head_owner = labels, division, groups, head_owner
        self._heads, self._set_names = heads, set_names
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
        ids = ids.reshape(-1, ids.shape[-1])
        labels = self._labels[ids]
        found = np.unique(labels).tolist() if self._head_owner else []  # sorting millions of labels takes its time
        owners = {self._head_owner.get(label) for label in found} or {None}
        names = {owner[0] for owner in owners if owner}
        if None not in owners and len(names) == 1:  # its positions are heads, equally many a head
            name = names.pop()
            rows_are_heads = len(labels) > 1 and all(
                len({self._head_owner[int(n)] for n in row}) == 1 for row in labels
            )
            units = {name: labels.size // len(owners)}
            return AxisSize(0, units, len(labels), name if rows_are_heads else "", counts_heads=True)
        groups = self._division.group_of[labels]
        by_head, follows_heads, row_group = self._by_head(ids, groups)
        counts = np.bincount(groups[~follows_heads] + 1)  # of what is in no group, in group 0, in group 1 …
        fixed = int(counts[0]) if len(counts) else 0
        positions = {int(number) - 1: int(counts[number]) for number in np.flatnonzero(counts) if number}
        units = {self._groups[n].name: count // self._groups[n].num_units for n, count in positions.items()}
        return AxisSize(fixed, units, len(labels), row_group or self._row_group(groups, labels), by_head=by_head)

    def _by_head(self, ids: Ids, groups: Ids) -> tuple[dict[tuple[str, str], int], NDArray[np.bool_], str]:
        """Positions of an axis with ids (rows, n) that follow heads with shared dims.

        Returns:
            See `AxisSize.by_head`; which positions these are; and the set of which every row holds one head.
        """
        head_of = self._heads.of_id[ids]
        by_head: dict[tuple[str, str], int] = {}
        follow, row_group = np.zeros(ids.shape, bool), ""
        for position, first in self._heads.first_of.items() if (head_of >= 0).any() else ():
            found, name = self._heads.sets[position], self._set_names[position]
            count = len(found.labels)
            inside = (head_of >= first) & (head_of < first + count)
            shared = inside & ~np.isin(groups, found.groups)
            for number in np.unique(groups[shared]).tolist():
                mine = shared & (groups == number)
                counts = np.bincount(head_of[mine] - first, minlength=count)
                if (counts == counts[0]).all():  # of one head alone, as where all are tied, they are like any other
                    group = self._groups[number] if number >= 0 else None
                    key = (group.name if group else "", name)
                    by_head[key] = int(counts.sum()) // (group.num_units if group else 1)
                    follow |= mine
            of_rows = head_of[:, 0]  # (heads, q k v, dims): each row is of one head
            if inside.all() and (head_of == of_rows[:, None]).all() and follow.any():
                counts = np.bincount(of_rows - first, minlength=count)
                row_group = name if (counts == counts[0]).all() else row_group
        return by_head, follow, row_group

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
    return groups_in(equation.expression) | axis.groups | ({axis.row_group} if axis.row_group else set())


def dims_of_heads(equation: SizeEquation) -> set[str]:
    """The names of groups in an equation whose units all heads of an attention share."""
    lengths = [leaf.axis for leaf in leaves(equation.expression) if isinstance(leaf, Length)]
    return {name for axis in (equation.axis, *lengths) for name, _ in axis.by_head}


def groups_in(expression: Expression) -> set[str]:
    """The names of groups that an expression depends on."""
    return {name for leaf in leaves(expression) if isinstance(leaf, Length) for name in leaf.axis.groups}


def _can_change(expression: Expression) -> bool:
    return bool(groups_in(expression)) or any(isinstance(leaf, Attribute) for leaf in leaves(expression))
