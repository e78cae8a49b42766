"""The study of recoveries: its tables, by rows whose answers are known, and its tool on models that nobody trained."""

from __future__ import annotations

import csv
import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isomorphic.checkpoints.save import save_model
from isomorphic.commands.train_flags import parse_finetune_args
from isomorphic.models import build_model, describe_model
from studies.rows import read_rows, write_rows

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 2}),
    "resnet": ("resnet18", {"channels": [4, 6, 8, 8], "stem_width": 4}),
    "deit": ("deit_tiny_distilled_patch16_224", {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}),
}


@pytest.fixture(scope="module")
def tables() -> Any:
    return importlib.import_module("studies.recovery.tables")


@pytest.fixture(scope="module")
def ways() -> Any:
    return importlib.import_module("studies.recovery.ways")


@pytest.fixture(scope="module")
def models() -> Any:
    return importlib.import_module("studies.recovery.models")


@pytest.fixture
def study(run_study: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(run_study, "recovery", "--jobs", "1")


def save_dense(models: Any, folder: Path, family: str, seed: int = 0) -> nn.Module:
    """A model with random weights, where the study looks for a trained one."""
    torch.manual_seed(seed)
    name, kwargs = SMALL[family]
    spec = describe_model(name, kwargs={**kwargs, "num_classes": 10}, input_size=32)
    model = build_model(spec, pretrained=False).eval()
    path = models.dense_file(folder, family, seed)
    path.parent.mkdir(parents=True)
    save_model(path, model, spec, provenance={})
    return model


@pytest.fixture(scope="module")
def deit(models: Any, ways: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("study")
    save_dense(models, folder, "deit")
    return ways.open_subject(folder, "deit", 0)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def recovered(tables: Any, top1: dict[str, list[float]], table: str = "hidden") -> list[Any]:
    """Rows of one family at one share; each recovery has the top-1 of seed 0, 1, …"""
    return [
        tables.RecoveryRow(table, "deit", seed, 0.7, "isomorphic", recovery, 500_000, value)
        for recovery, values in top1.items()
        for seed, value in enumerate(values)
    ]


def test_rows_come_back_as_they_were_written(tables: Any, tmp_path: Path):
    rows = [
        tables.RecoveryRow("whole", "deit", 3, 0.25, "isomorphic", "plain", 123, 95.5, loss=0.25),
        tables.RecoveryRow("groups", "deit", 0, 0.5, "isomorphic", "compensate", 9, 50.0, None, "blocks.0", 0.5, 0.0),
        tables.RecoveryRow("finetuned", "deit", 0, 0.25, "isomorphic", "plain", 9, 50.0, epoch=0),
    ]
    write_rows(tmp_path / "rows.csv", tables.RecoveryRow, rows)
    assert read_rows(tmp_path / "rows.csv", tables.RecoveryRow) == rows


def test_rows_of_other_columns_are_refused(tables: Any, tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("table,family\nwhole,deit\n")
    with pytest.raises(RuntimeError, match=r"rows\.csv: remove it, and it is measured again"):
        read_rows(path, tables.RecoveryRow)


def test_recoveries_stand_side_by_side_with_what_stays_lost(tables: Any):
    rows = recovered(tables, {"dense": [98.0, 99.0], "plain": [90.0, 92.0], "compensate": [96.0, 97.0]})
    head, _, line, _, verdict = tables.recovery_table(rows)
    assert cells(head)[5:] == ["plain", "compensate"]
    assert cells(line) == ["deit", "70%", "0.50 M", "2", "98.50 ± 0.71", "91.00 ± 1.41", "96.50 ± 0.71"]
    assert verdict == "- deit, 70%: plain loses 7.50 points, compensate 2.00, 27% of that"


def test_what_the_stream_adds_is_told(tables: Any):
    top1 = {"dense": [98.0], "plain": [90.0], "compensate, hidden units": [95.5], "compensate": [97.0]}
    assert tables.recovery_table(recovered(tables, top1, "whole"))[-1] == (
        "- deit, 70%: plain loses 8.00 points, compensate 1.00, 12% of that; "
        "what reads residual streams accounts for +1.50 points"
    )


def test_a_loss_of_less_than_a_point_is_too_little_to_tell(tables: Any):
    rows = recovered(tables, {"dense": [98.0], "plain": [97.5], "compensate": [98.0]})
    assert tables.recovery_table(rows)[-1] == (
        "- deit, 70%: plain loses 0.50 points, too little to tell (compensate 0.00)"
    )


def test_a_searched_allocation_is_held_against_the_better_of_the_others(tables: Any):
    top1 = {"global": (80.0, 82.0), "isomorphic": (85.0, 87.0), "searched": (84.0, 87.5)}
    rows = [
        tables.RecoveryRow("allocation", "deit", seed, 0.5, allocation, "plain", 500_000, value)
        for allocation, values in top1.items()
        for seed, value in enumerate(values)
    ]
    line = cells(tables.allocation_table(rows)[-1])
    assert line[:5] == ["deit", "50%", "0.50 M", "plain", "2"]
    assert line[5:] == ["81.00 ± 1.41", "86.00 ± 1.41", "85.75 ± 2.47", "-0.25"]


def test_finetuning_counts_epochs_to_where_the_plain_start_ends(tables: Any):
    curves = {("plain", 0): (40, 90, 95), ("plain", 1): (50, 96, 94), ("compensate", 0): (80, 95, 96)}
    curves |= {("compensate", 1): (80, 91, 93)}
    rows = [
        tables.RecoveryRow("finetuned", "deit", seed, 0.25, "isomorphic", start, 250_000, float(value), epoch=epoch)
        for (start, seed), values in curves.items()
        for epoch, value in enumerate(values)
    ]
    plain, compensated = map(cells, tables.finetuned_table(rows)[2:4])
    assert plain == ["deit", "0.25 M", "2", "plain", "45.00 ± 7.07", "94.50 ± 0.71", "95.50 ± 0.71", "2, 1"]
    assert compensated[3:] == ["compensate", "80.00 ± 0.00", "94.50 ± 2.12", "94.50 ± 2.12", "1, never"]
    verdict = "- deit: compensate ends +0.00 points from plain, whose deviation is 0.71: not worse by more than that"
    assert tables.finetuned_table(rows)[-1] == verdict


def test_a_start_that_ends_worse_is_called_so(tables: Any):
    ends = {("plain", 0): 95.0, ("plain", 1): 96.0, ("compensate", 0): 94.0, ("compensate", 1): 95.0}
    rows = [
        tables.RecoveryRow("finetuned", "deit", seed, 0.25, "isomorphic", start, 1, end, epoch=epoch)
        for (start, seed), end in ends.items()
        for epoch in (0, 1)
    ]
    assert tables.finetuned_table(rows)[-1].endswith(
        "-1.00 points from plain, whose deviation is 0.71: worse by more than that"
    )


def test_one_seed_has_no_deviation(tables: Any):
    rows = [
        tables.RecoveryRow("finetuned", "deit", 0, 0.25, "isomorphic", start, 1, end, epoch=epoch)
        for start, end in (("plain", 95.0), ("compensate", 96.0))
        for epoch in (0, 1)
    ]
    assert tables.finetuned_table(rows)[-1] == "- deit: compensate ends +1.00 points from plain, of one seed"


def test_only_hidden_units_go_where_only_they_are_to(deit: Any, ways: Any):
    plan = ways.hidden_plan(deit, 0.5)
    lost = {group.name: len(plan.removed(group)) for group in deit.scored.graph.groups if plan.removed(group)}
    assert set(lost) <= {"blocks.0.mlp.fc1.weight:0", "blocks.1.mlp.fc1.weight:0"} and sum(lost.values()) == 64


def test_streams_are_what_several_layers_add_to(deit: Any, ways: Any):
    streams = [group.name for group in deit.scored.graph.groups if ways.is_stream(group)]
    assert streams == ["patch_embed.proj.weight:0"]


def test_the_mean_shift_changes_biases_alone(deit: Any, ways: Any):
    plan = ways.budget_plan(deit, 0.5)
    plain = ways.cut_by(deit, plan, "plain").state_dict()
    shifted = ways.cut_by(deit, plan, "mean shift").state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], shifted[name])}
    assert changed and all(name.endswith(".bias") for name in changed)


