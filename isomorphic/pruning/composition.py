"""Several cuts, one after the other, as one plan for the dense model.

Each step of iterative pruning traces the model that the last step left, so its plan speaks of that smaller model. What
they did together is told by positions: of every tensor dim that the dense model's groups touch, which of its positions
are still there.

    fc1.weight, dim 0, 6 units            positions 0 1 2 3 4 5
    step 1 keeps 0 1 3 5 of these six     positions 0 1 3 5
    step 2 keeps 1 2 of those four        positions 1 3

so the plan for the dense model keeps units 1 and 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from isomorphic.plain_tensors import named_plain_tensors
from isomorphic.pruning.cutting.cut import kept_positions
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup, Member
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.ranking.ranker import DenseSize

_Dim = tuple[str, int]  # a tensor's first name, a dim


class Composition:
    """What is left of a dense model's groups, cut after cut."""

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        """
        Args:
            model: the dense model.
            graph: its groups.
        """
        self._graph = graph
        self._first_name = _first_names(model)
        self._left: dict[_Dim, NDArray[np.int64]] = {}  # dense positions that are still there, ascending
        # By dim: number of the group that a dense position belongs to, or -1; in one of whole heads, and in any other.
        self._owner: dict[tuple[_Dim, bool], NDArray[np.int64]] = {}
        tensors = dict(_all_tensors(model))
        for number, group in enumerate(graph.groups):
            for member in group.members:
                key = self._key(member)
                length = tensors[member.name].shape[member.dim]
                self._left.setdefault(key, np.arange(length))
                owner = self._owner.setdefault((key, group.has_width), np.full(length, -1))
                owner[member.index.numpy().ravel()] = number

    def add(self, model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> None:
        """Notes a cut; to be called before it is made.

        Args:
            model: as the last cut left it.
            graph: the groups of `model` as it stands.
            plan: what will be cut of them.
        """
        for (module, tensor), dims in kept_positions(model, graph, plan).items():
            name = f"{module}.{tensor}" if module else tensor
            for dim, keep in dims.items():
                key = self._first_name.get(name, name), dim
                if key in self._left:
                    self._left[key] = self._left[key][keep.numpy()]

    def kept(self) -> dict[str, tuple[int, ...]]:
        """Returns the units of the dense model's groups that all cuts together have left, by group name."""
        kept = {}
        for group in self._graph.groups:
            member = group.members[0]
            stays = np.isin(member.index.numpy(), self._left[self._key(member)]).any(1)  # a dim, in any of its heads
            kept[group.name] = tuple(np.flatnonzero(stays).tolist())
        return kept

    def dense_sizes(self, graph: ChannelGraph) -> dict[str, DenseSize]:
        """Returns how large the groups of the smaller model were in the dense one, by name.

        A group that does not come from one dense group as a whole is left out: it counts as it stands.
        """
        sizes = {}
        for group in graph.groups:
            dense = self._dense_group(group)
            if dense is not None and dense.num_sections >= group.num_sections:
                sizes[group.name] = DenseSize(dense.section_size, dense.num_sections)
        return sizes

    def strangers(self, graph: ChannelGraph) -> frozenset[str]:
        """Returns the names of groups with units that no dense group has: no plan for the dense model can name them."""
        return frozenset(group.name for group in graph.groups if (self._owners(group) < 0).any())

    def _dense_group(self, group: CoupledGroup) -> CoupledGroup | None:
        owners = np.unique(self._owners(group))
        if len(owners) != 1 or owners[0] < 0:
            return None
        dense = self._graph.groups[int(owners[0])]
        member = dense.members[0]
        left = np.isin(member.index.numpy(), self._left[self._key(member)]).any(1).sum()
        return dense if left == group.num_units else None

    def _owners(self, group: CoupledGroup) -> NDArray[np.int64]:
        """The number of the dense group that each unit comes from, shape (n,), or -1."""
        for member in group.members:
            key = self._key(member)
            if (key, group.has_width) in self._owner:
                return self._owner[key, group.has_width][self._left[key][member.index[:, 0].numpy()]]
        return np.full(group.num_units, -1)

    def _key(self, member: Member) -> _Dim:
        return self._first_name.get(member.name, member.name), member.dim


def _first_names(model: nn.Module) -> Mapping[str, str]:
    """The first name of every tensor, by all of its names: a tied one has several."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in _all_tensors(model)}


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and plain tensors, each under all of its names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    yield from named_plain_tensors(model)
