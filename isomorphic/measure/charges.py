"""What makes up a model's complexity: every amount that a counter charges, and the parameters that it follows.

A convolution's MACs shrink with its weight. An activation has no weight: its elements are as many as the channels that
the last layer made. Nothing here is counted anew: the amounts are those of the two counters, and their sum is what
`count_complexity` says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call
from isomorphic.measure.exact_counter import BLOCK_EXTRAS, FunctionCounter
from isomorphic.measure.layer_hooks import CallArguments, ModuleRule, counting, layers_in
from isomorphic.measure.paper_counter import paper_layers
from isomorphic.observe import eval_mode


class Charge(NamedTuple):
    """Part of a model's complexity.

    Attributes:
        amount: MACs, or params.
        parameters: what the amount is in proportion to, as much to each as it is large.
        maker: where there are none, the parameter whose rows made the channels; None if nobody knows.
    """

    amount: float
    parameters: tuple[Tensor, ...] = ()
    maker: Tensor | None = None


def charges(model: nn.Module, inputs: Inputs, unit: str, makers: Collection[int]) -> list[Charge]:
    """The parts of a model's complexity, which add up to `getattr(count_complexity(model, inputs), unit)`.

    Args:
        model: in any mode, best on the meta device.
        inputs: what it runs on: one item, or what is counted as it is given (see `count_complexity`).
        unit: a field of `Complexity`.
        makers: the `id` of each parameter whose rows are channels that may go.
    """
    if unit == "params":
        return [Charge(parameter.numel(), (parameter,)) for parameter in model.parameters()]
    exact = unit == "macs_exact"
    functions = _Functions(makers, charged=exact)
    rules = dict(layers_in(model, BLOCK_EXTRAS) if exact else paper_layers(model))
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for module in rules:
            stack.callback(module.register_forward_pre_hook(functions.enter).remove)
        stack.enter_context(counting({module: _noting(functions, rule) for module, rule in rules.items()}))
        stack.enter_context(torch.no_grad())
        stack.enter_context(functions)
        call(model, inputs)
    return functions.charges


class _Functions(FunctionCounter):
    """Notes who is charged, while it is active.

    Attributes:
        charges: in the order of the calls.
    """

    def __init__(self, makers: Collection[int], *, charged: bool) -> None:
        """
        Args:
            makers: see `charges`.
            charged: functions' own charges are part of the complexity, and not just those of modules.
        """
        super().__init__()
        self.charges: list[Charge] = []
        self._makers = makers
        self._charged = charged
        self._maker: Tensor | None = None
        self._inside: list[Charge] = []  # of functions, since a module's forward began

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.products + self.rest
        output = super().__torch_function__(func, types, args, kwargs)
        parameters = tuple(_parameters_in([*args, *(kwargs or {}).values()]))
        self._maker = next((parameter for parameter in parameters if id(parameter) in self._makers), self._maker)
        amount = self.products + self.rest - before
        if amount:
            self._inside.append(Charge(amount, parameters, None if parameters else self._maker))
            self.charges += self._inside[-1:] if self._charged else []
        return output

    def enter(self, *_: Any) -> None:
        """A module begins."""
        self._inside.clear()

    def note(self, amount: int, module: nn.Module) -> None:
        """A module's charge: spread over what ran inside it, which scales as the parts of a whole attention do."""
        total = sum(charge.amount for charge in self._inside)
        if total:
            self.charges += [charge._replace(amount=amount * charge.amount / total) for charge in self._inside]
        else:
            parameters = tuple(module.parameters())
            self.charges.append(Charge(amount, parameters, None if parameters else self._maker))


def _noting(functions: _Functions, rule: ModuleRule) -> ModuleRule:
    """`rule`, whose charges are noted."""

    def noting(module: nn.Module, inputs: CallArguments, output: Any) -> int:
        amount = rule(module, inputs, output)
        functions.note(amount, module)
        return amount

    return noting


def _parameters_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _parameters_in(value)
        elif isinstance(value, nn.Parameter):
            yield value
