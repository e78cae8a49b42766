"""How well the widths of a model's layers fit what a machine computes at a time.

A CPU with AVX-512 multiplies 16 numbers of float32 at once: a layer of 98 channels takes what one of 112 takes, or
runs in slower code for what does not fit. A GPU's tensor cores want rows of whole 16 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs
from isomorphic.measure.charges import charges

VECTOR_BYTES = {"AVX512": 64, "AVX2": 32}  # of a CPU, by the name that torch has for what it can do
OTHER_VECTOR_BYTES = 16  # NEON, SSE; and what tensor cores ask for
BADLY_ALIGNED = 0.25  # of the MACs


def vector_width(device: torch.device, dtype: torch.dtype = torch.float32) -> int:
    """Returns how many numbers of a type the device computes at a time: widths had better be multiples of it."""
    capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
    return VECTOR_BYTES.get(capability, OTHER_VECTOR_BYTES) // dtype.itemsize


def misaligned_share(model: nn.Module, inputs: Inputs, multiple: int) -> float:
    """Returns the share of the layers' MACs that is in layers whose widths are no multiples of `multiple`.

    Args:
        model: on the device of `inputs`.
        inputs: what it takes, see `count_complexity`.
        multiple: see `vector_width`.
    """
    total = misaligned = 0.0
    for charge in charges(model, inputs, "macs_exact", makers=()):
        matrices = [parameter for parameter in charge.parameters if parameter.dim() > 1]
        if matrices:
            total += charge.amount
            misaligned += charge.amount * any(_is_misaligned(matrix, multiple) for matrix in matrices)
    return misaligned / total if total else 0.0


def _is_misaligned(weight: Tensor, multiple: int) -> bool:
    """Of (outputs, inputs, …); a depthwise filter has (channels, 1, …)."""
    outputs, inputs = weight.shape[:2]
    return outputs % multiple != 0 or (inputs > 1 and inputs % multiple != 0)
