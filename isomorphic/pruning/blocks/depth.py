"""Removing whole residual blocks: depth, before anything is said about widths.

Blocks are scored on the dense model and removed before the rest is traced and ranked, so that the two decisions can be
planned at one budget (Isomorphic Pruning, ECCV 2024, removes 18 of ConvNeXt-Base's 27 blocks in its third stage).
`residual.py` says which may go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from isomorphic.drop_path import drop_path_blocks, space_drop_path
from isomorphic.errors import UserError
from isomorphic.inputs import Inputs
from isomorphic.models import keep_blocks
from isomorphic.pruning.blocks.residual import KeptBlocks, Stage, check_without
from isomorphic.pruning.gradients import Statistic
from isomorphic.pruning.scoring import CustomCriterion, mean_saliency

SCOPES = ("stage", "all")


def check_spare(stages: Sequence[Stage], count: int, scope: str) -> None:
    """Finds out, before anything is scored, that `count` blocks can go.

    Raises:
        UserError: there are not so many; the message says how many there are.
    """
    candidates = _in_scope(stages, scope)
    spare = sum(stage.spare for stage in candidates)
    if count > spare:
        where = f"{candidates[0].name}, the stage with most blocks," if scope == "stage" and candidates else "the model"
        raise UserError(
            f"cannot remove {count} blocks: {where} can spare {spare} that are residual and keep their shape"
        )


def score_blocks(
    model: nn.Module,
    stages: Sequence[Stage],
    criterion: str | CustomCriterion,
    *,
    statistic: Statistic | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Every block's importance: the mean over its parameters of each one's mean saliency.

    Args:
        model: holds the blocks.
        stages: from `find_stages`.
        criterion: a key of `CRITERIA`.
        statistic: from `accumulate`, where the criterion needs one.
        seed: of the random criterion.

    Returns:
        The scores of the removable blocks by stage name, shape (len(removable),), on the CPU.

    Raises:
        UserError: a score that is not finite.
    """
    if not stages:
        return {}
    of_parameter = mean_saliency(model, criterion, statistic=statistic, seed=seed)
    scores = {}
    for stage in stages:
        blocks = list(model.get_submodule(stage.name).children())
        means = [[of_parameter[p] for p in blocks[index].parameters()] for index in stage.removable]
        scores[stage.name] = torch.stack([torch.stack(block).mean() for block in means])
        if not torch.isfinite(scores[stage.name]).all():
            raise UserError(f"the {criterion} scores of the blocks of {stage.name} are not finite")
    return scores


def choose_blocks(
    stages: Sequence[Stage], scores: Mapping[str, Tensor], count: int, scope: str
) -> dict[str, tuple[int, ...]]:
    """The blocks that stay when the `count` least important ones go, in each stage that loses any.

    Args:
        stages: from `find_stages`.
        scores: from `score_blocks`.
        count: how many go.
        scope: "stage": all from the stage with most blocks, as the paper does; "all": from wherever they matter least.

    Raises:
        UserError: as `check_spare`.
    """
    check_spare(stages, count, scope)
    if not count:
        return {}
    candidates = _in_scope(stages, scope)
    blocks = [(stage, index) for stage in candidates for index in stage.removable]
    worst_first = torch.cat([scores[stage.name] for stage in candidates]).argsort(stable=True).tolist()
    removed: dict[str, set[int]] = {stage.name: set() for stage in candidates}
    for stage, index in (blocks[position] for position in worst_first):
        if sum(map(len, removed.values())) < count and len(removed[stage.name]) < stage.spare:
            removed[stage.name].add(index)
    return {
        stage.name: tuple(index for index in range(stage.num_blocks) if index not in removed[stage.name])
        for stage in candidates
        if removed[stage.name]
    }


def remove_blocks(model: nn.Module, kept: KeptBlocks, inputs: Inputs) -> dict[str, str]:
    """Leaves only the `kept` blocks in `model`, in place, and spaces its drop-path rates as for its new depth.

    Returns:
        What every parameter that is left was called before, by its new name.

    Raises:
        UserError: the model has no such blocks, or does not do without them; it is left as it was.
    """
    old_names = {parameter: name for name, parameter in model.named_parameters()}
    if kept:
        check_without(model, kept, inputs)
        scheduled = drop_path_blocks(model)
        keep_blocks(model, kept)
        left = set(model.modules())
        space_drop_path(scheduled, [block for block in scheduled if block in left])
    return {name: old_names[parameter] for name, parameter in model.named_parameters()}


def _in_scope(stages: Sequence[Stage], scope: str) -> list[Stage]:
    """All stages, or the one with most blocks: the first of several."""
    return list(stages) if scope == "all" else sorted(stages, key=lambda stage: -stage.num_blocks)[:1]
