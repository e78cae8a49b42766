"""Training leaves pruned weights at zero: at every step, in the average, when it is resumed; see also test_parallel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isomorphic.checkpoints.open import open_model
from isomorphic.masks import Masks
from isomorphic.models import ModelSpec, example_inputs
from isomorphic.pruning.weights.dimap import mask
from isomorphic.pruning.weights.layer_roles import assign_roles
from isomorphic.training.ema import build_ema
from isomorphic.training.engine import Job, fit, train_step
from isomorphic.training.optim import set_learning_rate
from isomorphic.training.recipe import Recipe
from isomorphic.training.resume import TrainState, find_state, load_state
from isomorphic.training.sampling import RawBatch

CPU = torch.device("cpu")
PIXELS = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
BATCHES = [RawBatch(half, torch.arange(4), torch.zeros(4, 4, dtype=torch.long)) for half in PIXELS.split(4)]
ADAMW_EMA = {"opt": "adamw", "weight_decay": 0.05, "model_ema": True, "model_ema_decay": 0.9, "model_ema_steps": 1,
             "accumulate": 2, "clip_grad_norm": 1.0, "mixup_alpha": 0.4}  # fmt: skip


def zeros_of(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: model.get_parameter(name) == 0 for name in names}


def same(mine: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.fixture
def masked_job(make_job: Callable, vit_spec: ModelSpec) -> Callable[[Recipe], tuple[Job, TrainState, ModelSpec]]:
    """A job on a model of which 55% of the weights are masked; with its spec."""

    def make(recipe: Recipe) -> tuple[Job, TrainState, ModelSpec]:
        job, state = make_job(recipe)
        names = mask(state.model, assign_roles(state.model, example_inputs(vit_spec)), 0.55).names
        state.masks, state.ema = Masks.of(state.model, names), build_ema(state.model, recipe.ema)
        return job, state, vit_spec.masking(names)

    return make


def test_a_step_moves_all_weights_but_the_pruned_ones(make_recipe: Callable[..., Recipe], masked_job: Callable):
    job, state, spec = masked_job(make_recipe(**ADAMW_EMA))
    before = zeros_of(state.model, spec.masked)
    old = {name: parameter.clone() for name, parameter in state.model.named_parameters()}
    set_learning_rate(state.optimizer, 1e-2)
    for step in range(3):
        train_step(job, state, BATCHES)
        state.step = step + 1
        assert same(before, zeros_of(state.model, spec.masked)) and same(before, zeros_of(state.result, spec.masked))
    for name, gone in before.items():
        weight = state.model.get_parameter(name)
        assert weight.grad is not None and weight.grad[gone].any()  # it would have moved
        assert (weight[~gone] != old[name][~gone]).all()


def test_an_average_that_something_else_has_changed_is_masked_again(
    make_recipe: Callable[..., Recipe], masked_job: Callable
):
    job, state, spec = masked_job(make_recipe(**ADAMW_EMA))
    assert state.ema
    state.step = 1  # whose update does not copy the model
    name = spec.masked[0]
    with torch.no_grad():
        state.ema.module.get_parameter(name).add_(1)
    train_step(job, state, BATCHES)
    assert same(zeros_of(state.ema.module, (name,)), zeros_of(state.model, (name,)))


def test_a_run_and_its_continuation_keep_the_masks(
    make_recipe: Callable[..., Recipe], masked_job: Callable, make_folder: Callable
):
    recipe = make_recipe(**ADAMW_EMA, checkpoint_steps=3)
    job, whole, spec = masked_job(recipe)
    before = zeros_of(whole.model, spec.masked)
    fit(job, whole, make_folder(recipe, "whole", spec=spec))

    first = make_recipe(**ADAMW_EMA, checkpoint_steps=3, max_steps=10)
    job, state, spec = masked_job(first)
    folder = make_folder(first, "parts", spec=spec)
    fit(job, state, folder)
    job, state, spec = masked_job(recipe)
    saved = find_state(str(folder.path / "state.pt"), folder.path)
    assert saved
    load_state(saved, state, first.settings(), folder.layout, CPU)
    with torch.no_grad():  # as a state that was written elsewhere, by something that knows of no masks
        state.model.get_parameter(spec.masked[0]).add_(1e-3)
    fit(job, state, folder)
    for path in (folder.file("best"), folder.file("last"), whole_file(folder.path)):
        model, found = open_model(path)
        assert found.masked == spec.masked and same(before, zeros_of(model, found.masked))


def whole_file(parts: Path) -> Path:
    return parts.parent / "whole" / "last.safetensors"
