"""A moving average of the weights, which often does better than the weights themselves."""

from __future__ import annotations

from timm.utils.model_ema import ModelEmaV3
from torch import nn

from isomorphic.training.recipe import EmaRecipe


def build_ema(model: nn.Module, recipe: EmaRecipe, *, foreach: bool = True) -> ModelEmaV3 | None:
    """A copy of `model`, in eval mode on its device, that follows it; None where the recipe has no average.

    `ema.update(model, step=n)`, n counted from 1, sets every parameter and buffer to decay · its own + (1 − decay) ·
    the model's, and copies whole numbers; the first update copies everything.

    Call it before the model is wrapped, compiled or sharded. One that will be sharded needs `foreach` off: its
    parameters are then of another kind than its buffers, and are updated one by one.
    """
    return ModelEmaV3(model, decay=recipe.model_ema_decay, foreach=foreach) if recipe.model_ema else None


def adjusted_decay(decay: float, *, global_batch: int, steps: int, epochs: int) -> float:
    """The decay that torchvision's reference trainer makes of the one that is asked for.

    1 − decay grows with the images between two updates and shrinks with the epochs:
    1 − min(1, (1 − decay) · global_batch · steps / epochs).

    Args:
        decay: what is asked for, for one image an update and one epoch.
        global_batch: images of one optimizer step, over all processes.
        steps: optimizer steps between two updates.
        epochs: of the whole run.
    """
    return 1 - min(1.0, (1 - decay) * global_batch * steps / epochs)
