"""Tensors that modules hold as plain attributes: `self.positions = torch.sin(...)`, neither parameter nor buffer.

PyTorch neither moves nor stores them. They are constants of the forward code like buffers are, so that they are traced,
cut, and kept in checkpoints like these.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn


def named_plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the plain tensors of all modules by name; one that two modules hold stands under both names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in own_plain_tensors(module):
            yield (f"{prefix}.{name}" if prefix else name), tensor


def own_plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields those of one module. What is computed from parameters before each forward pass is none.

    Such a tensor carries a gradient, or its name begins that of a parameter: `weight` of `weight_g` and `weight_v`.
    """
    for name, value in vars(module).items():
        is_computed = any(parameter.startswith(f"{name}_") for parameter in module._parameters)
        if isinstance(value, Tensor) and not value.requires_grad and not is_computed:
            yield name, value
