"""A checkpoint's model for images of another size than it was trained on.

A transformer keeps a table of positions, or of differences between them, whose size follows from the image's. The dense
model is built again for the new size and gets the pruned model's structure, and timm's own function for weights of this
model resamples the tables, at whatever width they were pruned to.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import nn

from isomorphic.checkpoints.fitting import Target, fit_tensors
from isomorphic.checkpoints.rebuild import build_shaped
from isomorphic.checkpoints.save import tensors_to_save
from isomorphic.checkpoints.structure import describe_structure, plain_to_save, tensor_shapes
from isomorphic.checkpoints.tensors import load_tensors
from isomorphic.errors import UserError
from isomorphic.kinds import library
from isomorphic.models import ModelSpec, build_skeleton, check_input_size


def with_input_size(model: nn.Module, spec: ModelSpec, size: int, path: Path) -> tuple[nn.Module, ModelSpec, list[str]]:
    """Returns the model for images of `size` pixels, its spec, and lines about what was resampled.

    A model that takes such images as it is, or whose library has no tables to resample, is returned as it is.

    Raises:
        UserError: the model has such tables and timm cannot resample them.
    """
    if spec.builder != "timm" or not _has_fixed_size(spec) or _takes(model, size, path):
        return model, spec, []
    resized = dataclasses.replace(spec, kwargs={**spec.kwargs, "img_size": size})
    try:
        return _resample(model, spec, resized, path)
    except UserError as error:
        raise UserError(
            f"{path} does not take images of {size}×{size} pixels, and its positions cannot be resampled: {error}"
        ) from error


def _has_fixed_size(spec: ModelSpec) -> bool:
    config = library("timm").get_pretrained_cfg(spec.name) if library("timm").is_model(spec.name) else None
    return "img_size" in spec.kwargs or bool(config and config.fixed_input_size)


def _takes(model: nn.Module, size: int, path: Path) -> bool:
    try:
        check_input_size(model, size, str(path))
    except UserError:
        return False
    return True


def _resample(
    model: nn.Module, spec: ModelSpec, resized: ModelSpec, path: Path
) -> tuple[nn.Module, ModelSpec, list[str]]:
    before, after = build_skeleton(spec), build_skeleton(resized)
    structure = json.loads(json.dumps(describe_structure(model, before)))
    tensors = tensors_to_save(model, before)
    if plain_to_save(model, before, all_of_them=False):
        raise UserError("it holds tables that are no parameters")
    old, new = tensor_shapes(before), tensor_shapes(after)
    stored = model.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if name in stored or old.get(name) == new.get(name)}
    # a table of (1, 5, 32), pruned to (1, 5, 20), becomes one of (1, 17, 20) if the dense model's is (1, 17, 32) now
    shapes = {name: _new_shape(tensor, old.get(name), new.get(name)) for name, tensor in tensors.items()}
    empty = {name: torch.empty(shape, dtype=tensors[name].dtype) for name, shape in shapes.items()}
    shaped = build_shaped(resized, structure, empty, path)
    fit = fit_tensors(tensors, Target(shaped, resized), path)
    load_tensors(shaped, fit.tensors, path)
    return shaped.eval(), resized, [*fit.notes]


def _new_shape(tensor: torch.Tensor, old: list[int] | None, new: list[int] | None) -> list[int]:
    if old is None or new is None or len(old) != len(new):
        return list(tensor.shape)
    sizes = zip(tensor.shape, old, new, strict=True)
    return [size if before == after else after for size, before, after in sizes]
