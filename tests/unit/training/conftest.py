"""A vision transformer small enough to train in a test, and a training job around it."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Subset

from isomorphic.data.loaders import build_eval_loader
from isomorphic.data.sources import DataSource, build_dataset
from isomorphic.data.transforms import eval_transform
from isomorphic.models import ModelSpec, build_model, describe_model
from isomorphic.training.augment import build_preparation, train_transform
from isomorphic.training.ema import build_ema
from isomorphic.training.engine import Job
from isomorphic.training.losses import build_objective
from isomorphic.training.optim import build_optimizer
from isomorphic.training.precision import build_scaler
from isomorphic.training.recipe import (
    AugmentRecipe,
    EmaRecipe,
    LoaderRecipe,
    LoopRecipe,
    LossRecipe,
    NetworkRecipe,
    OptimizerRecipe,
    Recipe,
    ScheduleRecipe,
)
from isomorphic.training.resume import TrainState, seed_process
from isomorphic.training.sampling import build_train_loader
from isomorphic.training.tracking import RunFolder

CPU = torch.device("cpu")
KWARGS = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
LAYOUT = {"processes": 1, "batch_size": 32, "accumulate": 1}
IMAGES = 479  # a third of the digits: 15 batches, the last one smaller; two processes repeat an image


@pytest.fixture
def heeded_signals() -> Iterator[None]:
    """Signals that nohup, or a shell's background, may have made the tests ignore end a process again."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """Recipes for digits: AdamW on random crops, two epochs; keyword arguments change single fields."""

    def make(**changes: Any) -> Recipe:
        parts = (
            OptimizerRecipe(opt="adamw", weight_decay=0.05),
            ScheduleRecipe(lr=2e-3, epochs=2, lr_scheduler="cosineannealinglr"),
            AugmentRecipe(train_crop_size=32, scale=(0.6, 1.0), hflip=0.0),
            LossRecipe(),
            LoaderRecipe(batch_size=32, workers=0),
            EmaRecipe(),
            NetworkRecipe(),
            LoopRecipe(epochs=2),
        )
        values = {field: value for part in parts for field, value in dataclasses.asdict(part).items()}
        assert changes.keys() <= values.keys()
        return Recipe.from_values(values | changes)

    return make


@pytest.fixture
def vit_spec() -> ModelSpec:
    return describe_model("vit_tiny_patch16_224", kwargs=KWARGS, input_size=32)


@pytest.fixture
def make_job(vit_spec: ModelSpec) -> Callable[..., tuple[Job, TrainState]]:
    """A fresh job on digits and its state; the same recipe gives the same weights."""

    def make(
        recipe: Recipe, spec: ModelSpec = vit_spec, *, images: int = IMAGES, **changes: Any
    ) -> tuple[Job, TrainState]:
        torch.manual_seed(recipe.loader.seed)
        model = build_model(spec)
        digits = DataSource("digits")
        train = build_dataset(digits, "train", train_transform(recipe.augment, spec.preprocessing))
        val = build_dataset(digits, "val", eval_transform(spec.preprocessing))
        job = Job(
            network=model,
            objective=build_objective(recipe.loss),
            teacher=None,
            prepare=build_preparation(recipe.augment, spec.preprocessing, 10, CPU),
            train_loader=build_train_loader(Subset(train, range(images)), recipe.loader, recipe.augment, CPU),
            val_loader=build_eval_loader(Subset(val, range(120)), 60, 0, CPU),
            device=CPU,
            recipe=recipe,
        )
        optimizer, scaler = build_optimizer(model, recipe.optimizer), build_scaler(recipe.loop.amp_dtype, CPU)
        state = TrainState(model, optimizer, scaler, build_ema(model, recipe.ema))
        seed_process(recipe.loader.seed)
        return dataclasses.replace(job, **changes), state

    return make


@pytest.fixture
def make_folder(tmp_path: Path, vit_spec: ModelSpec) -> Callable[..., RunFolder]:
    def make(recipe: Recipe, name: str = "run", spec: ModelSpec = vit_spec) -> RunFolder:
        settings = recipe.settings()
        return RunFolder(tmp_path / name, spec, settings, LAYOUT, {"command": "a test"}, recipe.loop.checkpoint_hist)

    return make
