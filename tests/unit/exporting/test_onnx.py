"""ONNX is written, read back by onnxruntime, and answers as the original does, in any batch, opset and precision."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import isomorphic as iso
from isomorphic.errors import UserError
from isomorphic.exporting import onnx as writer
from isomorphic.models import build_model, describe_model, example_inputs
from tests.unit.exporting import networks
from tests.versions import needs_newest_export

pytestmark = needs_newest_export

NEEDED = "needs the libraries of requirements-export.txt"
onnx = pytest.importorskip("onnx", reason=NEEDED)
onnxruntime: Any = pytest.importorskip("onnxruntime", reason=NEEDED)
pytest.importorskip("onnxscript", reason=NEEDED)

# The paper's five families, small: name, arguments, side of the image.
SMALL_DEIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
FAMILIES = {
    "deit": ("deit_tiny_distilled_patch16_224", SMALL_DEIT, 16),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 28, "embed_dim": 12, "depths": [2], "num_heads": [2]}, 28),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}, 32),
    "resnet": ("resnet10t", {"stem_width": 8, "channels": [8, 16, 16, 24]}, 32),
    "mobilenet_v2": ("mobilenet_v2", {"inverted_residual_setting": [[1, 8, 1, 1], [6, 8, 2, 2]]}, 32),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_papers_families(tmp_path: Path, family: str):
    name, kwargs, size = FAMILIES[family]
    builder = "torchvision" if family == "mobilenet_v2" else "timm"
    spec = describe_model(name, builder=builder, kwargs={**kwargs, "num_classes": 10}, input_size=size)
    model = build_model(spec)
    exported = iso.export(model, example_inputs(spec), tmp_path / "net.onnx")
    assert exported.batch_sizes == (1, 3) and exported.difference.value < 1e-5
    (image,) = onnx.load(tmp_path / "net.onnx").graph.input
    assert [dim.dim_param or dim.dim_value for dim in image.type.tensor_type.shape.dim] == ["batch", 3, size, size]


def run(path: Path, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of a file for some inputs, in order."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    outputs = session.run(None, dict(zip(names, (tensor.numpy() for tensor in tensors), strict=True)))
    return [torch.from_numpy(output) for output in outputs]


def names(path: Path) -> tuple[list[str], list[str]]:
    graph = onnx.load(path).graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


def test_outputs_of_all_kinds_are_named_by_their_places(tmp_path: Path):
    model, path = networks.InDict(), tmp_path / "net.onnx"
    iso.export(model, torch.randn(1, 4), path)
    assert names(path) == (["x"], ["logits", "again", "input", "ones"])
    x = torch.randn(2, 4)
    logits, again, image, ones = run(path, x)
    assert torch.allclose(logits, model.layer(x), atol=1e-6) and torch.equal(logits, again)
    assert torch.equal(image, x) and ones.tolist() == [1, 1]


def test_objects_and_keyword_inputs(tmp_path: Path):
    model, path = networks.InObjects(), tmp_path / "net.onnx"
    iso.export(model, {"scale": torch.full((1, 1), 2.0), "x": torch.randn(1, 4)}, path)
    assert names(path)[1] == [
        "output_0_scores", "output_0_corners_0", "output_0_corners_1", "output_1_0", "output_1_1"]  # fmt: skip
    x, scale = torch.randn(5, 4), torch.randn(5, 1)
    feed = {"x": x, "scale": scale}
    found = run(path, *(feed[name] for name in names(path)[0]))
    boxes, pair = model(x, scale)
    for given, expected in zip(found, [boxes.scores, *boxes.corners, *pair], strict=True):
        assert torch.allclose(given, expected, atol=1e-5)


@pytest.mark.parametrize("opset", [18, 23])
def test_the_opset_is_the_one_that_was_asked_for(tmp_path: Path, opset: int):
    assert iso.export(networks.Alone(), torch.randn(1, 4), tmp_path / "net.onnx", opset=opset).opset == opset
    (imported,) = [entry.version for entry in onnx.load(tmp_path / "net.onnx").opset_import if not entry.domain]
    assert imported == opset


@pytest.mark.parametrize("opset", [1, 17, 999])
def test_an_opset_that_does_not_exist(tmp_path: Path, opset: int):
    with pytest.raises(UserError, match=rf"there is no opset {opset} to write: choose one of 18 to \d+$"):
        iso.export(networks.Alone(), torch.randn(1, 4), tmp_path / "net.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_torch_does_not_reach(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    newest = onnx.defs.onnx_opset_version()
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    try:
        assert iso.export(model, torch.randn(1, 4), tmp_path / "net.onnx", opset=newest).opset == newest
    except UserError as error:  # the newest of onnx is often newer than what torch can write
        assert f"torch cannot write this model in opset {newest}, only in " in str(error)
        assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_an_operator_without_onnx_is_named_with_its_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(UserError) as caught:
        iso.export(networks.Singular(), torch.randn(1, 4), tmp_path / "net.onnx")
    told = str(caught.value)
    assert told.startswith("torch has no ONNX for the operator aten._linalg_svd at tests/unit/exporting/networks.py:")
    assert "`return torch.linalg.svd(self.layer(x).unsqueeze(1)).S`; rewrite that line" in told
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_attention_whose_kernels_lay_their_result_out_differently(tmp_path: Path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x, mask):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.out(mixed.transpose(1, 2).reshape(*x.shape[:-1], -1).contiguous())

    exported = iso.export(Attention(), (torch.randn(1, 5, 8), torch.randn(1, 1, 5, 5)), tmp_path / "net.onnx")
    assert exported.difference.value < 1e-5


def test_half_precision(tmp_path: Path):
    exported = iso.export(networks.Alone(), torch.randn(1, 4), tmp_path / "net.onnx", half=True)
    assert 1e-5 < exported.difference.value < 5e-3 and exported.bound == 2e-2
    (weight, *_) = onnx.load(tmp_path / "net.onnx").graph.initializer
    assert weight.data_type == onnx.TensorProto.FLOAT16


def test_bfloat16_is_refused_with_what_to_do(tmp_path: Path):
    with pytest.raises(UserError, match=r"does not run bfloat16 on a CPU: export model.float\(\), or in half"):
        iso.export(networks.Alone().bfloat16(), torch.randn(1, 4).bfloat16(), tmp_path / "net.onnx")


def test_more_weights_than_a_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "MOST_BYTES", 79)
    with pytest.raises(UserError, match=r"GB of weights are more than one ONNX file holds: export a .pt2"):
        iso.export(networks.Alone(), torch.randn(1, 4), tmp_path / "net.onnx")


def test_a_file_that_onnxruntime_does_not_take(tmp_path: Path):
    (tmp_path / "net.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="onnxruntime does not take what torch has written: "):
        writer.check_onnx(tmp_path / "net.onnx", [])


def test_logs_and_warnings_are_as_before(tmp_path: Path):
    logging.getLogger("onnxscript").setLevel(logging.NOTSET)
    before = logging.root.manager.disable
    iso.export(networks.Looped(), torch.randn(3, 4), tmp_path / "net.onnx", fixed_batch=True)
    assert logging.root.manager.disable == before


# Reads an image of the digits as the file says, and prints the top-1: nothing but numpy and onnxruntime.
ELSEWHERE = """
import json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
images = numpy.load("images.npy")
guesses = session.run(None, {session.get_inputs()[0].name: images})[0].argmax(1)
print(json.dumps({"guesses": guesses.tolist(), "about": session.get_modelmeta().custom_metadata_map}))
assert not {"torch", "timm", "onnx", "isomorphic"} & set(sys.modules)
"""


def test_a_pruned_model_in_a_process_of_numpy_and_onnxruntime(tmp_path: Path):
    numpy = pytest.importorskip("numpy")
    model = iso.load_model("pretrained/digits_deit.safetensors")
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pruned = iso.prune(model, images[:1], macs="60%", criterion="l1")
    kwargs = {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 10, "img_size": 32}
    pruned.save(tmp_path / "net.safetensors", name="deit_tiny_distilled_patch16_224", kwargs=kwargs)
    iso.export(tmp_path / "net.safetensors", None, tmp_path / "net.onnx")
    numpy.save(tmp_path / "images.npy", images.numpy())
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["guesses"] == pruned.model.eval()(images).argmax(1).tolist() and len(set(told["guesses"])) > 1
    assert json.loads(told["about"]["preprocessing"])["input_size"] == 32
