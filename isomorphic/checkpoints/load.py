"""Loading a checkpoint of this project: its dense model is built, cut to the file's shapes, and filled."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isomorphic.checkpoints.dense import check_dense, fill_dense, parse_dense, unchanged_on_error
from isomorphic.checkpoints.headers import open_tensors, parse_header, parse_masked, parse_spec
from isomorphic.checkpoints.origins import Origin, origin_of, remember_origin
from isomorphic.checkpoints.rebuild import rebuild
from isomorphic.checkpoints.structure import tensor_shapes
from isomorphic.errors import UserError
from isomorphic.models import LARGEST_ARGUMENT, ModelSpec, at_most, build_skeleton
from isomorphic.user_file import UserFile

# How large a dense model a file may ask for: nothing that is cut to a file's size needs more.
MOST_MODULES, NUMBERS_PER_NUMBER, FEW_NUMBERS = 10_000, 1000, 200_000_000


def load_checkpoint(
    path: Path, builder_file: str | Path | None, model: nn.Module | None
) -> tuple[nn.Module, ModelSpec]:
    with open_tensors(path) as file:
        header = parse_header(path, file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    spec = parse_spec(path, header)
    if model is None and spec.builder == "none":
        raise UserError(
            f"{path} is a model of {spec.name:.80}, which only its user can build: load it in Python with the dense "
            f'model, isomorphic.load_model("{path.name}", model=build())'
        )
    if model is not None:
        _check_is_dense(model, spec, header, tensors, path)
        dense = origin_of(model).dense
        with unchanged_on_error(model):
            fill_dense(model, spec.kept_blocks, header.get("structure"), tensors, path)
            spec = spec.masking(parse_masked(path, header["structure"], model))
        remember_origin(model, Origin(dense, spec.kept_blocks))
        return model, spec
    if spec.builder == "file":
        spec = _find_factory(path, spec, builder_file)
    else:
        check_extent(path, spec, tensors)
    model = rebuild(spec, header.get("structure"), tensors, path)
    return model, spec.masking(parse_masked(path, header["structure"], model))


def _check_is_dense(
    model: nn.Module, spec: ModelSpec, header: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path
) -> None:
    """Raises a UserError unless a model is the dense one of a checkpoint, as far as its builder or its header tell."""
    if spec.builder in ("none", "file"):
        if spec.builder == "none" or "dense" in header:  # which models of users' files did not have at first
            check_dense(model, parse_dense(header, path), path)
        return
    dense = dataclasses.replace(spec, kept_blocks={})
    check_extent(path, dense, tensors)
    check_dense(model, tensor_shapes(build_skeleton(dense)), path)


def check_extent(path: Path, spec: ModelSpec, tensors: dict[str, torch.Tensor]) -> None:
    """A header may ask for millions of layers as easily as for ten: they are counted before they are made.

    Raises:
        UserError: the dense model is out of proportion.
    """
    large = [key for key, value in spec.kwargs.items() if any(abs(n) > LARGEST_ARGUMENT for n in _whole_numbers(value))]
    if large:
        raise UserError(
            f"{path} asks for {spec.name} with {large[0]} beyond {LARGEST_ARGUMENT}: no checkpoint needs that"
        )
    numbers = max(FEW_NUMBERS, NUMBERS_PER_NUMBER * sum(tensor.numel() for tensor in tensors.values()))
    with at_most(MOST_MODULES, numbers, f"{path} asks for {spec.name} with {spec.kwargs}"):
        build_skeleton(spec)


def _whole_numbers(value: Any) -> list[int]:
    """All that are in a JSON value."""
    if isinstance(value, (list, dict)):
        return [n for item in (value.values() if isinstance(value, dict) else value) for n in _whole_numbers(item)]
    return [value] if isinstance(value, int) else []


def _find_factory(path: Path, spec: ModelSpec, builder_file: str | Path | None) -> ModelSpec:
    """The spec with the factory of the file that the user names, if it is the one that the checkpoint was written with.

    Nothing of the file runs before its checksum is compared.
    """
    file_name, _, factory = spec.name.rpartition(":")
    if builder_file is None:
        raise UserError(
            f"{path} is a model of {file_name}, and checkpoints hold no code: name that file, "
            f"--builder-file path/to/{file_name} (in Python, builder_file=)"
        )
    file = UserFile.read(builder_file)
    if file.sha256 != spec.sha256:
        raise UserError(
            f"{path} needs {file_name} as it was when the checkpoint was written (SHA-256 {spec.sha256}); "
            f"{builder_file} differs ({file.sha256[:12]}…): name that version of the file"
        )
    return dataclasses.replace(spec, factory=file.load(factory))
