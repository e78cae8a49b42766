"""An interrupted run goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isomorphic.errors import Stopped, UserError
from isomorphic.processes import distributed
from isomorphic.training.engine import Job, Observers, fit
from isomorphic.training.recipe import LoopRecipe, Recipe
from isomorphic.training.resume import TrainState, find_state, kept_states, load_state, save_state
from isomorphic.training.tracking import EpochRow
from tests.faults import one_line

CPU = torch.device("cpu")
LAYOUT = {"processes": 1, "batch_size": 32, "accumulate": 1}
# dropout and mixup draw from the process's own random numbers, which the state must therefore bring back
GROWING = ("epochs", "max_steps", "model_ema_decay")
RANDOM = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "random_erase": 0.25, "random_erase_mode": "pixel"}


class Interrupted(Exception):
    pass


def interrupt(after: str, at: int) -> Observers:
    """Stops dead at a `row` or a `step`, as a crash does: nobody writes anything any more."""

    def row(row: EpochRow) -> None:
        if after == "row" and row.epoch == at:
            raise Interrupted

    def step(step: int, loss: float, lr: float) -> None:
        if after == "step" and step == at:
            raise Interrupted

    return Observers(row, step)


def with_dropout(state: TrainState) -> None:
    for module in state.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1


@pytest.fixture
def start(make_recipe: Callable[..., Recipe], make_job: Callable) -> Callable[..., tuple[Job, TrainState]]:
    """A job with all that is random, its state on the first step."""

    def start(**changes: Any) -> tuple[Job, TrainState]:
        job, state = make_job(make_recipe(**RANDOM, **changes))
        with_dropout(state)
        return job, state

    return start


def assert_same(state: TrainState, other: TrainState) -> None:
    for mine, theirs in zip(state.models(), other.models(), strict=True):
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    for mine, theirs in zip(state.optimizer.state.values(), other.optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    results = ("epoch", "step", "images", "best_top1", "best_loss", "best_epoch")
    assert [getattr(state, name) for name in results] == [getattr(other, name) for name in results]


@pytest.mark.parametrize(
    ("moment", "changes", "done"),
    [
        pytest.param(("row", 1), {}, (0, 15, 479), marks=pytest.mark.slow),  # the state is of before validation
        (("step", 20), {"checkpoint_steps": 4}, (1, 16, 32)),
        pytest.param(("step", 6), {"checkpoint_steps": 1}, (0, 5, 160), marks=pytest.mark.slow),
        (("step", 6), {"checkpoint_steps": 1, "accumulate": 2}, (0, 5, 320)),
        (("step", 10), {"checkpoint_steps": 9, "ra_reps": 3}, (1, 9, 32)),  # 256 images an epoch
    ],
)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    start: Callable, make_folder: Callable, moment: tuple[str, int], changes: dict[str, Any], done: tuple[int, int, int]
):
    changes = {"log_every": 1, "model_ema": True, "model_ema_steps": 2, "model_ema_decay": 0.9, **changes}
    job, whole = start(**changes)
    fit(job, whole, make_folder(job.recipe, "whole"))

    folder = make_folder(job.recipe, "parts")
    job, state = start(**changes)
    with pytest.raises(Interrupted):
        fit(job, state, folder, interrupt(*moment))
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(99)
    job, state = start(**changes)
    saved = find_state("auto", folder.path)
    assert saved and load_state(saved, state, folder.settings, folder.layout, CPU) == []
    assert (state.epoch, state.step, state.images) == done
    folder.prepare(state.epoch, anew=False)
    fit(job, state, folder)

    assert_same(whole, state)
    rows = [(folder.path.parent / name / "metrics.csv").read_text().splitlines() for name in ("whole", "parts")]
    without_times = [[line.rsplit(",", 2)[0].split(",") for line in lines] for lines in rows]
    assert len(without_times[0]) == 3
    for mine, theirs in zip(*without_times, strict=True):
        assert mine[:2] + mine[3:] == theirs[:2] + theirs[3:]
        assert mine[2] == theirs[2] or float(mine[2]) == pytest.approx(float(theirs[2]), rel=1e-12)  # a sum's order


def test_what_the_state_remembers_of_random_numbers(start: Callable, tmp_path: Path):
    job, state = start()
    path, settings = tmp_path / "state.pt", job.recipe.settings()
    save_state(path, state, settings, LAYOUT, CPU)
    first = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1))
    saved = find_state(str(path), tmp_path)
    assert saved
    load_state(saved, state, settings, LAYOUT, CPU)
    assert first == (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.usefixtures("heeded_signals")
def test_sigterm_stops_after_the_step_and_loses_nothing(number: signal.Signals, start: Callable, make_folder: Callable):
    job, whole = start(log_every=1)
    fit(job, whole, make_folder(job.recipe, "whole"))

    def step(step: int, loss: float, lr: float) -> None:
        if step == 19:
            os.kill(os.getpid(), number)

    folder = make_folder(job.recipe, "parts")
    job, state = start(log_every=1)
    before = signal.getsignal(number)
    told = f"stopped by {number.name} in epoch 2, step 19; .*--resume auto goes on"
    with pytest.raises(Stopped, match=told) as stop:
        fit(job, state, folder, Observers(step=step))
    assert signal.getsignal(number) == before and stop.value.status == 128 + number
    job, state = start(log_every=1)
    saved = find_state("auto", folder.path)
    assert saved
    load_state(saved, state, folder.settings, folder.layout, CPU)
    assert (state.epoch, state.step, state.images) == (1, 19, 4 * 32)
    fit(job, state, folder)
    assert_same(whole, state)


def test_sigusr1_writes_the_state_and_training_goes_on(start: Callable, make_folder: Callable):
    job, state = start(log_every=1, max_steps=10)
    folder = make_folder(job.recipe)
    seen = []

    def step(step: int, loss: float, lr: float) -> None:
        seen.append((folder.path / "state.pt").exists())
        if step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)

    fit(job, state, folder, Observers(step=step))
    assert seen == [False] * 4 + [True] * 6 and state.step == 10


@pytest.fixture
def saved(make_recipe: Callable[..., Recipe], make_job: Callable, tmp_path: Path) -> tuple[Path, TrainState, Recipe]:
    """A state file, a state to load it into, and the recipe of both."""
    recipe = make_recipe()
    _, state = make_job(recipe)
    path = tmp_path / "state.pt"
    save_state(path, state, recipe.settings(), LAYOUT, CPU)
    return path, state, recipe


def load(
    path: Path,
    state: TrainState,
    settings: dict[str, Any],
    layout: dict[str, int] | None = None,
    *,
    may_grow: Collection[str] = (),
) -> list[str]:
    found = find_state(str(path), path.parent)
    assert found
    return load_state(found, state, settings, layout or LAYOUT, CPU, may_grow=may_grow)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_state_is_refused_in_one_line(saved: tuple, share: float):
    path, state, recipe = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="is not a whole training state") as error:
        load(path, state, recipe.settings())
    assert "\n" not in str(error.value)


def test_truncated_anywhere_the_state_before_it_is_taken(saved: tuple):
    path, state, recipe = saved
    state.step = 7
    save_state(path, state, recipe.settings(), LAYOUT, CPU, keep=2)
    whole = path.read_bytes()
    offsets = [*random.Random(5).sample(range(len(whole)), 46), 0, 1, len(whole) - 22, len(whole) - 1]
    for offset in offsets:
        path.write_bytes(whole[:offset])
        found = find_state("auto", path.parent)
        assert found and found.path.name == "state.1.pt" and found.content["counters"]["step"] == 0, offset
        assert len(found.notes) == 1 and f"skipping it: {path} is not a whole training state" in found.notes[0]
    path.write_bytes(whole)
    found = find_state("auto", path.parent)
    assert found and found.content["counters"]["step"] == 7 and found.notes == ()


def test_a_folder_of_torn_states_is_an_error(saved: tuple):
    path, *_ = saved
    path.write_bytes(b"")
    with pytest.raises(UserError, match="no state in .* is whole: remove its state\\*.pt"):
        find_state("auto", path.parent)


def test_the_last_states_are_kept(saved: tuple):
    path, state, recipe = saved

    def steps() -> list[int]:
        found = [find_state(str(path), path.parent) for path in kept_states(path.parent)]
        return [one.content["counters"]["step"] for one in found if one]

    for step in range(1, 13):
        state.step = step
        save_state(path, state, recipe.settings(), LAYOUT, CPU, keep=11)
    assert steps() == list(range(12, 1, -1))  # the eleventh file comes after the tenth
    os.remove(path)  # killed between moving the old ones and writing the new one
    assert steps() == list(range(11, 1, -1))
    state.step = 13
    save_state(path, state, recipe.settings(), LAYOUT, CPU, keep=2)
    assert steps()[0] == 13 and len(steps()) <= 2


def test_a_state_that_cannot_be_written_leaves_the_one_before_it(saved: tuple, monkeypatch: pytest.MonkeyPatch):
    path, state, recipe = saved
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*state.pt: is the disk full"):
        save_state(path, state, recipe.settings(), LAYOUT, CPU, keep=2)
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"] and path.read_bytes() == before


def test_a_foreign_file_is_refused(saved: tuple):
    path, state, recipe = saved
    torch.save({"model": {}}, path)
    with pytest.raises(UserError, match="not a training state of this version"):
        load(path, state, recipe.settings())
    torch.save(shutil.rmtree, path)  # a pickle that names code is not run
    with pytest.raises(UserError, match="is not a whole training state"):
        load(path, state, recipe.settings())


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="no such training state: .*elsewhere.pt"):
        find_state(str(tmp_path / "elsewhere.pt"), tmp_path)


def test_every_setting_that_differs_is_named_and_nothing_is_loaded(saved: tuple, make_recipe: Callable[..., Recipe]):
    path, state, _ = saved
    other = make_recipe(lr=0.5, epochs=7, workers=3, checkpoint_hist=9).settings()
    before = [parameter.clone() for parameter in state.model.parameters()]
    with pytest.raises(UserError, match=r"epochs 2 \(now 7\), lr 0.002 \(now 0.5\); repeat those"):
        load(path, state, other)
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))


def test_a_setting_that_a_state_does_not_know_yet_had_its_default(
    make_recipe: Callable[..., Recipe], make_job: Callable, tmp_path: Path
):
    recipe = make_recipe()
    _, state = make_job(recipe)
    settings = recipe.settings()
    older = {name: value for name, value in settings.items() if name not in ("lr_milestones", "crop_padding")}
    save_state(tmp_path / "state.pt", state, older, LAYOUT, CPU)
    assert load(tmp_path / "state.pt", state, settings) == []
    with pytest.raises(UserError, match=r"settings: crop_padding None \(now 4\); repeat"):
        load(tmp_path / "state.pt", state, settings | {"crop_padding": 4})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epochs": 7}, None),
        ({"epochs": 2, "max_steps": None}, None),
        ({"epochs": 3, "max_steps": 900, "model_ema_decay": 0.9}, None),
        ({"epochs": 1}, r"epochs 2 \(now 1\)"),
        ({"epochs": 7, "max_steps": 3}, r"epochs 2 \(now 7\), max_steps 5 \(now 3\)"),
        ({"epochs": 7, "lr": 0.5}, r"epochs 2 \(now 7\), lr 0.002 \(now 0.5\); repeat"),
        ({"model_ema_decay": 0.9}, "model_ema_decay"),
    ],
)
def test_a_run_may_be_extended_and_nothing_else(
    changes: dict[str, Any], told: str | None, make_recipe: Callable[..., Recipe], make_job: Callable, tmp_path: Path
):
    recipe = make_recipe(max_steps=5)
    _, state = make_job(recipe)
    path = tmp_path / "state.pt"
    save_state(path, state, recipe.settings(), LAYOUT, CPU)
    now = make_recipe(**{"max_steps": 5, **changes}).settings()
    if told is None:
        assert load(path, state, now, may_grow=GROWING) == []
        with pytest.raises(UserError, match=r"repeat those, .* \(--extend lets a run go on for more epochs\)"):
            load(path, state, now)
    else:
        with pytest.raises(UserError, match=told) as error:
            load(path, state, now, may_grow=GROWING)
        assert "--extend" not in one_line(error)


def test_a_finished_run_that_is_extended_equals_one_that_was_longer_from_the_start(
    start: Callable, make_folder: Callable
):
    """Where the schedule does not ask how many epochs there are."""
    longer = {"lr_scheduler": "steplr", "model_ema": True, "model_ema_steps": 2, "model_ema_decay": 0.9}
    job, whole = start(**longer)
    fit(job, whole, make_folder(job.recipe, "whole"))

    job, state = start(**longer, epochs=1)
    fit(job, state, make_folder(job.recipe, "parts"))
    job, state = start(**longer)
    folder = make_folder(job.recipe, "parts")
    saved = find_state("auto", folder.path)
    assert saved and load_state(saved, state, folder.settings, folder.layout, CPU, may_grow=GROWING) == []
    assert state.epoch == 1 and not state.is_finished(job.recipe.loop)
    fit(job, state, folder)
    assert_same(whole, state)
    again = find_state("auto", folder.path)
    assert again and load_state(again, state, folder.settings, folder.layout, CPU) == []  # it is a longer run now


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"model": "/elsewhere/net.safetensors"}, True),
        ({"teacher_model": "/elsewhere/t.safetensors"}, True),
        ({"model": "/elsewhere/net.safetensors", "parent": "another"}, False),
        ({"model": "other.safetensors"}, False),
        ({"model": "code/net.py:other"}, False),
        ({"model": "resnet50", "parent": None}, False),
    ],
)
def test_a_file_may_be_addressed_by_another_path(changes: dict[str, Any], same: bool, saved: tuple):
    path, state, recipe = saved
    files = {"model": "mine/net.safetensors", "parent": "7f3c", "teacher_model": "t.safetensors", "teacher": "9a"}
    save_state(path, state, recipe.settings() | files, LAYOUT, CPU)
    if same:
        assert load(path, state, recipe.settings() | files | changes) == []
    else:
        with pytest.raises(UserError, match="belongs to a run with other settings"):
            load(path, state, recipe.settings() | files | changes)


@pytest.mark.parametrize("name", ["best.safetensors", "weights.pth", "state.pt"])
def test_no_file_that_is_named_is_to_be_removed(name: str, saved: tuple, tmp_path: Path):
    _, state, recipe = saved
    named = tmp_path / "mine" / name
    named.parent.mkdir()
    torch.save({"model": {}}, named)
    with pytest.raises(UserError, match=f"{name} .*leave out --resume") as error:
        load(named, state, recipe.settings())
    told = one_line(error)
    assert "remove" not in told and (f"pass --model {named}" in told) == (name == "best.safetensors")


def test_the_images_of_a_step_may_be_dealt_out_anew(saved: tuple):
    path, state, recipe = saved
    notes = load(path, state, recipe.settings(), LAYOUT | {"batch_size": 16, "accumulate": 2})
    assert len(notes) == 1
    assert notes[0].startswith("batch_size 32 (now 16), accumulate 1 (now 2): the images of each step stay the same")


def test_hosts_that_do_not_share_the_folder_are_told(saved: tuple, monkeypatch: pytest.MonkeyPatch):
    path, *_ = saved
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, None])  # the other process finds nothing
    with pytest.raises(UserError, match="not all processes see the same states .* share --output-dir"):
        find_state("auto", path.parent)


def test_which_file_resume_means(saved: tuple, tmp_path: Path):
    path, *_ = saved
    empty = tmp_path / "empty"
    empty.mkdir()
    assert find_state(None, path.parent) is None
    assert find_state("auto", empty) is None and find_state("auto", tmp_path / "absent") is None
    for resume, folder in ((str(path), empty), ("auto", path.parent)):
        found = find_state(resume, folder)
        assert found and found.path == path


def test_the_best_epoch_is_the_earliest_of_the_highest(make_recipe: Callable[..., Recipe], make_job: Callable):
    _, state = make_job(make_recipe())
    improved = []
    for top1 in (0.0, 0.6, 0.6, 0.5, 0.7):
        state.end_epoch(top1, loss=top1 / 2)
        improved.append(state.is_best())
    assert improved == [True, True, False, False, True]
    assert (state.best_top1, state.best_loss, state.best_epoch) == (0.7, 0.35, 5)


def test_a_run_is_finished_by_epochs_or_by_steps(make_recipe: Callable[..., Recipe], make_job: Callable):
    _, state = make_job(make_recipe())
    loop = LoopRecipe(epochs=3, max_steps=10)
    assert not state.is_finished(loop)
    state.step = 10
    assert state.is_finished(loop) and not state.is_finished(dataclasses.replace(loop, max_steps=None))
    state.step, state.epoch = 0, 3
    assert state.is_finished(loop)


def test_a_run_that_goes_on_in_another_folder_finds_its_best_anew(
    make_recipe: Callable[..., Recipe], make_job: Callable, make_folder: Callable
):
    recipe = make_recipe()
    job, state = make_job(recipe)
    state.epoch, state.best_top1, state.best_epoch = 1, 1.0, 1
    folder = make_folder(recipe)
    fit(job, state, folder)
    assert folder.file("best").is_file() and state.best_epoch == 2 and state.best_top1 < 1.0
