"""Which line of a model's forward code is running."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import FrameType

import torch

from isomorphic.inputs import call

_NOT_FORWARD_CODE = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[2]}/")


def forward_line() -> str:
    """Returns the innermost line that is neither torch's nor ours, "timm/layers/mlp.py:45"; "" outside of a forward."""
    found: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not call.__code__:
        if found is None and not frame.f_code.co_filename.startswith(_NOT_FORWARD_CODE):
            found = frame
        frame = frame.f_back
    if found is None or frame is None:
        return ""
    return f"{_short(found.f_code.co_filename)}:{found.f_lineno}"


@functools.cache
def _short(path: str) -> str:
    """A file as one would import it, seen from the folder of modules that it lies in."""
    folders = [folder for folder in sys.path if folder and path.startswith(folder.rstrip("/") + "/")]
    return path[len(max(folders, key=len).rstrip("/")) + 1 :] if folders else Path(path).name
