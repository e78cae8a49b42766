"""From classes of ids to coupled groups.

A class of united ids is a unit if a layer makes it and nothing freezes it. Units that occupy the same dims of the same
tensors equally often, and the same sized axes of the forward code, make a group. Rows that keep equally many units
divide a group into blocks, or tie the sizes of groups together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from isomorphic.pruning.expressions import Attribute, AxisSize, Expression, Length, Operation, leaves
from isomorphic.pruning.groups import BlockStructure, CoupledGroup, LayerNode, Member, Rescaling, SizeEquation
from isomorphic.pruning.tracing.calls import SizeMode, TracedAxis
from isomorphic.pruning.tracing.record import Leaf, Recorder
from isomorphic.pruning.tracing.units import Ids

PRODUCERS = frozenset({"conv", "linear", "embedding"})
_HEADS = "its units are whole heads, which stay"
_UNEVEN = "it is the only channel of its group, or shares evenly split rows with channels that stay"


@dataclass(frozen=True)
class Place:
    """One dim of a parameter or buffer: its layer side, and the class at each of its positions, shape (n,)."""

    leaf: Leaf
    dim: int
    node: int
    labels: Ids

    @property
    def name(self) -> str:
        """What a group that begins here is called."""
        return f"{self.leaf.name}:{self.dim}"


class Assembly:
    """Groups of one finished trace."""

    def __init__(self, recorder: Recorder, sizes: SizeMode) -> None:
        self._table, self._topology, self._sizes = recorder.table, recorder.topology, sizes
        self._compensations = sizes.compensations()
        self._axis_sizes: dict[TracedAxis, AxisSize] = {}
        self.labels = self._table.classes()
        frozen = self._table.reasons(self.labels)
        self._reasons = [_HEADS, *(reason for _, reason in frozen), _UNEVEN]
        self._reason_of = np.zeros(self._table.size, np.int64)  # by class: position of the first reason, 0 for none
        for number, (classes, _) in reversed([*enumerate(frozen, start=1)]):
            self._reason_of[classes] = number
        self._places = [self._place(leaf, dim) for leaf, dim in _dims(recorder)]
        self._is_block = np.zeros(self._table.size, bool)
        self._is_block[[self.labels[block[0]] for block, _ in self._table.blocks.values()]] = True
        self._live = self._live_classes()
        self._rows = self._uneven_rows()
        self._group_of = np.full(self._table.size, -1)  # by class
        self._unit_of = np.zeros(self._table.size, np.int64)
        self._classes: list[Ids] = []  # of each group, in the order of its units
        self._num_blocks: list[int] = []
        self._divide()
        self._places_of_blocks = [place for place in self._places if self._is_block[place.labels].any()]
        self._rows_of_blocks = self._blocks_by_units()
        self._attended = {int(label) for ids in self._table.heads for label in np.unique(self.labels[ids])}
        self._targets: dict[int, list[int]] = {}
        for source, target in self._topology.edges:
            self._targets.setdefault(source, []).append(target)
        self._head_owner: dict[int, str] = {}  # class of a head -> its group's name
        self.groups = self._build()

    # --- which classes are units

    def _place(self, leaf: Leaf, dim: int) -> Place:
        axis = leaf.units.axes[dim]
        assert axis is not None
        node = self._topology.roles.get((leaf.name, dim))
        if node is None:
            owner = leaf.name.rpartition(".")[0]
            node = self._topology.node(leaf.name, LayerNode(owner, "parameter", "both"))
        return Place(leaf, dim, node, self.labels[axis.ids])

    def _makes_units(self, place: Place) -> bool:
        node = self._topology.nodes[place.node]
        return node.side == "out" and node.kind in PRODUCERS

    def _live_classes(self) -> NDArray[np.bool_]:
        live = np.zeros(self._table.size, bool)
        for place in filter(self._makes_units, self._places):
            live[place.labels] = True
        live[self._is_block] = False
        live[self._reason_of > 0] = False
        return live

    def _uneven_rows(self) -> list[Ids]:
        """Classes (r, n) in rows that hold different units, so that something has to keep them equally many."""
        rows = [self.labels[ids] for ids in self._table.rows.values()]
        rows = [found for found in rows if not (np.sort(found, axis=1) == np.sort(found[:1], axis=1)).all()]
        changed = True
        while changed:
            changed = False
            for found in rows:
                alive = self._live[found]
                if alive.any() and (found.shape[1] == 1 or len(set(alive.sum(axis=1).tolist())) > 1):
                    self._reason_of[found[alive]] = len(self._reasons) - 1
                    self._live[found[alive]] = False
                    changed = True
        return [found for found in rows if self._live[found].any()]

    # --- which units belong together

    def _divide(self) -> None:
        """Numbers the groups and the units in them."""
        signature, block = self._signatures()
        found: dict[tuple[int, int], list[Ids]] = {}
        live = np.flatnonzero(self._live)
        first = self._first_positions()
        order = live[np.argsort(first[live], kind="stable")]
        order = order[np.lexsort((block[order], signature[order]))]  # stable: by position inside a block
        changes = (np.diff(signature[order]) != 0) | (np.diff(block[order]) != 0)
        for classes in np.split(order, np.flatnonzero(changes) + 1):
            if len(classes):
                found.setdefault((int(signature[classes[0]]), len(classes)), []).append(classes)
        for blocks in sorted(found.values(), key=lambda blocks: min(first[classes[0]] for classes in blocks)):
            blocks.sort(key=lambda classes: first[classes[0]])
            classes = np.concatenate(blocks)
            self._group_of[classes] = len(self._classes)
            self._unit_of[classes] = np.arange(len(classes))
            self._classes.append(classes)
            self._num_blocks.append(len(blocks))

    def _first_positions(self) -> Ids:
        """Where each class is first made, as a position in all producing dims one after the other."""
        first = np.full(self._table.size, np.iinfo(np.int64).max)
        start = 0
        for place in filter(self._makes_units, self._places):
            np.minimum.at(first, place.labels, start + np.arange(len(place.labels)))
            start += len(place.labels)
        return first

    def _signatures(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """By class: a sum of random numbers over what it occupies, and one over the rows that it lies in."""
        random = np.random.default_rng(0)
        occupied = [place.labels for place in self._places]
        occupied += [self.labels[axis.ids].ravel() for axis in self._sizes.axes() if axis.ids is not None]
        occupied += [rows.ravel() for rows in self._rows]
        signature = _hash(random, occupied, self._table.size)
        block = _hash(random, [row for rows in self._rows for row in rows], self._table.size)
        return signature, block

    # --- groups

    def _build(self) -> list[CoupledGroup]:
        members: list[list[tuple[Place, Ids]]] = [[] for _ in self._classes]
        for place in self._places:
            groups = self._group_of[place.labels]
            for number in np.unique(groups[groups >= 0]).tolist():
                positions = np.flatnonzero(groups == number)
                units = self._unit_of[place.labels[positions]]
                order = np.argsort(units, kind="stable")
                members[number].append((place, positions[order].reshape(len(self._classes[number]), -1)))
        return [self._group(*name, number, members[number]) for number, name in enumerate(self._names(members))]

    def _names(self, members: Sequence[Sequence[tuple[Place, Ids]]]) -> list[tuple[str, str]]:
        """Name and pool of each group: where it is made first, by a weight if there is one."""
        made = [[(place, index) for place, index in found if self._makes_units(place)] for found in members]
        made = [next((pair for pair in found if pair[0].leaf.tensor.dim() > 1), found[0]) for found in made]
        shared = Counter(place.name for place, _ in made)
        return [
            (f"{place.name}:{int(index.min())}", place.name) if shared[place.name] > 1 else (place.name, "")
            for place, index in made
        ]

    def _group(self, name: str, pool: str, number: int, members: Sequence[tuple[Place, Ids]]) -> CoupledGroup:
        nodes = sorted({place.node for place, _ in members})
        rank = {node: position for position, node in enumerate(nodes)}
        edges = {(rank[a], rank[b]) for a in nodes for b in self._targets.get(a, ()) if b in rank}
        found = tuple(
            self._member(name, place.dim, index, rank[place.node])
            for place, index in members
            for name in place.leaf.names
        )
        layers = tuple(self._topology.nodes[node] for node in nodes)
        blocks = self._blocks(name, number)
        return CoupledGroup(name, len(self._classes[number]), found, layers, frozenset(edges), blocks, pool)

    def _blocks(self, name: str, number: int) -> BlockStructure | None:
        if self._num_blocks[number] < 2:
            return None
        heads = self._heads_of(number)
        if heads is None:
            return BlockStructure(self._num_blocks[number])
        self._head_owner |= dict.fromkeys(heads, name)
        return BlockStructure(len(heads), are_heads=True, members=tuple(self._head_members(heads)))

    def _member(self, tensor_name: str, dim: int, index: Ids, node: int) -> Member:
        module, _, tensor = tensor_name.rpartition(".")
        return Member(module, tensor, dim, torch.from_numpy(index), node)

    # --- heads

    def _heads_of(self, number: int) -> list[int] | None:
        """The classes of the heads that a group's blocks are, None where blocks may not go as a whole."""
        blocks = self._classes[number].reshape(self._num_blocks[number], -1)
        found = [self._rows_of_blocks.get(frozenset(block.tolist()), -1) for block in blocks]
        may_go = all(label in self._attended and not self._reason_of[label] for label in found)
        return found if may_go and len(set(found)) == len(found) else None

    def _blocks_by_units(self) -> dict[frozenset[int], int]:
        """The block class whose rows, all together, hold exactly these units and nothing else."""
        held: dict[int, set[int]] = {}
        for block, row in self._table.blocks.values():
            labels = self.labels[row]
            units = labels.tolist() if self._live[labels].any() else [-1]  # not a group's: there may be very many
            held.setdefault(int(self.labels[block[0]]), set()).update(units)
        return {frozenset(units): label for label, units in held.items()}

    def _head_members(self, heads: Sequence[int]) -> Iterator[Member]:
        """Tensors with positions of whole heads: bias tables, temperatures."""
        for place in self._places_of_blocks:
            if np.isin(place.labels, heads).any():
                index = np.stack([np.flatnonzero(place.labels == label) for label in heads])
                for name in place.leaf.names:
                    yield self._member(name, place.dim, index, -1)

    # --- what holds between groups

    def equal_rows(self) -> list[set[str]]:
        """Groups whose units share rows that stay equally long."""
        return [
            {self.groups[n].name for n in np.unique(self._group_of[rows]).tolist() if n >= 0} for rows in self._rows
        ]

    def frozen(self) -> dict[str, str]:
        """Why producing dims, or parts of them, stay."""
        found = {}
        for place in filter(self._makes_units, self._places):
            goes_with_heads = np.isin(place.labels, list(self._head_owner))
            stays = place.labels[(self._group_of[place.labels] < 0) & ~goes_with_heads]
            if len(stays) and place.leaf.tensor.dim() > 1:
                most_common = np.bincount(self._reason_of[stays]).argmax()
                part = f" ({len(stays)} of {len(place.labels)})" if len(stays) < len(place.labels) else ""
                found[place.name] = self._reasons[most_common] + part
        return found

    def equations(self) -> list[SizeEquation]:
        """The forward code's sizes in terms of groups; those that no cut can touch are left out."""
        found = [
            SizeEquation(self._translated(expression), self._axis_size(axis))
            for expression, axis in self._sizes.equations
        ]
        return [equation for equation in found if _can_change(equation)]

    def rescalings(self) -> list[Rescaling]:
        """Parameters that make up for numbers computed from sizes."""
        found = []
        for names, rows, factor in self._compensations:
            expression = self._translated(factor.expression)
            for name in names if groups_in(expression) else ():
                module, _, tensor = name.rpartition(".")
                found.append(Rescaling(module, tensor, torch.from_numpy(rows), expression, factor.holder))
        return found

    def freeze(self, names: Collection[str], reason: str) -> None:
        """Freezes whole groups in the trace; assemble again to see the effect."""
        for group, classes in zip(self.groups, self._classes, strict=True):
            if group.name in names:
                self._table.freeze(classes, reason)

    def freeze_heads(self, names: Collection[str], reason: str) -> None:
        """Freezes the heads of groups, whose blocks then stay."""
        labels = [label for label, owner in self._head_owner.items() if owner in names]
        self._table.freeze(np.array(labels), reason)

    def _translated(self, expression: Expression) -> Expression:
        if isinstance(expression, Operation):
            left, right = self._translated(expression.left), self._translated(expression.right)
            return Operation(expression.operator, left, right)
        if isinstance(expression, Length):
            return Length(self._axis_size(expression.axis))  # type: ignore[arg-type]
        return expression

    def _axis_size(self, axis: TracedAxis) -> AxisSize:
        if axis not in self._axis_sizes:
            self._axis_sizes[axis] = AxisSize(axis.size) if axis.ids is None else self._units_on(axis.ids)
        return self._axis_sizes[axis]

    def _units_on(self, ids: Ids) -> AxisSize:
        """The groups' units on an axis with ids (rows …, n)."""
        labels = self.labels[ids].reshape(-1, ids.shape[-1])
        owners = [self._head_owner.get(int(label)) for label in labels[0]]
        if all(owners) and len(set(owners)) == 1:  # one position a head
            heads = len(set(labels[0].tolist()))
            return AxisSize(0, {owners[0]: labels.size // heads}, len(labels), counts_heads=True)  # type: ignore[dict-item]
        groups = self._group_of[labels]
        numbers, counts = np.unique(groups, return_counts=True)
        positions = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        fixed = positions.pop(-1, 0)
        units = {self.groups[n].name: count // self.groups[n].num_units for n, count in positions.items()}
        return AxisSize(fixed, units, len(labels), self._row_group(groups, labels))

    def _row_group(self, groups: Ids, labels: Ids) -> str:
        """The attention group of whose heads each row holds one."""
        for number in np.unique(groups[0][groups[0] >= 0]).tolist():
            group = self.groups[number]
            here = labels[0][groups[0] == number]
            if group.heads and len(set((self._unit_of[here] // group.block_size).tolist())) == 1 < len(labels):
                return group.name
        return ""


def groups_in(expression: Expression) -> set[str]:
    """The names of groups that an expression depends on."""
    return {name for leaf in leaves(expression) if isinstance(leaf, Length) for name in leaf.axis.units}


def _can_change(equation: SizeEquation) -> bool:
    named = groups_in(equation.expression) | equation.axis.units.keys()
    return bool(named) or any(isinstance(leaf, Attribute) for leaf in leaves(equation.expression))


def _dims(recorder: Recorder) -> list[tuple[Leaf, int]]:
    return [
        (leaf, dim) for leaf in recorder.leaves.values() for dim, axis in enumerate(leaf.units.axes) if axis is not None
    ]


def _hash(random: np.random.Generator, occupied: Sequence[Ids], size: int) -> NDArray[np.uint64]:
    """The sum, by class, of one random number for each array that a class occurs in, as often as it does."""
    total = np.zeros(size, np.uint64)
    if occupied:
        keys = random.integers(0, 2**64, len(occupied), np.uint64)
        np.add.at(total, np.concatenate(occupied), np.repeat(keys, [len(labels) for labels in occupied]))
    return total
