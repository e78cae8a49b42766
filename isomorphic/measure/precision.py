"""Bfloat16 autocast where it pays and says the same as full precision: what commands do unless told otherwise.

Whether it pays is for the processor to say, not for a stopwatch: the same command does the same on the same machine.
It has to multiply bfloat16 in hardware, and the work has to be worth a check. The first `FULL_FIRST` MACs of forward
passes run in full precision, which is all of a small run. Then one batch runs both ways, and the rest in bfloat16 if
both agree.

Worked example: an image is 17.6 G MACs of DeiT-B's, and 50 batches of 64 images are 56 T. The first batch, 1.1 T, runs
in full precision, the second one both ways, and 49 in bfloat16. A thousand handwritten digits, 5 G, never come to a
check.

Convolutions pay in bfloat16 only in the layout that their kernels want, `channels_last`: on two cores of a CPU with
AMX, side by side, a ResNet-50 is evaluated 1.1 and in that layout 2.0 times as fast as in full precision, and scored
2.4 and 4.3 times as fast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from isomorphic import torch_versions
from isomorphic.errors import first_line
from isomorphic.progress import stage

T = TypeVar("T")

AUTO: Literal["auto"] = "auto"  # how options of Python name `Auto`
FULL_FIRST = 1e12  # MACs; two cores take a quarter of a minute for them, and three times as long with backward passes


@dataclass(frozen=True)
class Auto:
    """The wish for bfloat16 where it pays and agrees; `macs` are those of one image's forward pass."""

    macs: int


Precision = torch.dtype | None | Auto  # a dtype of autocast, the model's own precision, or whichever is better


@dataclass(frozen=True)
class Agreement:
    """Whether a batch in bfloat16 says the same as in full precision, and how well, in words."""

    good: bool
    told: str


class Autocast:
    """How the next batch is to run: `dtype` is that of its autocast, None for the model's own precision.

    Args:
        wanted: a dtype, or None, for all batches, or `Auto`.
        device: where the model runs.
        doing: what for, as a stage is named: "scoring".
    """

    def __init__(self, wanted: Precision, device: torch.device, doing: str) -> None:
        self.dtype = None if isinstance(wanted, Auto) else wanted
        self.device, self._doing = device, doing
        self._macs = wanted.macs if isinstance(wanted, Auto) and is_fast_in_bf16(device) else 0
        self._done = 0

    def before(self, images: int, compare: Callable[[], Agreement]) -> None:
        """To be called before each batch, of so many images; compares once, when it is due."""
        if not self._macs:
            return
        if self._done < FULL_FIRST:
            self._done += images * self._macs
            return
        self._macs = 0  # no second comparison
        found = _tried(compare)
        if found.good:
            self.dtype = torch.bfloat16
        stage(f"{self._doing} in {'bf16' if found.good else 'fp32'}: {found.told}")

    def __call__(self) -> torch.autocast:
        """Returns the context to run the batch's forward pass in."""
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def both_ways(self, run: Callable[[], T]) -> tuple[T, T]:
        """Returns what a run gives in full precision, and what it gives in bfloat16, for a comparison."""
        before = self.dtype
        found = []
        try:
            for self.dtype in (None, torch.bfloat16):
                found.append(run())
        finally:
            self.dtype = before
        return found[0], found[1]


def _tried(compare: Callable[[], Agreement]) -> Agreement:
    try:
        return compare()
    except Exception as error:  # whatever forward code and losses of the user's own raise where numbers are bfloat16
        return Agreement(False, f"in bf16 it fails ({first_line(error)})")


def is_fast_in_bf16(device: torch.device) -> bool:
    """Returns True if matrices of bfloat16 are multiplied in hardware there, and not by widening them first."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch_versions.cpu_multiplies_bf16()


@contextlib.contextmanager
def laid_out_for_convolutions(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Inside, if `wanted`, weights of convolutions lie in memory as their fast kernels want them, with the same values.

    What a convolution with such weights returns is laid out like them, so images need not be.
    """
    as_they_were = {p: p.data for p in model.parameters() if wanted and p.dim() == 4}
    for parameter, values in as_they_were.items():
        parameter.data = values.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for parameter, values in as_they_were.items():
            parameter.data = values


class _Fp32Convolution(nn.Conv2d):
    """A convolution that computes in fp32 even under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def keep_depthwise_in_fp32(model: nn.Module, amp_dtype: torch.dtype | None, device: torch.device) -> list[nn.Conv2d]:
    """Excludes depthwise convolutions from autocast, in place, if the device is a CPU; returns those.

    oneDNN's gradient of their weights takes three times as long in bf16 as in fp32: without autocast there, a
    ConvNeXt-Tiny step is 1.3 times faster. Names and types of parameters stay.
    """
    if amp_dtype is None or device.type != "cpu":
        return []
    found = [m for m in model.modules() if type(m) is nn.Conv2d and m.groups == m.in_channels > 1]
    for module in found:
        module.__class__ = _Fp32Convolution
    return found


@contextlib.contextmanager
def fast_gradients(model: nn.Module, amp_dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Inside, forward and backward passes under autocast run on the kernels that are fast; nothing in fp32."""
    with laid_out_for_convolutions(model, wanted=amp_dtype is not None):
        depthwise = keep_depthwise_in_fp32(model, amp_dtype, device)
        try:
            yield
        finally:
            for module in depthwise:
                module.__class__ = nn.Conv2d
