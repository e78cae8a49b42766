"""What a run's folder holds."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isomorphic.checkpoints.open import load_model, read_header
from isomorphic.errors import UserError
from isomorphic.training.recipe import Recipe
from isomorphic.training.tracking import COLUMNS, EpochRow, RunFolder, check_free
from tests.faults import one_line

CPU = torch.device("cpu")
HEADER = "epoch,lr,train_loss\n"


def row(epoch: int, top1: float = 0.5) -> EpochRow:
    return EpochRow(epoch, 0.1, 2.0, 1.5, top1, 0.9, top1, 3.0, 100.0)


def epochs_in(folder: RunFolder) -> list[int]:
    with open(folder.path / "metrics.csv", newline="") as file:
        return [int(line["epoch"]) for line in csv.DictReader(file)]


def test_columns_are_the_documented_ones():
    assert ",".join(COLUMNS) == "epoch,lr,train_loss,val_loss,top1,top5,raw_top1,seconds,images_per_second"


def test_folder_of_a_run(make_recipe: Callable[..., Recipe], make_job: Callable, make_folder: Callable):
    recipe = make_recipe()
    _, state = make_job(recipe)
    folder = make_folder(recipe)
    folder.prepare(0, anew=True)
    state.end_epoch(0.5, 1.5)
    folder.keep(state, row(1, 0.5))
    best = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    with torch.no_grad():
        next(state.model.parameters()).add_(1.0)
    state.end_epoch(0.4, 1.5)
    folder.keep(state, row(2, 0.4))
    folder.save_state(state, CPU)

    assert sorted(path.name for path in folder.path.iterdir()) == [
        "best.safetensors",
        "last.safetensors",
        "metrics.csv",
        "run.json",
        "state.pt",
    ]
    assert json.loads((folder.path / "run.json").read_text()) == {"command": "a test"}
    assert epochs_in(folder) == [1, 2]
    for name, weights in (("best", best), ("last", state.model.state_dict())):
        loaded = load_model(folder.file(name)).state_dict()
        assert all(torch.equal(loaded[key], weights[key]) for key in weights)
    assert read_header(folder.file("best"))["provenance"] == {
        "command": "a test",
        "epoch": 1,
        "top1": 50.0,  # percent, as in results files
        "top5": 90.0,
        "loss": 1.5,
    }


def test_preparing_keeps_the_rows_of_finished_epochs_only(
    make_recipe: Callable[..., Recipe], make_job: Callable, make_folder: Callable
):
    recipe = make_recipe()
    _, state = make_job(recipe)
    folder = make_folder(recipe)
    folder.prepare(0, anew=True)
    for epoch in (1, 2, 3):
        folder.keep(state, row(epoch))
    folder.prepare(2, anew=False)
    assert epochs_in(folder) == [1, 2]
    folder.prepare(0, anew=True)
    assert epochs_in(folder) == []


def test_a_run_that_starts_anew_leaves_no_older_state_to_resume(
    make_recipe: Callable[..., Recipe], make_job: Callable, make_folder: Callable
):
    recipe = make_recipe()
    _, state = make_job(recipe)
    folder = make_folder(recipe)
    folder.prepare(0, anew=True)
    folder.save_state(state, CPU)
    folder.prepare(1, anew=False)  # goes on
    assert (folder.path / "state.pt").is_file()
    folder.prepare(0, anew=True)  # starts anew
    assert not (folder.path / "state.pt").exists()


# --- what is there already ---


def test_a_folder_without_results_is_free(tmp_path: Path):
    check_free(tmp_path / "new", None)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.csv").write_text(HEADER)  # of a run that was killed in its first epoch
    (tmp_path / "run.json").write_text("{}")
    check_free(tmp_path, None)
    check_free(tmp_path, "auto")


@pytest.mark.parametrize("name", ["state.pt", "state.3.pt", "best.safetensors", "last.safetensors", "metrics.csv"])
def test_a_folder_with_results_is_named_with_the_ways_on(name: str, tmp_path: Path):
    (tmp_path / name).write_text(f"{HEADER}1,0.1,2.0\n")
    with pytest.raises(UserError, match=f"holds a run \\({name}\\): .* another --output-dir, .* --overwrite") as error:
        check_free(tmp_path, None)
    assert ("--resume auto" in one_line(error)) == name.startswith("state")


def test_going_on_is_no_replacing(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        torch.save({}, tmp_path / folder / "state.pt")
    check_free(tmp_path / "a", "auto")
    check_free(tmp_path / "a", str(tmp_path / "b" / ".." / "a" / "state.pt"))
    with pytest.raises(UserError, match="holds a run"):
        check_free(tmp_path / "a", str(tmp_path / "b" / "state.pt"))
    (tmp_path / "a" / "state.pt").rename(tmp_path / "a" / "best.safetensors")
    with pytest.raises(UserError, match="there is no training state to go on with"):
        check_free(tmp_path / "a", "auto")
