"""A checkpoint's model for images of another size: positions are resampled at whatever width they were pruned to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from isomorphic.checkpoints.open import load_model, open_model
from isomorphic.checkpoints.save import save_model
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, describe_model, example_inputs
from tests.faults import one_line
from tests.unit.checkpoints.conftest import CONVNEXT, VIT, pruned

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}
SWIN = describe_model("swin_tiny_patch4_window7_224", input_size=56,
                      kwargs={"embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 6]})  # fmt: skip
BEIT = describe_model("beit_base_patch16_224", kwargs=TINY, input_size=32)
CAIT = describe_model("cait_xxs24_224", kwargs=TINY, input_size=32)
LEVIT = describe_model("levit_128s", kwargs={"num_classes": 10}, input_size=64)


def saved(spec: ModelSpec, folder: Path) -> tuple[nn.Module, Path]:
    model = pruned(spec)
    save_model(folder / "m.safetensors", model, spec, provenance={})
    return model.eval(), folder / "m.safetensors"


@pytest.mark.parametrize("spec", [VIT, SWIN, BEIT, CAIT], ids=lambda spec: spec.name)
def test_tables_of_a_pruned_model_are_resampled(spec: ModelSpec, tmp_path: Path):
    model, path = saved(spec, tmp_path)
    size = 2 * spec.preprocessing.input_size
    lines: list[str] = []
    resized, after = open_model(path, input_size=size, tell=lines.append)
    assert after.kwargs["img_size"] == after.preprocessing.input_size == size
    assert len(lines) == 1 and lines[0].startswith(f"{path}: resampled to the model's input size: ")
    before, state = model.state_dict(), resized.state_dict()
    tables = {name for name in before if state[name].shape != before[name].shape}
    assert tables and all("pos_embed" in name or "position" in name for name in tables)
    assert all(torch.equal(state[name], before[name]) for name in before.keys() - tables)
    save_model(tmp_path / "again.safetensors", resized, after, provenance={})
    image = example_inputs(after)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "again.safetensors")(image), resized(image))
    _, unchanged = open_model(path, input_size=size // 2, tell=lines.append)
    assert unchanged == spec and len(lines) == 1


def test_resampling_is_timms_own(tmp_path: Path):
    from timm.layers.pos_embed import resample_abs_pos_embed

    model, path = saved(VIT, tmp_path)
    table = model.get_parameter("pos_embed")
    expected = resample_abs_pos_embed(table, new_size=[4, 4], num_prefix_tokens=2)
    assert torch.equal(load_model(path, input_size=32).get_parameter("pos_embed"), expected)


def test_a_model_without_tables_is_left_as_it_is(tmp_path: Path):
    model, path = saved(CONVNEXT, tmp_path)
    opened, spec = open_model(path, input_size=64)
    assert spec.kwargs == CONVNEXT.kwargs
    assert (spec.preprocessing.input_size, spec.preprocessing.resize_size) == (64, 73)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in opened.state_dict().items())


def test_tables_that_cannot_be_resampled_are_named_in_one_line(tmp_path: Path):
    _, path = saved(LEVIT, tmp_path)
    with pytest.raises(UserError, match="does not take images of 128×128 pixels, and its positions cannot be") as error:
        open_model(path, input_size=128)
    assert "stages.0.blocks.0.attn.attention_biases is (" in one_line(error)
