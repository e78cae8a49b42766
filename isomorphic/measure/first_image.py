"""One image of a batch: what costs and latencies are of.

Of inputs that are a batch, every tensor as long as the first one is cut to its first item. Not all inputs are one. Of a
graph with 24 nodes and 80 edges, x (24, 8) and edge_index (2, 80), the first row is a node without the others that its
edges name, and no model runs on it. So the rule is: inputs are a batch if the model runs on their first item alone.
What is no batch is counted and timed as it is given, and results say so (`Complexity.as_given`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call, device_of, map_tensors, move_to, tensors_in
from isomorphic.models import REFUSALS
from isomorphic.observe import eval_mode


def is_batch(model: nn.Module, inputs: Inputs) -> bool:
    """Says whether dim 0 of the inputs is a batch: the model runs on their first item alone.

    It is tried, in one forward pass in eval mode, unless there is one item. Without data (on the meta device) only
    shapes can tell: an index that is out of range goes unnoticed there.

    Args:
        model: on the device of the inputs.
        inputs: what it takes.
    """
    if _num_items(inputs) < 2:
        return True
    if device_of(inputs).type == "cuda" and _has_numbers(inputs):
        model, inputs = copy.deepcopy(model).cpu(), move_to(inputs, torch.device("cpu"))
    try:
        with eval_mode(model), torch.no_grad():
            call(model, first_image(inputs))
    except REFUSALS:
        return False
    return True


def _num_items(inputs: Inputs) -> int:
    images = list_of_first_tensor(inputs)
    if images is not None:
        return len(images)
    first = next(iter(tensors_in(inputs)), None)
    return 0 if first is None or not first.dim() else len(first)


def _has_numbers(inputs: Inputs) -> bool:
    """Says whether some integers stay when the others are cut, as a graph's edges do.

    They may be out of range then, which ends everything that a process does on a GPU. A CPU raises an error.
    """
    tensors = [tensor for tensor in tensors_in(inputs) if tensor.dim() and not tensor.is_floating_point()]
    return any(len(tensor) != _num_items(inputs) for tensor in tensors)


def one_item(model: nn.Module, inputs: Inputs) -> Inputs:
    """Returns the first item of inputs that are a batch, see `is_batch`; others as they are."""
    return first_image(inputs) if is_batch(model, inputs) else inputs


def first_image(example_inputs: Inputs, copies: int = 1) -> Inputs:
    """Returns the inputs with every tensor that has the first one's batch size cut to its first item.

    Where the first tensor lies in a list, as the images (3, H, W) of a detector do, the list is the batch: it, and each
    list as long, such as one of targets, is cut to its first entry.

    Args:
        example_inputs: what a model takes.
        copies: how often the item is repeated: the batch size of what is returned.
    """
    images = list_of_first_tensor(example_inputs)
    if images is not None:
        return _first_of_lists(example_inputs, len(images), copies)
    batch_sizes = [tensor.shape[:1] for tensor in tensors_in(example_inputs)]

    def cut(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[:1] != batch_sizes[0]:
            return tensor
        return tensor[:1] if copies == 1 else torch.cat([tensor[:1]] * copies)

    return map_tensors(example_inputs, cut)


def list_of_first_tensor(values: Any) -> list[Any] | None:
    """The list that the first of some nested tensors lies in, if it is in one."""
    if isinstance(values, list):
        return values
    items = values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple) else ()
    first = next((item for item in items if tensors_in(item)), None)
    return None if first is None else list_of_first_tensor(first)


def _first_of_lists(values: Any, length: int, copies: int) -> Any:
    if isinstance(values, list) and len(values) == length:
        return values[:1] * copies
    if isinstance(values, Mapping):
        return {key: _first_of_lists(value, length, copies) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_first_of_lists(value, length, copies) for value in values)
    return values
