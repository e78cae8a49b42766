"""Opening `.safetensors` files and reading the header that makes one a checkpoint (see `structure.py`)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from isomorphic.checkpoints.sources import is_folder, is_pth
from isomorphic.checkpoints.structure import FORMAT, METADATA_KEY, parameter_names
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, parse_class_names


def read_header(path: str | Path) -> dict[str, Any]:
    """Returns the JSON header of a checkpoint, without its tensors.

    Raises:
        UserError: the file is missing, truncated, not a checkpoint, or of a newer format.
    """
    with open_tensors(Path(path)) as file:
        return parse_header(Path(path), file.metadata())


def has_header(path: Path) -> bool:
    """Says whether a `.safetensors` file is a checkpoint of this project, or tensors alone.

    Raises:
        UserError: the file is missing or truncated.
    """
    with open_tensors(path) as file:
        return METADATA_KEY in (file.metadata() or {})


def stored_class_names(path: str | Path) -> tuple[str, ...]:
    """Returns the names of the classes in a file of weights; none in one that does not hold them.

    Raises:
        UserError: as `read_header`, of a file that is a checkpoint.
    """
    if is_folder(path) or is_pth(path) or not has_header(Path(path)):
        return ()
    try:
        return parse_class_names(read_header(path))
    except ValueError as error:
        raise UserError(f"{path} has a damaged header: {error}") from error


def is_averaged(path: Path) -> bool:
    """Says whether weights are a moving average, by the header; tensors without one are raw."""
    return has_header(path) and read_header(path).get("averaged") is True


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Opens a `.safetensors` file.

    Raises:
        UserError: it is missing or truncated.
    """
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error


def parse_header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    """Returns the header in a file's metadata.

    Raises:
        UserError: there is none, or one of a newer format.
    """
    try:
        header = json.loads((metadata or {})[METADATA_KEY])
        version = header["format"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} holds tensors but no model structure: not a checkpoint of this project "
            f"(weights of a model that has a name are read by --model NAME --checkpoint {path}; in Python weights=)"
        ) from error
    if version != FORMAT:
        raise UserError(f"{path} is of checkpoint format {version}; this version reads format {FORMAT}")
    return header


def parse_spec(path: Path, header: dict[str, Any]) -> ModelSpec:
    """Returns how to build the dense model of a header.

    Raises:
        UserError: the header does not say so.
    """
    try:
        return ModelSpec.from_dict(header)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} has a damaged header: it does not say how to build its model") from error


def parse_masked(path: Path, structure: Any, model: nn.Module) -> list[str]:
    """Returns the names of the parameters of `model` whose zeros are pruned weights, by the structure in a header.

    Raises:
        UserError: it names others.
    """
    names = structure.get("masked", []) if isinstance(structure, dict) else None
    known = parameter_names(model)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} has a damaged header: it does not name its masked parameters")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{path} has a damaged header: its masked {unknown[0]!r:.80} is no parameter of the model")
    return names
