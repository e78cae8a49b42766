"""Attention heads of a finished trace: which may go as a whole, and what of every tensor goes with each of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from isomorphic.pruning.grouping.unit_groups import Classes, Division, Place
from isomorphic.pruning.grouping.units import Ids, UnitTable


@dataclass(frozen=True, eq=False)
class HeadSet:
    """The heads of one attention that may go, or of several that lose the same ones.

    Attributes:
        groups: numbers of the groups that each head has a section of, ascending.
        labels: for each head the section classes that stand for it.
        shared: where all heads share their dims, as behind a rotary embedding: places, and each head's positions there,
            shape (heads, k).
    """

    groups: tuple[int, ...]
    labels: Sequence[Ids]
    shared: Sequence[tuple[Place, Ids]] = ()


@dataclass(frozen=True, eq=False)
class Heads:
    """All heads that may go as a whole.

    Attributes:
        sets: see `HeadSet`.
        of_id: by id: which head it is of, in a set with shared dims, -1 for none. The heads of all such sets are
            numbered one after the other.
        first_of: the number that the first head of each such set has, by the set's position in `sets`.
    """

    sets: Sequence[HeadSet]
    of_id: Ids
    first_of: Mapping[int, int]


def find_heads(table: UnitTable, classes: Classes, division: Division) -> Heads:
    """The heads that may go: those that are sections of all groups they touch, and those that share dims."""
    sets = [HeadSet(groups, labels) for groups, labels in _separate_heads(table, classes, division).items()]
    taken = {int(label) for one in sets for labels in one.labels for label in labels}
    lists = _lists_of_heads(table, classes, taken)
    of_id = np.full(table.size, -1)
    first_of: dict[int, int] = {}
    if lists:
        of_id = _heads_of_ids(table, classes, lists)
    start = 0
    for heads in lists:
        found = _with_shared_dims(classes, division, heads, of_id - start)
        if found is not None:
            first_of[len(sets)] = start
            sets.append(found)
        start += len(heads)
    return Heads(sets, of_id, first_of)


# --- heads that are sections of all groups that they touch --------------------------------------------------


def _separate_heads(table: UnitTable, classes: Classes, division: Division) -> dict[tuple[int, ...], list[Ids]]:
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
    for units, labels in attended_sections(table, classes):
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


def attended_sections(table: UnitTable, classes: Classes) -> Iterator[tuple[frozenset[int], list[int]]]:
    """The sections that attention runs over; see `_sections_by_units`."""
    attended = {int(label) for ids in table.heads for label in np.unique(classes.labels[ids])}
    if not attended:  # no attention, though a model may have thousands of sections
        return
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
    held = _held(table, classes)
    found: dict[frozenset[int], list[int]] = {}
    for label in held:
        inside = _all_inside(label, held)
        sections = [one for one in inside if one in held]
        found[frozenset(inside.difference(sections))] = [label, *sorted(sections)]
    return found


def _held(table: UnitTable, classes: Classes) -> dict[int, set[int]]:
    """By section class: the classes that lie in its rows."""
    held: dict[int, set[int]] = {}
    for section, row in table.sections.values():
        labels = classes.labels[row]
        matters = classes.is_unit[labels].any() or classes.is_section[labels].any()
        inside = labels.tolist() if matters else [-1]  # not a group's: there may be very many
        held.setdefault(int(classes.labels[section[0]]), set()).update(inside)
    return held


def _all_inside(label: int, held: Mapping[int, Collection[int]]) -> set[int]:
    """What lies in a section, and in the sections that lie in it."""
    found: set[int] = set()
    waiting = [label]
    while waiting:
        new = set(held[waiting.pop()]) - found - {label}
        found |= new
        waiting += [one for one in new if one in held]
    return found


# --- heads that share dims ----------------------------------------------------------------------------------


def _lists_of_heads(table: UnitTable, classes: Classes, taken: Collection[int]) -> list[list[Ids]]:
    """For each attention whose heads may go, and are not `taken`: the section classes that stand for each head.

    The heads lie along one axis that attention runs over. Query heads that are laid out as (2 key heads, 3) lie inside
    those of the key heads, which stand for them.
    """
    if not table.heads:
        return []
    held = _held(table, classes)
    axes = {tuple(dict.fromkeys(classes.labels[ids].ravel().tolist())) for ids in table.heads}
    found, taken = [], set(taken)
    for axis in sorted(axes, key=lambda axis: (len(axis), axis)):
        if len(axis) < 2 or not all(label in held for label in axis):
            continue
        heads = [np.array([label, *sorted(one for one in _all_inside(label, held) if one in held)]) for label in axis]
        every = np.concatenate(heads)
        if len({*every.tolist()}) == len(every) and not taken & {*every.tolist()}:
            taken.update(every.tolist())
            if not classes.reason_of[every].any():
                found.append(heads)
    return found


def _heads_of_ids(table: UnitTable, classes: Classes, lists: Sequence[Sequence[Ids]]) -> Ids:
    """By id: the number of the head in whose rows it lies, all heads numbered one after the other; -1 for none.

    What is united position by position with an id of a head is of that head, too; the weight of a norm over the dims,
    which all heads are united with, is of none. Neither is what lies in several.
    """
    every = [labels for heads in lists for labels in heads]
    number_of = {int(label): number for number, labels in enumerate(every) for label in labels}
    alike = table.aligned_classes()
    head_of = np.full(table.size, -1)
    for section, row in table.sections.values():
        number = number_of.get(int(classes.labels[section[0]]), -1)
        if number >= 0:
            before = head_of[alike[row]]
            head_of[alike[row]] = np.where((before == -1) | (before == number), number, -2)
    return np.maximum(head_of[alike], -1)


def _with_shared_dims(classes: Classes, division: Division, heads: Sequence[Ids], head_of: Ids) -> HeadSet | None:
    """The set of some heads; None where parts of the model cannot go with them.

    Groups with a section for each head go by sections. Of all others, and of what stays, each head's positions go:
    every unit must have equally many of them in every head.

    Args:
        heads: see `_lists_of_heads`.
        head_of: by id: the number of the head; others than these heads have numbers that none of them has.
    """
    count = len(heads)
    own = _groups_by_head(classes, division, count, head_of)
    shared = []
    for place in classes.places:
        axis = place.leaf.units.axes[place.dim]
        assert axis is not None
        groups = division.group_of[place.labels]
        found = head_of[axis.ids]
        found = np.where((found < 0) | (found >= count) | np.isin(groups, own), -1, found)
        if len(np.unique(found[found >= 0])) < 2:  # none, or units that all heads are tied to by way of the first one
            continue
        positions = np.argsort(found, kind="stable")[np.count_nonzero(found < 0) :]
        if len(positions) % count or (np.bincount(found[positions], minlength=count) != len(positions) // count).any():
            return None
        index = positions.reshape(count, -1)
        units = np.sort(np.where(groups[index] >= 0, place.labels[index], -1), axis=1)
        if (units != units[0]).any():
            return None
        shared.append((place, index))
    return HeadSet(tuple(own), heads, shared) if shared else None


def _groups_by_head(classes: Classes, division: Division, count: int, head_of: Ids) -> list[int]:
    """The groups of which section i is all that head i has, and no other head has any of it."""
    head_of_class = np.full(len(classes.labels), -1)
    inside = np.flatnonzero((head_of >= 0) & (head_of < count))
    labels = classes.labels[inside]
    head_of_class[labels] = head_of[inside]
    mixed = labels[head_of_class[labels] != head_of[inside]]
    head_of_class[mixed] = -1
    found = []
    for number in np.unique(division.group_of[labels]).tolist():
        if number >= 0 and division.num_sections[number] == count:
            sections = head_of_class[division.units[number]].reshape(count, -1)
            if (sections == np.arange(count)[:, None]).all():
                found.append(number)
    return found
