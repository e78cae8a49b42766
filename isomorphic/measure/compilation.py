"""torch.compile before a measurement, so that what it takes, and what goes wrong with it, stays out of the figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from isomorphic.errors import UserError, first_line
from isomorphic.inputs import Inputs, call, device_of
from isomorphic.measure.complexity import first_image


def compile_model(
    model: nn.Module,
    image: Inputs,
    batch_sizes: Iterable[int],
    *,
    amp_dtype: torch.dtype | None = None,
    fixed_sizes: bool = False,
) -> nn.Module:
    """`model` under torch.compile, compiled here and now for inference on batches of these sizes.

    Other sizes are compiled when they come.

    Args:
        model: in eval mode; shares its weights with what is returned.
        image: one input, shape (1, C, H, W) or whatever the model takes, on the device and in the memory format of
            those to come.
        batch_sizes: how many of them at once.
        amp_dtype: the type of the autocast that the forward will run under; None for none.
        fixed_sizes: compile each size for itself, and apart from all other models: without it, the second size of a
            class of models is compiled for any size, and after eight of them torch goes back to eager.

    Raises:
        UserError: it cannot be compiled here; a CPU needs a C++ compiler for it, a GPU needs Triton.
    """
    compiler: Any = torch.compile  # which returns a module for a module, whatever its annotation says
    compiled = compiler(model, dynamic=False, isolate_recompiles=True) if fixed_sizes else compiler(model)
    device = device_of(image)
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            for size in sorted(set(batch_sizes), reverse=True):
                call(compiled, first_image(image, copies=size))  # which keeps the memory format
    except RuntimeError as error:  # so are all that dynamo and inductor raise
        cause = getattr(error, "inner_exception", error)  # what the backend raised, where it was the backend
        raise UserError(f"--compile does not work here: {first_line(cause)}; leave it out") from error
    return compiled
