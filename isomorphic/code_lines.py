"""Lines of code as messages name them: those of a model's authors, neither torch's nor ours."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

_NOT_FORWARD_CODE = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parent}/")


def is_users_code(path: str) -> bool:
    """Whether a file is neither torch's nor this package's."""
    return not path.startswith(_NOT_FORWARD_CODE)


def name_line(path: str, number: int) -> str:
    """Returns a line's name, "timm/layers/mlp.py:45"."""
    return f"{_short(path)}:{number}"


@functools.cache
def _short(path: str) -> str:
    """A file as one would import it, seen from the folder of modules that it lies in."""
    folders = [folder for folder in sys.path if folder and path.startswith(folder.rstrip("/") + "/")]
    return path[len(max(folders, key=len).rstrip("/")) + 1 :] if folders else Path(path).name
