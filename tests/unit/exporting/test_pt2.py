"""A .pt2 is written, read back in another process, and answers as the original does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import isomorphic as iso
from isomorphic.errors import UserError
from tests.unit.exporting import networks
from tests.versions import needs_newest_export

pytestmark = needs_newest_export


def test_any_batch_and_any_output(tmp_path: Path):
    model = networks.InObjects()
    exported = iso.export(model, {"scale": torch.ones(1, 1), "x": torch.randn(1, 4)}, tmp_path / "net.pt2")
    assert exported.batch_sizes == (1, 3) and exported.difference.value == 0 and exported.any_batch
    written = torch.export.load(tmp_path / "net.pt2").module()
    x, scale = torch.randn(5, 4), torch.randn(5, 1)
    boxes, pair = written(scale=scale, x=x)
    expected, spread = model.eval()(x, scale)
    assert torch.equal(boxes["corners"][1], expected.corners[1]) and boxes["count"] == 2
    assert torch.equal(pair["spread"], spread.spread)
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]


def test_the_model_is_left_as_it_was(tmp_path: Path):
    model = networks.Anchored().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    iso.export(model, torch.randn(1, 4), tmp_path / "net.pt2", half=True)
    assert model.training and model.shape is None and not model._forward_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_squeezed_batches_are_squeezed_as_in_the_original(tmp_path: Path):
    assert iso.export(networks.Squeezed(), torch.randn(2, 4), tmp_path / "net.pt2").batch_sizes == (1, 3)
    assert torch.export.load(tmp_path / "net.pt2").module()(torch.randn(1, 4)).shape == (4,)


def test_inputs_that_the_model_changes_stay(tmp_path: Path):
    x = torch.zeros(1, 4)
    iso.export(networks.ChangesItsInput(), x, tmp_path / "net.pt2")
    assert x.tolist() == [[0, 0, 0, 0]]


def test_a_list_of_images_is_a_fixed_batch(tmp_path: Path):
    images = [torch.randn(3, 4, 4) for _ in range(2)]
    exported = iso.export(networks.OfList(), (images,), tmp_path / "net.pt2")
    assert exported.batch_sizes == (2,) and not exported.any_batch
    assert "batches of 2 only" in str(exported)
    with pytest.raises(UserError, match="fixed_batch=4: the inputs have no batch"):
        iso.export(networks.OfList(), (images,), tmp_path / "other.pt2", fixed_batch=4)


def test_half_precision_is_compared_with_the_original_in_full(tmp_path: Path):
    exported = iso.export(networks.Alone(), torch.randn(1, 4), tmp_path / "net.pt2", half=True)
    assert 1e-5 < exported.difference.value < 5e-3 and exported.bound == 2e-2
    written = torch.export.load(tmp_path / "net.pt2").module()
    assert written(torch.zeros(1, 4).half()).dtype == torch.float16


def test_another_process_needs_torch_alone(tmp_path: Path):
    iso.export(nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)), torch.randn(1, 4), tmp_path / "net.pt2")
    code = "import torch, sys; net = torch.export.load('net.pt2').module(); print(net(torch.zeros(2, 4)).sum().item());"
    code += "assert not any(name.startswith('isomorphic') for name in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert float(done.stdout) == pytest.approx(2), done.stderr


def test_a_checkpoint_brings_its_preprocessing(tmp_path: Path):
    iso.export("pretrained/digits_deit.safetensors", None, tmp_path / "net.pt2")
    extra = {"preprocessing": ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    assert json.loads(extra["preprocessing"])["input_size"] == 32
