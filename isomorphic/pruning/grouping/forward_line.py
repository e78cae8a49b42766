"""Which line of a model's forward code is running."""

from __future__ import annotations

import sys
from types import FrameType

from isomorphic.code_lines import is_users_code, name_line
from isomorphic.inputs import call


def forward_line() -> str:
    """Returns the innermost line that is neither torch's nor ours, "timm/layers/mlp.py:45"; "" outside of a forward."""
    found: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not call.__code__:
        if found is None and is_users_code(frame.f_code.co_filename):
            found = frame
        frame = frame.f_back
    if found is None or frame is None:
        return ""
    return name_line(found.f_code.co_filename, found.f_lineno)
