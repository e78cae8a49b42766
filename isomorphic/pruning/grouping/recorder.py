"""Watches one forward pass: a dispatch mode that gives every tensor its units."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isomorphic.inputs import tensors_in
from isomorphic.pruning.grouping.axes import Axes, drop_short
from isomorphic.pruning.grouping.topology import Flow, Topology
from isomorphic.pruning.grouping.units import Axis, Ids, UnitTable
from isomorphic.pruning.groups import LayerNode

_SLOT = "_isomorphic_units"


Rule = Callable[["Call"], "Axes | list[Axes]"]


# What a layer's output is proportional to, row by row, with both together.
_ROWS = (("weight", 0), ("bias", 0))
# Layers that run over learned tokens, too; other products and norms of parameters make weights.
_MAY_READ_TOKENS = frozenset({"linear", "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"})


@dataclass(frozen=True)
class Producer:
    """Parameters whose rows a tensor is proportional to, all together; `ids` of these rows, None for its own axes'."""

    tensors: tuple[str, ...]
    ids: Ids | None = field(default=None, compare=False)


@dataclass
class Units:
    """What a tensor carries.

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
    """All that one trace knows: ids, layer graph, leaves.

    Args:
        model: what is traced.
        vouched: torch functions whose sizes somebody reads.
    """

    def __init__(self, model: nn.Module, vouched: Container[Any]) -> None:
        self.table = UnitTable()
        self.topology = Topology()
        self.leaves: dict[int, Leaf] = {}
        self.used: set[str] = set()
        self.caller: Any = None  # the torch function that the forward code has called; None inside TorchScript
        self.vouched = vouched
        self.readers: dict[tuple[str, ...], list[Ids]] = {}  # by producer: what each call that uses it up reads
        names: dict[int, list[str]] = {}
        tensors: dict[int, Tensor] = {}
        for found in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
            for name, tensor in found:
                names.setdefault(id(tensor), []).append(name)
                tensors[id(tensor)] = tensor
        convolutions = [module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)]
        kernels = {id(p) for one in convolutions for p in one.parameters() if p.dim() == one.weight.dim()}
        for key, tensor in tensors.items():
            is_index = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
            dims = 2 if key in kernels else 0 if is_index else tensor.dim()
            axes: Axes = [
                Axis(self.table.new(size)) if dim < dims and size > 1 else None for dim, size in enumerate(tensor.shape)
            ]
            is_parameter = isinstance(tensor, nn.Parameter)
            units = Units(axes, leaf=names[key][0] if is_parameter else "", constant=not is_parameter)
            self.leaves[key] = Leaf(tuple(names[key]), tensor, units)
        self.leaf_by_name = {leaf.name: leaf for leaf in self.leaves.values()}

    def units(self, tensor: Tensor) -> Units:
        """What `tensor` carries; a tensor that nothing is known of is fixed."""
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

    def num_readers(self, tensors: tuple[str, ...], rows: Ids) -> int:
        """How many calls use what these rows of a producer made, other than by passing it on in proportion."""
        own = self.leaf_by_name[tensors[0]].units.axes[0]
        assert own is not None
        return sum(bool(np.isin(own.ids[rows], read).any()) for read in self.readers.get(tensors, ()))

    def freeze_outputs(self, outputs: Any) -> None:
        """What a caller of the model sees stays."""
        for tensor in tensors_in(outputs):
            self.table.freeze_axes(self.units(tensor).axes, "it reaches the model's output")
            self.freeze_numbered(tensor)

    def freeze_numbered(self, tensor: Tensor) -> None:
        """Units keep their places where a tensor of such numbers is used."""
        for ids in self.units(tensor).numbers:
            self.table.freeze(ids, "their places are used as numbers")


class UnknownCallError(ValueError):
    """A rule does not know the arguments that its operation was called with."""


class Call:
    """One call of an operation, as its rule sees it."""

    def __init__(self, recorder: Recorder, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.recorder, self.table, self.func = recorder, recorder.table, func
        self.out: Any = None
        self.arguments: dict[str, Any] = {a.name: a.default_value for a in func._schema.arguments}
        self.arguments |= dict(zip(self.arguments, args, strict=False)) | kwargs
        self.tensors: list[Tensor] = list(_tensors(self.arguments.values()))
        self._shapes = {id(tensor): tuple(tensor.shape) for tensor in self.tensors}  # as they are before the call
        self.flow: Flow | None = None
        self.is_layer = False
        self.proportional_to: Producer | None = None
        self.numbered: tuple[Ids, ...] = ()  # what integers among its results number
        self._passed: set[int] = set()

    @property
    def name(self) -> str:
        """The operation's name without its namespace: "add", "view"."""
        return self.func._schema.name.partition("::")[2].rstrip("_")

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    def get(self, argument: str, default: Any = None) -> Any:
        """An argument that not all overloads have."""
        return self.arguments.get(argument, default)

    def axes(self, argument: str | Tensor) -> Axes:
        """The axes of a tensor argument."""
        tensor = self.arguments[argument] if isinstance(argument, str) else argument
        return list(self.recorder.units(tensor).axes)

    def units(self, argument: str | Tensor) -> Units:
        """All that a tensor argument carries."""
        return self.recorder.units(self.arguments[argument] if isinstance(argument, str) else argument)

    def shape(self, argument: str | Tensor) -> Sequence[int]:
        """The shape of a tensor argument."""
        tensor = self.arguments[argument] if isinstance(argument, str) else argument
        return self._shapes[id(tensor)]

    def written(self) -> list[Tensor]:
        """The tensor arguments that the operation changes in place."""
        changed = (a.name for a in self.func._schema.arguments if a.alias_info and a.alias_info.is_write)
        return [tensor for name in changed if isinstance(tensor := self[name], Tensor)]

    def flows(self, tensors: Iterable[Tensor] | None = None) -> Flow:
        """The union of the tensors' flows. A parameter that meets an activation is a layer of its own."""
        units = [self.recorder.units(tensor) for tensor in (self.tensors if tensors is None else tensors)]
        if self.common_leaf(units):
            return set()
        return set().union(*(one.flow if not one.leaf else self._parameter_node(one) for one in units))

    @staticmethod
    def common_leaf(units: Sequence[Units]) -> str:
        """The first of the parameters behind some arguments, "" where activations are among them."""
        leaves = [one.leaf for one in units if not one.constant]
        return leaves[0] if leaves and all(leaves) else ""

    def pass_on(self, *tensors: Tensor, in_product: bool = False) -> None:
        """The result is proportional to what all of `tensors` are proportional to.

        In a product the rows' ids are noted, which the result may no longer carry.
        """
        producers = {self.units(tensor).proportional_to for tensor in tensors}
        producer = producers.pop() if len(producers) == 1 else None
        if producer is not None:
            ids = self.units(tensors[0]).produced_ids() if in_product else producer.ids
            self.proportional_to = Producer(producer.tensors, ids)
            self._passed = {id(tensor) for tensor in tensors}

    def read(self) -> None:
        """Notes what the call uses up of the producers of its arguments."""
        for tensor in self.tensors:
            units = self.units(tensor)
            if units.proportional_to is not None and id(tensor) not in self._passed:
                self.recorder.readers.setdefault(units.proportional_to.tensors, []).append(units.produced_ids())

    def layer(self, kind: str, roles: dict[tuple[str, int], str], *, reads: Tensor, detail: str = "") -> None:
        """The call is a layer.

        Args:
            kind: see `LayerNode`.
            roles: the side ("out", "in", "both") of dims of parameters, by (argument's name, dim).
            reads: the activation.
            detail: see `LayerNode`.
        """
        named = {key: self.recorder.name_of(self[key[0]]) for key in roles if isinstance(self.get(key[0]), Tensor)}
        owner = next((leaf for leaf in named.values() if leaf), "")
        learned = self.units(reads).leaf  # a token, or a weight in the making
        if not owner or (learned and self.name not in _MAY_READ_TOKENS):
            return
        self.is_layer = True
        flow = self._parameter_node(self.units(reads)) if learned else self.flows([reads])
        topology, sides = self.recorder.topology, {}
        for key, leaf in named.items():
            side = roles[key]
            if side not in sides:
                node = LayerNode(owner.rpartition(".")[0], kind, side, detail)
                sides[side] = topology.node((owner, side), node)
                if side != "out":
                    topology.read(flow, sides[side])
            if leaf:
                topology.assign(leaf, key[1], sides[side])
        self.flow = {number for side, number in sides.items() if side != "in"}
        tensors = dict.fromkeys(leaf for key, leaf in named.items() if key in _ROWS and leaf and roles[key] != "in")
        own = self.recorder.leaf_by_name[next(iter(tensors))].units.axes[0] if tensors and kind == "norm" else None
        # A norm's result carries the ids of what it reads.
        self.proportional_to = Producer(tuple(tensors), own and own.ids) if tensors else None

    def _parameter_node(self, units: Units) -> Flow:
        """A parameter that no layer holds: a token, a position embedding, a layer scale."""
        leaf = self.recorder.leaf_by_name[units.leaf]
        dims = [dim for dim, axis in enumerate(leaf.units.axes) if axis is not None]
        if not isinstance(leaf.tensor, nn.Parameter) or not dims:
            return set()
        node = LayerNode(leaf.name.rpartition(".")[0], "parameter", "both", self.name)
        number = self.recorder.topology.node(leaf.name, node)
        for dim in dims:
            self.recorder.topology.assign(leaf.name, dim, number)
        return {number}


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Tensor))


