"""Watches one forward pass: a dispatch mode that gives every tensor its units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from isomorphic.observe import EagerMode
from isomorphic.pruning.grouping.axes import Axes, drop_short
from isomorphic.pruning.grouping.call import Call, Rule
from isomorphic.pruning.grouping.recorder import Recorder, Units
from isomorphic.pruning.grouping.rules.zeros import note_zeros


class UnitMode(EagerMode):
    """Runs every operation as it is, and then its rule."""

    def __init__(self, recorder: Recorder, find_rule: Callable[[Any], Rule | None]) -> None:
        super().__init__()
        self.recorder, self.find_rule = recorder, find_rule

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        with torch._C.DisableTorchFunction():  # what is called from here is not the forward code's
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        rule = self.find_rule(func)
        condition = getattr(rule, "condition", None)
        applies = rule is not None and (condition is None or condition(Call(self.recorder, func, args, kwargs)))
        if not applies and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
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
        call.note_consumed()
        nonzero = note_zeros(call)
        flow = call.flows() if call.flow is None else call.flow
        for tensor in call.written():
            units = call.units(tensor)
            units.flow |= flow
            flow = units.flow
        leaf = "" if call.is_layer else call.common_leaf(inputs)
        constant = bool(inputs) and all(units.constant for units in inputs)
        for tensor, axes in zip(outputs, found, strict=True):
            numbers = () if tensor.is_floating_point() else call.numbered
            units = Units(drop_short(axes), flow, leaf, constant, call.proportional_to, numbers, nonzero, call.factors)
            self.recorder.set_units(tensor, units)

    def _axes(self, call: Call, rule: Rule | None, outputs: Sequence[Tensor]) -> list[Axes]:
        """Returns the axes of each result. A call without a rule that knows its arguments freezes them and is named."""
        try:
            given: Any = rule(call) if rule else None
        except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
            given = None
        if given is None:
            for tensor in call.tensors:
                reason = f"no rule for {'this ' if rule else ''}{call.name}"
                call.table.freeze_axes(call.axes(tensor), reason)
                if id(tensor) in self.recorder.leaves:
                    self.recorder.without_rule.setdefault(self.recorder.name_of(tensor), reason)
            given = [[None] * tensor.dim() for tensor in outputs]
        return given if given and isinstance(given[0], list) else [given] * len(outputs)
