"""What a model is run on: a tensor, or a tuple of positional arguments where a model takes several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Inputs = Tensor | tuple[Any, ...]


def arguments(inputs: Inputs) -> tuple[Any, ...]:
    """The positional arguments: `model(*arguments(inputs))`."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def without_data(inputs: Inputs) -> tuple[Any, ...]:
    """The arguments with every tensor on the meta device, for a model that has shapes but no data."""
    return tuple(torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x for x in arguments(inputs))
