"""The moving average of the weights, which is often more accurate than the weights themselves."""

from __future__ import annotations

from timm.utils.model_ema import ModelEmaV3
from torch import nn

from isomorphic.training.recipe import EmaRecipe


def build_ema(model: nn.Module, recipe: EmaRecipe, *, foreach: bool = True) -> ModelEmaV3 | None:
    """Returns the moving average of `model`, a copy in eval mode on its device; None if the recipe has none.

    `ema.update(model, step=n)`, n counted from 1, sets every parameter and buffer to decay · its own + (1 − decay) ·
    the model's, and copies whole numbers; the first update copies everything.

    Call it before the model is wrapped, compiled or sharded. A model that will be sharded needs `foreach` off, because
    its parameters will be of another tensor type than its buffers: they are then updated one by one.
    """
    return ModelEmaV3(model, decay=recipe.model_ema_decay, foreach=foreach) if recipe.model_ema else None


def adjusted_decay(decay: float, *, global_batch: int, steps: int, epochs: int) -> float:
    """Returns the decay that torchvision's reference trainer uses for a given `--model-ema-decay`.

    1 − decay grows with the images between two updates and shrinks with the epochs:
    1 − min(1, (1 − decay) · global_batch · steps / epochs).

    Args:
        decay: the given decay, for one image per update and one epoch.
        global_batch: images of one optimizer step, over all processes.
        steps: optimizer steps between two updates.
        epochs: epochs of the whole run.
    """
    return 1 - min(1.0, (1 - decay) * global_batch * steps / epochs)