class UnitMode(TorchDispatchMode):
    """Runs every operation as it is, and then its rule."""

    def __init__(self, recorder: Recorder, find_rule: Callable[[Any], Rule | None]) -> None:
        super().__init__()
        self.recorder, self.find_rule = recorder, find_rule

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        with torch._C.DisableTorchFunction():  # what is called from here is not the forward code's
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        rule = self.find_rule(func)
        if rule is None and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        call = Call(self.recorder, func, args, kwargs)
        call.out = func(*args, **kwargs)
        self._record(call, rule)
        return call.out

    def _record(self, call: Call, rule: Rule | None) -> None:
        outputs = [tensor for tensor in tree_leaves(call.out) if isinstance(tensor, Tensor)]
        if not outputs:
            return
        for tensor in call.tensors:
            self.recorder.freeze_numbered(tensor)
        found = self._axes(call, rule, outputs)
        inputs = [self.recorder.units(tensor) for tensor in call.tensors]
        call.read()
        flow = call.flows() if call.flow is None else call.flow
        for tensor in call.written():
            units = call.units(tensor)
            units.flow |= flow
            flow = units.flow
        leaf = "" if call.is_layer else call.common_leaf(inputs)
        constant = bool(inputs) and all(units.constant for units in inputs)
        for tensor, axes in zip(outputs, found, strict=True):
            numbers = () if tensor.is_floating_point() else call.numbered
            self.recorder.set_units(
                tensor, Units(drop_short(axes), flow, leaf, constant, call.proportional_to, numbers)
            )

    def _axes(self, call: Call, rule: Rule | None, outputs: Sequence[Tensor]) -> list[Axes]:
        """The axes of each result. What has no rule, or arguments that its rule does not know, is frozen and named."""
        try:
            given: Any = rule(call) if rule else None
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
            given = None
        if given is None:
            for tensor in call.tensors:
                call.table.freeze_axes(call.axes(tensor), f"no rule for {'this ' if rule else ''}{call.name}")
            given = [[None] * tensor.dim() for tensor in outputs]
        return given if given and isinstance(given[0], list) else [given] * len(outputs)
