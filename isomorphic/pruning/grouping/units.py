"""Ids of units: allocation, union, freezing, and rows that must keep equally many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isomorphic.pruning.grouping.forward_line import forward_line

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Axis:
    """The units along one axis of a tensor.

    Attributes:
        ids: shape (n,), or (r₁, …, n) where they differ along other axes of the tensor: after a view of 768 channels
            as (12 heads, 64 dims), the last axis has ids (12, 64).
        rows: the tensor's axes that the leading dims of `ids` run along, outermost first.
    """

    ids: Ids
    rows: tuple[int, ...] = ()

    def over(self, dims: tuple[int, ...]) -> Ids:
        """The ids with one dim for each of the tensor's axes `dims` (size 1 where they do not vary), then their own."""
        order = [self.rows.index(dim) for dim in dims if dim in self.rows]
        ids = self.ids.transpose(*order, self.ids.ndim - 1)
        sizes = iter(ids.shape)
        return ids.reshape(*(next(sizes) if dim in self.rows else 1 for dim in dims), ids.shape[-1])

    def moved(self, new_place: dict[int, int]) -> Axis:
        """The same units after the tensor's axes were renumbered."""
        return Axis(self.ids, tuple(new_place[row] for row in self.rows)) if self.rows else self


class UnitTable:
    """All ids of one trace, and what was learnt about them."""

    def __init__(self) -> None:
        self.size = 0
        self.rows: dict[tuple[int, bytes], Ids] = {}  # (rows, n) arrays whose rows keep equally many units
        self.sections: dict[bytes, tuple[Ids, Ids]] = {}  # (n,) ids of a row -> (its section id (1,), the row)
        self.heads: list[Ids] = []  # section ids that attention runs over
        self._section_ids: set[int] = set()
        self._apart_ids: set[int] = set()
        self._copy_ids: set[int] = set()
        self._pairs: list[tuple[Ids, Ids]] = []
        self._frozen: list[tuple[Ids, str, str]] = []

    def new(self, count: int) -> Ids:
        """Fresh ids, shape (count,)."""
        self.size += count
        return np.arange(self.size - count, self.size)

    def copies(self, count: int) -> Ids:
        """Fresh ids for an axis that has grown from length 1: equal positions, of which some may go."""
        ids = self.new(count)
        self._copy_ids.update(ids.tolist())
        return ids

    def unite(self, first: Ids, second: Ids) -> None:
        """Makes one unit of each pair of ids, under broadcasting."""
        if first is not second:
            self._pairs.append((first, second))

    def unite_outer(self, ids: Ids) -> None:
        """Makes one unit of the ids (r, …) at each position of the inner axes."""
        for other in ids[1:]:
            self.unite(ids[0], other)

    def freeze(self, ids: Ids, reason: str, where: str | None = None) -> None:
        """Units that may not be removed; `where` in the forward code is the line that runs, unless it is given."""
        self._frozen.append((ids, reason, forward_line() if where is None else where))

    def fixed(self, count: int, reason: str) -> Ids:
        """Fresh ids that are frozen."""
        ids = self.new(count)
        self.freeze(ids, reason)
        return ids

    def freeze_axes(self, axes: Iterable[Axis | None], reason: str) -> None:
        """Freezes every unit along some axes."""
        for axis in axes:
            if axis is not None:
                self.freeze(axis.ids, reason)

    def tie(self, axis: Axis, rows: Iterable[int]) -> Axis:
        """Makes the units equal along some rows, and forgets these rows."""
        for row in rows:
            if row in axis.rows:
                place = axis.rows.index(row)
                first = axis.ids.take([0], axis=place)
                self.unite(first, axis.ids)
                axis = Axis(first.squeeze(place), axis.rows[:place] + axis.rows[place + 1 :])
        return axis

    def keep_equal(self, rows: Ids) -> None:
        """Every row of an (r, n) array keeps the same number of its units."""
        if len(rows) > 1:
            self.rows.setdefault((len(rows), rows.tobytes()), rows)

    def section_ids(self, rows: Ids, *, apart: bool = False) -> Ids:
        """One id for each row of (r, n) ids: the section that these units make up. Equal rows share an id.

        `apart`: of several parts each, see `axes.view`.
        """
        for row in rows:
            if row.tobytes() not in self.sections:
                self.sections[row.tobytes()] = (self.new(1), row)
                self._section_ids.add(self.size - 1)
                if apart:
                    self._apart_ids.add(self.size - 1)
        return np.concatenate([self.sections[row.tobytes()][0] for row in rows])

    def is_section(self, ids: Ids) -> bool:
        """Whether these are ids of sections."""
        return int(ids.flat[0]) in self._section_ids

    def are_apart(self, ids: Ids) -> bool:
        """Whether these are ids of sections of several parts each."""
        return int(ids.flat[0]) in self._apart_ids

    def are_copies(self, ids: Ids) -> bool:
        """Whether these are ids of an axis that has grown from length 1."""
        return int(ids.flat[0]) in self._copy_ids

    def classes(self) -> Ids:
        """The class of every id, shape (size,): the smallest id that it is united with."""
        return self._components(np.broadcast_arrays(first, second) for first, second in self._pairs)

    def aligned_classes(self) -> Ids:
        """The same without what was united under broadcasting, as all heads are with the weight of a norm over dims."""
        return self._components(
            np.broadcast_arrays(first, second)
            for first, second in self._pairs
            if first.size == second.size == np.broadcast(first, second).size
        )

    def _components(self, pairs: Iterable[Sequence[Ids]]) -> Ids:
        flat = [[ids.ravel() for ids in pair] for pair in pairs]
        if not flat:
            return np.arange(self.size)
        return connected_components(self.size, *(np.concatenate(side) for side in zip(*flat, strict=True)))

    def reasons(self, classes: Ids) -> list[tuple[Ids, str, str]]:
        """The frozen classes, why, and where in the forward code, in the order in which they were frozen."""
        return [(classes[ids].ravel(), reason, where) for ids, reason, where in self._frozen]


def connected_components(size: int, first: Ids, second: Ids) -> Ids:
    """The smallest node of each node's component in the graph with edges first[i] - second[i], shape (size,)."""
    labels = np.arange(size)
    while True:
        low = np.minimum(labels[first], labels[second])
        before = labels.copy()
        np.minimum.at(labels, labels[first], low)  # the roots, so that whole components move at once
        np.minimum.at(labels, labels[second], low)
        while not np.array_equal(labels, labels[labels]):
            labels = labels[labels]
        if np.array_equal(labels, before):
            return labels
        keep = labels[first] != labels[second]
        first, second = first[keep], second[keep]
