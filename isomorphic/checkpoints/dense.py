"""The dense model that a user builds for a checkpoint: held against the one that was cut, shaped and filled.

A model that is refused is left exactly as it was.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from isomorphic.checkpoints.structure import is_vacant, named_tensors, restore_structure, set_tensor, tensor_shapes
from isomorphic.checkpoints.tensors import load_tensors
from isomorphic.errors import UserError, first_line
from isomorphic.models import keep_blocks

LARGEST_SIZE, MOST_DIMS = 2**48, 64  # no tensor has more

Shapes = dict[str, list[int]]


def parse_dense(header: Mapping[str, Any], path: str | Path) -> Shapes:
    """Returns the names and shapes of the dense model's tensors, as a checkpoint's header has them.

    Raises:
        UserError: there are none, or something else stands in their place.
    """
    shapes = header.get("dense")
    if not isinstance(shapes, dict):
        raise UserError(f"{path} has a damaged header: it does not say which dense model it was cut from")
    for name, shape in shapes.items():
        if not _is_shape(shape):
            raise UserError(f"{path} has a damaged header: it has no shape for the dense model's {name!r:.80}")
    return shapes


def check_dense(model: nn.Module, expected: Shapes, path: str | Path) -> None:
    """Holds the dense model that a user has built against the one that a checkpoint was written with.

    A buffer that is outside the state dict and still empty is a cache, which the first forward pass would make.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape; the message names the first.
    """
    found = tensor_shapes(model)
    faults = [
        f"it has no {name:.80}" for name in expected if name not in found and not is_vacant(model, name, cache=True)
    ]
    faults += [f"it has {name:.80}, which the checkpoint's has not" for name in found if name not in expected]
    for name, shape in found.items():
        if expected.get(name, shape) != shape:
            faults.append(f"{name:.80} is {tuple(shape)}, not {tuple(expected[name])!s:.80}")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"model= is not the dense model that {path} was cut from: {faults[0]}{more}")


def check_built(model: Any) -> None:
    """Raises a UserError for what is no model, or one that is compiled, or whose layers have no shapes yet."""
    if isinstance(model, type):
        raise UserError(f"model= is a class, {model.__name__}: give the dense model itself, {model.__name__}(…)")
    if not isinstance(model, nn.Module):
        raise UserError(f"model= is a {type(model).__name__}, not a torch.nn.Module: give the dense model itself")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UserError("model= is a ScriptModule, whose code is compiled: give the dense model that it was made from")
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise UserError(f"{lazy[0]} of model= is lazy and has no shape yet: run the dense model once before")


def fill_dense(
    model: nn.Module,
    kept_blocks: Mapping[str, Sequence[int]],
    structure: Any,
    tensors: dict[str, torch.Tensor],
    path: str | Path,
) -> None:
    """Makes the dense `model` the one of a checkpoint, in place and in eval mode.

    Floating-point numbers get the file's precision; what the file does not hold keeps the model's. Tensors stay on the
    model's device, and on the CPU where that is the meta device.

    Raises:
        UserError: the structure or the tensors do not fit.
    """
    try:
        keep_blocks(model, kept_blocks)
        restore_structure(model, structure, tensors)
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not fit the dense model: {first_line(error):.300}") from error
    _make_room(model, tensors, path)
    load_tensors(model, tensors, path)
    model.eval()


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Makes a model what it was if anything is raised inside: tensors, modules, attributes and modes.

    Data are not copied but kept by reference: inside, a tensor may be given other memory, and only that be written to.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    containers = [
        (value, type(value)(value))
        for _, values in attributes
        for value in values.values()
        if type(value) in (dict, list, set, OrderedDict)
    ]
    data = [(tensor, tensor.data) for tensor in [*model.parameters(), *model.buffers()]]
    try:
        yield
    except BaseException:
        for module, values in attributes:
            vars(module).clear()
            vars(module).update(values)
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for tensor, before in data:
            tensor.data = before
        raise


def _is_shape(shape: Any) -> bool:
    if not isinstance(shape, list) or len(shape) > MOST_DIMS:
        return False
    return all(type(size) is int and 0 <= size <= LARGEST_SIZE for size in shape)


def _make_room(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Gives all tensors that the file holds other memory, of the file's precision; on the meta device they get some."""
    places = named_tensors(model)
    stored = {id(place): tensors[name] for name, place in places if name in tensors}
    made: dict[int, torch.Tensor] = {}  # a tied parameter stays tied
    for name in _without_data(model):
        if name not in tensors:
            raise UserError(f"{path} does not hold {name}, which model= has on the meta device: build it with data")
    for name, place in places:
        if id(place) not in stored:
            continue
        if id(place) not in made:
            made[id(place)] = _with_other_memory(place, stored[id(place)].dtype)
        if place.is_meta:
            set_tensor(model, name, made[id(place)])


def _without_data(model: nn.Module) -> Iterator[str]:
    """Yields the names of tensors on the meta device, plain attributes included, each tensor once."""
    yield from (name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta)
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                yield f"{prefix}.{key}" if prefix else key


@torch.no_grad()
def _with_other_memory(place: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the tensor itself; or another one for it, since none can leave the meta device."""
    dtype = dtype if place.is_floating_point() and dtype.is_floating_point else place.dtype
    empty = torch.empty_like(place, dtype=dtype, device="cpu" if place.is_meta else place.device)
    if not place.is_meta:
        place.data = empty
        return place
    return nn.Parameter(empty, place.requires_grad) if isinstance(place, nn.Parameter) else empty
