"""Checkpoints on the Hugging Face hub, and in folders that are laid out as there (`tools/export.py NET FOLDER/`).

    hf-hub:USER/NAME            model.safetensors of that repository, as huggingface_hub fetches and keeps it
    hf-hub:USER/NAME@REVISION   of a branch, a tag or a commit
    path/to/folder              model.safetensors in it

Only what a user asks for is fetched, and only that file, or timm's config.json beside it where it is no checkpoint of
this project: a checkpoint that names a repository makes nobody fetch it.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from isomorphic import progress
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


def source_name(source: str | Path) -> str:
    """Returns the name of a repository or folder: "deit_4.2G" of "hf-hub:USER/deit_4.2G@main"."""
    return Path(str(source).removeprefix(PREFIX).partition("@")[0]).name


@functools.cache  # a process that began with a file ends with it, whatever the hub does meanwhile
def fetch(source: str, name: str) -> Path:
    """Returns a file of a repository, fetched unless it is here already.

    Raises:
        UserError: there is no such repository or file, or the hub cannot be reached.
    """
    import huggingface_hub  # slow to import, and most sources are files
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    from isomorphic.pretrained import out_of_reach  # the network is no matter of those who load a file

    repository, _, revision = source.removeprefix(PREFIX).partition("@")
    if repository.count("/") != 1:
        raise UserError(f"{source} is no repository: hf-hub:USER/NAME, or hf-hub:USER/NAME@REVISION")
    progress.stage(f"fetching {name} of {source}, unless it is here")
    endpoint = os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT
    silent = None if huggingface_hub.constants.HF_HUB_OFFLINE else out_of_reach(endpoint)  # else it tries for a minute
    options = {"revision": revision or None, "endpoint": endpoint, "local_files_only": silent is not None}
    try:
        with quiet_hub():
            return Path(huggingface_hub.hf_hub_download(repository, name, **options))
    except HFValidationError as error:
        raise UserError(f"{source} is no repository: {first_line(error)}") from error
    except (OSError, EntryNotFoundError) as error:  # all that the hub and the connection raise
        why = f"{silent}: check the connection" if silent else _reason(error)
        raise UserError(f"cannot fetch {name} of {source}: {why}") from error


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return f"HTTP {status}: there is no such repository, revision or file, or it is private (hf auth login)"
    return f"{type(error).__name__}: check the connection" if status is None else f"HTTP {status}"
