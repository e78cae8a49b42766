"""What a model is run on, a tensor or a tuple of positional arguments where it takes several, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
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
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, Mapping):
        values = list(values.values())
    elif hasattr(values, "__dict__") and not isinstance(values, (tuple, list, nn.Module, type)):
        values = list(vars(values).values())
    return [tensor for value in values for tensor in tensors_in(value)] if isinstance(values, (tuple, list)) else []
