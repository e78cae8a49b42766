"""What is there already: results of minutes are replaced, those of hours and other people's files are not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from isomorphic.checkpoints.save import save_model
from isomorphic.commands.replacing import check_outputs, check_run_folder
from isomorphic.errors import UserError
from isomorphic.models import build_model, describe_model
from isomorphic.pruning.plan import PruningPlan, save_plan
from tests.faults import one_line

HEADER = "epoch,lr,train_loss\n"


def checkpoint(path: Path, **provenance: object) -> None:
    spec = describe_model("resnet10t", num_classes=3)
    save_model(path, build_model(spec), spec, provenance=dict(provenance))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    checkpoint(tmp_path / "pruned.safetensors", command="prune.py")
    checkpoint(tmp_path / "trained.safetensors", command="finetune.py", epoch=7)
    (tmp_path / "foreign.safetensors").write_bytes(b"weights of another program")
    save_plan(tmp_path / "plan.json", PruningPlan({}), (), {"model": "resnet10t"})
    (tmp_path / "results.json").write_text(json.dumps({"model": "resnet10t", "gmacs": 1.0}))
    (tmp_path / "results.csv").write_text("model,gmacs\nresnet10t,1.0\n")
    (tmp_path / "run.json").write_text(json.dumps({"command": "finetune.py", "gmacs": 1.0}))
    (tmp_path / "metrics.csv").write_text(HEADER)
    (tmp_path / "scores.png").write_bytes(b"\x89PNG tEXtSoftware\0Matplotlib version3")
    (tmp_path / "cat.png").write_bytes(b"\x89PNG a cat")
    return tmp_path


REPLACED = [
    ("--save-as", "pruned.safetensors"),
    ("--plan-file", "plan.json"),
    ("--results-file", "results.json"),
    ("--results-file", "results.csv"),
    ("--report", "scores.png"),
    ("--save-as", "new.safetensors"),
]
KEPT = [
    ("--save-as", "trained.safetensors", r"a trained model \(of epoch 7\)"),
    ("--save-as", "foreign.safetensors", "no checkpoint of a pruned model"),
    ("--results-file", "run.json", "no results file"),
    ("--results-file", "metrics.csv", "no results file"),
    ("--results-file", "plan.json", "no results file"),
    ("--plan-file", "results.json", "no plan"),
    ("--plan-file", "cat.png", "no plan"),
    ("--report", "cat.png", "no picture of scores"),
]


@pytest.mark.parametrize(("flag", "name"), REPLACED)
def test_what_the_same_command_has_written_is_replaced(flag: str, name: str, files: Path):
    check_outputs({flag: str(files / name)}, overwrite=False)


@pytest.mark.parametrize(("flag", "name", "what"), KEPT)
def test_what_it_has_not_written_stays_unless_it_may_go(flag: str, name: str, what: str, files: Path):
    path = str(files / name)
    with pytest.raises(UserError, match=f"{name} is {what}: choose another {flag}, or .*--overwrite") as error:
        check_outputs({"--save-as": None, flag: path}, overwrite=False)
    one_line(error)
    check_outputs({flag: path}, overwrite=True)


# --- folders of runs ---


def asked(folder: Path, resume: str | None = None, *, overwrite: bool = False) -> argparse.Namespace:
    return argparse.Namespace(output_dir=str(folder), resume=resume, overwrite=overwrite)


def test_a_folder_without_results_is_free(tmp_path: Path):
    check_run_folder(asked(tmp_path / "new"))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.csv").write_text(HEADER)  # of a run that was killed in its first epoch
    (tmp_path / "run.json").write_text("{}")
    check_run_folder(asked(tmp_path))
    check_run_folder(asked(tmp_path, "auto"))


@pytest.mark.parametrize("name", ["state.pt", "state.3.pt", "best.safetensors", "last.safetensors", "metrics.csv"])
def test_a_folder_with_results_is_named_with_the_ways_on(name: str, tmp_path: Path):
    (tmp_path / name).write_text(f"{HEADER}1,0.1,2.0\n")
    with pytest.raises(UserError, match=f"holds a run \\({name}\\): .* another --output-dir, .* --overwrite") as error:
        check_run_folder(asked(tmp_path))
    assert ("--resume auto" in one_line(error)) == name.startswith("state")
    check_run_folder(asked(tmp_path, overwrite=True))


def test_going_on_is_no_replacing(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        torch.save({}, tmp_path / folder / "state.pt")
    check_run_folder(asked(tmp_path / "a", "auto"))
    check_run_folder(asked(tmp_path / "a", str(tmp_path / "b" / ".." / "a" / "state.pt")))
    with pytest.raises(UserError, match="holds a run"):
        check_run_folder(asked(tmp_path / "a", str(tmp_path / "b" / "state.pt")))
    (tmp_path / "a" / "state.pt").rename(tmp_path / "a" / "best.safetensors")
    with pytest.raises(UserError, match="there is no training state to go on with"):
        check_run_folder(asked(tmp_path / "a", "auto"))
