"""The acceptance of the published DeiT-4.2G script at full size, with random weights and random images."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isomorphic.checkpoint import load_model, open_model
from isomorphic.models import example_inputs
from isomorphic.pruning.graph import trace_groups
from isomorphic.pruning.plan import load_plan
from isomorphic.pruning.surgery import cut

REPOSITORY = Path(__file__).resolve().parents[2]
DRY = ["--dataset", "synthetic", "--no-pretrained", "--taylor-batches", "1", "--batch-size", "4"]
FIGURES = re.compile(r"MACs: ([\d.]+) G => ([\d.]+) G.*\nParams: ([\d.]+) M => ([\d.]+) M")


def prune(folder: Path, *words: str) -> list[float]:
    """Runs the script and gives what it prints last: MACs (G) before and after, params (M) before and after."""
    outputs = ["--save-as", str(folder / "pruned.safetensors"), "--plan-file", str(folder / "plan.json")]
    done = subprocess.run(
        ["bash", str(REPOSITORY / "scripts" / "pruning" / "deit_4.2G.sh"), *DRY, *outputs, *words],
        env=os.environ | {"ISOMORPHIC_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    figures = FIGURES.search(done.stdout)
    assert figures is not None, done.stdout
    return [float(figure) for figure in figures.groups()]


@pytest.mark.slow
def test_deit_base_at_the_published_ratios(tmp_path: Path):
    macs, pruned_macs, params, pruned_params = prune(tmp_path)
    assert (macs, params) == (17.69, 87.34)
    assert 4.0 <= pruned_macs <= 4.3 and 20 <= pruned_params <= 21.5

    # the file computes what the model computes that the plan leaves
    torch.manual_seed(0)
    model, spec = open_model("deit_base_distilled_patch16_224.fb_in1k", pretrained=False)
    cut(model, trace_groups(model, example_inputs(spec)), load_plan(tmp_path / "plan.json"))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        logits = load_model(tmp_path / "pruned.safetensors")(images)
        torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-6)
    assert logits.std() > 1e-3


@pytest.mark.slow
def test_deit_base_at_a_budget(tmp_path: Path):
    macs, pruned_macs, *_ = prune(tmp_path, "--target-macs", "4.16G")
    assert macs == 17.69 and pruned_macs == pytest.approx(4.16, rel=0.005)
