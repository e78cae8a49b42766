"""Finding the plan nearest to a budget: bisection over the ratio, then single steps back.

Worked example: a pool of 16 equal units, each worth 1 M of 16 M MACs, and a budget of 9.4 M. Bisection ends at the
smallest ratio that meets the budget: 7 steps, 9 M left. Giving one step back would cost 1 M, more than the 0.4 M that
are left over, so 7 steps it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.ranking.estimate import Kept
from isomorphic.pruning.ranking.ranker import BY_NAME, HEADS, Ranker, RankingPool, Ratios, RemovalOrder, steps_by_set

# Halvings of the ratio; single steps then use up what is left of the budget.
BISECTIONS = 12


@dataclass(frozen=True)
class Candidate:
    """A plan before it is written out.

    Attributes:
        ranker: writes it out.
        heads: those that survive, by group name.
        orders: the removal order of each pool.
        steps: how many of it each pool takes.
        returned: how many of its last steps a set gets back all the same, by the set's name: see `leftover.py`.
    """

    ranker: Ranker
    heads: Mapping[str, NDArray[np.int64]]
    orders: Mapping[RankingPool, RemovalOrder]
    steps: Mapping[RankingPool, int]
    returned: Mapping[str, int] = field(default_factory=dict)

    @functools.cached_property
    def taken(self) -> dict[str, int]:
        """How many of its steps each set takes, by its name."""
        by_pool = steps_by_set(self.orders, self.steps)
        return {name: count - self.returned.get(name, 0) for name, count in by_pool.items()}

    @functools.cached_property
    def kept(self) -> Kept:
        """Sections, and units of each, by group name: as different as two candidates of one ranker are."""
        sections = {
            g.name: len(self.heads[g.name]) if g.name in self.heads else g.num_sections for g in self.ranker.groups
        }
        return {name: (sections[name], width) for name, width in self.ranker.widths_left(self.taken).items()}

    def plan(self) -> PruningPlan:
        return self.ranker.plan_of(self.heads, self.taken)

    def with_steps(self, pool: RankingPool, steps: int) -> Candidate:
        return replace(self, steps={**self.steps, pool: steps})

    def with_one_back(self, name: str) -> Candidate:
        """The candidate that gives a set, by its name, the last of its steps back."""
        return replace(self, returned={**self.returned, name: self.returned.get(name, 0) + 1})


Price = Callable[[Candidate], int]


def candidate_at(ranker: Ranker, ratios: Ratios) -> Candidate:
    """Returns the candidate that comes nearest to removing `ratios`."""
    heads = ranker.surviving_heads(ratios.of(HEADS))
    orders = ranker.width_orders(heads, separate_head_dims=ratios.head_dims is not None)
    return Candidate(ranker, heads, orders, ranker.steps_at(ratios, orders))


def search(at: Callable[[float], Candidate], price: Price, target: int) -> Candidate:
    """Returns the candidate nearest to `target` from below; that of ratio 1 where even this is over.

    Args:
        at: the candidate at a ratio in [0, 1].
        price: what a candidate costs; it falls as the ratio grows.
        target: the budget, in the unit of `price`.
    """
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


def _fill(candidate: Candidate, price: Price, target: int) -> Candidate:
    """Gives back the last steps of each pool, from the costliest step to the cheapest, as many as still fit."""

    def fits(back: int) -> bool:
        return price(candidate.with_steps(pool, taken - back)) <= target

    prices = step_prices(candidate, price)
    for pool in sorted(prices, key=lambda pool: -prices[pool]):
        taken = candidate.steps[pool]
        guess = (target - price(candidate)) // max(prices[pool], 1)
        candidate = candidate.with_steps(pool, taken - largest_fitting(fits, guess, taken))
    return candidate


def step_prices(candidate: Candidate, price: Price) -> dict[RankingPool, int]:
    """Returns what one step back would cost in each pool where any was taken; ratios given by name stay."""
    current = price(candidate)
    taken = {pool: steps for pool, steps in candidate.steps.items() if steps and pool.kind != BY_NAME}
    return {pool: price(candidate.with_steps(pool, steps - 1)) - current for pool, steps in taken.items()}


def largest_fitting(fits: Callable[[int], bool], guess: int, limit: int) -> int:
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
