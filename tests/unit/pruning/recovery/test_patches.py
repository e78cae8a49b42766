"""Patches: times a layer's weights they are what it makes, at all positions and at some; their sum needs no copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from isomorphic.pruning.recovery.patches import Patches


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()


PATCHED: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear on vectors": (lambda: nn.Linear(6, 4), (6,)),
    "linear on tokens": (lambda: nn.Linear(6, 4, bias=False), (5, 6)),
    "linear on maps": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "1×1": (lambda: nn.Conv2d(6, 4, 1), (6, 5, 7)),
    "stride, padding and dilation of their own": (
        lambda: nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 3)),
        (6, 9, 10),
    ),
    "same": (lambda: nn.Conv2d(6, 4, (4, 3), padding="same", dilation=(1, 2)), (6, 7, 8)),  # more at the bottom
    "valid": (lambda: nn.Conv2d(6, 4, 3, padding="valid"), (6, 7, 8)),
    "reflect": (lambda: nn.Conv2d(6, 4, 3, padding=(2, 1), padding_mode="reflect"), (6, 7, 8)),
    "replicate": (lambda: nn.Conv2d(6, 4, 5, padding=(1, 2), stride=2, padding_mode="replicate"), (6, 7, 8)),
    "circular": (lambda: nn.Conv2d(6, 4, 3, padding=(1, 2), padding_mode="circular"), (6, 7, 8)),
    "reflect to the same size": (lambda: nn.Conv2d(6, 4, (4, 3), padding="same", padding_mode="reflect"), (6, 7, 8)),
    "as TensorFlow pads": (lambda: Conv2dSame(6, 4, 3, stride=2), (6, 8, 7)),  # more at the bottom, alike at the sides
    "as TensorFlow pads, dilated": (lambda: Conv2dSame(6, 4, (3, 2), stride=(2, 3), dilation=(2, 1)), (6, 8, 7)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (6, 7, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, (3, 2), stride=2, padding=1, groups=6), (6, 7, 8)),
}


def products(layer: Any, patches: Tensor) -> Tensor:
    """What the layer makes of patches (images, positions, numbers), group by group."""
    groups = getattr(layer, "groups", 1)
    weights = layer.weight.detach().flatten(1).view(groups, len(layer.weight) // groups, -1)
    made = torch.einsum("npgm,gom->npgo", patches.unflatten(-1, (groups, -1)), weights).flatten(2)
    return made if layer.bias is None else made + layer.bias.detach()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", PATCHED)
def test_patches_times_weights_are_what_a_layer_makes(name: str):
    build, shape = PATCHED[name]
    layer, x = build().double(), random(3, *shape)
    with torch.no_grad():
        made = layer(x) if isinstance(layer, nn.Linear) else layer(x).movedim(1, -1)
    made = made.reshape(3, -1, made.shape[-1])
    patches = Patches(layer, x)
    assert patches.num_positions == made.shape[1]
    everywhere = torch.arange(made.shape[1]).expand(3, -1)
    torch.testing.assert_close(products(layer, patches.at(everywhere)), made, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(patches.total(), patches.at(everywhere).sum((0, 1)), rtol=1e-10, atol=1e-10)
    some = torch.tensor([[0], [made.shape[1] - 1], [made.shape[1] // 2]])
    expected = made[torch.arange(3)[:, None], some]
    torch.testing.assert_close(products(layer, patches.at(some)), expected, rtol=1e-10, atol=1e-10)
