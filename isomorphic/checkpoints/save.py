"""Writing a pruned or trained model as a checkpoint, whose format `structure.py` describes."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from isomorphic.checkpoints.rebuild import rebuild
from isomorphic.checkpoints.sources import is_pth
from isomorphic.checkpoints.structure import (
    FORMAT,
    METADATA_KEY,
    describe_structure,
    parameter_names,
    plain_to_save,
    tensor_shapes,
)
from isomorphic.checkpoints.tensors import is_plain, torn
from isomorphic.errors import UserError
from isomorphic.files import atomic_write
from isomorphic.models import ModelSpec, build_skeleton, example_inputs, keep_blocks


def check_savable(source: str | Path, model: nn.Module, spec: ModelSpec) -> None:
    """Finds out early that what is made of a `.pth` file's model can be saved: what it saves loads as the same model.

    Models from elsewhere are what their spec builds, and pass.

    Raises:
        UserError: the spec builds another model, so the file has to be converted with the right one.
    """
    if not is_pth(source):
        return
    try:
        skeleton = build_skeleton(spec)
        structure = json.loads(json.dumps(describe_structure(model, skeleton)))
        twin = rebuild(spec, structure, tensors_to_save(model, skeleton), source)
        agree = same_logits(model, twin, spec)
    except UserError as error:
        agree, reason = False, str(error)
    else:
        reason = f"{spec.name} with {spec.kwargs} is another model"
    if not agree:
        raise UserError(
            f"what is made of {source} could not be saved ({reason}): convert it first with the builder's name and "
            f"arguments, python tools/convert.py {source} OUT.safetensors --name NAME --model-kwargs KEY=VALUE …"
        )


def same_logits(model: nn.Module, other: nn.Module, spec: ModelSpec) -> bool:
    """Whether two models, in eval mode on the CPU, answer alike to one image of random noise."""
    image = example_inputs(spec)
    with torch.no_grad():
        ours, theirs = model(image), other(image)
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


def save_model(
    path: str | Path, model: nn.Module, spec: ModelSpec, *, provenance: dict[str, Any], averaged: bool = False
) -> None:
    """Writes `model`, which was cut or trained from `build_model(spec)`, atomically.

    Args:
        path: file to write; its folder is made.
        model: any modules of the spec's model, with other tensor shapes and attributes.
        spec: how to build the dense model.
        provenance: JSON values that say where the model comes from.
        averaged: the weights are a moving average (`--use-ema` asks for those).

    Raises:
        UserError: the file cannot be written, the model differs from its builder's beyond what a checkpoint holds, or
            it has not the parameters that the spec says are masked.
    """
    more: dict[str, Any] = {"averaged": True} if averaged else {}
    dense = build_skeleton(spec)
    if spec.builder == "file":  # so that whoever has the model needs no file
        whole = build_skeleton(dataclasses.replace(spec, kept_blocks={})) if spec.kept_blocks else dense
        more["dense"] = tensor_shapes(whole)
    _write(path, model, dense, spec, {**more, "provenance": provenance})


def save_module(
    path: str | Path,
    model: nn.Module,
    dense: nn.Module,
    *,
    provenance: dict[str, Any],
    kept_blocks: Mapping[str, Sequence[int]] | None = None,
    class_names: Sequence[str] = (),
) -> None:
    """Writes any pruned module, atomically; whoever loads it builds the dense model: `load_model(path, model=build())`.

    Args:
        path: file to write; its folder is made.
        model: the dense model with other tensor shapes and attributes, and without removed blocks.
        dense: the dense model, perhaps without data (on the meta device).
        provenance: JSON values that say where the model comes from.
        kept_blocks: indices of the dense model's blocks that are still there, by the name of what holds them.
        class_names: what the logits stand for, in their order, where that is known.

    Raises:
        UserError: the file cannot be written, or the model differs from the dense one beyond what a checkpoint holds.
    """
    hidden = _hidden_modules(model)
    if hidden:
        raise UserError(
            f"cannot save the modules in {hidden[0]}, a plain list or dict, which are no part of the model: "
            "keep them in an nn.ModuleList or nn.ModuleDict, or outside of the model"
        )
    kept = {name: tuple(indices) for name, indices in (kept_blocks or {}).items()}
    kind = type(model)
    spec = ModelSpec("none", f"{kind.__module__}.{kind.__qualname__}", kept_blocks=kept, class_names=tuple(class_names))
    shapes = tensor_shapes(dense)
    dense = copy.deepcopy(dense)
    keep_blocks(dense, kept)
    _write(path, model, dense, spec, {"dense": shapes, "provenance": provenance})


def _hidden_modules(model: nn.Module) -> list[str]:
    """Returns the names of lists and dicts of modules that are no part of the model, whose parameters no file holds."""
    known = set(map(id, model.modules()))
    hidden = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            modules = [item for item in items if isinstance(item, nn.Module) and id(item) not in known]
            if any(next(item.parameters(), None) is not None for item in modules):
                hidden.append(f"{name}.{key}" if name else key)
    return hidden


def _write(path: str | Path, model: nn.Module, dense: nn.Module, spec: ModelSpec, more: dict[str, Any]) -> None:
    tensors = tensors_to_save(model, dense, all_buffers=spec.builder == "none")
    plain = plain_to_save(model, dense, all_of_them=spec.builder == "none")
    tensors |= {name: tensor.detach().cpu().clone().contiguous() for name, tensor in plain.items()}
    structure = describe_structure(model, dense) | _masked_names(model, spec)
    if plain:
        structure["plain"] = [*plain]
    header = {"format": FORMAT, **spec.to_dict(), "structure": structure, **more}
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(header)})
        except SafetensorError as error:  # how a full disk is reported
            raise UserError(f"cannot write {path}: {error}") from error


def _masked_names(model: nn.Module, spec: ModelSpec) -> dict[str, list[str]]:
    """What the structure of a checkpoint says of masks."""
    unknown = [name for name in spec.masked if name not in parameter_names(model)]
    if unknown:
        raise UserError(f"cannot save the masks of parameters that the model has not: {', '.join(unknown[:3])}")
    return {"masked": list(spec.masked)} if spec.masked else {}


def tensors_to_save(model: nn.Module, dense: nn.Module, *, all_buffers: bool = False) -> dict[str, torch.Tensor]:
    """Returns parameters, buffers, and non-persistent buffers that were cut; each with storage of its own.

    With `all_buffers` other non-persistent buffers, too: nobody knows whether building the model again makes the same.
    """
    dense_buffers = dict(dense.named_buffers())
    extra = {}
    for name, buffer in model.named_buffers():
        was_cut = name in dense_buffers and buffer.shape != dense_buffers[name].shape
        if all_buffers or was_cut:
            extra[name] = buffer
    tensors = extra | model.state_dict()
    strange = [name for name, tensor in tensors.items() if not isinstance(tensor, torch.Tensor)]
    if strange:
        raise UserError(f"cannot save what is no tensor: {', '.join(strange[:3])} of the model's state")
    _check_plain(tensors)
    apart = torn(dense, tensors)
    if apart:
        raise UserError(f"cannot save {' and '.join(apart[0])}, which differ, while the dense model ties them")
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _check_plain(tensors: dict[str, torch.Tensor]) -> None:
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise UserError(f"cannot save a model without data: {', '.join(empty[:3])} on the meta device")
    strange = [name for name, tensor in tensors.items() if not is_plain(tensor)]
    if strange:
        raise UserError(f"cannot save what is no plain tensor of real numbers: {', '.join(strange[:3])}")
