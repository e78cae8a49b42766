"""Meeting a budget in MACs or params, by searching over plans.

A plan's cost is measured on a copy of the model that has shapes but no data (torch's "meta" device), cut like the real
one and counted by the same counter: exact for whatever the counter knows, and the model itself is not touched. That
takes about a tenth of a second a plan. `search.py` is the search, plain bisection; `guided_search.py` does the same
with fewer measurements; `leftover.py` uses up what both leave.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Protocol

from torch import nn

from isomorphic.errors import UserError
from isomorphic.inputs import Inputs, without_data
from isomorphic.measure.complexity import Complexity, count_complexity, format_amount
from isomorphic.measure.first_image import first_image, is_batch
from isomorphic.progress import steps
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.snapshot import Snapshot
from isomorphic.pruning.grouping.memory import remembering_nothing
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.ranking.estimate import Estimate, Kept
from isomorphic.pruning.ranking.guided_search import guided_search
from isomorphic.pruning.ranking.leftover import use_up
from isomorphic.pruning.ranking.ranker import Ranker, Ratios
from isomorphic.pruning.ranking.search import Candidate, candidate_at, search
from isomorphic.skeletons import shape_copy


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
        self._as_given = not is_batch(model, inputs)  # without data nobody could tell
        item = inputs if self._as_given else first_image(inputs)
        self._use(shape_copy(model), without_data(item))
        try:
            with remembering_nothing(self._skeleton):
                self._count()
        except (RuntimeError, TypeError, ValueError):  # forward code that looks at values
            self._use(copy.deepcopy(model), item)
        self._dense.restore()

    def _use(self, skeleton: nn.Module, inputs: Inputs) -> None:
        self._skeleton, self._inputs = skeleton.eval(), inputs
        self._dense = Snapshot(skeleton)

    def __call__(self, plan: PruningPlan) -> Complexity:
        """MACs, under both counters, and params of the model that `plan` leaves."""
        try:
            cut(self._skeleton, self._graph, plan)
            with remembering_nothing(self._skeleton):
                return self._count()
        finally:
            self._dense.restore()

    def _count(self) -> Complexity:
        return count_complexity(self._skeleton, self._inputs, as_given=self._as_given)

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


def plan_for_budget(
    ranker: Ranker, ratios_at: Callable[[float], Ratios], complexity: Cost, unit: str, target: int
) -> PruningPlan:
    """The plan whose complexity comes nearest to `target` from below, as far as single steps allow.

    Bisection finds the smallest ratio that meets the target; then each pool gets its last steps back while they fit.
    Where more than 0.5% of the target is left over all the same, single sets get steps back (`leftover.py`).
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
    def at(ratio: float) -> Candidate:
        return candidate_at(ranker, ratios_at(ratio))

    known: dict[tuple[tuple[int, int], ...], int] = {}  # by what each group keeps

    def cost(candidate: Candidate) -> int:
        kept = tuple(candidate.kept.values())
        if kept not in known:
            bar.update()
            known[kept] = getattr(complexity(candidate.plan()), unit)
        return known[kept]

    with steps("searching for the budget", unit="plan") as bar:  # of how many, nobody knows
        estimate = complexity.estimate(unit)
        found = guided_search(at, estimate, cost, target) or search(at, cost, target)
        found = use_up(found, at(0.0), estimate, cost, target)
    if found.kept == at(1.0).kept and (least := cost(found)) > target:
        most = cost(candidate_at(ranker, Ratios(0.0)))
        share = f" (a share of what it takes is written {target}%)" if target <= 100 else ""
        raise UserError(
            f"a budget of {format_amount(target, unit)} is out of reach{share}: "
            f"under these rules the model takes between {format_amount(least, unit)} and {format_amount(most, unit)}"
        )
    return found.plan()
