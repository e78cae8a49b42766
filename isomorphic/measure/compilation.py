"""torch.compile before a measurement, so that what it takes, and what goes wrong with it, stays out of the figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from isomorphic.errors import UserError, first_line
from isomorphic.inputs import Inputs, call, device_of
from isomorphic.measure.first_image import first_image
from isomorphic.torch_versions import apart_from_others


def compile_model(
    model: nn.Module, image: Inputs, batch_sizes: Iterable[int], *, amp_dtype: torch.dtype | None = None
) -> nn.Module:
    """`model` under torch.compile, compiled here and now for inference on batches of these sizes.

    Other sizes are compiled when they come.

    Args:
        model: in eval mode; shares its weights with what is returned.
        image: one input, shape (1, C, H, W) or whatever the model takes, on the device and in the memory format of
            those to come.
        batch_sizes: how many of them at once.
        amp_dtype: the type of the autocast that the forward will run under; None for none.

    Raises:
        UserError: it cannot be compiled here; a CPU needs a C++ compiler for it, a GPU needs Triton.
    """
    compiled: Any = torch.compile(model)  # a module, whatever its annotation says
    batches = [first_image(image, copies=size) for size in sorted(set(batch_sizes), reverse=True)]
    _run_all(compiled, batches, amp_dtype)  # copies keep the memory format
    return compiled


def compile_for(model: nn.Module, batch: Inputs, *, amp_dtype: torch.dtype | None = None) -> nn.Module:
    """`model` compiled here and now for inference on this batch alone, and apart from all other models.

    Under `compile_model`, the second size of batch of a class of models is compiled for any size, and after eight sizes
    and models of it torch goes back to eager without an error.

    Args:
        model, amp_dtype: as for `compile_model`.
        batch: what the model takes.

    Raises:
        UserError: as `compile_model`.
    """
    compiler: Any = torch.compile
    compiled = compiler(model, dynamic=False, **apart_from_others())
    _run_all(compiled, [batch], amp_dtype)
    return compiled


def _run_all(compiled: nn.Module, batches: Iterable[Inputs], amp_dtype: torch.dtype | None) -> None:
    try:
        for batch in batches:
            device = device_of(batch).type
            with torch.no_grad(), torch.autocast(device, dtype=amp_dtype, enabled=amp_dtype is not None):
                call(compiled, batch)
    except RuntimeError as error:  # so are all that dynamo and inductor raise
        cause = getattr(error, "inner_exception", error)  # what the backend raised, where it was the backend
        raise UserError(f"--compile does not work here: {first_line(cause)}; leave it out") from error
