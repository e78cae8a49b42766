"""What is there already: results of minutes are replaced, those of hours and other people's files are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isomorphic.checkpoints.save import save_model
from isomorphic.commands.replacing import check_outputs
from isomorphic.errors import UserError
from isomorphic.models import build_model, describe_model
from isomorphic.pruning.plan import PruningPlan, save_plan
from tests.faults import one_line


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
    (tmp_path / "metrics.csv").write_text("epoch,lr,train_loss\n")
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
