"""How many attention heads a model has: those that a forward pass computes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from isomorphic.inputs import Inputs, call, no_fast_path

_SOFTMAXES: tuple[Callable[..., Any], ...] = (F.softmax, torch.softmax, Tensor.softmax)


def count_heads(model: nn.Module, inputs: Inputs) -> int:
    """Returns the heads of all attentions, those of an attention that runs more than once counted once.

    An attention is a call of torch's attention functions, or a softmax over the last dim of a tensor
    (…, heads, queries, keys). One whose heads lie elsewhere is counted wrongly, and one without either is not seen.
    """
    counter = _HeadCounter()
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(counter.enter).remove)
            stack.callback(module.register_forward_hook(counter.leave, always_call=True).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(no_fast_path())
        stack.enter_context(counter)
        call(model, inputs)
    return sum(counter.heads.values())


class _HeadCounter(TorchFunctionMode):
    """Notes the heads of each attention, by the innermost module and how many attentions came before in its call."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: dict[tuple[int, int], int] = {}
        self._calls: list[list[int]] = [[0, 0]]

    def enter(self, module: nn.Module, args: Any) -> None:
        """A module's forward begins."""
        self._calls.append([id(module), 0])

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module's forward ends."""
        self._calls.pop()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        heads = _heads_of(func, args, kwargs or {})
        if heads:
            module, position = self._calls[-1]
            self.heads[module, position] = heads
            self._calls[-1][1] += 1
        return func(*args, **(kwargs or {}))


def _heads_of(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The heads of a call that is an attention; 0 for any other."""
    if func is F.multi_head_attention_forward:
        return kwargs["num_heads"] if "num_heads" in kwargs else args[4]
    first = next((value for value in (*args[:1], kwargs.get("input"), kwargs.get("query")) if value is not None), None)
    if not isinstance(first, Tensor) or first.dim() < 4:
        return 0
    if func is F.scaled_dot_product_attention:
        key = args[1] if len(args) > 1 else kwargs["key"]
        return key.shape[-3]  # of heads that share a key, the key's are what can go
    if func in _SOFTMAXES:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return first.shape[-3] if dim in (-1, first.dim() - 1) else 0
    return 0
