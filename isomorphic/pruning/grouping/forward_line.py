"""Which line of a model's forward code is running."""

from __future__ import annotations

import functools
import linecache
import sys
from pathlib import Path
from types import FrameType

import torch

from isomorphic.inputs import call

_NOT_FORWARD_CODE = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[2]}/")
_GENERATED = "<eval_with_key>"  # how torch.fx names the code of a graph


def forward_line() -> str:
    """Returns the innermost line that is neither torch's nor ours, "timm/layers/mlp.py:45"; "" outside of a forward.

    In a converted graph (`torch.fx`), whose code is in no file, it is the node, "node view_1 = linear.view(1, 3, 64)";
    where code of a library runs for a node, both are named.
    """
    found: FrameType | None = None
    generated: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not call.__code__:
        if found is None and not frame.f_code.co_filename.startswith(_NOT_FORWARD_CODE):
            found = frame
        if generated is None and frame.f_code.co_filename.startswith(_GENERATED):
            generated = frame
        frame = frame.f_back
    if found is None or frame is None:
        return ""
    node = _node(generated) if generated else ""
    line = "" if found is generated and node else f"{_short(found.f_code.co_filename)}:{found.f_lineno}"
    return ", ".join(filter(None, (line, node)))


def _node(frame: FrameType) -> str:
    """The node that a line of a converted graph runs, "node view_1 = linear.view(1, 3, 64)"."""
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return f"node {text.partition(';')[0].strip()}" if text.strip() else ""


@functools.cache
def _short(path: str) -> str:
    """A file as one would import it, seen from the folder of modules that it lies in."""
    folders = [folder for folder in sys.path if folder and path.startswith(folder.rstrip("/") + "/")]
    return path[len(max(folders, key=len).rstrip("/")) + 1 :] if folders else Path(path).name
