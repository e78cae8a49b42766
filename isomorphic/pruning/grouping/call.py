"""One call of an operation, as its rule sees it: arguments by name, and what they carry."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from isomorphic.pruning.expressions import Expression
from isomorphic.pruning.grouping.axes import Axes
from isomorphic.pruning.grouping.recorder import Producer, Recorder, Units
from isomorphic.pruning.grouping.topology import Flow
from isomorphic.pruning.grouping.units import Ids
from isomorphic.pruning.groups import LayerNode

Rule = Callable[["Call"], "Axes | list[Axes]"]

# What a layer's output is proportional to, row by row, with both together.
_ROWS = (("weight", 0), ("bias", 0))
# Layers that run over learned tokens, too; other products and norms of parameters make weights.
_RUN_ON_TOKENS = frozenset({"linear", "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"})


def only_if(condition: Callable[[Call], bool]) -> Callable[[Rule], Rule]:
    """Decorates the rule of a composite operation, whose other calls are taken apart into what they are made of."""

    def decorate(rule: Rule) -> Rule:
        rule.condition = condition  # type: ignore[attr-defined]
        return rule

    return decorate


class UnknownCallError(ValueError):
    """A rule does not know the arguments that its operation was called with."""


@dataclasses.dataclass(frozen=True)
class _Signature:
    """What an operation says of itself: its name without its namespace, defaults, and arguments that it changes."""

    name: str
    defaults: dict[str, Any]
    written: tuple[str, ...]


@functools.cache
def _signature(func: Any) -> _Signature:
    """Reads an operation's schema, which takes longer than most rules."""
    arguments = func._schema.arguments
    written = (a.name for a in arguments if a.alias_info and a.alias_info.is_write)
    name = func._schema.name.partition("::")[2].rstrip("_")
    return _Signature(name, {a.name: a.default_value for a in arguments}, tuple(written))


class Call:
    """One call of an operation, as its rule sees it."""

    def __init__(self, recorder: Recorder, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.recorder, self.table, self.func = recorder, recorder.table, func
        self.out: Any = None
        self._signature = _signature(func)
        self.arguments: dict[str, Any] = dict(self._signature.defaults)
        self.arguments |= dict(zip(self.arguments, args, strict=False)) | kwargs
        self.tensors: list[Tensor] = list(_tensors(self.arguments.values()))
        self._shapes = {id(tensor): tuple(tensor.shape) for tensor in self.tensors}  # as they are before the call
        self.flow: Flow | None = None
        self.is_layer = False
        self.proportional_to: tuple[Producer, ...] = ()
        self.factors: frozenset[Expression] = frozenset()
        self.numbered: tuple[Ids, ...] = ()  # what integers among its results number
        self._passed: set[int] = set()

    @property
    def name(self) -> str:
        """The operation's name without its namespace: "add", "view"."""
        return self._signature.name

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
        return [tensor for name in self._signature.written if isinstance(tensor := self[name], Tensor)]

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

    def pass_on(self, *tensors: Tensor, in_product: bool = False, joined: bool = False) -> None:
        """The result is proportional to what all of `tensors` are proportional to.

        Args:
            tensors: some of the arguments.
            in_product: the result may no longer carry their rows' ids, so that the rows are noted.
            joined: each has a part of its own in the result: it is proportional to all that they are, together.
        """
        each = [self.units(tensor) for tensor in tensors]
        if not all(units.proportional_to for units in each):
            return
        if len(each) == 1 == len(each[0].proportional_to) and not in_product:
            self.proportional_to, self._passed = each[0].proportional_to, {id(tensors[0])}
            self.factors = each[0].factors
            return
        if len({units.proportional_to for units in each}) > 1 and not joined:
            return
        rows: dict[Producer, list[Ids]] = {}
        for units in each:
            for producer in units.proportional_to:
                rows.setdefault(producer, []).append(self.recorder.rows_of(producer, units))
        alike = all(np.array_equal(found[0], one) for found in rows.values() for one in found)
        if in_product or len(rows) > 1 or not alike:
            noted = {producer: np.unique(np.concatenate(found)) for producer, found in rows.items()}
            self.proportional_to = tuple(dataclasses.replace(producer, rows=found) for producer, found in noted.items())
        else:
            self.proportional_to = each[0].proportional_to
        self.factors = frozenset.intersection(*(units.factors for units in each))
        self._passed = {id(tensor) for tensor in tensors}

    def note_consumed(self) -> None:
        """The call consumes what the producers of its arguments made, but for what it passes on in proportion."""
        for tensor in self.tensors:
            if id(tensor) not in self._passed:
                units = self.units(tensor)
                for producer in units.proportional_to:
                    self.recorder.note_consumer(producer, units)

    def layer(
        self,
        kind: str,
        roles: dict[tuple[str, int], str],
        *,
        activation: Tensor,
        detail: str = "",
        dims_of_leaf: bool = False,
    ) -> None:
        """The call is a layer.

        Args:
            kind: see `LayerNode`.
            roles: the side ("out", "in", "both") of dims of parameters, by (argument's name, dim).
            activation: its input.
            detail: see `LayerNode`.
            dims_of_leaf: dims are those of the parameters, not of arguments that were made from them.
        """
        named = {key: self.recorder.name_of(self[key[0]]) for key in roles if isinstance(self.get(key[0]), Tensor)}
        owner = next((leaf for leaf in named.values() if leaf), "")
        learned = self.units(activation).leaf  # a token, or a weight in the making
        if not owner or (learned and self.name not in _RUN_ON_TOKENS):
            return
        self.is_layer = True
        flow = self._parameter_node(self.units(activation)) if learned else self.flows([activation])
        topology, sides = self.recorder.topology, {}
        for key, leaf in named.items():
            side = roles[key]
            if side not in sides:
                node = LayerNode(owner.rpartition(".")[0], kind, side, detail)
                sides[side] = topology.node((owner, side), node)
                if side != "out":
                    topology.connect(flow, sides[side])
            if leaf:
                topology.assign(leaf, key[1] if dims_of_leaf else self._leaf_dim(leaf, *key), sides[side])
        self.flow = {number for side, number in sides.items() if side != "in"}
        tensors = dict.fromkeys(leaf for key, leaf in named.items() if key in _ROWS and leaf and roles[key] != "in")
        known_as = self._normed_ids(activation) if kind == "norm" else None
        self.proportional_to = (Producer(tuple(tensors), known_as),) if tensors else ()

    def _leaf_dim(self, leaf: str, argument: str, dim: int) -> int:
        """The dim of a parameter that `dim` of an argument made from it is: 1 for dim 0 of `weights[expert]`."""
        if id(self[argument]) in self.recorder.leaves:
            return dim
        used = self.units(argument).axes[dim]
        own = self.recorder.leaf_by_name[leaf].units.axes
        same = (d for d, axis in enumerate(own) if axis and used and (axis.ids == used.ids.flat[0]).any())
        return next(same, dim)

    def _normed_ids(self, activation: Tensor) -> Ids | None:
        """The ids of a norm's input along the axis of its weight, which its result goes on with."""
        axis = self.units(activation).axes[-1 if "layer_norm" in self.name or "rms_norm" in self.name else 1]
        return None if axis is None else axis.ids

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
