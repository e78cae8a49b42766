"""Step 4, rank: from scores and a ratio to a pruning plan.

Ranking is a matter of *steps*. A step is the smallest removal that leaves a *set* in order: groups that must shrink
together, most often a single group. All sections of a set (the surviving heads of an attention group; a plain group is
one section) keep the same fraction of their units, and each loses its own worst. That is `round_to` units of a plain
group, or `round_to` dims of every head; where groups of other sizes shrink along, the next fraction that is a whole
number of units, and a multiple of `round_to`, in all of them. A set's steps come in the order of its scores, and the
sets that share a *pool* (the same isomorphism classes, all sets, or one set) merge theirs into one removal order. A
ratio is then a prefix of that order, so plans are nested: a larger ratio removes what a smaller one does, and more.

When asks conflict: the cut model runs > at least one unit and one head stay > `max_pruning_ratio` > `round_to` > quota.
Ties go by a step's rank fraction inside its set, then by the name of the set's first group, then by unit number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from isomorphic.pruning.groups import ChannelGraph, CoupledGroup
from isomorphic.pruning.plan import PruningPlan

RANKINGS = ("isomorphic", "global", "local")


class RankingPool(NamedTuple):
    """What is ranked together.

    `kind` is "heads", "width", "head_dims", or "by name" for groups whose ratio was given by name; `label` tells pools
    of a kind apart.
    """

    kind: str
    label: str


HEADS = RankingPool("heads", "all")  # of all head sets that may lose any
BY_NAME = "by name"  # the kind of pool that a group with a ratio of its own makes


@dataclass(frozen=True)
class Ratios:
    """Shares to remove, each in [0, 1].

    Attributes:
        width: of every pool that the others leave out.
        heads: of all attention heads; 0 keeps them.
        head_dims: of the head dims, ranked in a pool of their own; None treats them like any width.
        by_pool: of the pools that are named here, whatever the others say.
    """

    width: float
    heads: float = 0.0
    head_dims: float | None = None
    by_pool: Mapping[RankingPool, float] = field(default_factory=dict)

    def of(self, pool: RankingPool) -> float:
        """The share to remove from a pool."""
        by_kind = {"heads": self.heads, "head_dims": self.width if self.head_dims is None else self.head_dims}
        return self.by_pool.get(pool, by_kind.get(pool.kind, self.width))


@dataclass(frozen=True)
class RankingRules:
    """What holds whatever the ratio is.

    Attributes:
        ranking: "isomorphic" ranks inside a class, "global" over all groups, "local" inside a group, or inside the
            groups that one dim was divided into.
        round_to: the width of a group that loses anything, per section, becomes a multiple of this; a group that is no
            wider stays whole.
        max_pruning_ratio: the largest share that a section may lose of its units, and an attention group of its heads.
        whole: names of groups that lose nothing, neither units nor heads, which those that share their heads keep, too.
            They count in no pool.
        by_name: the share that a group loses of its units, by its name: whatever ratio or budget the others meet. What
            shrinks together with it follows.
    """

    ranking: str = "isomorphic"
    round_to: int = 1
    max_pruning_ratio: float = 1.0
    whole: frozenset[str] = frozenset()
    by_name: Mapping[str, float] = field(default_factory=dict)

    def most(self, width: int, dense_width: int) -> int:
        """Returns how many of `width` units, heads or head dims may go, of `dense_width` in the dense model.

        One always stays. With a largest share of 0.5, 3 of 8 may go where 2 of 10 have gone already.
        """
        allowed = int(self.max_pruning_ratio * dense_width + 1e-9)  # 0.29 × 100 is 28.999… in floats
        return max(min(allowed - (dense_width - width), width - 1), 0)


class DenseSize(NamedTuple):
    """How large a group was in the dense model, where this one has been pruned already."""

    section_size: int
    num_sections: int


@dataclass(frozen=True)
class RemovalOrder:
    """One pool's steps, in the order of removal.

    Attributes:
        names: the pool's sets, each by its first group's name.
        owner: position in `names` of each step's set, shape (S,).
        units: units that each step removes, shape (S,).
        total: units that the pool had in the dense model, those that may not go included.
        gone: how many of these had gone before this ranking.
    """

    names: tuple[str, ...]
    owner: NDArray[np.int64]
    units: NDArray[np.int64]
    total: int
    gone: int = 0

    def steps_for(self, ratio: float) -> int:
        """Returns how many steps come nearest to removing `ratio` of the dense pool's units; the smaller of two.

        Of a pool of 16 units that has lost 4 already, in steps of one: a ratio of 0.5 takes 4 steps.
        """
        removed = self.gone + np.concatenate([[0], np.cumsum(self.units)])
        return int(np.argmin(np.abs(removed - ratio * self.total)))

    def steps_by_set(self, steps: int) -> dict[str, int]:
        """How many of the first `steps` steps belong to each set."""
        counts = np.bincount(self.owner[:steps], minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))


@dataclass(frozen=True)
class _Steps:
    """One set's steps, worst first.

    Attributes:
        scores: mean score of what each step removes, shape (s,).
        units: how many units that is, shape (s,).
        total: the set's units in the dense model.
        gone: those of them that had gone before.
    """

    name: str
    scores: NDArray[np.float64]
    units: NDArray[np.int64]
    total: int
    gone: int


@dataclass(frozen=True)
class _ShrinkSet:
    """Groups whose sections all keep the same fraction: a number of `ticks`, the finest that all can be divided into.

    Attributes:
        groups: by name.
        removals: ticks removed after each step, ascending, shape (s,).
    """

    groups: tuple[CoupledGroup, ...]
    removals: NDArray[np.int64]

    @property
    def name(self) -> str:
        return self.groups[0].name

    @property
    def names(self) -> set[str]:
        return _names(self.groups)

    @property
    def has_width(self) -> bool:
        """Whether it has units that are no whole heads."""
        return any(group.has_width for group in self.groups)

    @property
    def ticks(self) -> int:
        return _ticks(self.groups)


class Ranker:
    """Turns ratios into plans for one set of scores."""

    def __init__(
        self,
        graph: ChannelGraph,
        scores: Mapping[str, Tensor],
        classes: Mapping[str, int],
        rules: RankingRules,
        dense: Mapping[str, DenseSize] | None = None,
    ) -> None:
        """
        Args:
            graph: all prunable groups, and which of them shrink together.
            scores: shape (n,), by group name.
            classes: isomorphism class by group name.
            rules: see `RankingRules`.
            dense: sizes of groups in the dense model, by name, where the model has been pruned before: ratios are
                shares of these.
        """
        self.groups = graph.groups
        self.rules = rules
        self._made_of = graph, scores, classes
        self._dense = {g.name: DenseSize(g.section_size, g.num_sections) for g in graph.groups} | dict(dense or {})
        self._sets = _shrink_sets(graph, rules, self._dense)
        self._labels = _labels(self._sets, classes, rules.ranking)
        self._scores = {g.name: _by_section(g, scores[g.name]) for g in graph.groups}  # (sections, units of a section)
        self._head_sets = {groups[0].name: groups for groups in graph.head_sets if not _names(groups) & rules.whole}
        self._head_scores = {name: self._mean_by_head(groups) for name, groups in self._head_sets.items()}
        self._head_order = {
            name: np.lexsort((np.arange(len(scores)), scores)) for name, scores in self._head_scores.items()
        }
        self._known_orders: dict[tuple[Any, ...], RemovalOrder] = {}  # see `_width_order`

    def with_ranking(self, ranking: str) -> Ranker:
        """The ranker of the same scores under the same rules, but for which units compete."""
        return Ranker(*self._made_of, replace(self.rules, ranking=ranking), self._dense)

    def pools(self, *, separate_head_dims: bool) -> dict[RankingPool, list[CoupledGroup]]:
        """Returns the pools that can lose anything, with their groups: the heads of all layers, then widths.

        Of groups that share their heads, the pool of heads has the first. Groups whose ratio was given by name are in
        no pool.
        """
        attention = [groups[0] for groups in self._head_sets.values()]
        pools = {HEADS: attention} if any(self._most_heads(group) for group in attention) else {}
        for pool, members in self._width_pools(separate_head_dims).items():
            if pool.kind != BY_NAME and any(len(shrink_set.removals) for shrink_set in members):
                pools[pool] = [group for shrink_set in members for group in shrink_set.groups]
        return pools

    def plan(self, ratios: Ratios) -> PruningPlan:
        """The plan that comes nearest to removing `ratios`: heads first, then widths among what survives."""
        heads = self.surviving_heads(ratios.of(HEADS))
        orders = self.width_orders(heads, separate_head_dims=ratios.head_dims is not None)
        return self.plan_of(heads, steps_by_set(orders, self.steps_at(ratios, orders)))

    def steps_at(self, ratios: Ratios, orders: Mapping[RankingPool, RemovalOrder]) -> dict[RankingPool, int]:
        """Returns how many steps each pool takes at `ratios`; a ratio that was given by name stands."""
        steps = {}
        for pool, order in orders.items():
            ratio = self.rules.by_name[pool.label] if pool.kind == BY_NAME else ratios.of(pool)
            steps[pool] = order.steps_for(ratio)
        return steps

    def surviving_heads(self, ratio: float) -> dict[str, NDArray[np.int64]]:
        """The heads that each attention group keeps, ascending; all heads are ranked by their units' mean score.

        A head is ranked once, with its units in all groups that share it, and goes from all of them.
        """
        names = list(self._head_sets)
        pools = [[name] for name in names] if self.rules.ranking == "local" else [names]
        surviving = {}
        for members in filter(None, pools):
            order = _merge([self._head_steps(name) for name in members])
            for name, removed in order.steps_by_set(order.steps_for(ratio)).items():
                kept = np.sort(self._head_order[name][removed:])
                surviving |= {group.name: kept for group in self._head_sets[name]}
        return surviving

    def width_orders(
        self, heads: Mapping[str, NDArray[np.int64]], *, separate_head_dims: bool
    ) -> dict[RankingPool, RemovalOrder]:
        """The removal order of each pool of widths, given the heads that survive."""
        pools = self._width_pools(separate_head_dims)
        return {pool: self._width_order(members, heads) for pool, members in pools.items()}

    def _width_order(self, members: list[_ShrinkSet], heads: Mapping[str, NDArray[np.int64]]) -> RemovalOrder:
        """One pool's order; made once for the same heads, as a search asks at ratios that leave most of them alone."""
        groups = [group.name for shrink_set in members for group in shrink_set.groups]
        key = (*groups, *(heads[name].tobytes() for name in groups if name in heads))
        if key not in self._known_orders:
            self._known_orders[key] = _merge([self._width_steps(shrink_set, heads) for shrink_set in members])
        return self._known_orders[key]

    def widths_left(self, taken: Mapping[str, int]) -> dict[str, int]:
        """The units that each section keeps when the first `taken[name]` steps of each set go, by group name."""
        widths = {}
        for shrink_set in self._sets:
            count = taken.get(shrink_set.name, 0)
            ticks = int(shrink_set.removals[count - 1]) if count else 0
            for group in shrink_set.groups:
                widths[group.name] = group.section_size - ticks * group.section_size // shrink_set.ticks
        return widths

    def plan_of(self, heads: Mapping[str, NDArray[np.int64]], taken: Mapping[str, int]) -> PruningPlan:
        """The plan that keeps `heads`, by group name, and takes the first `taken[name]` steps of each set."""
        widths = self.widths_left(taken)
        return PruningPlan({g.name: self._kept_units(g, heads.get(g.name), widths[g.name]) for g in self.groups})

    def _width_pools(self, separate_head_dims: bool) -> dict[RankingPool, list[_ShrinkSet]]:
        pools: dict[RankingPool, list[_ShrinkSet]] = {}
        for shrink_set in self._sets:
            if shrink_set.has_width and not shrink_set.names & self.rules.whole:
                pools.setdefault(self._width_pool(shrink_set, separate_head_dims), []).append(shrink_set)
        return pools

    def _width_pool(self, shrink_set: _ShrinkSet, separate_head_dims: bool) -> RankingPool:
        named = sorted(shrink_set.names & self.rules.by_name.keys())
        if named:
            return RankingPool(BY_NAME, named[0])
        label = self._labels[shrink_set.name]
        if separate_head_dims and all(group.heads for group in shrink_set.groups):
            return RankingPool("head_dims", label if self.rules.ranking == "local" else "all")
        return RankingPool("width", label)

    def _most_heads(self, group: CoupledGroup) -> int:
        return self.rules.most(group.num_sections, self._dense[group.name].num_sections)

    def _mean_by_head(self, groups: Sequence[CoupledGroup]) -> NDArray[np.float64]:
        """The mean score of each head's units in all groups that share it, shape (heads,)."""
        return np.concatenate([self._scores[group.name] for group in groups], axis=1).mean(axis=1)

    def _head_steps(self, name: str) -> _Steps:
        first = self._head_sets[name][0]
        scores = self._head_scores[name][self._head_order[name]]
        largest, dense = self._most_heads(first), self._dense[name].num_sections
        return _Steps(name, scores[:largest], np.ones(largest, np.int64), dense, dense - first.num_sections)

    def _width_steps(self, shrink_set: _ShrinkSet, heads: Mapping[str, NDArray[np.int64]]) -> _Steps:
        """Steps whose score is the mean over all units that they remove, of every section in the set."""
        sums, units, total = np.zeros(shrink_set.ticks), 0, 0  # of a tick: its scores, its units; the dense units
        for group in shrink_set.groups:
            scores = self._surviving_scores(group, heads.get(group.name))
            by_rank = np.sort(scores, axis=1)  # (sections, units of a section): worst first
            sums += by_rank.sum(axis=0).reshape(shrink_set.ticks, -1).sum(axis=1)
            units += by_rank.size // shrink_set.ticks
            total += len(by_rank) * self._dense[group.name].section_size
        ends = shrink_set.removals
        sizes = np.diff(ends, prepend=0)
        step_sums = np.add.reduceat(sums[: ends[-1]], ends - sizes) if len(ends) else sums[:0]
        gone = total - shrink_set.ticks * units
        return _Steps(shrink_set.name, step_sums / (sizes * units), sizes * units, total, gone)

    def _kept_units(self, group: CoupledGroup, heads: NDArray[np.int64] | None, width: int) -> tuple[int, ...]:
        scores = self._surviving_scores(group, heads)  # (surviving sections, units of a section)
        units = np.sort(np.argsort(scores, axis=1, kind="stable")[:, group.section_size - width :], axis=1)
        first = (np.arange(group.num_sections) if heads is None else heads) * group.section_size
        return tuple((first[:, None] + units).ravel().tolist())

    def _surviving_scores(self, group: CoupledGroup, heads: NDArray[np.int64] | None) -> NDArray[np.float64]:
        scores = self._scores[group.name]
        return scores if heads is None else scores[heads]


