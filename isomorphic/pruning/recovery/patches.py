"""The numbers that a layer multiplies its weights by, position by position: as many of them as are wanted.

A 3 × 3 convolution over maps (N, 96, 112, 112) multiplies 864 numbers at each of 12,544 positions of an image. All of
them are nine times the maps. The sum over all positions needs nine shifted views of them and no copy; and least squares
look at some positions only, whose numbers are gathered by their places:

    map of 4 × 4, kernel 2 × 2, stride 1: 3 × 3 positions. Position 4 is row 1, column 1, and begins at place
    1·4 + 1 = 5 of the flat map; its four numbers are at the places 5 + (0, 1, 4, 5) = 5, 6, 9, 10.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.kinds import is_kind

Layer = nn.Linear | nn.Conv2d


class Patches:
    """What `layer` multiplies the weights of one output by, on some inputs.

    Args:
        layer: a linear, or a convolution of any padding and any number of groups.
        inputs: what it reads: (images, …, channels) of a linear, (images, channels, height, width) of a convolution.

    Attributes:
        num_positions: of one image, at which the layer makes outputs.
    """

    def __init__(self, layer: Layer, inputs: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            tokens = inputs.reshape(len(inputs), -1, inputs.shape[-1])  # a 1 × 1 convolution over a row of tokens
            self._maps, self._kernel, self._stride, self._dilation = tokens.mT[:, :, None], (1, 1), (1, 1), (1, 1)
        else:
            self._maps = _padded(layer, inputs)
            self._kernel, self._stride, self._dilation = layer.kernel_size, layer.stride, layer.dilation
        height, width = (
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation in zip(
                self._maps.shape[2:], self._kernel, self._stride, self._dilation, strict=True
            )
        )
        self._size = height, width
        self.num_positions = height * width

    @classmethod
    def of_outputs(cls, layer: Layer, outputs: Tensor) -> Patches:
        """The same of what a layer makes: its outputs at each position."""
        width = outputs.shape[-1 if isinstance(layer, nn.Linear) else 1]
        single = nn.Linear if isinstance(layer, nn.Linear) else partial(nn.Conv2d, kernel_size=1)
        return cls(single(width, 1, device="meta"), outputs)

    def total(self) -> Tensor:
        """Returns the sum over all images and positions, float64: (channels · kernel numbers,), as a weight's order."""
        (height, width), (down, right) = self._size, self._stride
        sums = []
        for top, left in self._offsets():
            maps = self._maps[:, :, top : top + down * (height - 1) + 1 : down]
            maps = maps[..., left : left + right * (width - 1) + 1 : right]
            sums.append(maps.sum((2, 3), dtype=torch.promote_types(maps.dtype, torch.float32)).double().sum(0))
        return torch.stack(sums, dim=1).flatten()

    def at(self, positions: Tensor) -> Tensor:
        """Returns the numbers at `positions` (images, wanted), int64: (images, wanted, channels · kernel numbers)."""
        if self._kernel == (1, 1):
            rows = self._maps[:, :, :: self._stride[0], :: self._stride[1]].flatten(2).mT
            images = torch.arange(len(rows), device=rows.device)
            return rows if positions.shape[1] == self.num_positions else rows[images[:, None], positions]
        width = self._maps.shape[3]
        begins = positions // self._size[1] * self._stride[0] * width + positions % self._size[1] * self._stride[1]
        offsets = torch.tensor([top * width + left for top, left in self._offsets()], device=positions.device)
        places = (begins[:, :, None] + offsets).flatten(1)  # (images, wanted · kernel numbers)
        images, channels = self._maps.shape[:2]
        found = self._maps.flatten(2).gather(2, places[:, None].expand(images, channels, -1))
        return found.view(images, channels, positions.shape[1], -1).transpose(1, 2).flatten(2)

    def _offsets(self) -> Iterator[tuple[int, int]]:
        """Yields where the kernel's numbers are, from the patch's corner, row by row."""
        for row in range(self._kernel[0]):
            for column in range(self._kernel[1]):
                yield row * self._dilation[0], column * self._dilation[1]


def _padded(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    if is_kind(layer, "timm.layers.conv2d_same.Conv2dSame"):
        from timm.layers.padding import pad_same

        return pad_same(inputs, [*layer.kernel_size], [*layer.stride], [*layer.dilation])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padding = layer._reversed_padding_repeated_twice
    return F.pad(inputs, padding, mode=mode) if any(padding) else inputs
