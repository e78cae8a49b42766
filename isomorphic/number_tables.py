"""Numbers that a module keeps in a mapping: `self.sizes = {"heads": 8}`, and the layers of einops.

`Rearrange("b n (h d) -> b h n d", h=8)` keeps its numbers as `axes_lengths = {"h": 8}`, and reads the pairs that its
constructor made of them, `_axes_lengths = (("h", 8),)`. Whoever gives such a layer other numbers has to change both.
"""

from __future__ import annotations

from typing import Any


def set_number_table(module: Any, name: str, table: dict[Any, Any]) -> None:
    """Gives a module another mapping in the place of `name`; the pairs that einops made of the old one follow."""
    setattr(module, name, table)
    if name == "axes_lengths" and "_axes_lengths" in vars(module):
        module._axes_lengths = tuple(table.items())
