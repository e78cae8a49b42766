"""Running a model on what it takes, and finding the tensors in what it takes and returns.

A model's inputs are a tensor, a tuple of positional arguments, or a mapping of keyword arguments:

    call(model, images)                                    model(images)
    call(model, (images, boxes))                           model(images, boxes)
    call(model, {"input_ids": ids, "use_cache": False})    model(input_ids=ids, use_cache=False)
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and the keyword arguments that `inputs` stand for."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Returns what `model` returns for `inputs`.

    The model gets tuples, lists and mappings of its own: a forward may write its results into the batch.
    """
    positional, keyword = arguments(map_tensors(inputs, lambda tensor: tensor))
    return model(*positional, **keyword)


def without_data(inputs: Inputs) -> Inputs:
    """Returns the inputs with every tensor on the meta device, for a model that has shapes but no data."""
    return map_tensors(inputs, lambda tensor: torch.empty_like(tensor, device="meta"))


def device_of(inputs: Inputs) -> torch.device:
    """Returns the device of the first tensor; the CPU where there is none."""
    return next((tensor.device for tensor in tensors_in(inputs)), torch.device("cpu"))


def move_to(values: Any, device: torch.device) -> Any:
    """Returns nested values with their tensors on `device`; the very same object where they are there already."""
    if all(tensor.device == device for tensor in tensors_in(values)):
        return values
    return map_tensors(values, lambda tensor: tensor.to(device, non_blocking=True))


def num_items(inputs: Inputs) -> int:
    """Returns the length of the first tensor that has one: how many items a batch has; 0 where there is none."""
    return next((len(tensor) for tensor in tensors_in(inputs) if tensor.dim()), 0)


def items_of(inputs: Inputs, part: slice | Tensor) -> Inputs:
    """Returns some items of a batch: the tensors that are as long as the first one are cut, all else goes along.

    `part` is a slice, the places of the items, or a mask over them.
    Of {"x": (8, 3), "cond": (8, 2), "scale": (5,)} and slice(0, 2): {"x": (2, 3), "cond": (2, 2), "scale": (5,)}.
    """
    length = num_items(inputs)
    return map_tensors(inputs, lambda tensor: tensor[part] if tensor.dim() and len(tensor) == length else tensor)


def told(inputs: Inputs) -> str:
    """Returns the first tensors as text: "float32 (8, 3, 32, 32) and int64 (8,)"."""
    return " and ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors_in(inputs)[:3])


def tensors_in(values: Any) -> list[Tensor]:
    """Returns the tensors in nested tuples, lists, mappings and objects, such as those that a model returns."""
    return [tensor for _, tensor in named_tensors(values, "")]


def floats_in(values: Any) -> list[Tensor]:
    """Returns the same, of floating-point numbers: what two models' outputs are compared by."""
    return [tensor for tensor in tensors_in(values) if tensor.is_floating_point()]


def named_tensors(values: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the same with their places: "output[0]['logits'].mean", where `name` is "output"."""
    if isinstance(values, Tensor):
        yield name, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from named_tensors(value, f"{name}[{key!r}]")
    elif isinstance(values, (tuple, list)):
        for position, value in enumerate(values):
            yield from named_tensors(value, f"{name}[{position}]")
    elif hasattr(values, "__dict__") and not isinstance(values, (nn.Module, type)) and not _is_program(values):
        for attribute, value in vars(values).items():
            yield from named_tensors(value, f"{name}.{attribute}")


def _is_program(value: Any) -> bool:
    """Says whether this is a traced graph of torch.fx, whose nodes hold each other, or one of them."""
    return type(value).__module__.startswith("torch.fx.")


def map_tensors(values: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Returns nested tuples, lists, mappings and dataclasses with `function` of each tensor, in `tensors_in`'s order.

    Containers keep their kind and whatever else they hold: a batch of a tokenizer, whose entries are attributes, too,
    still has these. A mapping that cannot be written to becomes a dict. Other objects are passed on as they are.
    """
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, Mapping):
        mapped = {key: map_tensors(value, function) for key, value in values.items()}
        if not isinstance(values, MutableMapping):
            return mapped
        changed = copy.copy(values)
        for key, value in mapped.items():
            changed[key] = value
        return changed
    if isinstance(values, (tuple, list)):
        items = [map_tensors(value, function) for value in values]
        return type(values)(*items) if hasattr(values, "_fields") else type(values)(items)
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        attributes = {name: map_tensors(value, function) for name, value in vars(values).items()}
        twin = copy.copy(values)
        vars(twin).update(attributes)
        return twin
    return values


@contextlib.contextmanager
def no_fast_path() -> Iterator[None]:
    """Inside, torch's transformer layers run operation by operation, as in training."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
