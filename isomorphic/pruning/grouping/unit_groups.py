"""From classes of united ids to units, and their division into groups.

A class is a unit if a layer makes it and nothing freezes it. Units that occupy the same dims of the same tensors
equally often, and the same sized axes of the forward code, make a group. Rows that keep equally many units divide a
group into sections, or tie the sizes of groups together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isomorphic.pruning.grouping.recorder import Leaf, Recorder
from isomorphic.pruning.grouping.units import Ids, UnitTable
from isomorphic.pruning.groups import LayerNode

_PRODUCERS = frozenset({"conv", "linear", "embedding"})
_HEADS = "its units are whole heads, which stay"
_UNEVEN = "it is the only channel of its group, or shares evenly split rows with channels that stay"


@dataclass(frozen=True, eq=False)
class Place:
    """One dim of a parameter or buffer.

    Attributes:
        leaf, dim: which.
        node: its layer side.
        makes_units: a layer's output begins here.
        labels: the class at each of its positions, shape (n,).
    """

    leaf: Leaf
    dim: int
    node: int
    makes_units: bool
    labels: Ids

    @property
    def name(self) -> str:
        """What a group that begins here is called."""
        return f"{self.leaf.name}:{self.dim}"


@dataclass(frozen=True, eq=False)
class Classes:
    """Classes of united ids, each named by its smallest id; "by class" is an array of shape (all ids,).

    Attributes:
        labels: the class of every id, shape (all ids,).
        places: the dims of parameters and buffers that carry ids.
        is_section: by class: it stands for a row of units, a head perhaps.
        is_unit: by class.
        reasons: why classes stay; the first is for whole heads, which nothing else freezes.
        lines: of forward code, where each was found.
        reason_of: by class: position in `reasons` of the first for it, 0 where nothing freezes it.
        rows: classes (r, n) in rows that hold different units, so that something has to keep them equally many.
    """

    labels: Ids
    places: Sequence[Place]
    is_section: NDArray[np.bool_]
    is_unit: NDArray[np.bool_]
    reasons: Sequence[str]
    lines: Sequence[str]
    reason_of: Ids
    rows: Sequence[Ids]


@dataclass(frozen=True, eq=False)
class Division:
    """Which class is which unit of which group.

    Attributes:
        group_of: by class: number of the group, -1 for none.
        unit_of: by class: number of the unit in its group.
        units: of each group: the classes that are its units, in order.
        num_sections: of each group.
    """

    group_of: Ids
    unit_of: Ids
    units: Sequence[Ids]
    num_sections: Sequence[int]

    def positions(self, place: Place) -> Iterator[tuple[int, Ids]]:
        """Number of each group that occupies a place, and the positions (units, k) of its units there, ascending."""
        groups = self.group_of[place.labels]
        order = np.lexsort((self.unit_of[place.labels], groups))  # stable: by position inside a unit
        order = order[np.count_nonzero(groups < 0) :]
        for found in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(order) else ():
            number = int(groups[found[0]])
            yield number, found.reshape(len(self.units[number]), -1)


# --- which classes are units --------------------------------------------------------------------------------


def classes_of(recorder: Recorder) -> Classes:
    """The classes of a finished trace."""
    table = recorder.table
    labels = table.classes()
    places = [_place(recorder, leaf, dim, labels) for leaf in recorder.leaves.values() for dim in _dims(leaf)]
    reasons, places_of_reasons, reason_of = _reasons(table, labels)
    is_section = np.zeros(table.size, bool)
    is_section[[labels[section[0]] for section, _ in table.sections.values()]] = True
    is_unit = np.zeros(table.size, bool)
    for place in places:
        is_unit[place.labels] |= place.makes_units
    is_unit &= ~is_section & (reason_of == 0)
    rows = [labels[ids] for ids in table.rows.values()]
    rows = [found for found in rows if not (np.sort(found, axis=1) == np.sort(found[:1], axis=1)).all()]
    uneven = _uneven(rows, is_unit)
    is_unit[uneven] = False
    reason_of[uneven] = len(reasons) - 1
    rows = [found for found in rows if is_unit[found].any()]
    return Classes(labels, places, is_section, is_unit, reasons, places_of_reasons, reason_of, rows)


def _dims(leaf: Leaf) -> list[int]:
    return [dim for dim, axis in enumerate(leaf.units.axes) if axis is not None]


def _place(recorder: Recorder, leaf: Leaf, dim: int, labels: Ids) -> Place:
    axis, topology = leaf.units.axes[dim], recorder.topology
    assert axis is not None
    number = topology.roles.get((leaf.name, dim))
    if number is None:
        owner = leaf.name.rpartition(".")[0]
        number = topology.node(leaf.name, LayerNode(owner, "parameter", "both"))
    node = topology.nodes[number]
    return Place(leaf, dim, number, node.side == "out" and node.kind in _PRODUCERS, labels[axis.ids])


def _reasons(table: UnitTable, labels: Ids) -> tuple[list[str], list[str], Ids]:
    """Why classes stay, where, and by class the position of the first reason; the last is for those of uneven rows."""
    frozen = table.reasons(labels)
    reason_of = np.zeros(table.size, np.int64)
    for number, (classes, _, _) in reversed([*enumerate(frozen, start=1)]):
        reason_of[classes] = number
    reasons, lines = [reason for _, reason, _ in frozen], [where for _, _, where in frozen]
    return [_HEADS, *reasons, _UNEVEN], ["", *lines, ""], reason_of


def _uneven(rows: Sequence[Ids], is_unit: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """By class: units in rows (r, n) that cannot lose equally many, as parts of them stay."""
    stays = ~is_unit
    changed = True
    while changed:
        changed = False
        for found in rows:
            may_go = ~stays[found]
            if may_go.any() and (found.shape[1] == 1 or len(set(may_go.sum(axis=1).tolist())) > 1):
                stays[found] = True
                changed = True
    return stays & is_unit


# --- which units belong together ----------------------------------------------------------------------------


def divide(classes: Classes, sized: Sequence[Ids]) -> Division:
    """Numbers the groups, and the units in them, by where they are made first.

    Args:
        classes: of a finished trace.
        sized: ids, any shape, of each axis whose length the forward code spells out.
    """
    size = len(classes.labels)
    group_of, unit_of = np.full(size, -1), np.zeros(size, np.int64)
    units: list[Ids] = []
    num_sections: list[int] = []
    first = _first_positions(classes)
    for sections in sorted(
        _sections(classes, sized, first), key=lambda sections: min(first[section[0]] for section in sections)
    ):
        found = np.concatenate(sorted(sections, key=lambda section: first[section[0]]))
        group_of[found], unit_of[found] = len(units), np.arange(len(found))
        units.append(found)
        num_sections.append(len(sections))
    return Division(group_of, unit_of, units, num_sections)


def _sections(classes: Classes, sized: Sequence[Ids], first: Ids) -> list[list[Ids]]:
    """For each group its blocks: units with one signature and in the same rows, by position."""
    signature, row = _signatures(classes, sized)
    order = np.flatnonzero(classes.is_unit)
    order = order[np.lexsort((first[order], row[order], signature[order]))]
    changes = (np.diff(signature[order]) != 0) | (np.diff(row[order]) != 0)
    found: dict[tuple[int, int], list[Ids]] = {}
    for section in np.split(order, np.flatnonzero(changes) + 1) if len(order) else ():
        found.setdefault((int(signature[section[0]]), len(section)), []).append(section)
    return [*found.values()]


def _first_positions(classes: Classes) -> Ids:
    """By class: where it is first made, as a position in all producing dims one after the other."""
    first = np.full(len(classes.labels), np.iinfo(np.int64).max)
    start = 0
    for place in classes.places:
        if place.makes_units:
            np.minimum.at(first, place.labels, start + np.arange(len(place.labels)))
            start += len(place.labels)
    return first


def _signatures(classes: Classes, sized: Sequence[Ids]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """By class: a sum of random numbers over what it occupies, and one over the rows that it lies in."""
    random = np.random.default_rng(0)
    occupied = [place.labels for place in classes.places]
    occupied += [classes.labels[ids].ravel() for ids in sized]
    occupied += [rows.ravel() for rows in classes.rows]
    signature = _hash(random, occupied, len(classes.labels))
    return signature, _hash(random, [row for rows in classes.rows for row in rows], len(classes.labels))


def _hash(random: np.random.Generator, occupied: Sequence[Ids], size: int) -> NDArray[np.uint64]:
    """The sum, by class, of one random number for each array that a class occurs in, as often as it does."""
    total = np.zeros(size, np.uint64)
    if occupied:
        keys = random.integers(0, 2**64, len(occupied), np.uint64)
        np.add.at(total, np.concatenate(occupied), np.repeat(keys, [len(labels) for labels in occupied]))
    return total
