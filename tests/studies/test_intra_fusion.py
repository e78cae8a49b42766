"""The comparison of Intra-Fusion with plain pruning: its models, its tool and its scripts."""

from __future__ import annotations

import copy
import csv
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isomorphic.commands.train_flags import parse_finetune_args
from isomorphic.measure.complexity import count_complexity
from isomorphic.models import build_model, describe_model
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.recovery.batch_norm import fold
from isomorphic.pruning.recovery.fusion import from_output, unmergeable
from isomorphic.pruning.recovery.watching import watch

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGE = torch.zeros(1, 3, 32, 32)
# python, or the interpreter that the scripts are told to use: notes its words, one call a line
RECORDER = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$RECORD"
"""


def cifar_model(name: str, **kwargs: int) -> nn.Module:
    spec = describe_model(f"{REPOSITORY}/examples/cifar_models.py:{name}", builder="file", kwargs=kwargs, input_size=32)
    return build_model(spec, pretrained=False).eval()


@pytest.fixture
def comparison() -> Any:
    return importlib.import_module("studies.intra_fusion.__main__")


@pytest.fixture
def compare(
    comparison: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """`compare(*flags)` runs the tool in this process on a narrow VGG11-BN: the lines that it prints."""
    model = ["--model", "examples/cifar_models.py:vgg11_bn", "--no-pretrained", "--model-kwargs", "width=4"]
    data = ["--dataset", "digits", "--input-size", "32", "--val-resize-size", "32", "--workers", "0"]

    def run(*flags: object) -> list[str]:
        monkeypatch.chdir(REPOSITORY)
        monkeypatch.setattr(sys, "argv", ["compare", *model, *data, "--device", "cpu", *map(str, flags)])
        comparison.main()
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize(
    ("name", "params", "macs", "groups"),
    [("vgg11_bn", 9_231_114, 153_500_682, 8), ("resnet18", 11_173_962, 556_651_530, 12)],
)
def test_the_models_are_those_of_the_paper(name: str, params: int, macs: int, groups: int):
    model = cifar_model(name)
    found = count_complexity(model, IMAGE)
    assert (found.params, found.macs_paper) == (params, macs)
    narrow = cifar_model(name, width=4, num_classes=7)
    graph, watched = trace_groups(narrow, IMAGE), watch(narrow, IMAGE)
    assert len(graph.groups) == groups and not unmergeable(narrow, graph, watched)
    assert narrow(IMAGE).shape == (1, 7)
    last = [module for module in narrow.modules() if isinstance(module, nn.Conv2d)][-1 if name == "vgg11_bn" else -2]
    assert from_output(graph, watched)[0].num_units == last.out_channels


def test_the_last_convolution_makes_group_0():
    model = cifar_model("resnet18", width=4)
    names = [group.name for group in from_output(trace_groups(model, IMAGE), watch(model, IMAGE))]
    assert names[:4] == [
        "blocks.6.conv2.weight:0",  # the last stage, of which blocks.7.conv2 is
        "blocks.7.conv1.weight:0",
        "blocks.6.conv1.weight:0",
        "blocks.4.conv2.weight:0",
    ]


def test_the_share_that_stays_is_rounded_down(comparison: Any):
    model = cifar_model("vgg11_bn", width=5)
    graph = trace_groups(model, IMAGE)
    group = next(group for group in graph.groups if group.num_units == 10)
    scores = torch.tensor([5.0, 9, 1, 1, 3, 0, 8, 7, 7, 2])
    kept = {s: comparison.plan_for(graph, group, scores, s).kept for s in (0.5, 0.55, 0.9, 0.99)}
    assert [units[group.name] for units in kept.values()] == [(0, 1, 6, 7, 8), (1, 6, 7, 8), (1,), (1,)]
    assert all(len(kept[0.5][g.name]) == g.num_units for g in graph.groups if g is not group)


def test_importance_is_that_of_the_folded_layers_alone(comparison: Any, monkeypatch: pytest.MonkeyPatch):
    model = cifar_model("vgg11_bn", width=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 2.0)
    graph, watched = trace_groups(model, IMAGE), watch(model, IMAGE)
    monkeypatch.setattr(sys, "argv", ["compare", "--model", "any"])
    spec: Any = None  # no images are needed
    scores = comparison.score_folded(comparison.parse_args(), "l1", model, spec, graph, watched)
    folded: Any = copy.deepcopy(model)
    fold(folded, watched.pairs)
    first, second = folded.features[0].weight, folded.features[4].weight
    expected = (first.abs().sum((1, 2, 3)) + second.abs().sum((0, 2, 3))) / 2
    torch.testing.assert_close(scores["features.0.weight:0"], expected.detach())


def test_rows_and_means_are_printed_and_written(compare: Callable[..., list[str]], tmp_path: Path):
    path = tmp_path / "rows.csv"
    lines = compare(
        *("--groups", 6, 7, "--sparsities", 0.5, "--criteria", "l1", "taylor", "--taylor-batches", 1),
        *("--normalizations", "source", "mass", "--masses", "importance", "--results-file", path),
    )
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["group"], row["producer"], row["units"], row["kept"], row["criterion"]) for row in rows] == [
        ("6", "features.4.weight", "8", "4", "l1"),
        ("7", "features.0.weight", "4", "2", "l1"),
        ("6", "features.4.weight", "8", "4", "taylor"),
        ("7", "features.0.weight", "4", "2", "taylor"),
    ]
    assert lines[0].startswith("Dense: ") and lines[2].split()[-3:] == ["plain", "source", "mass"]
    printed = [[float(word) for word in line.split()[-3:]] for line in lines[3:7]]
    written = [[float(row[column]) for column in ("plain", "source", "mass")] for row in rows]
    assert printed == [[pytest.approx(value, abs=0.006) for value in row] for row in written]
    mean = [float(word) for word in lines[8].split()[-3:]]
    assert mean == [pytest.approx(sum(column) / 2, abs=0.011) for column in zip(*written[:2], strict=True)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--groups", "-1"), "-1 is less than 0"),
        (("--sparsities", "1.0"), "1.0 is not in [0, 1)"),
        (("--results-file", "rows.json"), "must end in .csv"),
        (("--normalizations", "target"), "invalid choice: 'target'"),
    ],
)
def test_bad_flags_are_one_line(
    flags: tuple[str, ...],
    message: str,
    comparison: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys, "argv", ["compare", "--model", "any", *flags])
    with pytest.raises(SystemExit, match="2"):
        comparison.parse_args()
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_groups_that_cannot_be_merged_are_named(comparison: Any, capsys: pytest.CaptureFixture[str]):
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    inputs = torch.zeros(2, 4)
    chosen = comparison.chosen_groups(model, trace_groups(model, inputs), watch(model, inputs), None)
    assert [(number, group.name) for number, group in chosen.items()] == [(0, "2.weight:0")]
    assert "Group 1, 0.weight:0, is left out: 1 normalises it" in capsys.readouterr().out
    with pytest.raises(comparison.UserError, match="none of these groups"):
        comparison.chosen_groups(model, trace_groups(model, inputs), watch(model, inputs), [1])
    with pytest.raises(comparison.UserError, match="--groups 2: the model has 2 groups, 0 to 1"):
        comparison.chosen_groups(model, trace_groups(model, inputs), watch(model, inputs), [0, 2])


@pytest.mark.parametrize(("name", "groups"), [("vgg11_bn", 8), ("resnet18", 12)])
@pytest.mark.parametrize("cifar", [None, "a folder"])
def test_the_scripts_train_once_and_compare_all_groups(
    name: str, groups: int, cifar: str | None, comparison: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    python, record = tmp_path / "python", tmp_path / "record"
    python.write_text(RECORDER)
    python.chmod(0o755)
    environment = os.environ | {"ISOMORPHIC_PYTHON": str(python), "RECORD": str(record), "CIFAR10": cifar or ""}
    words = ["bash", f"scripts/intra_fusion/{name}.sh", "--sparsities", "0.5"]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    training, comparing = (line.replace("a folder", "a_folder").split() for line in record.read_text().splitlines())
    assert training[:3] == ["finetune.py", "--model", f"examples/cifar_models.py:{name}"]
    assert f"width={64 if cifar else 16}" in training
    args = parse_finetune_args(training[1:])
    assert (args.resume, args.no_pretrained, args.input_size) == ("auto", True, 32)
    assert comparing[:2] == ["-m", "studies.intra_fusion"]
    monkeypatch.setattr(sys, "argv", comparing[1:])
    wanted = comparison.parse_args()
    assert (wanted.model, wanted.dataset) == (f"{args.output_dir}/best.safetensors", args.dataset)
    assert wanted.dataset == ("torch/cifar10" if cifar else "digits")
    assert (wanted.groups, wanted.criteria, wanted.sparsities) == (list(range(groups)), ["l1", "taylor"], [0.5])
    assert wanted.taylor_batches == 5 and wanted.batch_size == 128 and wanted.normalizations == ["source", "mass"]
