"""What a model answers to a few batches, and how far an exported one is from that."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.errors import UserError, first_line
from isomorphic.inputs import Inputs, call, map_tensors, named_tensors, tensors_in
from isomorphic.measure.first_image import list_of_first_tensor
from isomorphic.models import REFUSALS
from isomorphic.plain_tensors import named_plain_tensors

BATCH_SIZES = (1, 3)
# The largest differences that pass, each as a share of the largest absolute value of the output that it is in.
BOUND, HALF_BOUND = 1e-4, 2e-2


@dataclass(frozen=True)
class Answer:
    """What the original model answers to one batch.

    Attributes:
        inputs: the batch.
        size: how many items it has.
        outputs: the tensors of the answer in order, by their places: "output", "output[0]", "output['logits']".
    """

    inputs: Inputs
    size: int
    outputs: Sequence[tuple[str, Tensor]]


@dataclass(frozen=True)
class Difference:
    """How far an output of an exported model is from the original's: max |exported − original| / max |original|.

    Both maxima are over one tensor and one batch; where the original's is zero, the difference is as it is.
    """

    value: float = 0.0
    output: str = ""
    batch_size: int = 0


def independent_copy(model: nn.Module) -> nn.Module:
    """Returns a copy on the CPU, in eval mode, so that nothing that an exporter does reaches the model.

    Raises:
        UserError: something in the model cannot be copied.
    """
    computed = [tensor for tensor in tensors_in([vars(module) for module in model.modules()]) if not tensor.is_leaf]
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in computed}  # which torch does not copy
    try:
        twin = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"the model cannot be copied: {first_line(error)}") from error
    for name, tensor in list(named_plain_tensors(twin)):  # which Module.cpu leaves behind
        prefix, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(prefix), leaf, tensor.cpu())
    return twin.cpu().eval()


def precision_of(model: nn.Module) -> torch.dtype:
    """Returns the coarsest floating type among the model's parameters and buffers; float32 where there are none."""
    dtypes = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def bound_of(dtype: torch.dtype) -> float:
    """Returns the largest difference that passes for a model of this precision."""
    return HALF_BOUND if torch.finfo(dtype).bits <= 16 else BOUND


def make_batch(inputs: Inputs, size: int) -> Inputs:
    """Returns the inputs with `size` different items; dim 0 of the first tensor, and of those as long, is the batch.

    Items beyond those that `inputs` has are its own with values in other places: rolled along the last dim.

        [[1, 2, 3]], size 3  ->  [[1, 2, 3], [3, 1, 2], [2, 3, 1]]

    Inputs without a batch, or in a list, are returned as they are.
    """
    length = batch_length(inputs)
    if length is None:
        return inputs

    def resize(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != length:
            return tensor
        items = []
        for index in range(size):
            item = tensor[index % length].unsqueeze(0)
            items.append(item.roll(index // length, dims=-1) if tensor.dim() > 1 else item)
        return torch.cat(items)

    return map_tensors(inputs, resize)


def batch_length(inputs: Inputs) -> int | None:
    """Returns how many items the inputs hold: the first tensor's length; None where it has none, or lies in a list."""
    if list_of_first_tensor(inputs) is not None:
        return None
    first = next(iter(tensors_in(inputs)), None)
    return None if first is None or not first.dim() else len(first)


@torch.no_grad()
def ask(model: nn.Module, inputs: Inputs, size: int | None) -> Answer:
    """Runs the original model, in eval mode, on one batch, twice.

    Args:
        model: on the device of the inputs.
        inputs: what it takes.
        size: how many items the batch has; None takes the inputs as they are.

    Raises:
        UserError: it does not take the inputs, returns no tensor, or answers differently the second time.
    """
    if size is None:
        images = list_of_first_tensor(inputs)
        size = len(images) if images is not None else batch_length(inputs) or 1
    else:
        inputs = make_batch(inputs, size)
    try:
        first, second = (call(model, map_tensors(inputs, torch.clone)) for _ in range(2))  # some change their inputs
    except REFUSALS as error:
        raise UserError(f"the model does not take these inputs (batch of {size}): {first_line(error)}") from error
    outputs = [(name, tensor.detach().clone()) for name, tensor in named_tensors(first, "output")]
    if not outputs:
        raise UserError(f"the model returns {type(first).__name__}, in which there is no tensor to compare")
    answer = Answer(inputs, size, outputs)
    if difference(answer, tensors_in(second)).value > BOUND:
        raise UserError("the model answers differently each time it is run: seed or switch off what is random in it")
    return answer


def difference(answer: Answer, outputs: Sequence[Tensor]) -> Difference:
    """Returns the largest difference of all outputs to one batch.

    Raises:
        UserError: outputs are missing, have another shape, or other elements that are infinite or not a number.
    """
    if len(outputs) != len(answer.outputs):
        raise UserError(f"the original returns {len(answer.outputs)} tensors and the exported model {len(outputs)}")
    largest = Difference(batch_size=answer.size)
    for (name, original), written in zip(answer.outputs, outputs, strict=True):
        expected, given = _real(original), _real(written)
        if given.shape != expected.shape:
            shapes = f"{tuple(expected.shape)} in the original and {tuple(given.shape)} in the exported model"
            raise UserError(f"{name} of a batch of {answer.size} has shape {shapes}: its forward looks at the batch")
        value = _relative(expected, given)
        if not value <= largest.value:
            largest = Difference(value, name, answer.size)
    return largest


def _real(tensor: Tensor) -> Tensor:
    """Returns a tensor in double precision; of complex numbers (…) their two parts (…, 2), as ONNX has them."""
    tensor = tensor.detach().cpu()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def _relative(expected: Tensor, given: Tensor) -> float:
    """Returns max |given − expected| / max |expected|; infinite where other elements are infinite or not a number."""
    finite = expected.isfinite()
    same_rest = torch.equal(finite, given.isfinite()) and torch.equal(
        expected[~finite].nan_to_num(nan=0.5), given[~finite].nan_to_num(nan=0.5)
    )
    if not same_rest:
        return float("inf")
    expected, given = expected[finite], given[finite]
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().item()
    return ((given - expected).abs().max() / (scale or 1.0)).item()
