"""Step 3, score: one number per unit of each coupled group.

A criterion turns a weight, and what was accumulated for it over images, into a saliency of the same shape. Saliency is
summed over a unit's slice of each member, averaged over the members of the group, and normalised inside the group so
that groups of one isomorphism class can be compared (Isomorphic Pruning, ECCV 2024, section 3.3; Taylor: Molchanov et
al., CVPR 2019). The scored members are the weights of convolutions, linears, depthwise filters and affine norms.

"dimap" goes on from there: a unit's energy is the sum of its shares of each tensor's energy, and its score is that of
`weights/dimap.py` over the energies of its group (DIMAP, ICLR 2024, of units instead of weights).

Two criteria belong to sparse training (`sparsify/`), and score what it shrinks. "group_norm" is the squared norm of a
unit over everything that it occupies but biases, summed, not averaged; the normalizer "top" relates it to the strong
half of its group (DepGraph, CVPR 2023, section 3.3: N · I_k / Σ TopN(I), with N half of the units). "bn_scale" is the
mean of |scale| over the batch norms on the unit (network slimming, ICCV 2017, over groups).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from isomorphic.errors import UserError
from isomorphic.pruning.gradients import Statistic
from isomorphic.pruning.groups import CoupledGroup, Member
from isomorphic.pruning.weights.dimap import surviving_share

# A criterion of the user's own: (group, weights, gradients) -> scores (n,). `weights` has a float32 tensor (n, m) for
# each scored member of the group: row u holds all m weights of unit u there. `gradients` has their gradients, summed
# over the batches, likewise; it is empty where there is no data.
CustomCriterion = Callable[[CoupledGroup, list[Tensor], list[Tensor]], Tensor]


@dataclass(frozen=True)
class Criterion:
    """How important a single weight is.

    Attributes:
        saliency: (weight, statistic of the same shape) -> saliency of the same shape; None draws at random.
        statistic: what must be accumulated over images first: "gradient", "squared_gradient" or None.
        relative: of each tensor, a unit's saliency is its share of the whole tensor's.
        of_units: the scores of a group's units (n,), from their saliency (n,), which is the score for most.
        members: (model, group) -> the tensors that count, instead of the weights of layers that are scored; where there
            are none, the group's units cannot be told apart and stay.
        summed: a unit's saliency is the sum over members, not the mean.
    """

    saliency: Callable[[Tensor, Tensor], Tensor] | None
    statistic: str | None = None
    relative: bool = False
    of_units: Callable[[Tensor], Tensor] = lambda saliency: saliency
    members: Callable[[nn.Module, CoupledGroup], list[Member]] | None = None
    summed: bool = False


def batch_norm_scales(model: nn.Module, group: CoupledGroup) -> list[Member]:
    """Returns the scales of the batch norms that the group's units pass through."""
    return [one for one in group.weights() if _is_batch_norm_scale(model, one)]


def _is_batch_norm_scale(model: nn.Module, member: Member) -> bool:
    return member.tensor == "weight" and isinstance(model.get_submodule(member.module), _BatchNorm)


