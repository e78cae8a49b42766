"""All units of a model at once: their norms over everything that they occupy, and their part in the gradients.

Units of all groups are numbered through. Of each dim of each weight, a vector says which unit a position belongs to:

    group A, 4 units, numbers 0 to 3      conv1.weight (4, 3, 3, 3), dim 0     0 1 2 3
                                          bn1.weight (4,), dim 0               0 1 2 3
                                          conv2.weight (8, 4, 3, 3), dim 1     0 1 2 3
    group B, 8 units, numbers 4 to 11     conv2.weight (8, 4, 3, 3), dim 0     4 5 6 7 8 9 10 11

so that the squared norms of all slices, 4 + 4 + 4 + 8 numbers in one vector, are added up to 12 squared norms of units
by one segmented sum, and one number a unit reaches all of its slices by one look-up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup, Member


@dataclass(frozen=True)
class UnitSet:
    """Units that compete with each other: those of one group, or the heads of one attention.

    Attributes:
        group: name of the group; of heads, the first that they lie in.
        num_units: n, at least 2.
        members: weights that the units occupy, each with an index (n, k).
        are_heads: the units are heads.
    """

    group: str
    num_units: int
    members: tuple[Member, ...]
    are_heads: bool = False

    @property
    def name(self) -> str:
        """The group's, with " heads" behind it for heads."""
        return f"{self.group} heads" if self.are_heads else self.group


def unit_sets(graph: ChannelGraph) -> list[UnitSet]:
    """Returns the units of every group, and the heads of every attention that may lose some; none that are alone.

    A head is a unit besides its dims: its members are all that its dims occupy, in every group that shares it. What
    goes with heads alone, such as their temperatures, is left out.
    """
    sets = [UnitSet(group.name, group.num_units, tuple(group.weights())) for group in graph.groups if group.has_width]
    sets += [_heads(groups) for groups in graph.head_sets]
    return [units for units in sets if units.num_units > 1]


def _heads(groups: Sequence[CoupledGroup]) -> UnitSet:
    """The heads of an attention: of 2 heads of 3 dims, an index (6, k) of dims is one (2, 3 · k) of heads."""
    first = groups[0]
    members = [
        Member(one.module, one.tensor, one.dim, one.index.reshape(first.num_sections, -1), one.node)
        for group in groups
        for one in group.weights()
    ]
    return UnitSet(first.name, first.num_sections, tuple(members), are_heads=True)


@dataclass(frozen=True)
class _Slices:
    """One dim of a parameter, cut into slices.

    Attributes:
        parameter: the weight.
        dim: the dim.
        unit: int64 (length of the dim,), the number of the unit that each slice belongs to; one past the last unit for
            slices that belong to none.
    """

    parameter: nn.Parameter
    dim: int
    unit: Tensor

    def along(self, values: Tensor) -> Tensor:
        """Returns one value a slice (length of the dim,) in a shape that broadcasts over the parameter."""
        return values.view([-1 if dim == self.dim else 1 for dim in range(self.parameter.ndim)])


