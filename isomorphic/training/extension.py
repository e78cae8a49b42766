"""A run that goes on for longer than it was to at first: what may change, and what becomes of the learning rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from isomorphic.training.optim import learning_rate
from isomorphic.training.recipe import ScheduleRecipe
from isomorphic.training.resume import LENGTHS


def growing_settings(then: dict[str, Any], schedule: ScheduleRecipe, *, extend: bool) -> Sequence[str]:
    """Returns the settings that a resumed run may raise: how long it is, and what is computed from that.

    Unless it is to `extend` anyway, a longer run must be what it would have been, had it been longer from the start:
    each epoch that was planned keeps its learning rate.

    Args:
        then: settings of the saved run.
        schedule: of the run that resumes it.
        extend: the user accepts another schedule.
    """
    if extend:
        return (*LENGTHS, "model_ema_decay")  # see `ema.adjusted_decay`
    if then["lr_warmup_epochs"] != schedule.lr_warmup_epochs:
        return ()  # refused for that, whatever else
    planned = dataclasses.replace(schedule, epochs=then["epochs"])
    is_kept = all(learning_rate(planned, epoch) == learning_rate(schedule, epoch) for epoch in range(planned.epochs))
    return LENGTHS if is_kept else ()


def extension_line(then: dict[str, Any], schedule: ScheduleRecipe, epochs_done: int) -> str:
    """Returns a line on the learning rate of a longer run, before and after `epochs_done` epochs."""
    if schedule.epochs == then["epochs"]:
        return f"going on beyond the {then['max_steps']} steps that were planned"
    planned = dataclasses.replace(schedule, epochs=then["epochs"])
    last = max(epochs_done - 1, 0)
    before, after = learning_rate(planned, last), learning_rate(schedule, epochs_done)
    return (
        f"going on to {schedule.epochs} epochs, where {planned.epochs} were planned: {schedule.lr_scheduler} goes by "
        f"{schedule.epochs} epochs from here on, as if from the start: {before:.3g} was the learning rate of epoch "
        f"{last + 1}, {after:.3g} is that of epoch {epochs_done + 1}"
    )
