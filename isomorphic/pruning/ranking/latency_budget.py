"""Meeting a latency: the only budget that is no sum over layers, so every candidate is really cut and measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from isomorphic.errors import UserError
from isomorphic.measure.latency import Latency, format_seconds
from isomorphic.progress import steps
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.ranking.ranker import Ranker, Ratios

BISECTIONS = 10
CLOSE = 0.02  # this share below the target is near enough: two measurements differ by as much


@dataclass(frozen=True)
class PlanLatency:
    """Times what a plan leaves of `model` by `measure`; the model itself is not touched."""

    model: nn.Module
    graph: ChannelGraph
    measure: Callable[[nn.Module], Latency]

    def __call__(self, plan: PruningPlan) -> Latency:
        """The latency of a copy that is cut by `plan`."""
        model = copy.deepcopy(self.model)
        cut(model, self.graph, plan)
        return self.measure(model)


def plan_for_latency(
    ranker: Ranker, ratios_at: Callable[[float], Ratios], latency: Callable[[PruningPlan], Latency], target: float
) -> tuple[PruningPlan, Latency]:
    """The plan of the smallest ratio whose median latency is within `target`, by bisection, and that latency.

    The search ends where the target is missed by less than two measurements differ.

    Args:
        ranker: holds scores and rules.
        ratios_at: all ratios as a function of one in [0, 1].
        latency: of a plan; it falls as the ratio grows, but for noise and the widths that a device likes better.
        target: seconds.

    Raises:
        UserError: no ratio is fast enough; the message says what is.
    """

    def at(ratio: float) -> tuple[PruningPlan, Latency]:
        plan = ranker.plan(ratios_at(ratio))
        bar.update()
        return plan, latency(plan)

    with steps("timing models", 2 + BISECTIONS, unit="model") as bar:  # at most, as a rule
        return _search(at, target)


def _search(at: Callable[[float], tuple[PruningPlan, Latency]], target: float) -> tuple[PruningPlan, Latency]:
    """The bisection itself: `at` gives the plan of a ratio, and what it takes."""
    found = at(1.0)
    if found[1].median > target:
        raise UserError(
            f"a latency of {format_seconds(target)} is out of reach: "
            f"under these rules the model takes {found[1]} at least"
        )
    explicit = at(0.0)
    if explicit[1].median <= target:  # the explicit shares, or removed blocks, do it alone
        return explicit
    low, high = 0.0, 1.0  # over the target, within it
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        tried = at(middle)
        if tried[1].median > target:
            low = middle
            continue
        high, found = middle, tried
        if found[1].median > (1 - CLOSE) * target:
            return found
    return _take_back(at, high, found, target)


def _take_back(
    at: Callable[[float], tuple[PruningPlan, Latency]], ratio: float, found: tuple[PruningPlan, Latency], target: float
) -> tuple[PruningPlan, Latency]:
    """What growing steps back from `ratio` find within `target`: one slow moment may have misled the bisection."""
    step = 2.0**-BISECTIONS
    while found[1].median < (1 - CLOSE) * target and ratio > step:
        tried = at(ratio - step)
        if tried[1].median > target:
            break
        ratio, found, step = ratio - step, tried, 2 * step
    return found
