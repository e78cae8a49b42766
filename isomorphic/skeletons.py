"""Models without data: the same modules and attributes, with tensors that have shapes and no numbers."""

from __future__ import annotations

import copy

import torch
from torch import nn

from isomorphic.errors import UserError
from isomorphic.inputs import tensors_in


def shape_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device; the data is never copied.

    Raises:
        UserError: something in it cannot be copied.
    """
    memo = {}
    for tensor in tensors_in([vars(module) for module in model.modules()]):  # plain attributes, too
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"the model cannot be copied: {error}") from error
