"""Classes of timm and torchvision by name, so that neither is imported for a model that has none of them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from isomorphic.errors import UserError


def kind_names(kind: type) -> Iterator[str]:
    """Yields the full names of a class and of those that it inherits from, the nearest first.

    Of timm's `Attention` these are "timm.layers.attention.Attention", "torch.nn.modules.module.Module", …
    """
    for parent in kind.__mro__:
        yield f"{parent.__module__}.{parent.__qualname__}"


def is_kind(value: object, name: str) -> bool:
    """Whether a value is of the class with this full name, as `isinstance` has it."""
    return name in kind_names(type(value))


def library(name: str) -> Any:
    """Returns a library whose models are asked for by name.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed, and models by name come from there: pip install {name}") from error
