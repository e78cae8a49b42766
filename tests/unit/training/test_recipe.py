"""Recipes as values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from isomorphic.errors import UserError
from isomorphic.training.recipe import (
    AugmentRecipe,
    LoopRecipe,
    LossRecipe,
    NetworkRecipe,
    OptimizerRecipe,
    Recipe,
    ScheduleRecipe,
)


def test_settings_hold_every_value_that_moves_a_weight(make_recipe: Callable[..., Recipe]):
    settings = make_recipe(lr=0.3, ra_reps=3, distillation_tau=2.0, amp_dtype=torch.bfloat16).settings()
    assert settings["lr"] == 0.3 and settings["ra_reps"] == 3 and settings["distillation_tau"] == 2.0
    assert settings["amp_dtype"] == "torch.bfloat16"  # plain data: it goes through a weights-only file
    assert make_recipe(workers=5, log_every=1).settings() == make_recipe().settings()


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: ScheduleRecipe(lr=-1), "--lr -1"),
        (lambda: ScheduleRecipe(lr=float("nan")), "--lr nan"),
        (lambda: LossRecipe(label_smoothing=1.2), "--label-smoothing 1.2"),
        (lambda: OptimizerRecipe(weight_decay=-1.0), "--weight-decay -1.0"),
        (lambda: OptimizerRecipe(norm_weight_decay=float("nan")), "--norm-weight-decay nan"),
        (lambda: OptimizerRecipe(opt="sgd_nesterov", momentum=0.0), "sgd_nesterov needs a --momentum"),
        (lambda: ScheduleRecipe(lr_gamma=float("nan")), "--lr-gamma nan"),
        (lambda: AugmentRecipe(ra_magnitude=40), "--ra-magnitude 40"),
        (lambda: AugmentRecipe(augmix_severity=11), "--augmix-severity 11"),
        (lambda: LossRecipe(distillation_alpha=2), "--distillation-alpha 2"),
        (lambda: LossRecipe(distillation_tau=0), "--distillation-tau 0"),
        (lambda: LoopRecipe(clip_grad_norm=0), "--clip-grad-norm 0"),
        (lambda: ScheduleRecipe(lr_scheduler="multisteplr"), "drops at --lr-milestones"),
        (lambda: ScheduleRecipe(lr_milestones=(3,)), "--lr-milestones belongs to --lr-scheduler multisteplr"),
        (lambda: ScheduleRecipe(lr_scheduler="multisteplr", lr_milestones=(5, 3)), "--lr-milestones 5 3: needs epochs"),
        (lambda: AugmentRecipe(crop_padding=-1), "--crop-padding -1"),
        (lambda: AugmentRecipe(crop_padding=4, scale=(0.5, 1)), "leave out --scale and --ratio"),
        (lambda: AugmentRecipe(crop_padding=4, ratio=(1, 1)), "leave out --scale and --ratio"),
        (lambda: AugmentRecipe(crop_padding=4, train_interpolation="random"), "--train-interpolation random"),
        (lambda: NetworkRecipe(fsdp=True, sync_bn=True), "--fsdp goes with none of --sync-bn"),
        (lambda: NetworkRecipe(fsdp=True, channels_last=True), "--fsdp goes with none of .* --channels-last"),
    ],
)
def test_values_out_of_range_are_user_errors_that_name_the_flag(make: Callable, flag: str):
    with pytest.raises(UserError, match=flag):
        make()


def test_a_static_graph_cannot_accumulate(make_recipe: Callable[..., Recipe]):
    assert make_recipe(static_graph=True).network.static_graph
    with pytest.raises(UserError, match="--static-graph does not go with --accumulate above 1"):
        make_recipe(static_graph=True, accumulate=2)