def _squared_norms(weight: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """The squared norms of a weight's slices along each of some dims, float32 (length of the dim,).

    Squares are added up in the order in which they lie in memory, a plain norm over the outer dims being ten times as
    slow: (8, 4, 3, 3) along dim 1 is (8, 36) -> (36,) -> (4, 9) -> (4,).
    """
    order = sorted(range(weight.ndim), key=weight.stride, reverse=True)  # of a channels_last weight: 0, 2, 3, 1
    squares = weight.float().square().permute(order).contiguous()
    found = []
    for dim in dims:
        place = order.index(dim)
        inner = squares.flatten(0, place - 1).flatten(1).sum(0) if place else squares
        found.append(inner.reshape(weight.shape[dim], -1).sum(1))
    return found


class UnitWeights:
    """The weights of all units of a model, by unit.

    Attributes:
        sets: the units that compete with each other, set by set.
        set_of_unit: int64 (units,), the number of each unit's set.
    """

    def __init__(self, model: nn.Module, sets: Sequence[UnitSet]) -> None:
        """
        Args:
            model: holds the parameters that the sets' members name, on the device that they will be trained on.
            sets: of `unit_sets`.

        Raises:
            UserError: a member is not in the model, or has another shape there.
        """
        self.sets = list(sets)
        self._num_units = sum(units.num_units for units in sets)
        self._slices = _slices_of(model, sets, self._num_units)
        device = next(model.parameters()).device
        sizes = torch.tensor([units.num_units for units in sets], dtype=torch.int64, device=device)
        self.set_of_unit = torch.repeat_interleave(torch.arange(len(sets), device=device), sizes)
        self._unit_of_slice = torch.cat([slices.unit for slices in self._slices])
        # Slices are added up unit by unit, in one order on every device: what a GPU adds at indices comes in any order,
        # and processes would drift apart.
        self._by_unit = torch.argsort(self._unit_of_slice, stable=True)
        self._slices_of_unit = torch.bincount(self._unit_of_slice, minlength=self._num_units + 1)

    def one_for_all(self, value: float) -> Tensor:
        """Returns the same value for every unit, float32 (units,)."""
        return torch.full_like(self.set_of_unit, value, dtype=torch.float32)

    @torch.no_grad()
    def squared_norms(self) -> Tensor:
        """Returns the squared norm of each unit over all of its slices, float32 (units,)."""
        of_slices: list[Tensor] = []
        for _, group in itertools.groupby(self._slices, key=lambda slices: id(slices.parameter)):
            slices = list(group)
            of_slices += _squared_norms(slices[0].parameter.detach(), [each.dim for each in slices])
        in_order = torch.cat(of_slices)[self._by_unit]
        sums = torch.segment_reduce(in_order, "sum", lengths=self._slices_of_unit, unsafe=True, initial=0)
        return sums[:-1]  # the last one is of what belongs to no unit

    @torch.no_grad()
    def add_to_gradients(self, factors: Tensor, *, of_sign: bool = False) -> None:
        """Adds factor · weight to the gradient of every slice of each unit; a weight of two units gets both.

        Parameters without a gradient are left alone.

        Args:
            factors: float32 (units,).
            of_sign: add factor · sign(weight) instead.

        Raises:
            UserError: none of them has a gradient.
        """
        if all(slices.parameter.grad is None for slices in self._slices):
            raise UserError(
                "there are no gradients to add to: call it after backward(), and after a cut, or where parameters were "
                "replaced otherwise, make it anew"
            )
        of_slices = torch.cat([factors, factors.new_zeros(1)])[self._unit_of_slice]
        lengths = [len(slices.unit) for slices in self._slices]
        for slices, values in zip(self._slices, of_slices.split(lengths), strict=True):
            weight, gradient = slices.parameter.detach(), slices.parameter.grad
            if gradient is not None:
                gradient.addcmul_(weight.sign() if of_sign else weight, slices.along(values.to(gradient.dtype)))

    def by_set(self, values: Tensor) -> dict[str, Tensor]:
        """Returns one value a unit (units,) as a tensor (n,) a set, by the set's name."""
        parts = values.split([units.num_units for units in self.sets])
        return {units.name: part for units, part in zip(self.sets, parts, strict=True)}

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the smallest and the largest value in the set of each unit, both (units,)."""
        found = []
        for reduction in ("amin", "amax"):
            empty = values.new_zeros(len(self.sets))
            of_sets = empty.scatter_reduce(0, self.set_of_unit, values, reduction, include_self=False)
            found.append(of_sets[self.set_of_unit])
        return found[0], found[1]


def _slices_of(model: nn.Module, sets: Iterable[UnitSet], num_units: int) -> list[_Slices]:
    """The slices of all dims that units lie along.

    A dim has one `_Slices` for each kind of unit that shares it: the dims of heads and the heads, say.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    found: dict[int, dict[int, list[_Slices]]] = {}  # by parameter and dim, in an order that each run has anew
    first = 0
    for units in sets:
        numbers = torch.arange(first, first + units.num_units)
        for member in units.members:
            parameter = parameters.get(member.name)
            if parameter is None:
                if member.name in buffers:
                    continue  # it is not learned
                raise UserError(f"the graph is of another model: this one has no {member.name}")
            length = parameter.shape[member.dim] if member.dim < parameter.ndim else 0
            if int(member.index.max()) >= length:
                raise UserError(f"the graph is of another model: {member.name} is {tuple(parameter.shape)} here")
            positions = member.index.flatten()
            unit = numbers.repeat_interleave(member.index.shape[1])  # (n, k) -> (n · k)
            places = found.setdefault(id(parameter), {}).setdefault(member.dim, [])
            _place(places, _Slices(parameter, member.dim, torch.full((length,), num_units)), positions, unit)
        first += units.num_units
    every = [slices for dims in found.values() for places in dims.values() for slices in places]
    return [_Slices(one.parameter, one.dim, one.unit.to(one.parameter.device)) for one in every]


def _place(places: list[_Slices], new: _Slices, positions: Tensor, unit: Tensor) -> None:
    """Enters the units at `positions` of a dim: where they fit, or in new slices of the same dim."""
    nobody = int(new.unit[0])
    for slices in places:
        there = slices.unit[positions]
        if ((there == nobody) | (there == unit)).all():  # free, or a tied weight's other name
            slices.unit[positions] = unit
            return
    new.unit[positions] = unit
    places.append(new)
