"""An interrupted run goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isomorphic.errors import UserError
from isomorphic.training.engine import fit
from isomorphic.training.recipe import LoopRecipe, Recipe
from isomorphic.training.resume import TrainState, find_state, load_state, save_state
from isomorphic.training.tracking import EpochRow

CPU = torch.device("cpu")
# dropout and mixup draw from the process's own random numbers, which the state must therefore bring back
RANDOM = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "random_erase": 0.25}


class Interrupted(Exception):
    pass


def stop_after(epoch: int) -> Callable[[EpochRow], None]:
    def report(row: EpochRow) -> None:
        if row.epoch == epoch:
            raise Interrupted

    return report


def ignore(row: EpochRow) -> None:
    pass


def with_dropout(state: TrainState) -> None:
    for module in state.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    make_recipe: Callable[..., Recipe], make_job: Callable, make_folder: Callable
):
    recipe = make_recipe(**RANDOM)
    job, whole = make_job(recipe)
    with_dropout(whole)
    fit(job, whole, make_folder(recipe, "whole"), ignore)

    folder = make_folder(recipe, "parts")
    job, state = make_job(recipe)
    with_dropout(state)
    with pytest.raises(Interrupted):
        fit(job, state, folder, stop_after(1))
    torch.manual_seed(99)
    job, state = make_job(recipe)
    with_dropout(state)
    load_state(folder.path / "state.pt", state, folder.settings, CPU)
    assert (state.epoch, state.step) == (1, 15)
    fit(job, state, folder, ignore)

    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, state.model.state_dict()[name]), name
    for mine, other in zip(whole.optimizer.state.values(), state.optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    results = ("epoch", "step", "best_top1", "best_loss", "best_epoch")
    assert [getattr(whole, name) for name in results] == [getattr(state, name) for name in results]
    rows = [(folder.path.parent / name / "metrics.csv").read_text().splitlines() for name in ("whole", "parts")]
    without_times = [[line.rsplit(",", 2)[0] for line in lines] for lines in rows]
    assert without_times[0] == without_times[1] and len(without_times[0]) == 3


@pytest.fixture
def saved(
    make_recipe: Callable[..., Recipe], make_job: Callable, tmp_path: Path
) -> tuple[Path, TrainState, Recipe, Callable]:
    """A state file, a state to load it into, and the recipe of both."""
    recipe = make_recipe()
    _, state = make_job(recipe)
    path = tmp_path / "state.pt"
    save_state(path, state, recipe.settings(), CPU)
    return path, state, recipe, make_recipe


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_state_is_refused_in_one_line(saved: tuple, share: float):
    path, state, recipe, _ = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="is not a whole training state") as error:
        load_state(path, state, recipe.settings(), CPU)
    assert "\n" not in str(error.value)


def test_a_foreign_file_is_refused(saved: tuple):
    path, state, recipe, _ = saved
    torch.save({"model": {}}, path)
    with pytest.raises(UserError, match="not a training state of this version"):
        load_state(path, state, recipe.settings(), CPU)
    torch.save(shutil.rmtree, path)  # a pickle that names code is not run
    with pytest.raises(UserError, match="is not a whole training state"):
        load_state(path, state, recipe.settings(), CPU)


def test_a_missing_file_is_named(saved: tuple, tmp_path: Path):
    _, state, recipe, _ = saved
    with pytest.raises(UserError, match="no such training state: .*elsewhere.pt"):
        load_state(tmp_path / "elsewhere.pt", state, recipe.settings(), CPU)


def test_every_setting_that_differs_is_named_and_nothing_is_loaded(saved: tuple):
    path, state, _, make_recipe = saved
    other = make_recipe(lr=0.5, epochs=7, workers=3).settings()
    before = [parameter.clone() for parameter in state.model.parameters()]
    with pytest.raises(UserError, match=r"epochs 2 \(now 7\), lr 0.002 \(now 0.5\); repeat those"):
        load_state(path, state, other, CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))


def test_which_file_resume_means(tmp_path: Path):
    assert find_state(None, tmp_path) is None
    assert find_state("auto", tmp_path) is None
    assert find_state("some/state.pt", tmp_path) == Path("some/state.pt")
    (tmp_path / "state.pt").touch()
    assert find_state("auto", tmp_path) == tmp_path / "state.pt"
    assert find_state(None, tmp_path) is None


def test_the_best_epoch_is_the_earliest_of_the_highest(make_recipe: Callable[..., Recipe], make_job: Callable):
    _, state = make_job(make_recipe())
    improved = []
    for epoch, top1 in enumerate((0.0, 0.6, 0.6, 0.5, 0.7), start=1):
        state.epoch = epoch
        improved.append(state.note_result(top1, loss=top1 / 2))
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
    fit(job, state, folder, ignore)
    assert folder.file("best").is_file() and state.best_epoch == 2 and state.best_top1 < 1.0
