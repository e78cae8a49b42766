"""Which line of a model's forward code is running."""

from __future__ import annotations

import linecache
import sys
from types import FrameType

from isomorphic.code_lines import is_users_code, name_line
from isomorphic.inputs import call

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
        if found is None and is_users_code(frame.f_code.co_filename):
            found = frame
        if generated is None and frame.f_code.co_filename.startswith(_GENERATED):
            generated = frame
        frame = frame.f_back
    if found is None or frame is None:
        return ""
    node = _node(generated) if generated else ""
    line = "" if found is generated and node else name_line(found.f_code.co_filename, found.f_lineno)
    return ", ".join(filter(None, (line, node)))


def _node(frame: FrameType) -> str:
    """The node that a line of a converted graph runs, "node view_1 = linear.view(1, 3, 64)"."""
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return f"node {text.partition(';')[0].strip()}" if text.strip() else ""
