"""What cannot be exported is said in one line, and nothing is left behind."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import isomorphic as iso
from isomorphic.errors import UserError
from isomorphic.exporting import pt2
from isomorphic.exporting.answers import Difference
from isomorphic.exporting.result import Exported
from tests.unit.exporting import networks

IMAGE = torch.randn(1, 4)


@pytest.mark.parametrize("name", ["net.pth", "net", "deit_4.2G", "net.onnx.zip"])
def test_another_ending(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=r"must end in .onnx, .pt2, or / for a folder"):
        iso.export(networks.Alone(), IMAGE, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_target_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*net.pt2: Not a directory"):
        iso.export(networks.Alone(), IMAGE, tmp_path / "file" / "net.pt2")


@pytest.mark.parametrize(
    ("model", "inputs", "told"),
    [
        (networks.Alone, IMAGE, "the model is a class, Alone"),
        (3, IMAGE, "the model is int, not a torch.nn.Module"),
        (nn.DataParallel(networks.Alone()), IMAGE, "wrapped in DataParallel: export model.module$"),
        (nn.Sequential(nn.LazyLinear(4)), IMAGE, "lazy layers, which have no weights yet: run it once"),
        (networks.Alone(), None, "inputs is missing: give a tensor"),
        (networks.Alone(), [IMAGE], "inputs is list: give a tensor"),
        (networks.Alone(), torch.randn(1, 3), "does not take these inputs"),
        (networks.Branch(), IMAGE, "torch.export cannot capture the model at"),
    ],
)
def test_what_is_no_model_or_no_input(tmp_path: Path, model: nn.Module, inputs: torch.Tensor, told: str):
    (tmp_path / "net.pt2").write_text("what was there")
    with pytest.raises(UserError, match=told):
        iso.export(model, inputs, tmp_path / "net.pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]
    assert (tmp_path / "net.pt2").read_text() == "what was there"


def test_a_difference_above_the_bound_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pt2, "check_pt2", lambda path, answers: Difference(2e-4, "output['logits']", 3))
    told = r"net.pt2 is not kept: output\['logits'\] of a batch of 3 differs .* by 2.0e-04 of the output's largest"
    with pytest.raises(UserError, match=told):
        iso.export(networks.Alone(), IMAGE, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_a_difference_that_is_no_number_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pt2, "check_pt2", lambda path, answers: Difference(float("nan"), "output", 1))
    with pytest.raises(UserError, match="is not kept"):
        iso.export(networks.Alone(), IMAGE, tmp_path / "net.pt2")


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pt2, "check_pt2", interrupt)
    with pytest.raises(KeyboardInterrupt):
        iso.export(networks.Alone(), IMAGE, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_options_that_the_kind_of_output_has_not(tmp_path: Path):
    with pytest.raises(UserError, match="an opset is of ONNX, and .*net.pt2 is none"):
        iso.export(networks.Alone(), IMAGE, tmp_path / "net.pt2", opset=20)
    with pytest.raises(UserError, match="is a folder, made of a checkpoint: save the model first"):
        iso.export(networks.Alone(), IMAGE, f"{tmp_path}/net/")
    with pytest.raises(UserError, match="without opset, half, fixed_batch and latency"):
        iso.export("pretrained/digits_deit.safetensors", None, f"{tmp_path}/net/", half=True)
    with pytest.raises(TypeError, match="unexpected keyword arguments for a module: bilder"):
        iso.export(networks.Alone(), IMAGE, tmp_path / "net.pt2", bilder="timm")


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    for other in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, other, nn)  # as if it were there
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"^{name} is not installed, and ONNX needs it: pip install onnx onnxscript"):
        iso.export(networks.Alone(), IMAGE, tmp_path / "net.onnx")


def test_latency_stands_beside_the_originals(tmp_path: Path):
    exported = iso.export(networks.Alone(), IMAGE, tmp_path / "net.pt2", latency=True)
    assert list(exported.seconds) == ["torch", ".pt2"] and min(exported.seconds.values()) > 0
    assert str(exported).splitlines()[2].startswith("Latency: torch ")


def test_what_was_written_prints_as_a_person_reads_it(tmp_path: Path):
    file = tmp_path / "net.onnx"
    file.write_bytes(bytes(20_000))
    exported = Exported(file, (1, 3), Difference(3.14e-7, "output", 3), 1e-4, opset=20)
    assert str(exported) == (
        f"{file}: 0.02 MB, opset 20, any batch size\n"
        "Largest difference: 3.1e-07 of the output's largest value, at most 1e-04 (batch 1 and 3)"
    )


def test_a_script_module_is_named(tmp_path: Path):
    model = torch.jit.trace(networks.Alone(), IMAGE)
    with pytest.raises(UserError, match=r"ScriptModule, .*: export the module that it was made from$"):
        iso.export(model, IMAGE, tmp_path / "net.pt2")  # type: ignore[arg-type]


def test_the_name_stays_a_function_once_its_modules_are_imported():
    assert importlib.import_module("isomorphic.exporting.face").export is iso.export
