"""What names a model: a library's name, `path/to/file.py:factory`, a file of weights, or a folder with one.

A folder is what people download from a hub and what timm writes for one: `config.json` beside the weights. It may be
named as timm names it, `local-dir:path/to/folder`.
"""

from __future__ import annotations

import os
from pathlib import Path

from isomorphic.checkpoints.hub import CHECKPOINT, fetch, is_hub_folder, is_on_hub
from isomorphic.errors import UserError
from isomorphic.user_file import is_user_file

# What files of torch.save end in; others are told by their first bytes.
PTH = (".pth", ".pt", ".tar", ".ckpt")
CONFIG = "config.json"
LOCAL = "local-dir:"
# The weights in a folder, in timm's order; then any file of these endings.
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
WEIGHT_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def is_pth(source: str | Path) -> bool:
    """Says whether `source` names a file that torch.save wrote: by its ending, or else by its first bytes."""
    path = Path(source)
    if is_on_hub(source):
        return False
    if path.suffix in {*PTH, ".safetensors", ".py"} or not path.is_file():
        return path.suffix in PTH
    with open(path, "rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80\x02"))


def is_folder(source: str | Path) -> bool:
    """Says whether `source` names a folder that says which model its weights are of."""
    return str(source).startswith(LOCAL) or os.path.isfile(Path(source) / CONFIG)


def is_checkpoint(source: str | Path) -> bool:
    """Says whether `source` names a file of weights, or a folder of one, rather than a library's or a user's model."""
    suffix = Path(source).suffix
    in_file = suffix in {".safetensors", ".bin", *PTH} or (os.path.isfile(source) and suffix != ".py")
    return in_file or is_folder(source) or is_hub_folder(source) or is_on_hub(source)


def source_file(source: str) -> Path | None:
    """Returns the file that a model comes from, its weights or the code in "path/to/file.py:build"; None for names."""
    if is_checkpoint(source):
        return weights_file(source)
    return Path(source.rpartition(":")[0]) if is_user_file(source) else None


def folder_of(source: str | Path) -> Path:
    return Path(str(source).removeprefix(LOCAL))


def weights_file(source: str | Path) -> Path:
    """Returns the file of weights that `source` is, or that lies in the folder or repository that it is.

    Raises:
        UserError: the repository cannot be reached; the folder has none, or several, none of which has one of the usual
            names.
    """
    folder = fetch(str(source), CHECKPOINT) if is_on_hub(source) else folder_of(source)
    if not folder.is_dir():
        return folder
    named = [folder / name for name in WEIGHT_NAMES if (folder / name).is_file()]
    found = named[:1] or sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_ENDINGS and path.is_file())
    if not found:
        raise UserError(f"no weights in the folder {folder}: {WEIGHT_NAMES[0]} or {WEIGHT_NAMES[1]} is looked for")
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:3])
        raise UserError(f"several files of weights in the folder {folder}: name one of them ({names})")
    return found[0]
