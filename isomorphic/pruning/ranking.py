"""Step 4, rank: from scores and a ratio to a pruning plan.

Ranking is a matter of *steps*. A step is the smallest removal that leaves a group in order: `round_to` units of a plain
group, or `round_to` dims of every surviving head of an attention group, each head losing its own worst. A group's steps
come in the order of its scores, and the groups that share a *pool* (one isomorphism class, all groups, or one group)
merge theirs into one removal order. A ratio is then a prefix of that order, so plans are nested: a larger ratio removes
what a smaller one does, and more.

When asks conflict: the cut model runs > at least one unit and one head stay > `max_pruning_ratio` > `round_to` > quota.
Ties go by a step's rank fraction inside its group, then by the group's name, then by unit number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from isomorphic.pruning.groups import CoupledGroup
from isomorphic.pruning.plan import PruningPlan

RANKINGS = ("isomorphic", "global", "local")


class Pool(NamedTuple):
    """Groups that are ranked together: `kind` is "width" or "head_dims", `label` tells pools of a kind apart."""

    kind: str
    label: str


@dataclass(frozen=True)
class Ratios:
    """Shares to remove, each in [0, 1].

    Attributes:
        width: of every pool that the next two leave out.
        heads: of all attention heads; 0 keeps them.
        head_dims: of the head dims, ranked in a pool of their own; None treats them like any width.
    """

    width: float
    heads: float = 0.0
    head_dims: float | None = None

    def of(self, pool: Pool) -> float:
        """The share to remove from a pool."""
        return self.head_dims if pool.kind == "head_dims" and self.head_dims is not None else self.width


@dataclass(frozen=True)
class RankingRules:
    """What holds whatever the ratio is.

    Attributes:
        ranking: "isomorphic" ranks inside a class, "global" over all groups, "local" inside a group.
        round_to: the width of a group that loses anything, per head in attention, becomes a multiple of this; a group
            that is no wider stays whole.
        max_pruning_ratio: the largest share that a plain group may lose of its units, and an attention group of its
            heads and, again, of the dims of a head.
    """

    ranking: str = "isomorphic"
    round_to: int = 1
    max_pruning_ratio: float = 1.0

    def most(self, width: int) -> int:
        """The most that may go of `width` units, heads or head dims: one always stays."""
        return min(int(self.max_pruning_ratio * width + 1e-9), width - 1)  # 0.29 × 100 is 28.999… in floats


@dataclass(frozen=True)
class RemovalOrder:
    """One pool's steps, in the order of removal.

    Attributes:
        names: the pool's groups.
        group: position in `names` of each step's group, shape (S,).
        units: units that each step removes, shape (S,).
        total: units in the pool, those that may not go included.
    """

    names: tuple[str, ...]
    group: NDArray[np.int64]
    units: NDArray[np.int64]
    total: int

    def steps_for(self, ratio: float) -> int:
        """How many steps come nearest to removing `ratio` of the pool's units; the smaller of two equally near."""
        removed = np.concatenate([[0], np.cumsum(self.units)])
        return int(np.argmin(np.abs(removed - ratio * self.total)))

    def steps_by_group(self, steps: int) -> dict[str, int]:
        """How many of the first `steps` steps belong to each group."""
        counts = np.bincount(self.group[:steps], minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))


@dataclass(frozen=True)
class _GroupSteps:
    """One group's steps, worst first: mean scores (s,), units removed (s,), and the group's units in all."""

    name: str
    scores: NDArray[np.float64]
    units: NDArray[np.int64]
    total: int