def _top_half(scores: Tensor) -> Tensor:
    """The scores that are not below the median: 3 of 5, 2 of 4."""
    return scores.sort(descending=True).values[: -(-len(scores) // 2)]


CRITERIA = {
    "random": Criterion(None),
    "l1": Criterion(lambda weight, _: weight.abs()),
    "l2": Criterion(lambda weight, _: weight.square()),
    "taylor": Criterion(lambda weight, gradient: (weight * gradient).abs(), "gradient"),
    "hessian": Criterion(lambda weight, curvature: weight.square() * curvature, "squared_gradient"),
    "dimap": Criterion(lambda weight, _: weight.square(), relative=True, of_units=surviving_share),
    "group_norm": Criterion(
        lambda weight, _: weight.square(), members=lambda model, group: group.weights(), summed=True
    ),
    "bn_scale": Criterion(lambda weight, _: weight.abs(), members=batch_norm_scales),
}

NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda scores: scores,
    "mean": lambda scores: scores / scores.mean(),
    "max": lambda scores: scores / scores.max(),
    "top": lambda scores: scores / _top_half(scores).mean(),
    "sum": lambda scores: scores / scores.sum(),
    "standardize": lambda scores: (scores - scores.min()) / (scores.max() - scores.min()),
    "gaussian": lambda scores: (scores - scores.mean()) / scores.std(correction=0),
}


def statistic_of(criterion: str | CustomCriterion, *, has_data: bool) -> str | None:
    """Returns what has to be accumulated over data for a criterion: "gradient", "squared_gradient" or None.

    Raises:
        UserError: there is no such criterion.
    """
    if callable(criterion):
        return "gradient" if has_data else None
    return _criterion(criterion).statistic


def _criterion(name: str) -> Criterion:
    if name not in CRITERIA:
        known = ", ".join(CRITERIA)
        raise UserError(f"criterion = {name!r} is none of {known}, and no function (group, weights, gradients)")
    return CRITERIA[name]


def score_groups(
    model: nn.Module,
    groups: Sequence[CoupledGroup],
    criterion: str | CustomCriterion,
    *,
    statistic: Statistic | None = None,
    score_bias: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores every unit of every group, not yet normalised.

    Args:
        model: holds the weights that the groups' members name.
        groups: the coupled groups.
        criterion: a key of `CRITERIA`, or a function of the user's own.
        statistic: from `accumulate`, where the criterion needs one.
        score_bias: count the biases of scored layers too.
        seed: of the random criterion.

    Returns:
        float32 scores on the CPU, shape (n,), by group name; finite.

    Raises:
        UserError: a score that is not finite, scores of another shape, or no such criterion.
        ValueError: the criterion's statistic is missing.
    """
    if callable(criterion):
        return _custom_scores(model, groups, criterion, statistic, score_bias)
    rule = _criterion(criterion)
    if rule.statistic and not statistic:
        raise ValueError(f"{criterion} needs what `accumulate` gives for {rule.statistic!r}")
    generator = torch.Generator().manual_seed(seed)
    sums = _PositionSums(model, rule.saliency, statistic or {}, rule.relative) if rule.saliency else None
    scores = {}
    for group in groups:
        if sums is None:
            scores[group.name] = torch.rand(group.num_units, generator=generator)
        else:
            chosen = rule.members(model, group) if rule.members else []
            members = (
                sums.each_once(sums.known(chosen))
                or sums.known(group.scored_members(score_bias))
                or sums.known(group.members)
            )
            saliency = _mean_over_members(members, sums) * (len(members) if rule.summed else 1)
            scores[group.name] = rule.of_units(saliency).float()
        if not torch.isfinite(scores[group.name]).all():
            raise UserError(f"the {criterion} scores of {group.name} are not finite: check weights and images")
    return scores


def groups_beyond(model: nn.Module, groups: Sequence[CoupledGroup], criterion: str | CustomCriterion) -> frozenset[str]:
    """Returns the names of the groups that a criterion says nothing about: "bn_scale" of those without batch norms.

    Raises:
        UserError: these are all groups.
    """
    chosen = None if callable(criterion) else _criterion(criterion).members
    if chosen is None:
        return frozenset()
    beyond = frozenset(group.name for group in groups if not chosen(model, group))
    if len(beyond) == len(groups):
        raise UserError(f"criterion {criterion!r} knows no group of this model: take another, such as 'group_norm'")
    return beyond


def _custom_scores(
    model: nn.Module,
    groups: Sequence[CoupledGroup],
    criterion: CustomCriterion,
    statistic: Statistic | None,
    score_bias: bool,
) -> dict[str, Tensor]:
    """`score_groups` by a criterion of the user's own."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first_name = {parameter: name for name, parameter in model.named_parameters()}  # tied weights have several
    scores = {}
    for group in groups:
        known = [member for member in group.scored_members(score_bias) if member.name in parameters]
        members = known or [member for member in group.members if member.name in parameters]
        weights = [_unit_rows(member, parameters[member.name].detach()) for member in members]
        gradients = []
        if statistic:
            gradients = [_unit_rows(member, statistic[first_name[parameters[member.name]]]) for member in members]
        scores[group.name] = _checked_scores(group, criterion(group, weights, gradients), bool(statistic))
    return scores


def _checked_scores(group: CoupledGroup, scores: Any, has_gradients: bool) -> Tensor:
    """A custom criterion's scores of a group as float32 on the CPU."""
    if not isinstance(scores, Tensor) or scores.shape != (group.num_units,):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        hint = "" if has_gradients else " (without data= there are no gradients: their list is empty)"
        raise UserError(
            f"the criterion's scores of {group.name} are {found}, not a tensor of ({group.num_units},){hint}"
        )
    scores = scores.detach().float().cpu()
    if not torch.isfinite(scores).all():
        raise UserError(f"the criterion's scores {tuple(scores.shape)} of {group.name} are not finite")
    return scores


def _unit_rows(member: Member, values: Tensor) -> Tensor:
    """All numbers of each unit in one row, float32.

    A convolution's weight (16, 8, 3, 3) along dim 1, of units at one position each: (8, 16, 3, 3) -> (8, 144).
    """
    by_position = values.float().movedim(member.dim, 0)  # (positions, *rest)
    return by_position[member.index.to(values.device)].flatten(1)  # (n, k, *rest) -> (n, k · rest)


def mean_saliency(
    model: nn.Module, criterion: str | CustomCriterion, *, statistic: Statistic | None = None, seed: int = 0
) -> dict[nn.Parameter, Tensor]:
    """Returns the mean saliency of every parameter, a scalar on the CPU: what blocks are scored by.

    It is never relative: a block has its tensors as a whole, so that each one's share of itself would say nothing.

    Args:
        model, criterion, statistic, seed: as for `score_groups`.

    Raises:
        UserError: a criterion of the user's own, which knows groups of units, not blocks; or no such criterion.
    """
    if callable(criterion):
        raise UserError(f"blocks are scored by a criterion of {', '.join(CRITERIA)}, not by a function: name one")
    saliency = _criterion(criterion).saliency
    generator = torch.Generator().manual_seed(seed)
    if saliency is None:
        return {parameter: torch.rand((), generator=generator) for parameter in model.parameters()}
    return {
        weight: saliency(weight.detach().float(), statistic[name] if statistic else weight.detach()).mean().cpu()
        for name, weight in model.named_parameters()
    }


def normalize(scores: Tensor, normalizer: str) -> Tensor:
    """Makes the scores of one group, shape (n,), comparable with those of others; all zeros stay all zeros.

    Args:
        scores: of one group's units.
        normalizer: a key of `NORMALIZERS`.
    """
    return torch.nan_to_num(NORMALIZERS[normalizer](scores), nan=0.0, posinf=0.0, neginf=0.0)


class _PositionSums:
    """Saliency of a tensor summed over all dims but one; each tensor's saliency is computed once."""

    def __init__(
        self,
        model: nn.Module,
        saliency: Callable[[Tensor, Tensor], Tensor],
        statistic: Statistic,
        relative: bool = False,
    ) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        # tied weights have several
        self._first_name = {parameter: name for name, parameter in model.named_parameters()}
        self._saliency = saliency
        self._statistic = statistic
        self._relative = relative
        self._cache: dict[str, list[Tensor]] = {}

    def known(self, members: Iterable[Member]) -> list[Member]:
        """Those whose tensors are parameters: buffers are not learned, and have no gradient."""
        return [member for member in members if member.name in self._parameters]

    def each_once(self, members: Iterable[Member]) -> list[Member]:
        """Those of some known members that are no other name of a tied weight."""
        found: dict[tuple[Any, ...], Member] = {}
        for member in members:
            key = (id(self._parameters[member.name]), member.dim, tuple(member.index.flatten().tolist()))
            found.setdefault(key, member)
        return list(found.values())

    def __call__(self, name: str, dim: int) -> Tensor:
        """Sums by position along `dim`, float32 on the CPU."""
        if name not in self._cache:
            parameter = self._parameters[name]
            weight = parameter.detach().float()
            statistic = self._statistic[self._first_name[parameter]] if self._statistic else weight
            saliency = self._saliency(weight, statistic)
            if self._relative and saliency.any():
                saliency = saliency / saliency.sum()
            others = [[d for d in range(saliency.dim()) if d != kept] for kept in range(saliency.dim())]
            self._cache[name] = [(saliency.sum(dims) if dims else saliency).cpu() for dims in others]
        return self._cache[name][dim]


def _mean_over_members(members: Sequence[Member], sums: _PositionSums) -> Tensor:
    """A unit's score: summed over its k positions of a member, averaged over the members."""
    return torch.stack([sums(member.name, member.dim)[member.index].sum(dim=1) for member in members]).mean(dim=0)
