"""prune.py --steps: several cuts, and what stands in the place of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import isomorphic as iso
from isomorphic.checkpoints.open import read_header
from isomorphic.measure.complexity import count_complexity

CNN = """
from torch import nn
def build():
    layers = [nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()]
    layers += [nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 10))
"""
MODEL = ("--model", "cnn.py:build", "--no-pretrained", "--input-size", "8", "--device", "cpu", "--seed", "3")
DIGITS = ("--dataset", "digits", "--workers", "0", "--batch-size", "16", "--taylor-batches", "3")
POINTS = """
import torch
from torch import nn

passes = []

def build():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

def batches(split):
    passes.append(split)
    print(f"pass {len(passes)}")
    for seed in range(4):
        points = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        yield points, points.sum(1, keepdim=True)
"""
Call = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cnn.py").write_text(CNN)
    (tmp_path / "points.py").write_text(POINTS)
    return tmp_path


def weights(path: Path) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in load_file(path).items()}


def test_steps_are_one_plan_one_table_and_one_checkpoint(call: Call, folder: Path):
    budget = ("--pruning-type", "l2", "--ranking", "global", "--target-macs", "40%")
    done = call("prune.py", *MODEL, *DIGITS, *budget, "--steps", "5", "--plan-file", "plan.json",
                "--report", "page.html", "--results-file", "r.json", "--save-as", "steps.safetensors")  # fmt: skip
    assert (done.status, done.err) == (0, [])
    lines = done.out.splitlines()
    assert len([line for line in lines if line.startswith("class  first group")]) == 1
    assert len([line for line in lines if line.startswith("Self-check passed")]) == 1
    assert lines[-2] == "Saving the pruned model to steps.safetensors" and lines[-4].startswith("MACs: ")
    stored = read_header(folder / "steps.safetensors")["provenance"]
    assert stored["cut"]["asked"]["steps"] == stored["arguments"]["steps"] == 5
    results = json.loads((folder / "r.json").read_text())
    model: Any = iso.load_model(folder / "steps.safetensors", builder_file=folder / "cnn.py")
    image = torch.zeros(1, 3, 8, 8)
    assert results["macs"] == count_complexity(model, image).macs_paper
    table = [line.split() for line in lines[1:3]]
    assert table[0][4] == "12" and table[0][-1] == f"{model[0].out_channels / 12:.1%}", "of the dense model's units"

    again = call("prune.py", *MODEL, *DIGITS, "--from-plan", "plan.json", "--save-as", "at_once.safetensors")
    assert (again.status, again.err) == (0, [])
    assert weights(folder / "at_once.safetensors") == weights(folder / "steps.safetensors"), "nothing was trained"


def test_steps_do_what_they_do_in_python(call: Call, folder: Path):
    done = call("prune.py", *MODEL, *DIGITS, "--pruning-type", "l2", "--pruning-ratio", "0.5", "--steps", "3",
                "--plan-file", "plan.json", "--save-as", "a.safetensors")  # fmt: skip
    assert done.status == 0, done.err
    plan = call(
        "prune.py", *MODEL, *DIGITS, "--pruning-type", "l2", "--pruning-ratio", "0", "--save-as", "d.safetensors"
    )
    assert plan.status == 0
    dense = iso.load_model(folder / "d.safetensors", builder_file=folder / "cnn.py")
    pruned = iso.prune(dense, torch.zeros(1, 3, 8, 8), ratio=0.5, criterion="l2", steps=3)
    groups = json.loads((folder / "plan.json").read_text())["groups"]
    pruned.plan.save(folder / "python.json")
    assert json.loads((folder / "python.json").read_text())["groups"] == groups


def test_every_step_scores_on_all_images_and_recovers(call: Call, folder: Path):
    flags = ("--pruning-type", "taylor", "--target-macs", "50%", "--steps", "3", "--test-accuracy")
    done = call("prune.py", *MODEL, *DIGITS, *flags, "--recover", "compensate", "bn", "--calibration-batches", "2")
    assert (done.status, done.err) == (0, [])
    lines = done.out.splitlines()
    start = lines.index("Around the last of 3 cuts:")
    (judged,) = [line.split() for line in lines[start:] if line.startswith("  bn ")]
    assert f"Recalibrated: {'no' if judged[-1] == 'undone' else '2'} batch norms" in lines[start:]
    assert [line.split(":")[0] for line in lines if line.startswith(("Before", "After"))] == ["Before", "After"]


def test_batches_of_ones_own_begin_anew_in_each_step(call: Call, folder: Path):
    done = call("prune.py", "--model", "points.py:build", "--no-pretrained", "--taylor-batches", "4", "--device", "cpu",
                "--target-params", "50%", "--steps", "4", "--save-as", "p.safetensors")  # fmt: skip
    assert (done.status, done.err) == (0, [])
    model: Any = iso.load_model(folder / "p.safetensors", builder_file=folder / "points.py")
    assert model[0].out_features == 7  # 8 params each, and 1, of 129
    passes = [line for line in done.out.splitlines() if line.startswith("pass ")]
    assert len(passes) >= 4


def test_a_budget_out_of_reach_is_one_line(call: Call, folder: Path):
    done = call("prune.py", *MODEL, *DIGITS, "--pruning-type", "l2", "--target-macs", "100", "--steps", "3")
    assert done.status == 1 and len(done.err) == 1
    assert not (folder / "output").exists() or not list((folder / "output").rglob("*.safetensors"))
