"""Putting the tensors of a file into a model that has their shapes, strictly."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from isomorphic.errors import UserError


def load_tensors(model: nn.Module, tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Puts tensors, which come from `path`, into a model: all of its state dict, and buffers that it does not store.

    Raises:
        UserError: some are missing, unknown, of another shape, no plain numbers, or differ where the model ties them.
    """
    state = model.state_dict()
    places = dict(model.named_buffers()) | state
    faults = [f"{name} is missing" for name in state if name not in tensors]
    faults += [f"{name} is none of its tensors" for name in tensors if name not in places]
    faults += [
        f"{name} is {tuple(tensor.shape)}, not {tuple(places[name].shape)}"
        for name, tensor in tensors.items()
        if name in places and tensor.shape != places[name].shape
    ]
    faults += [
        f"{name} is no plain tensor of real numbers"
        for name, tensor in tensors.items()
        if not is_plain(tensor) or tensor.device.type != "cpu"
    ]
    faults += [f"{other} is not {name}, and the model ties them" for name, other in torn(model, tensors)]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"{path} does not fit the model: {faults[0]}{more}")
    try:
        with torch.no_grad():
            for name in tensors.keys() - state.keys():
                places[name].copy_(tensors[name])
        state.update({name: tensors[name] for name in state})  # it knows the versions that some modules look for
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} does not fit the model: {reason}") from error


def is_plain(tensor: torch.Tensor) -> bool:
    """Says whether a tensor holds all its numbers, one by one, and real ones."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_complex()


def torn(model: nn.Module, tensors: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Returns pairs of names that `model` ties to one parameter, and under which `tensors` has different numbers."""
    first: dict[int, str] = {}
    pairs = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and {name, other} <= tensors.keys() and not _same_bits(tensors[name], tensors[other]):
            pairs.append((other, name))
    return pairs


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compares bits, which NaN has, too, and in which every precision can be compared."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    bits = [tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)
