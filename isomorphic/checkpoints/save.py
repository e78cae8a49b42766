"""Writing a pruned or trained model as a checkpoint, whose format `structure.py` describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from isomorphic.checkpoints.open import is_pth, rebuild
from isomorphic.checkpoints.structure import FORMAT, METADATA_KEY, describe_structure, parameter_names
from isomorphic.errors import UserError
from isomorphic.files import atomic_write
from isomorphic.models import ModelSpec, build_skeleton, example_inputs


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
    dense = build_skeleton(spec)
    tensors = tensors_to_save(model, dense)
    header = {
        "format": FORMAT,
        **spec.to_dict(),
        "structure": describe_structure(model, dense) | _masked_names(model, spec),
        **({"averaged": True} if averaged else {}),
        "provenance": provenance,
    }
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


def tensors_to_save(model: nn.Module, dense: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers, and the non-persistent buffers that were cut; each with storage of its own."""
    dense_buffers = dict(dense.named_buffers())
    cut = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in dense_buffers and buffer.shape != dense_buffers[name].shape
    }
    tensors = cut | model.state_dict()
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
