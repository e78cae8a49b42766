"""Meeting a latency: the only budget that is no sum over layers, so every candidate is really cut and measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.measure.latency import Latency, measure_latency
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.ranking import Ranker, Ratios
from isomorphic.pruning.surgery import cut

BISECTIONS = 10
CLOSE = 0.02  # this share below the target is near enough: two measurements differ by as much


@dataclass(frozen=True)
class PlanLatency:
    """Measures what a plan leaves of `model`; see `measure_latency`. The model itself is not touched."""

    model: nn.Module
    graph: ChannelGraph
    image: Tensor
    batch_size: int = 1
    amp_dtype: torch.dtype | None = None

    def __call__(self, plan: PruningPlan) -> Latency:
        """The latency of a copy that is cut by `plan`."""
        model = copy.deepcopy(self.model)
        cut(model, self.graph, plan)
        return measure_latency(model, self.image, self.batch_size, amp_dtype=self.amp_dtype)


def plan_for_latency(
    ranker: Ranker, ratios_at: Callable[[float], Ratios], latency: Callable[[PruningPlan], Latency], target: float
) -> PruningPlan:
    """The plan of the smallest ratio whose median latency is within `target`, by bisection.

    Args:
        ranker: holds scores and rules.
        ratios_at: all ratios as a function of one in [0, 1].
        latency: of a plan; it falls as the ratio grows, but for noise and the widths that a device likes better.
        target: seconds.

    Raises:
        UserError: no ratio is fast enough; the message says what is.
    """
    fastest = latency(ranker.plan(ratios_at(1.0)))
    if fastest.median > target:
        raise UserError(
            f"a latency of {1e3 * target:.2f} ms is out of reach: under these rules the model takes {fastest} at least"
        )
    plan = ranker.plan(ratios_at(0.0))
    if latency(plan).median <= target:  # the explicit shares, or removed blocks, do it alone
        return plan
    low, high = 0.0, 1.0  # over the target, within it
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        median = latency(ranker.plan(ratios_at(middle))).median
        if median > target:
            low = middle
            continue
        high = middle
        if median > (1 - CLOSE) * target:
            break
    return ranker.plan(ratios_at(high))