def steps_by_set(orders: Mapping[RankingPool, RemovalOrder], steps: Mapping[RankingPool, int]) -> dict[str, int]:
    """How many steps each set takes when the first `steps[pool]` of each pool go, by the set's name."""
    taken: dict[str, int] = {}
    for pool, order in orders.items():
        taken |= order.steps_by_set(steps[pool])
    return taken


def _by_section(group: CoupledGroup, scores: Tensor) -> NDArray[np.float64]:
    return scores.double().numpy().reshape(group.num_sections, group.section_size)


def _names(groups: Iterable[CoupledGroup]) -> set[str]:
    return {group.name for group in groups}


def _ticks(groups: Iterable[CoupledGroup]) -> int:
    return math.gcd(*(group.section_size for group in groups))


def _shrink_sets(graph: ChannelGraph, rules: RankingRules, dense: Mapping[str, DenseSize]) -> list[_ShrinkSet]:
    """Every group in one set, alone where nothing shrinks with it; in the order of the sets' first groups."""
    partners = {name: names for names in graph.shrink_together for name in names}
    groups = {group.name: group for group in graph.groups}
    names = dict.fromkeys(tuple(sorted(partners.get(name, (name,)))) for name in groups)
    sets = [tuple(groups[name] for name in members) for members in names]
    return [_ShrinkSet(members, _removals(members, rules, dense)) for members in sets]