def test_without_the_stream_its_readers_stay_as_they_are(deit: Any, ways: Any):
    plan = ways.budget_plan(deit, 0.5)
    plain = ways.cut_by(deit, plan, "plain").state_dict()
    part = ways.cut_by(deit, plan, "compensate, hidden units").state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], part[name])}
    assert {"blocks.0.mlp.fc2.weight", "blocks.1.mlp.fc2.weight"} <= changed
    assert not {name for name in changed if ".fc1." in name or ".qkv." in name or name.startswith("head")}


def test_finetune_takes_the_words_of_the_study(models: Any):
    for family in models.FAMILIES:
        words = models.finetune_words(family, Path("dense.safetensors"), Path("p.safetensors"), Path("out"), 3)
        args = parse_finetune_args(words[1:])
        assert (args.seed, args.teacher_model, args.dataset) == (3, "dense.safetensors", "digits")


def test_teachers_are_trained_before_their_students():
    order = importlib.import_module("studies.recovery.__main__").training_order
    assert list(order(["deit", "resnet"])) == [["convnext", "resnet"], ["deit"]]
    assert list(order(["resnet"])) == [["resnet"]]


def test_what_was_measured_becomes_rows_and_a_page(models: Any, tmp_path: Path):
    study, path = importlib.import_module("studies.recovery.__main__"), tmp_path / "recovery.csv"
    save_dense(models, tmp_path, "deit")
    study.measure_part(tmp_path, study.Part("groups", "deit", 0))
    study.write(path, study.stored_rows(tmp_path))
    rows = list(csv.DictReader(path.open()))
    assert {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1"} <= {row["group"] for row in rows}
    assert all(0 <= float(row["after"]) <= float(row["before"]) for row in rows)
    assert f"| deit | {rows[0]['group']} | {float(rows[0]['before']):.4f} |" in path.with_suffix(".md").read_text()


@pytest.mark.slow
def test_the_tool_measures_what_is_missing_and_prints_all(study: Callable[..., Any], models: Any, tmp_path: Path):
    save_dense(models, tmp_path, "resnet")
    path = tmp_path / "recovery.csv"
    flags = ("--folder", tmp_path, "--families", "resnet", "--seeds", "0", "--csv", path)
    done = study("--tables", "whole", *flags)
    assert done.returncode == 0, done.stderr
    assert "measured: whole, resnet, seed 0" in done.stdout
    rows = list(csv.DictReader(path.open()))
    halves = {row["recovery"]: int(row["macs"]) for row in rows if row["share"] == "0.5"}
    assert {"plain", "mean shift", "compensate", "fusion, source", "bn", "compensate + bn"} <= set(halves)
    assert len(set(halves.values())) == 1  # all from one plan
    assert "| resnet | 50% |" in path.with_suffix(".md").read_text()
    again = study("--tables", "whole", *flags)
    assert again.returncode == 0 and "measured" not in again.stdout and "| resnet | 50% |" in again.stdout


@pytest.mark.slow
def test_the_tool_searches_allocations_and_finetunes(study: Callable[..., Any], models: Any, tmp_path: Path):
    for family in ("convnext", "deit"):
        save_dense(models, tmp_path, family)
    path = tmp_path / "recovery.csv"
    done = study("--folder", tmp_path, "--families", "deit", "--seeds", "0", "--csv", path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(path.open()))
    assert {row["table"] for row in rows} == {"hidden", "whole", "allocation", "finetuned", "groups"}
    searched = [row for row in rows if row["table"] == "allocation" and row["recovery"] == "compensate"]
    loss = {(row["share"], row["allocation"]): float(row["loss"]) for row in searched}
    for share in ("0.5", "0.25"):
        assert loss[share, "searched"] <= min(loss[share, "global"], loss[share, "isomorphic"])
    epochs = [int(row["epoch"]) for row in rows if row["table"] == "finetuned" and row["recovery"] == "plain"]
    assert epochs == list(range(11))
    run = json.loads((tmp_path / "finetuned/deit-0-plain/run.json").read_text())
    assert run
