"""Watching a model run, and putting it back: train and eval modes, calls of modules, calls of torch's functions.

with eval_mode(model), module_calls({"head": model.head}, after=lambda name, outputs: seen.append(outputs)):
    model(images)                                   # `seen` has one tensor; hooks and modes are as before
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Inside, modules may be told to train or not; afterwards each is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            if module.training != mode:
                module.training = mode


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while, then each module as it was."""
    with modes_kept(model):
        if any(module.training for module in model.modules()):
            model.eval()
        yield


@contextlib.contextmanager
def module_calls(
    modules: Mapping[str, nn.Module],
    *,
    before: Callable[[str, tuple[Any, ...], dict[str, Any]], None] | None = None,
    after: Callable[[str, Any], None] | None = None,
) -> Iterator[None]:
    """Inside, each call of some modules is told of.

    Args:
        modules: by name.
        before: is called with the module's name and its positional and keyword arguments.
        after: is called with the module's name and what it returned.
    """
    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            if before is not None:
                hooks.enter_context(module.register_forward_pre_hook(_entering(before, name), with_kwargs=True))
            if after is not None:
                hooks.enter_context(module.register_forward_hook(_leaving(after, name)))
        yield


def _entering(before: Callable[..., None], name: str) -> Callable[..., None]:
    return lambda module, positional, keyword: before(name, positional, keyword)


def _leaving(after: Callable[..., None], name: str) -> Callable[..., None]:
    return lambda module, inputs, outputs: after(name, outputs)


class EagerMode(TorchDispatchMode):
    """A dispatch mode under which nothing is compiled.

    Torch would keep its compiler away from the mode's own code, and import it for that: two seconds and more, at the
    first operation of every process.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class FunctionCalls(TorchFunctionMode):
    """Inside, each call of a torch function is told of.

    Args:
        before: is called with the function and all of its arguments, keyword ones last.
        after: is called with the same and what the function returned.
    """

    def __init__(
        self,
        *,
        before: Callable[[Any, Sequence[Any]], None] | None = None,
        after: Callable[[Any, Sequence[Any], Any], None] | None = None,
    ) -> None:
        super().__init__()
        self._before, self._after = before, after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        arguments = [*args, *kwargs.values()]
        if self._before is not None:
            self._before(func, arguments)
        output = func(*args, **kwargs)
        if self._after is not None:
            self._after(func, arguments, output)
        return output
