"""Counting at modules: which rule charges a module, and hooks that apply it at every call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from isomorphic.kinds import kind_names

# The attention of DeiT and of Swin, which both counters charge as a whole.
TIMM_ATTENTION = ("timm.layers.attention.Attention", "timm.models.swin_transformer.WindowAttention")

Number = TypeVar("Number", int, float)
CallArguments = tuple[Any, ...]
ModuleRule = Callable[[Any, CallArguments, Any], int]  # (module, inputs, output) -> MACs of the call


def entry_of(module: nn.Module, table: Mapping[Any, Any]) -> Any:
    """The entry of the module's class or its nearest parent in the table (as ``isinstance``), or None.

    Keys are classes, or the full names of those that timm may not be imported for.
    """
    kinds = type(module)
    keys = (key for both in zip(kinds.__mro__, kind_names(kinds), strict=True) for key in both)
    return next((table[key] for key in keys if key in table), None)


def layers_in(model: nn.Module, rules: Mapping[Any, ModuleRule]) -> Iterator[tuple[nn.Module, ModuleRule]]:
    for module in model.modules():
        rule = entry_of(module, rules)
        if rule is not None:
            yield module, rule


def _in_order(module: nn.Module, args: CallArguments, kwargs: dict[str, Any]) -> CallArguments:
    """A call's arguments in the order of the module's forward: named ones may come in any other."""
    if not kwargs:
        return args
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    return (*bound.args, *bound.kwargs.values())


@contextmanager
def counting(rules: Mapping[nn.Module, ModuleRule]) -> Iterator[list[int]]:
    """Hook each module with its rule; the list fills with one count for each call."""
    counts: list[int] = []

    def hook(module: nn.Module, args: CallArguments, kwargs: dict[str, Any], output: Any) -> None:
        counts.append(rules[module](module, _in_order(module, args, kwargs), output))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in rules]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def measuring_calls(
    model: nn.Module, reading: Callable[[], Number], by_module: dict[nn.Module, Number]
) -> Iterator[None]:
    """Adds to `by_module`, for every module that is called, by how much `reading()` grows from its begin to its end.

    Args:
        model: its modules are watched, each with all that runs inside it.
        reading: what a meter shows, such as MACs counted so far or the clock.
        by_module: sums over all calls.
    """
    begun: dict[nn.Module, list[Number]] = {}  # a stack each: a module may run inside itself

    def begin(module: nn.Module, args: Any) -> None:
        begun.setdefault(module, []).append(reading())

    def end(module: nn.Module, args: Any, output: Any) -> None:
        by_module[module] = by_module.get(module, 0) + reading() - begun[module].pop()

    handles = [module.register_forward_pre_hook(begin) for module in model.modules()]
    handles += [module.register_forward_hook(end) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
