"""Structural pruning of vision models: Isomorphic Pruning and its neighbours.

`from isomorphic import load_model` gives a ready `nn.Module` for a model name or a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isomorphic.checkpoints.open import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Loads the one public name on first use, so that importing a submodule stays light."""
    if name == "load_model":
        from isomorphic.checkpoints.open import load_model

        return load_model
    raise AttributeError(f"module 'isomorphic' has no attribute {name!r}")
