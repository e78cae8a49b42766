"""The export study: what is in its list, what its rows hold, and how failures and missing libraries are told."""

from __future__ import annotations

import csv
import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isomorphic.errors import UserError
from studies.export import models
from studies.export.row import ExportRow
from tests.versions import needs_newest_export

pytestmark = needs_newest_export

study: Any = importlib.import_module("studies.export.__main__")


def test_the_list_holds_what_it_promises():
    names = [case.model for case in models.CASES]
    assert len(set(names)) == len(names)
    assert [case.model for case in models.CASES if case.set == "paper"] == list(models.SCRIPTS)
    others = {case.set for case in models.CASES} - {"paper", "quickstart"}
    assert {"torchvision", "transformers", "ultralytics", "segmentation-models-pytorch"} <= others
    assert sum(case.set in others for case in models.CASES) >= 10
    assert pickle.loads(pickle.dumps(models.CASES[0])) is models.CASES[0]


def test_the_scripts_budgets_are_what_is_asked_for():
    asked = models.find("deit_4.2G").asked()
    assert asked["macs"].value == 4.16e9 and (asked["criterion"], asked["round_to"]) == ("l1", 2)
    assert models.find("convnext_4.2G").asked()["remove_blocks"] == 18


def test_a_detector_s_raw_outputs_are_those_of_its_heads():
    class Detector(nn.Module):
        def __init__(self, **parts: nn.Module):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    class Backbone(nn.Module):
        def forward(self, images):
            return {"0": images, "pool": images[..., ::2, ::2]}

    class Head(nn.Module):
        def forward(self, maps):
            return [each.sum(dim=(1, 2, 3)) for each in maps]

    proposals = nn.Module()
    proposals.head = Head()
    for parts in ({"head": Head()}, {"rpn": proposals}):
        outputs = models.RawOutputs(Detector(backbone=Backbone(), **parts))(torch.ones(2, 3, 4, 4))
        assert [output.tolist() for output in outputs] == [[48, 48], [12, 12]]


@pytest.mark.slow
def test_a_row_of_the_quickstart_s_deit(run_study: Callable[..., Any], tmp_path: Path):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="needs the libraries of requirements-export.txt")
    done = run_study("export", "--only", "deit-25%", "--csv", tmp_path / "rows.csv")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "rows.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["set"], row["model"], row["status"]) == ("quickstart", "deit-25%", "ok")
    assert 0.2 < float(row["macs_left"]) < 0.3 and row["onnx_batches"] == row["pt2_batches"] == "1 3"
    assert 0 < float(row["onnx_difference"]) < 1e-5 and float(row["pt2_difference"]) < 1e-5
    assert float(row["torch_ms"]) > 0 and float(row["onnxruntime_ms"]) > 0
    page = (tmp_path / "rows.md").read_text()
    assert "- onnx: 1 of 1 within 1e-04 of the output's largest value; the largest difference is " in page
    assert done.stdout.splitlines()[1] in page.splitlines()


def test_what_failed_is_told_in_full_and_does_not_count():
    held = ExportRow("paper", "deit_4.2G", "ok", 20_000_000, 0.25, 2e-7, "output", "1 3", 80.0, 0.0)
    failed = ExportRow(
        "monai", "monai/unet", "onnx: UserError: torch has no ONNX for the operator aten.x", pt2_difference=2e-4
    )
    lines = study.summary([held, failed])
    assert lines[0] == "monai/unet: onnx: UserError: torch has no ONNX for the operator aten.x"
    assert lines[1].startswith("onnx: 1 of 2 within 1e-04") and lines[1].endswith("is 2.0e-07, of deit_4.2G")
    assert lines[2].startswith("pt2: 1 of 2 within 1e-04")
    assert study.cells(failed) == ("monai/unet", "–", "–", "–", "2.0e-04", "–", "–", "–", "–")


def test_libraries_that_are_not_here_and_names_that_are_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(study, "_is_here", lambda library: library in ("paper", "quickstart"))
    assert {case.set for case in study.choose([])} == {"paper", "quickstart"}
    assert "monai is not installed, left out: monai/unet\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing to measure: install studies/coverage/requirements.txt"):
        study.choose(["monai/unet"])
    with pytest.raises(UserError, match="resnet0: not in studies/export/models.py"):
        study.choose(["resnet0"])
