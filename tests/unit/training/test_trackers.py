"""TensorBoard and W&B, played by modules that record what they are asked, or raise."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from isomorphic.commands import train
from isomorphic.errors import UserError
from isomorphic.processes import distributed
from isomorphic.training import trackers
from isomorphic.training.trackers import Trackers, open_trackers
from isomorphic.training.tracking import EpochRow

Calls = list[tuple[Any, ...]]


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


def fail(message: str) -> Callable[..., Any]:
    def raising(*args: Any, **kwargs: Any) -> Any:
        raise OSError(message)

    return raising


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Both packages are installed, and what they are asked stands here."""
    made: Calls = []

    class Writer:
        def __init__(self, **kwargs: Any) -> None:
            made.append(("writer", kwargs))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            made.append(("scalar", name, value, step))

        def close(self) -> None:
            made.append(("close",))

    class Run:
        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            made.append(("metric", name, step_metric))

        def log(self, values: dict[str, float]) -> None:
            made.append(("log", values))

        def finish(self) -> None:
            made.append(("finish",))

    def init(**kwargs: Any) -> Run:
        made.append(("init", kwargs))
        return Run()

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module("fake", SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=init, Run=Run))
    for name in ("WANDB_RUN_ID", "WANDB_FINISH_TIMEOUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return made


@pytest.fixture
def open_both(tmp_path: Path) -> Callable[..., Trackers]:
    def opened(**changes: Any) -> Trackers:
        options: dict[str, Any] = {"tensorboard": True, "wandb_project": "pruning"}
        return open_trackers(tmp_path, "deit", {"lr": 0.1}, **(options | changes))

    return opened


def named(calls: Calls, name: str) -> Calls:
    return [call[1:] for call in calls if call[0] == name]


def warnings_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_values_reach_both(calls: Calls, open_both: Callable[..., Trackers], tmp_path: Path):
    opened = open_both()
    opened.log(3, {"train/loss": 2.5, "lr": 0.1})
    opened.log(6, {"train/loss": 2.0})
    opened.close()
    assert named(calls, "writer") == [({"log_dir": str(tmp_path / "tensorboard"), "purge_step": 0},)]
    assert named(calls, "scalar") == [("train/loss", 2.5, 3), ("lr", 0.1, 3), ("train/loss", 2.0, 6)]
    ((options,),) = named(calls, "init")
    run_id = options.pop("id")
    assert options == {
        "project": "pruning", "name": "deit", "dir": str(tmp_path), "config": {"lr": 0.1}, "resume": "allow"
    }  # fmt: skip
    assert re.fullmatch("[0-9a-f]{8}", run_id)
    assert named(calls, "metric") == [("step", None), ("*", "step")]
    assert named(calls, "log") == [({"step": 3, "train/loss": 2.5, "lr": 0.1},), ({"step": 6, "train/loss": 2.0},)]
    assert calls[-2:] == [("close",), ("finish",)]


def test_nothing_is_opened_unless_asked_for(calls: Calls, tmp_path: Path):
    opened = open_trackers(tmp_path, "deit", {}, tensorboard=False, wandb_project=None)
    opened.log(1, {"loss": 1.0})
    opened.close()
    assert calls == [] and list(tmp_path.iterdir()) == []


def test_each_can_be_had_alone(calls: Calls, open_both: Callable[..., Trackers], tmp_path: Path):
    open_both(wandb_project=None).log(1, {"loss": 1.0})
    assert [call[0] for call in calls] == ["writer", "scalar"] and list(tmp_path.iterdir()) == []
    calls.clear()
    open_both(tensorboard=False).log(1, {"loss": 1.0})
    assert [call[0] for call in calls] == ["init", "metric", "metric", "log"]


def test_only_the_main_process_opens_any(
    calls: Calls, open_both: Callable[..., Trackers], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    opened = open_both()
    opened.log(1, {"loss": 1.0})
    opened.close()
    assert calls == []


def test_a_resumed_run_goes_on_in_the_same_places(calls: Calls, open_both: Callable[..., Trackers], tmp_path: Path):
    open_both()
    open_both(resumed_step=40)
    open_both()  # starts anew
    assert [options["purge_step"] for (options,) in named(calls, "writer")] == [0, 41, 0]
    first, second, third = (options["id"] for (options,) in named(calls, "init"))
    assert first == second != third
    assert (tmp_path / trackers.ID_FILE).read_text() == third + "\n"


def test_a_run_that_had_no_id_gets_one_when_resumed(calls: Calls, open_both: Callable[..., Trackers], tmp_path: Path):
    open_both(resumed_step=40)
    ((options,),) = named(calls, "init")
    assert (tmp_path / trackers.ID_FILE).read_text() == options["id"] + "\n"


def test_the_environment_may_name_the_run_and_its_patience(
    calls: Calls, open_both: Callable[..., Trackers], monkeypatch: pytest.MonkeyPatch
):
    open_both()
    assert os.environ["WANDB_FINISH_TIMEOUT"] == "15"
    monkeypatch.setenv("WANDB_RUN_ID", "sweep-7")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "5")
    open_both()
    assert named(calls, "init")[-1][0]["id"] == "sweep-7"
    assert os.environ["WANDB_FINISH_TIMEOUT"] == "5"


@pytest.mark.parametrize(
    ("package", "flag", "options"),
    [("tensorboard", "--tensorboard", {"wandb_project": None}), ("wandb", "--wandb-project", {"tensorboard": False})],
)
def test_a_package_that_is_not_installed_stops_the_run(
    package: str,
    flag: str,
    options: dict[str, Any],
    open_both: Callable[..., Trackers],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    with pytest.raises(UserError) as raised:
        open_both(**options)
    assert str(raised.value) == f"{flag} needs the package {package}: pip install {package}"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_called_wandb_is_not_the_package(open_both: Callable[..., Trackers], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", module("wandb"))  # what importing such a folder gives
    with pytest.raises(UserError, match="^--wandb-project needs the package wandb: pip install wandb$"):
        open_both(tensorboard=False)


def test_a_broken_installation_is_one_line(
    calls: Calls, open_both: Callable[..., Trackers], monkeypatch: pytest.MonkeyPatch
):
    def broken(name: str) -> Any:
        raise TypeError("Descriptors cannot be created directly.\nIf this call came from a _pb2.py file, …")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(UserError) as raised:
        open_both()
    assert str(raised.value) == (
        "--tensorboard needs the package tensorboard: pip install tensorboard (Descriptors cannot be created directly.)"
    )


def test_all_processes_hear_of_a_missing_package(
    calls: Calls, open_both: Callable[..., Trackers], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [["of the main process"], mine])
    with pytest.raises(UserError, match="^of the main process$"):
        open_both()
    assert calls == []


def test_what_cannot_be_opened_is_off_and_the_other_goes_on(
    calls: Calls,
    open_both: Callable[..., Trackers],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys.modules["wandb"], "init", fail("no API key configured\nUse `wandb login`"))
    opened = open_both()
    assert warnings_of(capsys) == ["warning: wandb is off from here on (no API key configured); training goes on"]
    opened.log(1, {"loss": 1.0})
    opened.close()
    assert warnings_of(capsys) == []
    assert [call[0] for call in calls] == ["writer", "scalar", "close"]


def test_what_fails_while_logging_is_off_after_one_line(
    calls: Calls,
    open_both: Callable[..., Trackers],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    opened = open_both()
    writer = vars(sys.modules["torch.utils.tensorboard"])["SummaryWriter"]
    monkeypatch.setattr(writer, "add_scalar", fail("No space left on device"))
    for step in (1, 2, 3):
        opened.log(step, {"loss": 1.0})
    opened.close()
    assert warnings_of(capsys) == [
        "warning: tensorboard is off from here on (No space left on device); training goes on"
    ]
    assert [call[0] for call in calls if call[0] not in ("init", "metric", "writer")] == ["log"] * 3 + ["finish"]


def test_what_fails_at_the_end_is_one_line(
    calls: Calls,
    open_both: Callable[..., Trackers],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(vars(sys.modules["wandb"])["Run"], "finish", fail(""))
    opened = open_both()
    opened.close()
    opened.close()
    assert warnings_of(capsys) == ["warning: wandb is off from here on (OSError); training goes on"]
    assert named(calls, "close") == [()]


def test_a_folder_that_cannot_be_written_turns_wandb_off(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    opened = open_trackers(tmp_path / "file", "deit", {}, tensorboard=False, wandb_project="pruning")
    opened.log(1, {"loss": 1.0})
    (line,) = warnings_of(capsys)
    assert line.startswith("warning: wandb is off from here on (cannot write ") and calls == []


def test_control_c_while_opening_ends_the_run(
    calls: Calls, open_both: Callable[..., Trackers], monkeypatch: pytest.MonkeyPatch
):
    def interrupted(**options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["wandb"], "init", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_both()


def test_importing_the_module_imports_neither():
    code = (
        "import sys, isomorphic.training.trackers\n"
        "print({'tensorboard', 'torch.utils.tensorboard', 'wandb'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "set()\n", done.stderr


def test_what_an_epoch_has_no_figure_of_is_not_logged(monkeypatch: pytest.MonkeyPatch):
    logged: list[dict[str, float]] = []
    fake: Any = SimpleNamespace(log=lambda step, values: logged.append(values))
    state: Any = SimpleNamespace(step=7)
    monkeypatch.setattr(train.entry, "say", lambda text: None)
    told = train.observers(SimpleNamespace(epochs=3), state, fake)  # type: ignore[arg-type]
    for weak_half in (None, 0.25):
        told.row(EpochRow(1, 0.1, 2.0, 1.5, 0.5, 0.9, 0.5, 3.0, 100.0, weak_half))
    assert all(isinstance(value, (int, float)) for values in logged for value in values.values())
    assert "weak_half" not in logged[0] and logged[1]["weak_half"] == 0.25
