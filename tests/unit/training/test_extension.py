"""A run that goes on for longer: by itself only where it is what it would have been from the start."""

from __future__ import annotations

from typing import Any

import pytest

from isomorphic.training.extension import extension_line, growing_settings
from isomorphic.training.recipe import ScheduleRecipe

THEN = {"epochs": 10, "max_steps": None, "lr_warmup_epochs": 2}


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        ({"lr_scheduler": "steplr", "lr_step_size": 3}, True),
        ({"lr_scheduler": "multisteplr", "lr_milestones": (3, 6, 20)}, True),
        ({"lr_scheduler": "exponentiallr"}, True),
        ({"lr_scheduler": "cosineannealinglr"}, False),
        ({"lr_scheduler": "cosineannealinglr", "lr_min": 0.1}, True),  # constant
        ({"lr_scheduler": "cosineannealinglr", "epochs": 10}, True),  # more steps alone
        ({"lr_scheduler": "steplr", "lr_warmup_epochs": 15}, False),  # another warm-up, longer than the run was
    ],
)
def test_a_schedule_that_does_not_ask_for_the_epochs_goes_on_alone(changes: dict[str, Any], alone: bool):
    schedule = ScheduleRecipe(**{"lr": 0.1, "epochs": 30, "lr_warmup_epochs": 2, **changes})
    assert bool(growing_settings(THEN, schedule, extend=False)) == alone
    assert set(growing_settings(THEN, schedule, extend=True)) == {"epochs", "max_steps", "model_ema_decay"}


def test_the_line_tells_both_learning_rates():
    schedule = ScheduleRecipe(lr=0.1, epochs=20, lr_scheduler="cosineannealinglr")
    line = extension_line(THEN, schedule, 10)
    assert line.startswith("going on to 20 epochs, where 10 were planned: cosineannealinglr goes by 20 epochs")
    assert line.endswith("0.00245 was the learning rate of epoch 10, 0.05 is that of epoch 11")
    assert extension_line(THEN | {"epochs": 20, "max_steps": 7}, schedule, 3) == (
        "going on beyond the 7 steps that were planned"
    )
