"""Number formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from isomorphic.checkpoints.open import load_model
from isomorphic.checkpoints.save import save_model
from isomorphic.errors import UserError
from isomorphic.models import build_model, describe_model
from isomorphic.training.precision import build_scaler, keep_depthwise_in_fp32, pick_amp_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_amp_is_fp16_on_cuda_as_published_and_bf16_elsewhere():
    assert pick_amp_dtype(None, CUDA) is torch.float16
    assert pick_amp_dtype(None, CPU) is torch.bfloat16
    assert pick_amp_dtype("bf16", CUDA) is torch.bfloat16
    with pytest.raises(UserError, match="fp16 needs a CUDA device.*--amp-dtype bf16"):
        pick_amp_dtype("fp16", CPU)


def test_only_fp16_is_scaled():
    assert build_scaler(torch.float16, CPU).is_enabled()
    assert not build_scaler(torch.bfloat16, CPU).is_enabled()
    assert not build_scaler(None, CPU).is_enabled()


def test_depthwise_convolutions_are_spared_bf16_on_a_cpu():
    depthwise, grouped, dense = nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3)
    images = torch.randn(2, 8, 9, 9)
    expected = depthwise(images)
    for device in (CUDA, CPU):  # on a GPU nothing changes
        keep_depthwise_in_fp32(nn.ModuleList([depthwise, grouped, dense]), torch.bfloat16, device)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [conv(images) for conv in (depthwise, grouped, dense)]
            assert dense(images).dtype == torch.bfloat16  # autocast goes on afterwards
        spared = device == CPU
        assert [output.dtype == torch.float32 for output in outputs] == [spared, False, False]
    assert torch.equal(outputs[0], expected)


def test_a_model_with_spared_convolutions_is_saved_as_any(tmp_path: Path):
    kwargs = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "num_classes": 3}
    spec = describe_model("convnext_atto", kwargs=kwargs, input_size=32)
    model = build_model(spec)
    keep_depthwise_in_fp32(model, torch.bfloat16, CPU)
    save_model(tmp_path / "net.safetensors", model, spec, provenance={})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_model(tmp_path / "net.safetensors")(images), model.eval()(images))