def _removals(groups: Sequence[CoupledGroup], rules: RankingRules, dense: Mapping[str, DenseSize]) -> NDArray[np.int64]:
    """The feasible numbers of removed ticks, ascending: widths that are multiples, and shares that may go."""
    ticks = _ticks(groups)
    kept = np.arange(ticks - 1, 0, -1)
    feasible = np.ones(len(kept), bool)
    for size, dense_size in {(group.section_size, dense[group.name].section_size) for group in groups}:
        width = kept * (size // ticks)
        feasible &= (width % rules.round_to == 0) & (size - width <= rules.most(size, dense_size))
    return ticks - kept[feasible]


def _labels(sets: Sequence[_ShrinkSet], classes: Mapping[str, int], ranking: str) -> dict[str, str]:
    """The label of each set's pool, by the set's name."""
    if ranking == "global":
        return {s.name: "all" for s in sets}
    if ranking == "isomorphic":
        return {s.name: "+".join(map(str, sorted(classes[group.name] for group in s.groups))) for s in sets}
    related = nx.Graph()  # sets, and the dims that several groups divide among them
    related.add_nodes_from(s.name for s in sets)
    related.add_edges_from((s.name, ("dim", g.split_dim)) for s in sets for g in s.groups if g.split_dim)
    labels = {}
    for part in nx.connected_components(related):
        members = [node for node in part if isinstance(node, str)]
        labels |= dict.fromkeys(members, min(members))
    return labels


def _merge(sets: Sequence[_Steps]) -> RemovalOrder:
    """One removal order over the sets' steps; ties by rank fraction, then by name, then by position."""
    names = tuple(sorted(one.name for one in sets))
    steps = {one.name: one for one in sets}
    scores = np.concatenate([steps[name].scores for name in names])
    sizes = [len(steps[name].scores) for name in names]
    owner = np.repeat(np.arange(len(names)), sizes)
    position = np.concatenate([np.arange(size) for size in sizes])
    fractions = [(steps[name].gone + np.cumsum(steps[name].units)) / steps[name].total for name in names]
    removed = np.concatenate(fractions)
    order = np.lexsort((position, owner, removed, scores))
    units = np.concatenate([steps[name].units for name in names])
    total, gone = (sum(getattr(one, field) for one in sets) for field in ("total", "gone"))
    return RemovalOrder(names, owner[order], units[order], total, gone)
