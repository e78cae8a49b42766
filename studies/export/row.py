"""Measures one model: pruned, exported to ONNX and .pt2, each read back and run at batch 1 and 3."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import isomorphic as iso
from isomorphic.exporting.result import Exported
from isomorphic.inputs import Inputs
from studies.apart import OK, noting
from studies.coverage.model import randomize
from studies.export.models import Case

KINDS = ("onnx", "pt2")


@dataclass
class ExportRow:
    """What was measured of one model: the columns of export.csv.

    Attributes:
        status: "ok", or the stage that failed and why.
        params: of what was exported.
        macs_left: exact MACs of the pruned model, as a share of the dense one's.
        onnx_difference, pt2_difference: the largest one, max |exported − original| / max |original| of one output.
        onnx_output, pt2_output: where it is.
        onnx_batches, pt2_batches: sizes of the batches that were compared.
        onnx_mb, pt2_mb: size of the file in megabytes.
        opset: of the ONNX file.
        torch_ms, onnxruntime_ms: median time of a batch of one, on one thread of a busy machine.
    """

    set: str
    model: str
    status: str = ""
    params: int | None = None
    macs_left: float | None = None
    onnx_difference: float | None = None
    onnx_output: str = ""
    onnx_batches: str = ""
    onnx_mb: float | None = None
    pt2_difference: float | None = None
    pt2_output: str = ""
    pt2_batches: str = ""
    pt2_mb: float | None = None
    opset: int | None = None
    torch_ms: float | None = None
    onnxruntime_ms: float | None = None


def measure(case: Case, report: Callable[[ExportRow], None]) -> ExportRow:
    """The row of one model. Whatever goes wrong with it ends in its status.

    Args:
        case: the model.
        report: takes the row as far as it is known, the stage that begins as its status.
    """
    row, failures = ExportRow(case.set, case.model), []

    def enter(stage: str) -> None:
        row.status = stage
        report(row)

    with noting(row, failures), tempfile.TemporaryDirectory() as folder:
        model, inputs = _prune(case, row, enter)
        row.params = sum(parameter.numel() for parameter in model.parameters())
        for kind in KINDS:
            with noting(row, failures):
                enter(kind)
                exported = iso.export(model, inputs, Path(folder, f"net.{kind}"), latency=kind == "onnx")
                _note(row, kind, exported)
    row.status = "; ".join(failures) or OK
    return row


def _prune(case: Case, row: ExportRow, enter: Callable[[str], None]) -> tuple[nn.Module, Inputs]:
    """Returns what is exported, with its inputs."""
    enter("build")
    torch.manual_seed(0)
    example = case.build()
    example.model.eval()
    if not case.is_trained:
        randomize(example.model, example.training_inputs if example.statistics is None else example.statistics)
    enter("prune")
    pruned = iso.prune(example.model, example.inputs, inplace=True, **case.asked())
    row.macs_left = round(pruned.after.macs_exact / pruned.before.macs_exact, 4)
    return case.exported(pruned.model) if case.exported else (pruned.model, example.inputs)


def _note(row: ExportRow, kind: str, exported: Exported) -> None:
    setattr(row, f"{kind}_difference", float(f"{exported.difference.value:.2g}"))
    setattr(row, f"{kind}_output", exported.difference.output)
    setattr(row, f"{kind}_batches", " ".join(map(str, exported.batch_sizes)))
    setattr(row, f"{kind}_mb", round(exported.path.stat().st_size / 1e6, 2))
    if kind == "onnx":
        row.opset = exported.opset
        row.torch_ms, row.onnxruntime_ms = (round(1e3 * seconds, 2) for seconds in exported.seconds.values())
