"""Putting the tensors of a file into a model that has their shapes, strictly."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    shapes = {name: value.shape for name, value in places.items() if isinstance(value, torch.Tensor)}
    faults = misfits(shapes, state.keys(), tensors)
    strange = [
        f"{name} is no plain tensor of real numbers"
        for name, tensor in tensors.items()
        if not is_plain(tensor) or tensor.device.type != "cpu"
    ]
    tied = [f"{other} is not {name}, and the model ties them" for name, other in torn(model, tensors)]
    if any(faults.values()) or strange or tied:
        raise misfit_error(path, {**faults, "": strange + tied})
    try:
        with torch.no_grad():
            for name in tensors.keys() - state.keys():
                places[name].copy_(tensors[name])
        state.update({name: tensors[name] for name in state})  # it knows the versions that some modules look for
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} does not fit the model: {reason}") from error


def misfits(
    places: Mapping[str, Sequence[int]], needed: Collection[str], tensors: Mapping[str, torch.Tensor]
) -> dict[str, list[str]]:
    """Returns what keeps tensors from filling a model, by kind: those missing, unknown, and of another shape.

    Args:
        places: shapes of the model's parameters and buffers by name.
        needed: names of those that must be filled.
        tensors: what there is.
    """
    shapes = [
        f"{name} is {tuple(tensor.shape)}, not {tuple(places[name])}"
        for name, tensor in tensors.items()
        if name in places and tuple(tensor.shape) != tuple(places[name])
    ]
    return {
        "missing": [f"{name} is missing" for name in needed if name not in tensors],
        "unknown": [f"{name} is none of its tensors" for name in tensors if name not in places],
        "of another shape": shapes,
    }


def misfit_error(path: str | Path, faults: Mapping[str, Sequence[str]], hint: str = "") -> UserError:
    """Returns the error of weights that do not fit: the first fault, and of many faults how many of each kind."""
    every = [fault for kind in faults.values() for fault in kind]
    more = f" (and {len(every) - 1} more)" if len(every) > 1 else ""
    told = [
        f"{len(faults[kind])} {kind} ({', '.join(f'{_name_in(fault):.60}' for fault in faults[kind][:2])}, …)"
        for kind in faults
        if kind and len(every) > 3 and faults[kind]
    ]
    counts = f": {'; '.join(told)}" if told else ""
    return UserError(f"{path} does not fit the model: {every[0]}{more}{counts}{hint}")


def _name_in(fault: str) -> str:
    return fault.partition(" is ")[0]


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
