"""Removing whole residual blocks: depth, before anything is said about widths.

A block may go if it is the identity once all of its parameters are zero, as x + f(x) is: nothing but its own work is
lost with it. Blocks that change the shape of what they are given, or that normalise the sum, stay. Blocks are chosen on
the dense model and removed before the rest is traced and ranked, so that the two decisions can be planned at one budget
(Isomorphic Pruning, ECCV 2024, removes 18 of ConvNeXt-Base's 27 blocks in its third stage).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from isomorphic.errors import UserError
from isomorphic.models import keep_blocks
from isomorphic.pruning.drop_path import drop_path_blocks, space_drop_path
from isomorphic.pruning.importance import Statistic, mean_saliency
from isomorphic.pruning.inputs import Inputs, arguments, tensors_in

SCOPES = ("stage", "all")
TOLERANCE = 1e-4  # of the largest output: a residual block leaves nothing but rounding behind

KeptBlocks = Mapping[str, Sequence[int]]  # the indices that stay, by the name of the module that holds the blocks


@dataclass(frozen=True)
class Stage:
    """A Sequential or ModuleList of blocks.

    Attributes:
        name: of the module in the model.
        num_blocks: its children, in the order in which they run.
        removable: indices of the residual ones.
    """

    name: str
    num_blocks: int
    removable: tuple[int, ...]

    @property
    def spare(self) -> int:
        """How many blocks can go: one always stays."""
        return min(len(self.removable), self.num_blocks - 1)


@torch.no_grad()
def find_stages(model: nn.Module, inputs: Inputs) -> list[Stage]:
    """All modules that hold residual blocks, in the model's order.

    Args:
        model: in eval mode.
        inputs: what its forward takes, on its device; see `trace_groups`.
    """
    residual = _residual_blocks(model, inputs)
    inner = {name for name in residual if not any(other.startswith(f"{name}.") for other in residual)}
    stages = []
    for name, blocks in _block_lists(model):
        removable = tuple(index for index, block in enumerate(blocks) if block in inner)
        if removable:
            stages.append(Stage(name, len(blocks), removable))
    return stages


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
    model: nn.Module, stages: Sequence[Stage], criterion: str, *, statistic: Statistic | None = None, seed: int = 0
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
    lists = dict(_block_lists(model))
    scores = {}
    for stage in stages:
        prefixes = [f"{lists[stage.name][index]}." for index in stage.removable]
        means = [[mean for name, mean in of_parameter.items() if name.startswith(prefix)] for prefix in prefixes]
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


@torch.no_grad()
def remove_blocks(model: nn.Module, kept: KeptBlocks, inputs: Inputs) -> dict[str, str]:
    """Leaves only the `kept` blocks in `model`, in place, and spaces its drop-path rates as for its new depth.

    The result is held against the dense model with the parameters of the removed blocks at zero.

    Returns:
        What every parameter that is left was called before, by its new name.

    Raises:
        UserError: the model has no such blocks, or does not do without them; it is of no use then.
    """
    old_names = {parameter: name for name, parameter in model.named_parameters()}
    if not kept:
        return {name: name for name in old_names.values()}
    try:
        expected = _without_effect(model, kept, inputs)
        scheduled = drop_path_blocks(model)
        keep_blocks(model, kept)
        left = set(model.modules())
        space_drop_path(scheduled, [block for block in scheduled if block in left])
        outputs = tensors_in(model(*arguments(inputs)))
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as failure:
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise UserError(f"the model cannot lose these blocks: {reason}") from failure
    error = max(_difference(*pair) for pair in zip(outputs, expected, strict=True))
    if error > TOLERANCE:
        raise UserError(
            f"the model cannot lose these blocks: those that stay depend on how many there are ({error:.0e})"
        )
    return {name: old_names[parameter] for name, parameter in model.named_parameters()}


def _in_scope(stages: Sequence[Stage], scope: str) -> list[Stage]:
    """All stages, or the one with most blocks: the first of several."""
    return list(stages) if scope == "all" else sorted(stages, key=lambda stage: -stage.num_blocks)[:1]


def _block_lists(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Every Sequential and ModuleList: its name and its children's."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            yield name, [f"{name}.{child}" if name else child for child in module._modules]


def _residual_blocks(model: nn.Module, inputs: Inputs) -> list[str]:
    """The children of lists that are the identity once their parameters are zero."""
    candidates = {block for _, blocks in _block_lists(model) for block in blocks}
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {name: [] for name in candidates}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, positional, keyword, calls=calls[name]: calls.append((positional, keyword)), with_kwargs=True
        )
        for name in candidates
    ]
    try:
        model(*arguments(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    once = {name: made[0] for name, made in calls.items() if len(made) == 1}
    return [name for name, call in once.items() if _is_residual(model.get_submodule(name), *call)]


def _is_residual(block: nn.Module, positional: tuple[Any, ...], keyword: dict[str, Any]) -> bool:
    """Whether the block, without parameters to speak of, returns what it is given: here positive numbers, so that an
    activation after the sum does not matter."""
    zeros = {name: torch.zeros_like(parameter) for name, parameter in block.named_parameters()}
    if not zeros or not positional or not isinstance(positional[0], Tensor) or not positional[0].is_floating_point():
        return False
    given = torch.rand_like(positional[0])
    try:
        returned = functional_call(block, zeros, (given, *positional[1:]), keyword)
    except (RuntimeError, TypeError, ValueError, LookupError):
        return False
    return (
        isinstance(returned, Tensor)
        and returned.shape == given.shape
        and bool(_difference(returned, given) < TOLERANCE)
    )


def _without_effect(model: nn.Module, kept: KeptBlocks, inputs: Inputs) -> list[Tensor]:
    """The model's outputs while the parameters of the blocks that are not kept are zero."""
    lists = dict(_block_lists(model))
    removed = tuple(
        f"{block}." for name, indices in kept.items() for i, block in enumerate(lists.get(name, ())) if i not in indices
    )
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name.startswith(removed)}
    return tensors_in(functional_call(model, zeros, arguments(inputs)))


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))
