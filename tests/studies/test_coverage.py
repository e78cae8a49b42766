"""The coverage benchmark: its lists of models, what it counts as width, and its rows for models that hold or fail."""

from __future__ import annotations

import csv
import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from tests.versions import IS_NEWEST_TIMM

REPOSITORY = Path(__file__).resolve().parents[2]
RESNET: dict[str, Any] = {"channels": [8, 12, 16, 24], "stem_width": 8, "num_classes": 10}


@pytest.fixture
def measuring() -> Any:
    """What -m studies.coverage does with one model."""
    return importlib.import_module("studies.coverage.model")


@pytest.fixture
def coverage(run_study: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(run_study, "coverage", "--jobs", "2")


def write_families(folder: Path, **sets: list[dict[str, Any]]) -> Path:
    path = folder / "families.json"
    path.write_text(json.dumps(sets))
    return path


def family(model: str, kwargs: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"model": model, "kwargs": kwargs, "input_size": 32, **options}


def test_the_lists_hold_the_models_that_they_promise():
    stored = json.loads((REPOSITORY / "benchmarks/families.json").read_text())
    assert {name: len(families) for name, families in stored.items()} == {"timm": 90, "torchvision": 22, "more": 50}
    names = [(entry.get("builder", "timm"), entry["model"]) for families in stored.values() for entry in families]
    assert len(set(names)) == 162
    known = {"timm": set(timm.list_models()), "torchvision": set(torchvision.models.list_models())}
    unknown = [name for builder, name in names if name not in known[builder]]
    assert unknown == [] or not IS_NEWEST_TIMM


def test_rows_of_models_that_hold_and_of_models_that_fail(coverage: Callable[..., Any], tmp_path: Path):
    families = write_families(
        tmp_path,
        timm=[family("resnet10t", RESNET), family("resnet14t", {**RESNET, "widths": 3})],
        torchvision=[family("alexnet", {"num_classes": 10}, builder="torchvision")],
    )
    flags = ("--families", families, "--set", "timm", "torchvision", "--csv", tmp_path / "rows.csv")
    done = coverage(*flags)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "rows.csv", newline="") as file:
        good, unknown_argument, too_small = csv.DictReader(file)

    assert (good["set"], good["model"], good["status"], good["frozen"]) == ("timm", "resnet10t", "ok", "")
    assert (
        int(good["width"]) == 6 + 8 + 16 + 3 * (8 + 12 + 16 + 24) and float(good["prunable"]) == 1
    )  # three convs a stage
    for ranking in ("local", "isomorphic"):
        assert 0.45 <= float(good[f"{ranking}_removed"]) <= 0.55
        assert 0.15 <= float(good[f"{ranking}_macs"]) <= 0.40
        assert float(good[f"{ranking}_error"]) < 1e-9
    assert unknown_argument["status"].startswith("build: UserError: cannot build resnet14t with")
    assert too_small["status"].startswith("build: ") and too_small["prunable"] == too_small["local_error"] == ""

    lines = done.stdout.splitlines()
    page = (tmp_path / "rows.md").read_text().splitlines()
    assert page[page.index("```") + 1 : -1] == lines[:4]  # the header and three rows
    assert f"resnet14t: {unknown_argument['status']}" in lines
    assert any(line.startswith("timm: 1 of 2 ran, 1 with at least 40%") for line in lines)
    assert any(line.startswith("torchvision: 0 of 1 ran, 0 with at least 40%") for line in lines)


def test_a_model_over_its_time_is_ended_and_named(coverage: Callable[..., Any], tmp_path: Path):
    families = write_families(tmp_path, timm=[family("vgg19", {}), family("resnet10t", RESNET)])
    done = coverage("--families", families, "--set", "timm", "--only", "vgg19", "--time-limit", "1")
    assert done.returncode == 0, done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("vgg19: ")]
    assert len(failed) == 1 and failed[0].endswith(": took longer than 1 s")
    assert "timm: 0 of 1 ran" in done.stdout and "Saving" not in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--only", "resnet0"), "resnet0: not in benchmarks/families.json under timm, torchvision, more"),
        (("--families", "nowhere.json"), "cannot read the lists of models in nowhere.json: "),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(coverage: Callable[..., Any], flags: tuple[str, ...], message: str):
    done = coverage(*flags)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"studies.coverage: {message}")


def test_random_weights_hold_no_zeros_and_known_statistics(measuring: Any):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.scale = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Parameter(torch.tensor(1e-6))
            self.conv.weight.data[0, 0] = 0.5
            nn.init.zeros_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) * self.scale

    torch.manual_seed(0)
    model, images = Model().eval(), torch.randn(4, 3, 5, 5)
    measuring.randomize(model, images)
    assert all(bool((parameter.abs() > 1e-4).all()) for parameter in model.parameters())
    torch.testing.assert_close(model.norm.running_mean, model.conv(images).mean((0, 2, 3)))
    assert model.norm.momentum == 0.1 and not model.training
    weight = torch.cat([p.flatten() for p in (model.norm.weight, model.norm.bias)])
    assert weight.unique().numel() == 8 and 0.05 <= model.scale.item() <= 0.15
