"""Checkpoints on the Hugging Face hub, and in folders that are laid out as there (`tools/export.py NET FOLDER/`).

    hf-hub:USER/NAME            model.safetensors of that repository, as huggingface_hub fetches and keeps it
    hf-hub:USER/NAME@REVISION   of a branch, a tag or a commit
    path/to/folder              model.safetensors in it

Only what a user asks for is fetched, and only that file: a checkpoint that names a repository makes nobody fetch it.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from isomorphic.errors import UserError, first_line
from isomorphic.models import quiet_hub

PREFIX = "hf-hub:"
CHECKPOINT = "model.safetensors"


def is_on_hub(source: str | Path) -> bool:
    """Whether `source` names a repository of the hub."""
    return str(source).startswith(PREFIX)


def is_hub_folder(source: str | Path) -> bool:
    """Whether `source` is the path of a folder with a checkpoint; a bare name is a model's, whatever lies around."""
    return os.sep in str(source) and os.path.isfile(Path(source) / CHECKPOINT)


def local_file(source: str | Path) -> str | Path:
    """Returns the file of a repository, fetched unless it is here already, or of a folder; else `source` as it is.

    Raises:
        UserError: there is no such repository, or it cannot be reached.
    """
    if is_on_hub(source):
        return _fetch(str(source))
    return Path(source) / CHECKPOINT if is_hub_folder(source) else source


def source_name(source: str | Path) -> str:
    """Returns the name of a repository or folder: "deit_4.2G" of "hf-hub:USER/deit_4.2G@main"."""
    return Path(str(source).removeprefix(PREFIX).partition("@")[0]).name


@functools.cache  # a process that began with a file ends with it, whatever the hub does meanwhile
def _fetch(source: str) -> Path:
    import huggingface_hub  # slow to import, and most sources are files
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    repository, _, revision = source.removeprefix(PREFIX).partition("@")
    if repository.count("/") != 1:
        raise UserError(f"{source} is no repository: hf-hub:USER/NAME, or hf-hub:USER/NAME@REVISION")
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        with quiet_hub():
            file = huggingface_hub.hf_hub_download(repository, CHECKPOINT, revision=revision or None, endpoint=endpoint)
            return Path(file)
    except HFValidationError as error:
        raise UserError(f"{source} is no repository: {first_line(error)}") from error
    except (OSError, EntryNotFoundError) as error:  # all that the hub and the connection raise
        raise UserError(f"cannot fetch {CHECKPOINT} of {source}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return f"HTTP {status}: there is no such repository, revision or file, or it is private (hf auth login)"
    return f"{type(error).__name__}: check the connection" if status is None else f"HTTP {status}"
