"""Export in one call: write, read back, run, compare; what fails leaves nothing behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from isomorphic import progress
from isomorphic.checkpoints.open import open_model
from isomorphic.checkpoints.origins import known_class_names
from isomorphic.errors import UserError
from isomorphic.exporting import onnx
from isomorphic.exporting.hub import export_folder
from isomorphic.exporting.one_file import FileOptions, export_file
from isomorphic.exporting.result import Exported
from isomorphic.files import check_writable
from isomorphic.inputs import Inputs, move_to
from isomorphic.models import example_inputs
from isomorphic.wrappers import check_unwrapped


def export(
    model: nn.Module | str | Path,
    inputs: Inputs | None,
    path: str | Path,
    *,
    opset: int | None = None,
    half: bool = False,
    fixed_batch: int | bool = False,
    latency: bool = False,
    repository: str | None = None,
    **options: Any,
) -> Exported:
    """Writes a model for elsewhere, reads it back, runs it at batch 1 and 3, and compares it with the original.

    Args:
        model: any module, which is left as it was; or what `load_model` takes. A folder is made of the latter.
        inputs: what the model takes: a tensor, a tuple of positional or a mapping of keyword arguments. Dim 0 of the
            first tensor, and of those as long, is the batch, of any size; other sizes are fixed. None is one image, for
            what `load_model` takes.
        path: ends in .onnx or .pt2, or in "/" for a folder with a checkpoint, config.json and a model card.
        opset: of ONNX; None is torch's own choice.
        half: weights and inputs in float16.
        fixed_batch: batches of this size only; True takes the sizes of `inputs` as they are. Inputs in a list, as
            detectors take them, are always so.
        latency: time a batch in torch and in what was written.
        repository: "USER/NAME" that the model card of a folder names; nothing is uploaded.
        **options: of what `load_model` takes, as there.

    Raises:
        UserError: an ending or opset that does not exist, a library that is missing, a path that cannot be written, a
            model that cannot be captured, has no ONNX, or answers otherwise than the original once it is read back.
    """
    chosen = FileOptions(opset, half, fixed_batch, latency)
    if is_folder(path):
        if isinstance(model, nn.Module) or chosen != FileOptions():
            raise UserError(
                f"{path} is a folder, made of a checkpoint: save the model first, pruned.save('net.safetensors'), then "
                "export('net.safetensors', …), without opset, half, fixed_batch and latency"
            )
        return export_folder(model, inputs, Path(path), repository, options)
    if opset is not None and Path(path).suffix != ".onnx":
        raise UserError(f"an opset is of ONNX, and {path} is none: leave it out")
    check_writable(path)
    if Path(path).suffix == ".onnx":
        onnx.check_libraries(opset)
    if isinstance(model, (str, Path)):
        progress.stage(f"opening {model}")
        model, spec = open_model(model, **options)
        inputs = example_inputs(spec) if inputs is None else inputs
        told: dict[str, Any] = {"name": spec.name, "preprocessing": dataclasses.asdict(spec.preprocessing)}
    elif options:
        raise TypeError(f"unexpected keyword arguments for a module: {', '.join(options)}")
    else:
        told = {}
    check_unwrapped(model, "export")
    if names := known_class_names(model):
        told["class_names"] = list(names)
    chosen = dataclasses.replace(chosen, metadata=told)
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise UserError("the model has lazy layers, which have no weights yet: run it once on its inputs first")
    return export_file(model, move_to(_checked(inputs), torch.device("cpu")), Path(path), chosen)


def is_folder(path: str | Path) -> bool:
    """Whether a path means a folder: it ends in "/", or is one already.

    Raises:
        UserError: it means no file either.
    """
    if str(path).endswith("/") or Path(path).is_dir():
        return True
    if Path(path).suffix not in (".onnx", ".pt2"):
        raise UserError(f"{path} must end in .onnx, .pt2, or / for a folder for the hub")
    return False


def _checked(inputs: Inputs | None) -> Inputs:
    if not isinstance(inputs, (Tensor, tuple, Mapping)):
        kind = "missing" if inputs is None else type(inputs).__name__
        raise UserError(f"inputs is {kind}: give a tensor, a tuple of positional or a mapping of keyword arguments")
    return inputs
