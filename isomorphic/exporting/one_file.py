"""A model as one file, ONNX or .pt2: written to a temporary name, read back, compared, and only then renamed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isomorphic import progress
from isomorphic.errors import UserError
from isomorphic.exporting import onnx, pt2
from isomorphic.exporting.answers import (
    BATCH_SIZES,
    Answer,
    ask,
    batch_length,
    bound_of,
    independent_copy,
    make_batch,
    precision_of,
)
from isomorphic.exporting.card import MARK
from isomorphic.exporting.result import Exported, check_bound
from isomorphic.exporting.timing import median_seconds
from isomorphic.files import atomic_write
from isomorphic.inputs import Inputs, map_tensors


@dataclass(frozen=True)
class FileOptions:
    """How a file is written: the arguments of `export` by the same names."""

    opset: int | None = None
    half: bool = False
    fixed_batch: int | bool = False
    latency: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)


def export_file(model: nn.Module, inputs: Inputs, path: Path, options: FileOptions) -> Exported:
    """Writes a model as the file that the ending of `path` names.

    Raises:
        UserError: as `export`; nothing is left behind.
    """
    if options.fixed_batch and options.fixed_batch is not True:
        if batch_length(inputs) is None:
            raise UserError(f"fixed_batch={options.fixed_batch}: the inputs have no batch, or lie in a list; give True")
        inputs = make_batch(inputs, options.fixed_batch)
    any_batch = not options.fixed_batch and batch_length(inputs) is not None
    dtype = torch.float16 if options.half else precision_of(model)
    if path.suffix == ".onnx":
        onnx.check_model(model, dtype)
    progress.stage("running the original")
    original = independent_copy(model)
    answers = [ask(original, inputs, size) for size in (BATCH_SIZES if any_batch else (None,))]
    if options.latency:
        progress.stage("timing the original")
    seconds = {"torch": median_seconds(pt2.runner(original, answers[0].inputs))} if options.latency else {}
    network = independent_copy(model)  # one that does not remember those batches
    if options.half:
        network, inputs = network.half(), _half(inputs)
        answers = [dataclasses.replace(answer, inputs=_half(answer.inputs)) for answer in answers]
    with atomic_write(path) as temporary:
        opset = _write(network, inputs, any_batch, answers[0], temporary, path.suffix, options)
        progress.stage(f"reading {path} back and comparing it with the original")
        check = onnx.check_onnx if path.suffix == ".onnx" else pt2.check_pt2
        found = check(temporary, answers)
        check_bound(path, found, bound_of(dtype))
        if options.latency:
            progress.stage(f"timing {path}")
            seconds |= _time(temporary, path.suffix, answers[0])
    return Exported(path, tuple(a.size for a in answers), found, bound_of(dtype), any_batch, opset, seconds)


def _write(
    network: nn.Module, inputs: Inputs, any_batch: bool, answer: Answer, file: Path, suffix: str, options: FileOptions
) -> int | None:
    """Writes the file and returns the opset of one in ONNX."""
    metadata = {"writer": MARK, **options.metadata}
    if suffix == ".pt2":
        pt2.write_pt2(network, inputs, file, any_batch=any_batch, metadata=metadata)
        return None
    outputs = [name for name, _ in answer.outputs]
    return onnx.write_onnx(
        network, inputs, file, any_batch=any_batch, outputs=outputs, opset=options.opset, metadata=metadata
    )


def _time(file: Path, suffix: str, answer: Answer) -> dict[str, float]:
    if suffix == ".pt2":
        return {".pt2": median_seconds(pt2.runner(pt2.open_pt2(file), answer.inputs))}
    return {"onnxruntime": median_seconds(onnx.runner(onnx.open_session(file), answer.inputs))}


def _half(inputs: Inputs) -> Inputs:
    return map_tensors(inputs, lambda tensor: tensor.half() if tensor.is_floating_point() else tensor)
