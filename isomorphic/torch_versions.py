"""What is newer than the oldest torch that the project runs with (`constraints-oldest.txt`), and what is done there.

Nothing else in the project asks for a version.
"""

from __future__ import annotations

from typing import Any

import torch


def known_overloads(*names: str) -> list[Any]:
    """Returns the default overloads of those aten operations that this torch has.

    `_fused_rms_norm` came with torch 2.8; before it, `rms_norm` is made of operations that are known anyway.
    """
    return [getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)]
