"""Stochastic depth: the schedule of drop-path rates over a model's blocks, and over those that are left of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from isomorphic.kinds import kind_names

# Where the libraries keep the rate, by the class that has it.
_RATE = {"timm.layers.drop.DropPath": "drop_prob", "torchvision.ops.stochastic_depth.StochasticDepth": "p"}


def drop_path_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a drop-path schedule runs over, in order; the first, of rate zero, may have no module for it."""
    lists = [module for module in model.modules() if isinstance(module, (nn.Sequential, nn.ModuleList))]
    with_rates = [one for one in lists if any(_rates(child) for child in one)]
    inner = [one for one in with_rates if not any(other in set(one.modules()) - {one} for other in with_rates)]
    kinds = {type(child) for one in inner for child in one}  # a list of one block of rate zero has none to show
    return [child for one in lists for child in one if type(child) in kinds]


def is_drop_path(module: nn.Module) -> bool:
    """Whether a module skips the branch that it ends."""
    return _rate_attribute(module) is not None


def scale_drop_path(model: nn.Module, rate: float) -> None:
    """Keeps the schedule of a model's drop-path rates and makes `rate` the highest; where all are 0, they stay 0."""
    highest = max(_rates(model), default=0.0)
    for module in model.modules():
        if highest and (attribute := _rate_attribute(module)):
            setattr(module, attribute, float(getattr(module, attribute)) / highest * rate)


def space_drop_path(blocks: Sequence[nn.Module], kept: Sequence[nn.Module]) -> None:
    """Gives the `kept` of `blocks` the rates of the same schedule over fewer blocks.

    A linear schedule from 0 to r over n blocks becomes the one from 0 to r that a builder gives a model of that depth.
    Any other is interpolated, and keeps the rate of its last block, which EfficientNet's builders let depend on the
    depth. Blocks without drop path have no say in it, but for the first, whose rate is 0 then.
    """
    if not blocks:
        return
    known = {0: 0.0} | {position: rates[0] for position, block in enumerate(blocks) if (rates := _rates(block))}
    places = np.linspace(0, 1, len(blocks))[list(known)]
    spaced = np.interp(np.linspace(0, 1, len(kept)), places, list(known.values()))
    for block, rate in zip(kept, spaced.tolist(), strict=True):
        for module in block.modules():
            if attribute := _rate_attribute(module):
                setattr(module, attribute, rate)


def _rates(block: nn.Module) -> list[float]:
    found = ((module, _rate_attribute(module)) for module in block.modules())
    return [float(getattr(module, attribute)) for module, attribute in found if attribute]


def _rate_attribute(module: nn.Module) -> str | None:
    return _RATE.get(next(kind_names(type(module))))  # of its very class: a subclass may do something else