class Ranker:
    """Turns ratios into plans for one set of scores."""

    def __init__(
        self,
        groups: Sequence[CoupledGroup],
        scores: Mapping[str, Tensor],
        classes: Mapping[str, int],
        rules: RankingRules,
    ) -> None:
        """
        Args:
            groups: all prunable groups.
            scores: shape (n,), by group name.
            classes: isomorphism class by group name.
            rules: see `RankingRules`.
        """
        self.groups = tuple(groups)
        self.rules = rules
        self._classes = classes
        self._scores = {g.name: _by_head(g, scores[g.name]) for g in groups}  # (heads, head dims)
        self._head_order = {
            g.name: np.lexsort((np.arange(g.num_heads), self._scores[g.name].mean(axis=1))) for g in groups if g.heads
        }

    def plan(self, ratios: Ratios) -> PruningPlan:
        """The plan that comes nearest to removing `ratios`: heads first, then widths among what survives."""
        heads = self.surviving_heads(ratios.heads)
        orders = self.width_orders(heads, separate_head_dims=ratios.head_dims is not None)
        steps = {pool: order.steps_for(ratios.of(pool)) for pool, order in orders.items()}
        return self.plan_from_steps(heads, orders, steps)

    def surviving_heads(self, ratio: float) -> dict[str, NDArray[np.int64]]:
        """The heads that each attention group keeps, ascending; all heads are ranked by their dims' mean score."""
        attention = [group for group in self.groups if group.heads]
        pools = [[group] for group in attention] if self.rules.ranking == "local" else [attention]
        surviving = {}
        for members in filter(None, pools):
            order = _merge([self._head_steps(group) for group in members])
            for name, removed in order.steps_by_group(order.steps_for(ratio)).items():
                surviving[name] = np.sort(self._head_order[name][removed:])
        return surviving

    def width_orders(
        self, heads: Mapping[str, NDArray[np.int64]], *, separate_head_dims: bool
    ) -> dict[Pool, RemovalOrder]:
        """The removal order of each pool, given the heads that survive."""
        pools: dict[Pool, list[CoupledGroup]] = {}
        for group in self.groups:
            pools.setdefault(self._width_pool(group, separate_head_dims), []).append(group)
        return {
            pool: _merge([self._width_steps_of(group, heads.get(group.name)) for group in members])
            for pool, members in pools.items()
        }

    def plan_from_steps(
        self, heads: Mapping[str, NDArray[np.int64]], orders: Mapping[Pool, RemovalOrder], steps: Mapping[Pool, int]
    ) -> PruningPlan:
        """The plan that takes the first `steps[pool]` steps of each pool."""
        taken: dict[str, int] = {}
        for pool, order in orders.items():
            taken |= order.steps_by_group(steps[pool])
        return PruningPlan({g.name: self._kept_units(g, heads.get(g.name), taken[g.name]) for g in self.groups})

    def _width_pool(self, group: CoupledGroup, separate_head_dims: bool) -> Pool:
        local = self.rules.ranking == "local"
        if group.heads and separate_head_dims:
            return Pool("head_dims", group.name if local else "all")
        labels = {"isomorphic": str(self._classes[group.name]), "global": "all", "local": group.name}
        return Pool("width", labels[self.rules.ranking])

    def _head_steps(self, group: CoupledGroup) -> _GroupSteps:
        scores = self._scores[group.name].mean(axis=1)[self._head_order[group.name]]
        largest = self.rules.most(group.num_heads)
        return _GroupSteps(group.name, scores[:largest], np.ones(largest, np.int64), group.num_heads)

    def _width_steps_of(self, group: CoupledGroup, heads: NDArray[np.int64] | None) -> _GroupSteps:
        by_rank = np.sort(self._surviving_scores(group, heads), axis=1)  # (surviving heads, head dims): worst first
        scores = by_rank.mean(axis=0)
        sizes = _step_sizes(len(scores), self.rules)
        starts = np.cumsum(sizes) - sizes
        means = np.add.reduceat(scores[: sizes.sum()], starts) / sizes if len(sizes) else scores[:0]
        num_heads = group.num_heads if heads is None else len(heads)
        return _GroupSteps(group.name, means, sizes * num_heads, len(scores) * num_heads)

    def _kept_units(self, group: CoupledGroup, heads: NDArray[np.int64] | None, steps: int) -> tuple[int, ...]:
        scores = self._surviving_scores(group, heads)  # (surviving heads, head dims)
        removed = int(_step_sizes(scores.shape[1], self.rules)[:steps].sum())
        dims = np.sort(np.argsort(scores, axis=1, kind="stable")[:, removed:], axis=1)
        first = (np.arange(group.num_heads) if heads is None else heads) * group.head_dim
        return tuple((first[:, None] + dims).ravel().tolist())

    def _surviving_scores(self, group: CoupledGroup, heads: NDArray[np.int64] | None) -> NDArray[np.float64]:
        scores = self._scores[group.name]
        return scores if heads is None else scores[heads]


def _by_head(group: CoupledGroup, scores: Tensor) -> NDArray[np.float64]:
    return scores.double().numpy().reshape(group.num_heads, group.head_dim)


def _step_sizes(width: int, rules: RankingRules) -> NDArray[np.int64]:
    """Units (a head) of each feasible step: the first brings the width to a multiple of `round_to`."""
    largest = rules.most(width)
    first = width % rules.round_to or rules.round_to
    if first > largest:
        return np.zeros(0, np.int64)
    sizes = np.full(1 + (largest - first) // rules.round_to, rules.round_to)
    sizes[0] = first
    return sizes


def _merge(groups: Sequence[_GroupSteps]) -> RemovalOrder:
    """One removal order over the groups' steps; ties by rank fraction, then by name, then by position."""
    names = tuple(sorted(group.name for group in groups))
    member = {group.name: group for group in groups}
    scores = np.concatenate([member[name].scores for name in names])
    sizes = [len(member[name].scores) for name in names]
    group = np.repeat(np.arange(len(names)), sizes)
    position = np.concatenate([np.arange(size) for size in sizes])
    removed = np.concatenate([np.cumsum(member[name].units) / member[name].total for name in names])
    order = np.lexsort((position, group, removed, scores))
    units = np.concatenate([member[name].units for name in names])
    return RemovalOrder(names, group[order], units[order], sum(member[name].total for name in names))
