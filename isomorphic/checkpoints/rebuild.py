"""Building a model with the structure that a checkpoint gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from isomorphic.checkpoints.structure import restore_structure
from isomorphic.checkpoints.tensors import load_tensors
from isomorphic.errors import UserError, first_line
from isomorphic.models import ModelSpec, build_model


def rebuild(spec: ModelSpec, structure: Any, tensors: dict[str, torch.Tensor], path: str | Path) -> nn.Module:
    """Returns the dense model with another structure and its tensors, which come from `path`, in eval mode.

    Raises:
        UserError: the structure or the tensors are not those of this model.
    """
    model = build_shaped(spec, structure, tensors, path)
    load_tensors(model, tensors, path)
    return model.eval()


def build_shaped(spec: ModelSpec, structure: Any, tensors: dict[str, torch.Tensor], path: str | Path) -> nn.Module:
    """Returns the dense model with another structure, and with tensors of these shapes, which are not filled yet.

    Raises:
        UserError: the structure is not one of this model.
    """
    model = build_model(spec)
    try:
        restore_structure(model, structure, tensors)
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not fit {spec.name} as this library builds it: {first_line(error)}") from error
    return model
