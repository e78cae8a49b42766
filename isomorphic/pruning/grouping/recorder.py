"""The notes of one trace: which units every tensor carries, which layers there are, who uses what a layer made."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from isomorphic.inputs import tensors_in
from isomorphic.plain_tensors import named_plain_tensors
from isomorphic.pruning.expressions import Expression
from isomorphic.pruning.grouping.axes import Axes, ViewForm
from isomorphic.pruning.grouping.topology import Flow, Topology
from isomorphic.pruning.grouping.units import Axis, Ids, UnitTable

_SLOT = "_isomorphic_units"  # of a tensor: the number of the trace, and what it carries there
_numbers = itertools.count()


@dataclass(frozen=True)
class Producer:
    """Parameters whose rows a tensor is proportional to, all together.

    Attributes:
        tensors: their names, such as weight and bias of one layer.
        known_as: ids that the rows (m,) go by on the tensor beside their own, shape (…, m); None for no others. After a
            norm over the dims of each head they are those of its input (heads, m).
        rows: the rows that count, where the tensor no longer carries their ids; None where it does.
    """

    tensors: tuple[str, ...]
    known_as: Ids | None = field(default=None, compare=False)
    rows: Ids | None = field(default=None, compare=False)


@dataclass
class Units:
    """All that a tensor carries.

    Attributes:
        axes: its units, one `Axis` or None for each axis.
        flow: the layer sides that it comes from.
        leaf: name of the first parameter that it was computed from, "" where activations took part.
        constant: it was computed from nothing but buffers.
        proportional_to: the weight and bias of the layer that made it, where nothing but movement and products came
            after; of all layers, where their results were joined.
        numbers: ids of units that its values number, by their places.
        nonzero: it need not be zero where the weights that make a unit are; see `rules/zeros.py`.
        factors: numbers computed from sizes that are in what it is proportional to.
    """

    axes: Axes
    flow: Flow = field(default_factory=set)
    leaf: str = ""
    constant: bool = False
    proportional_to: tuple[Producer, ...] = ()
    numbers: tuple[Ids, ...] = ()
    nonzero: bool = False
    factors: frozenset[Expression] = frozenset()


@dataclass(frozen=True)
class Leaf:
    """A parameter, buffer or plain tensor of a module: where ids begin."""

    names: tuple[str, ...]
    tensor: Tensor
    units: Units

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


class _Split(NamedTuple):
    """One axis that a view has taken apart: its ids, shape (n,), into what sizes, and whether it had rows before."""

    ids: Ids
    sizes: tuple[int, ...]
    has_rows: bool


class Recorder:
    """All that one trace knows: ids, layer graph, leaves, and who uses what a layer made.

    Args:
        model: to be traced.
        size_functions: torch functions whose sizes become equations; all others' are not known.
        views: the forms of views, by their numbers, as an earlier trace has found out.

    Attributes:
        without_rule: why parameters stay that an operation without a rule has used, by name.
        without_layer: why parameters stay that no layer turns out to have, by name.
        views_wanted: forms of other views, as what uses their results has shown: the model is to be traced again.
        caller: the torch function that the forward code has called; None inside TorchScript.
        consumers: by producer: for each call that computes with its output, what tells the rows that it computes with,
            and the factors that are in them.
    """

    def __init__(
        self, model: nn.Module, size_functions: Container[Any], views: Mapping[int, ViewForm] | None = None
    ) -> None:
        self._number = next(_numbers)  # a tensor of an earlier trace may lie in somebody's table
        self.views = views or {}
        self.views_wanted: dict[int, ViewForm] = {}
        self._num_views = 0
        self._splits: dict[int, list[_Split]] = {}  # by number of the view
        self.table = UnitTable()
        self.topology = Topology()
        self.used: set[str] = set()
        self.without_rule: dict[str, str] = {}
        self.without_layer: dict[str, str] = {}
        self.caller: Any = None
        self.size_functions = size_functions
        self.consumers: dict[tuple[str, ...], list[tuple[Producer, Units]]] = {}
        self.leaves = self._leaves_of(model)
        self.leaf_by_name = {leaf.name: leaf for leaf in self.leaves.values()}

    def _leaves_of(self, model: nn.Module) -> dict[int, Leaf]:
        """Every parameter, buffer and plain tensor, by its identity, under all of its names and with fresh ids."""
        names: dict[int, list[str]] = {}
        tensors: dict[int, Tensor] = {}
        for found in (
            model.named_parameters(remove_duplicate=False),
            model.named_buffers(remove_duplicate=False),
            named_plain_tensors(model),
        ):
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
        number, units = tensor.__dict__.get(_SLOT, (None, None))
        return units if number == self._number else Units([None] * tensor.dim())

    def ids_on(self, tensor: Tensor) -> Ids:
        """Returns the ids of the units that any axis of `tensor` carries, shape (n,)."""
        ids = [axis.ids.ravel() for axis in self.units(tensor).axes if axis is not None]
        return np.concatenate(ids) if ids else np.zeros(0, np.int64)

    def name_of(self, tensor: Tensor) -> str:
        """The name of a parameter or buffer, or of the first parameter that a tensor was computed from."""
        leaf = self.leaves.get(id(tensor))
        return leaf.name if leaf is not None else self.units(tensor).leaf

    def set_units(self, tensor: Tensor, units: Units) -> None:
        """Hands `tensor` its units; leaves keep theirs."""
        if id(tensor) not in self.leaves:
            setattr(tensor, _SLOT, (self._number, units))

    def rows_of(self, producer: Producer, units: Units) -> Ids:
        """Positions along dim 0 of a producer's parameters that a tensor with `units` is proportional to."""
        own = self.leaf_by_name[producer.tensors[0]].units.axes[0]
        if producer.rows is not None or own is None:
            return np.zeros(0, np.int64) if own is None else producer.rows  # type: ignore[return-value]
        carried = np.zeros(self.table.size, bool)  # for each id
        for axis in units.axes:
            if axis is not None:
                carried[axis.ids] = True
        found = carried[own.ids]
        if producer.known_as is not None:
            found |= carried[producer.known_as].reshape(-1, len(own.ids)).any(0)
        return np.flatnonzero(found)

    def form_of_view(self, axes: Sequence[Axis], sizes: Sequence[tuple[int, ...]]) -> ViewForm:
        """Notes a view that takes some axes apart into these sizes; returns what it makes of them, as far as is known.

        What (256,) -> (16, 4, 4) is shows only later: heads of an attention, or the pixels of 16 channels.
        """
        number, self._num_views = self._num_views, self._num_views + 1
        self._splits[number] = [
            _Split(axis.ids.ravel(), size, bool(axis.rows)) for axis, size in zip(axes, sizes, strict=True)
        ]
        return self.views.get(number, ViewForm.ROWS)

    def runs_over(self, axes: Iterable[Axis | None]) -> None:
        """Something treats some axes as pixels: a view that has arranged units along them makes a map."""
        for axis in axes:
            if axis is not None:
                for number, splits in self._splits.items():
                    if any(not one.has_rows and np.isin(axis.ids, one.ids).any() for one in splits):
                        self._want(number, ViewForm.MAP)

    def picks_from(self, axes: Axes, dim: int) -> None:
        """Positions of an axis are picked by number: the view that made it has laid out parts along it."""
        axis = axes[dim]
        if axis is None:
            return
        size = axis.ids.shape[-1]
        if axis.rows and not self.table.is_section(axis.ids):
            self._want(self._last_split(axis.ids, -1, size), ViewForm.PARTS_INSIDE)
        for other in axes:
            if other is not None and len(other.rows) > 1 and other.rows[-1] == dim:
                self._want(self._last_split(other.ids, -2, size), ViewForm.PARTS_OUTSIDE)

    def _last_split(self, ids: Ids, place: int, size: int) -> int:
        """The last view that has taken these ids apart so that an axis is of this size; -1 for none."""
        found = (
            number
            for number, splits in reversed(self._splits.items())
            if any(len(one.sizes) >= -place and one.sizes[place] == size and ids.flat[0] in one.ids for one in splits)
        )
        return next(found, -1)

    def _want(self, number: int, form: ViewForm) -> None:
        if number >= 0 and number not in self.views:
            self.views_wanted.setdefault(number, form)

    @property
    def sizes_become_equations(self) -> bool:
        """True where the sizes that the running call is given become equations."""
        return self.caller in self.size_functions

    def note_consumer(self, producer: Producer, units: Units) -> None:
        """A call computes with what a producer made, and a tensor with `units` carries."""
        self.consumers.setdefault(producer.tensors, []).append((producer, units))

    def num_consumers(self, tensors: tuple[str, ...], rows: Ids, factor: Expression) -> int:
        """How many calls use what these rows of a producer made without `factor`, other than by passing it on."""
        calls = [call for call in self.consumers.get(tensors, ()) if factor not in call[1].factors]
        return sum(bool(np.isin(rows, self.rows_of(producer, units)).any()) for producer, units in calls)

    def freeze_outputs(self, outputs: Any) -> None:
        """Freezes the units of all tensors that the model returns."""
        for tensor in tensors_in(outputs):
            self.table.freeze_axes(self.units(tensor).axes, "it reaches the model's output")
            self.freeze_numbered(tensor)

    def freeze_numbered(self, tensor: Tensor) -> None:
        """Freezes the units that the values of `tensor` number: they keep their places."""
        for ids in self.units(tensor).numbers:
            self.table.freeze(ids, "their places are used as numbers")
