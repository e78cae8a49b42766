"""Meeting a budget in MACs or params, by searching over plans.

A plan's cost is measured on a copy of the model that has shapes but no data (torch's "meta" device), cut like the real
one and counted by the same counter: exact for whatever the counter knows, and the model itself is not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import nn

from isomorphic.errors import UserError
from isomorphic.measure.complexity import Complexity, count_complexity, format_macs, format_params
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.inputs import Inputs, without_data
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.ranking import Pool, Ranker, Ratios
from isomorphic.pruning.surgery import cut, shape_copy

# Halvings of the ratio; single steps then use up what is left of the budget.
BISECTIONS = 12


class PlanCost:
    """Predicts a plan's complexity without touching the model."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, inputs: Inputs) -> None:
        self._skeleton = shape_copy(model)
        self._graph = graph
        self._inputs = without_data(inputs)

    def __call__(self, plan: PruningPlan) -> Complexity:
        """MACs, under both counters, and params of the model that `plan` leaves."""
        model = copy.deepcopy(self._skeleton)
        cut(model, self._graph, plan)
        return count_complexity(model, self._inputs)


def shared_ratios(ratio: float, heads: float | None, head_dims: float | None) -> Ratios:
    """The ratios of a budget search at `ratio`, where an explicit share of heads or head dims stays what it is.

    A share that was left open follows: with both open, heads and head dims each lose 1 - √(1 - ratio), so that the
    width of attention shrinks by `ratio` like every other width.
    """
    if heads is None and head_dims is None:
        each = 1 - (1 - ratio) ** 0.5
        return Ratios(ratio, each, each)
    return Ratios(ratio, ratio if heads is None else heads, ratio if head_dims is None else head_dims)


def plan_for_budget(
    ranker: Ranker,
    ratios_at: Callable[[float], Ratios],
    complexity: Callable[[PruningPlan], Complexity],
    unit: str,
    target: int,
) -> PruningPlan:
    """The plan whose complexity comes nearest to `target` from below, as far as single steps allow.

    Bisection finds the smallest ratio that meets the target; then each pool gets its last steps back while they fit.

    Args:
        ranker: holds scores and rules.
        ratios_at: all ratios as a function of one in [0, 1].
        complexity: of a plan; it falls as the ratio grows.
        unit: what is budgeted, a field of `Complexity`: "macs_paper", "macs_exact" or "params".
        target: the budget.

    Raises:
        UserError: the dense model meets the target already, or no ratio does; the message says what is reachable.
    """

    def cost(plan: PruningPlan) -> int:
        return getattr(complexity(plan), unit)

    dense, least = cost(ranker.plan(Ratios(0.0))), cost(ranker.plan(ratios_at(1.0)))
    if not least <= target <= dense:
        raise UserError(
            f"a budget of {_amount(target, unit)} is out of reach: "
            f"under these rules the model takes between {_amount(least, unit)} and {_amount(dense, unit)}"
        )
    explicit = ranker.plan(ratios_at(0.0))
    if cost(explicit) <= target:  # the explicit shares do it alone
        return explicit
    low, high = 0.0, 1.0  # over the target, within it
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if cost(ranker.plan(ratios_at(middle))) <= target:
            high = middle
        else:
            low = middle
    return _fill(ranker, ratios_at(high), cost, target)


def _fill(ranker: Ranker, ratios: Ratios, cost: Callable[[PruningPlan], int], target: int) -> PruningPlan:
    """Gives back the last steps of each pool, from the costliest step to the cheapest, as many as still fit."""
    heads = ranker.surviving_heads(ratios.heads)
    orders = ranker.width_orders(heads, separate_head_dims=ratios.head_dims is not None)
    steps = {pool: order.steps_for(ratios.of(pool)) for pool, order in orders.items()}

    def cost_of(changed: Mapping[Pool, int]) -> int:
        return cost(ranker.plan_from_steps(heads, orders, {**steps, **changed}))

    current = cost_of({})
    prices = {pool: cost_of({pool: taken - 1}) - current for pool, taken in steps.items() if taken}
    for pool in sorted(prices, key=lambda pool: -prices[pool]):
        taken = steps[pool]
        guess = (target - current) // max(prices[pool], 1)
        steps[pool] -= _largest(lambda back, p=pool, t=taken: cost_of({p: t - back}) <= target, guess, taken)
        current = cost_of({})
    return ranker.plan_from_steps(heads, orders, steps)


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


def _amount(value: int, unit: str) -> str:
    return f"{format_params(value)} params" if unit == "params" else f"{format_macs(value, 4)} MACs"
