"""Meeting a budget in MACs or params, by searching over plans.

A plan's cost is measured on a copy of the model that has shapes but no data (torch's "meta" device), cut like the real
one and counted by the same counter: exact for whatever the counter knows, and the model itself is not touched. That
takes about a tenth of a second, so a search does not measure all that it looks at: it searches by an estimate, measures
what that finds, puts the estimate right there and searches again, until nothing more fits. Where the estimate does not
lead there, every step of the search is measured.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from isomorphic.errors import UserError
from isomorphic.measure.complexity import Complexity, count_complexity, format_amount
from isomorphic.pruning.cutting.cut import cut, shape_copy
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.inputs import Inputs, arguments, without_data
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.ranking.estimate import Estimate, Kept
from isomorphic.pruning.ranking.ranker import BY_NAME, HEADS, Ranker, RankingPool, Ratios, RemovalOrder
from isomorphic.pruning.ranking.snapshot import Snapshot

# Halvings of the ratio; single steps then use up what is left of the budget.
BISECTIONS = 12
# Measured plans after which an estimate that has not led to the target is given up.
CORRECTIONS = 6


class Cost(Protocol):
    """What a search asks."""

    def __call__(self, plan: PruningPlan) -> Complexity:
        """What a plan leaves, to the unit; it falls as the ratios grow."""
        ...

    def estimate(self, unit: str) -> Callable[[Kept], float]:
        """About what plans leave of one field of `Complexity`, in no time."""
        ...


class PlanCost:
    """Predicts a plan's complexity without touching the model: on a copy that has no data, if forward runs on one."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, inputs: Inputs) -> None:
        self._graph = graph
        self._use(shape_copy(model), without_data(inputs))
        try:
            count_complexity(self._skeleton, self._inputs)
        except (RuntimeError, TypeError, ValueError):  # forward code that looks at values
            self._use(copy.deepcopy(model), arguments(inputs))
        self._dense.restore()

    def _use(self, skeleton: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._skeleton, self._inputs = skeleton.eval(), inputs
        self._dense = Snapshot(skeleton)

    def __call__(self, plan: PruningPlan) -> Complexity:
        """MACs, under both counters, and params of the model that `plan` leaves."""
        try:
            cut(self._skeleton, self._graph, plan)
            return count_complexity(self._skeleton, self._inputs)
        finally:
            self._dense.restore()

    def estimate(self, unit: str) -> Estimate:
        """About how much of a field of `Complexity` is left, from what each group keeps."""
        try:
            return Estimate(self._skeleton, self._graph, self._inputs, unit)
        finally:
            self._dense.restore()


def shared_ratios(ratio: float, heads: float | None, head_dims: float | None) -> Ratios:
    """The ratios of a budget search at `ratio`, where an explicit share of heads or head dims stays what it is.

    A share that was left open follows: with both open, heads and head dims each lose 1 - √(1 - ratio), so that the
    width of attention shrinks by `ratio` like every other width.
    """
    if heads is None and head_dims is None:
        each = 1 - (1 - ratio) ** 0.5
        return Ratios(ratio, each, each)
    return Ratios(ratio, ratio if heads is None else heads, ratio if head_dims is None else head_dims)


@dataclass(frozen=True)
class _Candidate:
    """A plan before it is written out: the surviving heads, and how many steps each pool takes."""

    ranker: Ranker
    heads: Mapping[str, NDArray[np.int64]]
    orders: Mapping[RankingPool, RemovalOrder]
    steps: Mapping[RankingPool, int]

    @functools.cached_property
    def kept(self) -> Kept:
        """Sections, and units of each, by group name: as different as two candidates of one ranker are."""
        widths = self.ranker.widths_from_steps(self.orders, self.steps)
        sections = {
            g.name: len(self.heads[g.name]) if g.name in self.heads else g.num_sections for g in self.ranker.groups
        }
        return {name: (sections[name], width) for name, width in widths.items()}

    def plan(self) -> PruningPlan:
        return self.ranker.plan_from_steps(self.heads, self.orders, self.steps)

    def with_steps(self, pool: RankingPool, steps: int) -> _Candidate:
        return replace(self, steps={**self.steps, pool: steps})


_Price = Callable[[_Candidate], int]


def plan_for_budget(
    ranker: Ranker, ratios_at: Callable[[float], Ratios], complexity: Cost, unit: str, target: int
) -> PruningPlan:
    """The plan whose complexity comes nearest to `target` from below, as far as single steps allow.

    Bisection finds the smallest ratio that meets the target; then each pool gets its last steps back while they fit.
    A model that meets the target without any of that, as one that lost blocks may, loses no more.

    Args:
        ranker: holds scores and rules.
        ratios_at: all ratios as a function of one in [0, 1].
        complexity: of a plan, and an estimate of it.
        unit: what is budgeted, a field of `Complexity`: "macs_paper", "macs_exact" or "params".
        target: the budget.

    Raises:
        UserError: no ratio meets the target; the message says what is reachable.
    """

    @functools.cache
    def at(ratio: float) -> _Candidate:
        return _candidate(ranker, ratios_at(ratio))

    def cost(candidate: _Candidate) -> int:
        return getattr(complexity(candidate.plan()), unit)

    found = _guided_search(at, complexity.estimate(unit), cost, target) or _search(at, cost, target)
    if found.kept == at(1.0).kept and (least := cost(found)) > target:
        most = cost(_candidate(ranker, Ratios(0.0)))
        raise UserError(
            f"a budget of {format_amount(target, unit)} is out of reach: "
            f"under these rules the model takes between {format_amount(least, unit)} and {format_amount(most, unit)}"
        )
    return found.plan()


def _candidate(ranker: Ranker, ratios: Ratios) -> _Candidate:
    heads = ranker.surviving_heads(ratios.of(HEADS))
    orders = ranker.width_orders(heads, separate_head_dims=ratios.head_dims is not None)
    return _Candidate(ranker, heads, orders, {pool: order.steps_for(ratios.of(pool)) for pool, order in orders.items()})


def _guided_search(
    at: Callable[[float], _Candidate], estimate: Callable[[Kept], float], cost: _Price, target: int
) -> _Candidate | None:
    """What `_search` finds by an estimate that is put right at each candidate found, until no step more would fit.

    Returns:
        A candidate that is measured to fit, and to be over with the step that seems cheapest; or one of both ends,
        measured to be within the target, or over it where the ratio is 1. None where the estimate errs too much.
    """
    anchor, measured = 1.0, 1.0  # the estimate as it is

    def price(candidate: _Candidate) -> int:
        return round(estimate(candidate.kept) / anchor * measured)

    for _ in range(CORRECTIONS):
        found = _search(at, price, target)
        anchor, measured = estimate(found.kept), cost(found)
        if not anchor:
            break
        if found.kept == at(0.0 if measured <= target else 1.0).kept:
            return found
        next_up = _cheapest_step(found, price)
        if measured <= target and (next_up is None or price(next_up) > target):
            return found if next_up is None or cost(next_up) > target else None
    return None


def _search(at: Callable[[float], _Candidate], price: _Price, target: int) -> _Candidate:
    """The candidate nearest to `target` from below; that of ratio 1 where even this is over."""
    if price(at(0.0)) <= target:  # the explicit shares do it alone
        return at(0.0)
    if price(at(1.0)) > target:
        return at(1.0)
    low, high = 0.0, 1.0  # over the target, within it
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if price(at(middle)) <= target:
            high = middle
        else:
            low = middle
    return _fill(at(high), price, target)


def _fill(candidate: _Candidate, price: _Price, target: int) -> _Candidate:
    """Gives back the last steps of each pool, from the costliest step to the cheapest, as many as still fit."""

    def fits(back: int) -> bool:
        return price(candidate.with_steps(pool, taken - back)) <= target

    prices = _prices(candidate, price)
    for pool in sorted(prices, key=lambda pool: -prices[pool]):
        taken = candidate.steps[pool]
        guess = (target - price(candidate)) // max(prices[pool], 1)
        candidate = candidate.with_steps(pool, taken - _largest(fits, guess, taken))
    return candidate


def _prices(candidate: _Candidate, price: _Price) -> dict[RankingPool, int]:
    """What one step of each pool would add, where any was taken."""
    current = price(candidate)
    taken = {pool: steps for pool, steps in candidate.steps.items() if steps and pool.kind != BY_NAME}
    return {pool: price(candidate.with_steps(pool, steps - 1)) - current for pool, steps in taken.items()}


def _cheapest_step(candidate: _Candidate, price: _Price) -> _Candidate | None:
    """The candidate with one step back, in the pool where that costs least; None where no step was taken."""
    prices = _prices(candidate, price)
    if not prices:
        return None
    pool = min(prices, key=lambda pool: prices[pool])
    return candidate.with_steps(pool, candidate.steps[pool] - 1)


def _largest(fits: Callable[[int], bool], guess: int, limit: int) -> int:
    """The largest number up to `limit` that fits, where all smaller ones and 0 fit too; few calls near `guess`."""
    low, high = 0, limit + 1  # low fits, high does not
    probe, stride = min(max(guess, 1), limit), 1
    while low < high - 1:
        if fits(probe):
            low = probe
            probe, stride = (low + stride, 2 * stride) if high > limit else ((low + high) // 2, stride)
        else:
            high = probe
            probe = (low + high) // 2
        probe = min(max(probe, low + 1), high - 1)
    return low
