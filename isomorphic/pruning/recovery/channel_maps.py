"""What a layer of a recovered model makes or reads, as a map from the dense layer's channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ChannelMap(NamedTuple):
    """`factor` (m, n) times the dense layer's channels, plus `offset` (m,); float64, on the CPU."""

    factor: Tensor
    offset: Tensor


def map_of_units(factor: Tensor, rows: Tensor, kept: Sequence[int], offset: Tensor | None = None) -> ChannelMap:
    """A mixture of units as a map of channels, in the order in which the cut leaves them.

    Args:
        factor: what takes the places of the kept units, of all units (m, n).
        rows: where the units lie among a layer's n channels (n,).
        kept: the units whose places stay, ascending: m of them.
        offset: in the order of the kept units (m,); None for nought.
    """
    offset = torch.zeros(len(factor), dtype=torch.float64) if offset is None else offset
    by_row = torch.argsort(rows[list(kept)])
    return ChannelMap(factor[by_row][:, torch.argsort(rows)], offset[by_row])
