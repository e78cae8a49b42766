"""torch.compile before a measurement, so that what it takes, and what goes wrong with it, stays out of the figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.errors import UserError, first_line


def compile_model(
    model: nn.Module, image: Tensor, batch_sizes: Iterable[int], *, amp_dtype: torch.dtype | None = None
) -> nn.Module:
    """`model` under torch.compile, compiled here and now for inference on batches of these sizes.

    Other sizes are compiled when they come.

    Args:
        model: in eval mode; shares its weights with what is returned.
        image: one input, shape (1, C, H, W), on the device and in the memory format of those to come.
        batch_sizes: how many of them at once.
        amp_dtype: the type of the autocast that the forward will run under; None for none.

    Raises:
        UserError: it cannot be compiled here; a CPU needs a C++ compiler for it, a GPU needs Triton.
    """
    compiled: Any = torch.compile(model)  # a module, whatever its annotation says
    try:
        with torch.no_grad(), torch.autocast(image.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            for size in sorted(set(batch_sizes), reverse=True):
                compiled(torch.cat([image] * size))  # which keeps the memory format
    except RuntimeError as error:  # so are all that dynamo and inductor raise
        cause = getattr(error, "inner_exception", error)  # what the backend raised, where it was the backend
        raise UserError(f"--compile does not work here: {first_line(cause)}; leave it out") from error
    return compiled
