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

import torch

from isomorphic.progress import steps

PACKAGES = ("torch", "torchvision", "timm", "torch-pruning", "safetensors", "numpy")
_MIB = 1 << 20
_REPOSITORY = Path(__file__).resolve().parents[1]


def run_provenance(arguments: dict[str, Any]) -> dict[str, Any]:
    """The command, its resolved arguments, versions, commit and hardware behind a run, as JSON values."""
    return {
        "command": _command(),
        "arguments": {key: _as_json(value) for key, value in sorted(arguments.items())},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """This machine: processor, cores that the process may use, memory in GiB, GPUs; None where it does not say."""
    return {"cpu": _cpu(), "cores": _cores(), "memory_gib": _memory_gib(), "gpus": _gpus()}


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, steps("hashing", -(-os.path.getsize(path) // _MIB), unit="MiB") as bar:
        while chunk := file.read(_MIB):
            digest.update(chunk)
            bar.update()
    return digest.hexdigest()


def _command() -> str:
    """What to type to run this again; of several processes, how one host starts its share of them."""
    if "RANK" not in os.environ:
        return shlex.join(["python", *sys.argv])
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return shlex.join(["torchrun", f"--nnodes={max(world // local, 1)}", f"--nproc_per_node={local}", *sys.argv])


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


def _cpu() -> str | None:
    """The processor's name as Linux has it, or its architecture where there is no name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, name = line.partition(":")
            if key.strip() == "model name":
                return name.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


def _cores() -> int | None:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    try:
        return len(affinity(0)) if affinity else os.cpu_count()
    except OSError:
        return os.cpu_count()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _gpus() -> list[str] | None:
    """Names of the GPUs that the process sees: their properties are read without a context on any of them."""
    try:
        if not torch.cuda.is_available():
            return []
        return [torch.cuda.get_device_properties(index).name for index in range(torch.cuda.device_count())]
    except (AssertionError, RuntimeError):  # a driver that is broken, or gone
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
