"""About what a plan costs, in a fraction of a millisecond.

Every part of the dense model's complexity (`measure/charges.py`) is scaled by the share that a plan leaves of the
parameters it belongs to. That is exact for params, and for layers that run once over fixed positions; attention, whose
terms scale differently, is a few percent off. A search may ask this which plan to measure next, never whether it fits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from isomorphic.inputs import Inputs
from isomorphic.measure.charges import Charge, charges
from isomorphic.pruning.groups import ChannelGraph

Kept = Mapping[str, tuple[int, int]]  # by group name: sections, and units of each
_Dim = tuple[int, int]  # id of a tensor, dim


class Estimate:
    """An estimate of what is left of a model, from how much each of its groups keeps.

    It is a sum of terms: a coefficient times the shares that are left of some dims of one tensor.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, inputs: Inputs, unit: str) -> None:
        """
        Args:
            model: the dense model, best without data; its forward may fill caches.
            graph: its groups.
            inputs: what it runs on.
            unit: a field of `Complexity`.
        """
        self._groups = graph.groups
        positions = _positions(model, graph)
        self._dims = {dim: number for number, dim in enumerate(positions)}
        entries = [(self._dims[dim], column, share) for dim, parts in positions.items() for column, share in parts]
        rows, columns, shares = zip(*entries, strict=True)
        self._rows, self._columns, self._shares = np.array(rows), np.array(columns), np.array(shares)
        self._constant, terms = 0.0, {}
        for charge in charges(model, inputs, unit, {tensor for tensor, dim in positions if dim == 0}):
            for coefficient, dims in self._terms(charge):
                terms[dims] = terms.get(dims, 0.0) + coefficient
        self._constant = terms.pop((), 0.0)
        self._coefficients = np.array(list(terms.values()))
        self._factors = np.array([dim for dims in terms for dim in dims], np.int64)
        self._starts = np.cumsum([0, *map(len, terms)], dtype=np.int64)[:-1]

    def __call__(self, kept: Kept) -> float:
        """The estimate for sections and units that are kept."""
        if not len(self._coefficients):
            return self._constant
        sizes = [(group.num_units, group.num_sections, *kept[group.name]) for group in self._groups]
        units, sections, kept_sections, width = np.array(sizes).T
        gone = np.concatenate([1 - kept_sections * width / units, 1 - kept_sections / sections])
        left = 1 - np.bincount(self._rows, self._shares * gone[self._columns], len(self._dims))
        return self._constant + float(self._coefficients @ np.multiply.reduceat(left[self._factors], self._starts))

    def _terms(self, charge: Charge) -> list[tuple[float, tuple[int, ...]]]:
        """Coefficients, and numbers of the dims that each of them follows."""
        if not charge.parameters:
            dim = None if charge.maker is None else self._dims.get((id(charge.maker), 0))
            return [(float(charge.amount), () if dim is None else (dim,))]
        total = sum(parameter.numel() for parameter in charge.parameters)
        return [(charge.amount * p.numel() / max(total, 1), self._prunable_dims(p)) for p in charge.parameters]

    def _prunable_dims(self, tensor: Tensor) -> tuple[int, ...]:
        dims = (self._dims.get((id(tensor), dim)) for dim in range(tensor.dim()))
        return tuple(dim for dim in dims if dim is not None)


def _positions(model: nn.Module, graph: ChannelGraph) -> dict[_Dim, list[tuple[int, float]]]:
    """By dim, which share of it each group's units (column: its number) and sections (+ number of groups) occupy.

    Positions that several names of a tied tensor reach count once.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    indices: dict[tuple[int, int, int], list[NDArray[np.int64]]] = {}
    lengths: dict[_Dim, int] = {}
    for number, group in enumerate(graph.groups):
        sections = group.sections.members if group.sections else ()
        for column, members in ((number, group.members), (number + len(graph.groups), sections)):
            for member in members:
                tensor = getattr(modules[member.module], member.tensor)
                lengths[id(tensor), member.dim] = tensor.shape[member.dim]
                indices.setdefault((id(tensor), member.dim, column), []).append(member.index.numpy().ravel())
    shares: dict[_Dim, list[tuple[int, float]]] = {}
    for (tensor, dim, column), parts in indices.items():
        occupied = np.zeros(lengths[tensor, dim], bool)
        for part in parts:
            occupied[part] = True
        shares.setdefault((tensor, dim), []).append((column, float(occupied.mean())))
    return shares
