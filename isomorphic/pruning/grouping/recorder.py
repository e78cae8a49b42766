"""The notes of one trace: which units every tensor carries, which layers there are, who uses what a layer made."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isomorphic.inputs import tensors_in
from isomorphic.pruning.grouping.axes import Axes
from isomorphic.pruning.grouping.topology import Flow, Topology
from isomorphic.pruning.grouping.units import Axis, Ids, UnitTable

_SLOT = "_isomorphic_units"


@dataclass(frozen=True)
class Producer:
    """Parameters whose rows a tensor is proportional to, all together; `ids` of these rows, None for its own axes'."""

    tensors: tuple[str, ...]
    ids: Ids | None = field(default=None, compare=False)


@dataclass
class Units:
    """All that a tensor carries.

    Attributes:
        axes: its units, one `Axis` or None for each axis.
        flow: the layer sides that it comes from.
        leaf: name of the first parameter that it was computed from, "" where activations took part.
        constant: it was computed from nothing but buffers.
        proportional_to: the weight and bias of the layer that made it, where nothing but movement and products came
            after.
        numbers: ids of units that its values number, by their places.
    """

    axes: Axes
    flow: Flow = field(default_factory=set)
    leaf: str = ""
    constant: bool = False
    proportional_to: Producer | None = None
    numbers: tuple[Ids, ...] = ()

    def produced_ids(self) -> Ids:
        """Ids of the producer's rows that the tensor is proportional to, among others perhaps."""
        if self.proportional_to is not None and self.proportional_to.ids is not None:
            return self.proportional_to.ids
        return np.concatenate([np.zeros(0, np.int64), *(axis.ids.ravel() for axis in self.axes if axis is not None)])


@dataclass(frozen=True)
class Leaf:
    """A parameter or buffer: where ids begin."""

    names: tuple[str, ...]
    tensor: Tensor
    units: Units

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


class Recorder:
    """All that one trace knows: ids, layer graph, leaves, and who uses what a layer made.

    Args:
        model: to be traced.
        size_functions: torch functions whose sizes become equations; all others' are not known.

    Attributes:
        caller: the torch function that the forward code has called; None inside TorchScript.
        consumers: by producer: for each call that computes with its output, the ids that the call computes with.
    """

    def __init__(self, model: nn.Module, size_functions: Container[Any]) -> None:
        self.table = UnitTable()
        self.topology = Topology()
        self.used: set[str] = set()
        self.caller: Any = None
        self.size_functions = size_functions
        self.consumers: dict[tuple[str, ...], list[Ids]] = {}
        self.leaves = self._leaves_of(model)
        self.leaf_by_name = {leaf.name: leaf for leaf in self.leaves.values()}

    def _leaves_of(self, model: nn.Module) -> dict[int, Leaf]:
        """Every parameter and buffer, by its identity, under all of its names and with fresh ids."""
        names: dict[int, list[str]] = {}
        tensors: dict[int, Tensor] = {}
        for found in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
            for name, tensor in found:
                names.setdefault(id(tensor), []).append(name)
                tensors[id(tensor)] = tensor
        convolutions = [module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)]
        kernels = {id(p) for one in convolutions for p in one.parameters() if p.dim() == one.weight.dim()}
        return {key: self._new_leaf(names[key], tensor, is_kernel=key in kernels) for key, tensor in tensors.items()}

    def _new_leaf(self, names: list[str], tensor: Tensor, *, is_kernel: bool) -> Leaf:
        """A leaf with fresh ids for each dim; a kernel's pixels and the values of an index carry none."""
        is_index = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
        dims = 2 if is_kernel else 0 if is_index else tensor.dim()
        axes: Axes = [
            Axis(self.table.new(size)) if dim < dims and size > 1 else None for dim, size in enumerate(tensor.shape)
        ]
        is_parameter = isinstance(tensor, nn.Parameter)
        units = Units(axes, leaf=names[0] if is_parameter else "", constant=not is_parameter)
        return Leaf(tuple(names), tensor, units)

    def units(self, tensor: Tensor) -> Units:
        """Returns all that `tensor` carries; an unknown tensor is fixed."""
        leaf = self.leaves.get(id(tensor))
        if leaf is not None:
            self.used.add(leaf.name)
            return leaf.units
        return tensor.__dict__.get(_SLOT) or Units([None] * tensor.dim())

    def name_of(self, tensor: Tensor) -> str:
        """The name of a parameter or buffer, or of the first parameter that a tensor was computed from."""
        leaf = self.leaves.get(id(tensor))
        return leaf.name if leaf is not None else self.units(tensor).leaf

    def set_units(self, tensor: Tensor, units: Units) -> None:
        """Hands `tensor` its units; leaves keep theirs."""
        if id(tensor) not in self.leaves:
            setattr(tensor, _SLOT, units)

    def rows_of(self, tensor: Tensor) -> Ids:
        """Positions along dim 0 of the parameters that `tensor` is proportional to."""
        units = self.units(tensor)
        own = self.leaf_by_name[units.proportional_to.tensors[0]].units.axes[0] if units.proportional_to else None
        return np.zeros(0, np.int64) if own is None else np.flatnonzero(np.isin(own.ids, units.produced_ids()))

    @property
    def sizes_become_equations(self) -> bool:
        """True where the sizes that the running call is given become equations."""
        return self.caller in self.size_functions

    def note_consumer(self, producer: Producer, ids: Ids) -> None:
        """A call computes with these ids of what a producer made."""
        self.consumers.setdefault(producer.tensors, []).append(ids)

    def num_consumers(self, tensors: tuple[str, ...], rows: Ids) -> int:
        """How many calls use what these rows of a producer made, other than by passing it on in proportion."""
        own = self.leaf_by_name[tensors[0]].units.axes[0]
        assert own is not None
        return sum(bool(np.isin(own.ids[rows], ids).any()) for ids in self.consumers.get(tensors, ()))

    def freeze_outputs(self, outputs: Any) -> None:
        """Freezes the units of all tensors that the model returns."""
        for tensor in tensors_in(outputs):
            self.table.freeze_axes(self.units(tensor).axes, "it reaches the model's output")
            self.freeze_numbered(tensor)

    def freeze_numbered(self, tensor: Tensor) -> None:
        """Freezes the units that the values of `tensor` number: they keep their places."""
        for ids in self.units(tensor).numbers:
            self.table.freeze(ids, "their places are used as numbers")
