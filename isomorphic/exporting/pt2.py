"""torch.export's .pt2, and its check: the file is read back and run by torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isomorphic.errors import UserError, first_line
from isomorphic.exporting.answers import Answer, Difference, difference
from isomorphic.exporting.capture import capture, plain_outputs, quiet
from isomorphic.inputs import Inputs, call, map_tensors, tensors_in
from isomorphic.models import REFUSALS


def write_pt2(
    model: nn.Module, inputs: Inputs, path: Path, *, any_batch: bool, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a model's graph.

    Args:
        model, inputs, any_batch: as for `capture`.
        path: the file, of any name.
        metadata: JSON values that the file holds beside the model, by name.

    Raises:
        UserError: torch cannot capture the model.
    """
    program = capture(model, inputs, any_batch=any_batch, outputs=plain_outputs)
    extra = {key: json.dumps(value) for key, value in (metadata or {}).items()}
    with quiet(), open(path, "wb") as file:
        torch.export.save(program, file, extra_files=extra)


def check_pt2(path: Path, answers: Iterable[Answer]) -> Difference:
    """Reads a file back, runs it, and returns the largest difference to what the original answers.

    Raises:
        UserError: torch does not take the file or the batches, or returns something else.
    """
    model = open_pt2(path)
    found = Difference()
    for answer in answers:
        try:
            outputs = tensors_in(runner(model, map_tensors(answer.inputs, torch.clone))())
        except REFUSALS as error:
            raise UserError(f"what was written fails on a batch of {answer.size}: {first_line(error)}") from error
        found = max(found, difference(answer, outputs), key=lambda d: d.value)
    return found


def open_pt2(path: Path) -> nn.Module:
    """Returns the model of a file."""
    with quiet(), open(path, "rb") as file:
        return torch.export.load(file).module()


def runner(model: nn.Module, inputs: Inputs) -> Callable[[], Any]:
    """Returns a function that runs a model on some inputs, without gradients."""

    def run() -> Any:
        with torch.no_grad():
            return call(model, inputs)

    return run
