"""Models without data: the same modules and attributes, with tensors that have shapes and no numbers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from isomorphic.errors import UserError
from isomorphic.inputs import tensors_in

_TABLES = (dict, OrderedDict, set)


def shape_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device; the data is never copied.

    Raises:
        UserError: something in it cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in tensors_in([vars(module) for module in model.modules()]):  # plain attributes, too
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    # Each module has a dozen tables of hooks, nearly all of them empty: copying these takes most of the time.
    tables = (table for module in model.modules() for table in vars(module).values() if type(table) in _TABLES)
    memo |= {id(table): type(table)() for table in tables if not table}
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"the model cannot be copied: {error}") from error
