"""Running a model: on a tensor, or a tuple of positional arguments where it takes several; and what it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Any, ...]


def arguments(inputs: Inputs) -> tuple[Any, ...]:
    """The positional arguments: `model(*arguments(inputs))`."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def without_data(inputs: Inputs) -> tuple[Any, ...]:
    """The arguments with every tensor on the meta device, for a model that has shapes but no data."""
    return tuple(torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x for x in arguments(inputs))


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, mappings and objects, such as those that a model returns."""
    return [tensor for _, tensor in named_tensors(values, "")]


def named_tensors(values: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The same with their places: "output[0]['logits'].mean", where `name` is "output"."""
    if isinstance(values, Tensor):
        yield name, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from named_tensors(value, f"{name}[{key!r}]")
    elif isinstance(values, (tuple, list)):
        for position, value in enumerate(values):
            yield from named_tensors(value, f"{name}[{position}]")
    elif hasattr(values, "__dict__") and not isinstance(values, (nn.Module, type)):
        for attribute, value in vars(values).items():
            yield from named_tensors(value, f"{name}.{attribute}")


@contextlib.contextmanager
def no_fast_path() -> Iterator[None]:
    """Inside, torch's transformer layers run operation by operation, as in training."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
