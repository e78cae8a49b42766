"""Records of widths after a cut: integers that no forward code reads, and that follow the layers which read the rest.

before: num_features 960, of conv_head (960 -> 1280)      after: conv_head (676 -> 896), so num_features 676
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from isomorphic.pruning.expressions import Attribute
from isomorphic.pruning.groups import WidthRecord

# Names under which torch's layers keep how many channels they read.
_INPUTS = ("in_features", "in_channels", "num_features", "num_channels")


def input_width(layer: Any) -> int:
    """Returns how many channels a layer reads: 16 of Linear(16, 8), of Conv2d(16, 8, 3) and of LayerNorm(16)."""
    known = (getattr(layer, name, None) for name in _INPUTS)
    return next((width for width in known if isinstance(width, int)), layer.weight.shape[-1])


def layer_widths(records: Sequence[WidthRecord], modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Returns how many channels each layer reads that a record follows, by the layer's name."""
    return {name: input_width(modules[name]) for record in records for name in record.layers}


def followed(
    records: Sequence[WidthRecord], dense: Mapping[Attribute, int], before: Mapping[str, int], after: Mapping[str, int]
) -> Iterator[tuple[Attribute, int]]:
    """Yields the new value of each record, in proportion to the layers that it follows.

    Where pooling gives each channel twice, as averages and as maxima, the layer reads twice as many as the record says.

    Args:
        dense: values of the records before the cut.
        before, after: widths of layers as `layer_widths` returns them.
    """
    for record in records:
        old, new = (sum(widths[name] for name in record.layers) for widths in (before, after))
        yield record.attribute, dense[record.attribute] * new // old
