"""Where a result comes from: stored inside every checkpoint and beside every training run."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "timm", "torch-pruning", "safetensors", "numpy")
_REPOSITORY = Path(__file__).resolve().parents[1]


def run_provenance(arguments: dict[str, Any]) -> dict[str, Any]:
    """The command, its resolved arguments, the versions and the commit behind a run, as JSON values."""
    return {
        "command": shlex.join(sys.argv),
        "arguments": {key: _as_json(value) for key, value in sorted(arguments.items())},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _as_json(value: Any) -> Any:
    """The value as JSON values: fields of a dataclass by name, and the text of what JSON has no word for."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The repository's commit, marked where the working tree differs; None outside a checkout."""
    try:
        command = ["git", "-C", str(_REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        # Only a repository of our own: not one that an installed package happens to lie in.
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(_REPOSITORY.parent)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=environment)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
