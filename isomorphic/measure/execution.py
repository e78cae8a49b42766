"""How a model is run where its latency is measured: precision, memory format, compiled or not, from a CUDA graph."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.errors import UserError, first_line
from isomorphic.inputs import Inputs, call, device_of, map_tensors
from isomorphic.measure.compilation import compile_for
from isomorphic.measure.first_image import first_image, is_batch

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = ("channels_last", "compile", "cuda_graph")
WARM_UP_RUNS_OF_A_GRAPH = 3  # as torch's documentation asks for, on a stream beside the main one


@dataclass(frozen=True)
class ExecutionMode:
    """A way to run a model.

    Attributes:
        amp_dtype: run under autocast in this type; None is the model's own precision.
        channels_last: weights and images in that memory format.
        compiled: as torch.compile makes it, for the one size of batch.
        cuda_graph: recorded once and replayed, which leaves out what Python and launching kernels take.
    """

    amp_dtype: torch.dtype | None = None
    channels_last: bool = False
    compiled: bool = False
    cuda_graph: bool = False

    def __str__(self) -> str:
        """`bf16+channels_last+compile`; `fp32` where it is the model as it stands."""
        precision = next(name for name, dtype in DTYPES.items() if dtype == self.amp_dtype)
        asked = (self.channels_last, self.compiled, self.cuda_graph)
        return "+".join([precision, *(form for form, wanted in zip(FORMS, asked, strict=True) if wanted)])

    def check(self, device: torch.device) -> None:
        """Raises a UserError for what this device does not have."""
        needs_cuda = {"fp16": self.amp_dtype is torch.float16, "cuda_graph": self.cuda_graph}
        for name, asked in needs_cuda.items():
            if asked and device.type != "cuda":
                raise UserError(f"{self} cannot be timed: {name} needs a CUDA device and this is {device}")


def parse_mode(text: str) -> ExecutionMode:
    """Reads `fp32`, `bf16+channels_last`, `compile`, `eager`: at most one precision, and any of the other words.

    Raises:
        UserError: it is no such thing.
    """
    words = text.split("+")
    known = [*DTYPES, "eager", *FORMS]
    unknown = [word for word in words if word not in known]
    if unknown:
        raise UserError(f"{unknown[0]!r} is no way to run a model: join {', '.join(known)} by +")
    precisions = [word for word in words if word in DTYPES]
    if len(precisions) > 1 or len(set(words)) < len(words) or {"eager", "compile"} <= set(words):
        raise UserError(f"{text!r} contradicts or repeats itself: one precision, eager or compile, each word once")
    return ExecutionMode(DTYPES[precisions[0]] if precisions else None, *(form in words for form in FORMS))


def batch_runner(model: nn.Module, inputs: Inputs, batch_size: int, mode: ExecutionMode) -> Callable[[], Any]:
    """Returns what runs the model on one batch; a CUDA graph is not captured yet.

    Args:
        model: in eval mode; it is left as it is: another memory format is that of a copy.
        inputs: what the model takes; a batch holds its first item `batch_size` times. What is no batch (see `is_batch`)
            is taken as it is given.
        batch_size: items of the batch.
        mode: how to run it; its autocast is the caller's, and has to enclose this call and the runs.

    Raises:
        UserError: it cannot be compiled here; several at once are asked for, of inputs that are no batch.
    """
    batch = _batch(model, inputs, batch_size)
    if mode.channels_last:
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        batch = map_tensors(batch, _channels_last)
    if mode.compiled:
        model = compile_for(model, batch, amp_dtype=mode.amp_dtype)
    return functools.partial(call, model, batch)


def captured(run: Callable[[], Any], inputs: Inputs) -> Callable[[], Any]:
    """Returns what replays `run` as a CUDA graph; `inputs` are on the device.

    Raises:
        UserError: the model does what a graph cannot hold, such as copying a number to the host.
    """
    device = device_of(inputs)
    try:
        with torch.cuda.device(device):
            beside = torch.cuda.Stream(device)
            beside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(beside):
                for _ in range(WARM_UP_RUNS_OF_A_GRAPH):
                    run()
            torch.cuda.current_stream(device).wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
    except RuntimeError as error:
        raise UserError(f"a CUDA graph does not hold this model: {first_line(error)}; leave out cuda_graph") from error
    return graph.replay


def _batch(model: nn.Module, inputs: Inputs, batch_size: int) -> Inputs:
    if is_batch(model, inputs):
        return first_image(inputs, copies=batch_size)
    if batch_size > 1:
        raise UserError(
            f"there is no batch of {batch_size} for a latency: the model does not run on the first item of its inputs "
            "alone. Measure batch 1, the inputs as they are given, or give larger ones"
        )
    return inputs


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
