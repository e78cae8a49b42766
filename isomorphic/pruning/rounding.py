"""Which multiple widths had better be rounded to on this machine: copies at the same MACs, one for each, to be timed.

What a layer takes depends on its shape and not on its weights, so units are drawn at random: no data is needed, and the
copies are as good as those of any criterion for being timed, and for nothing else.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

from torch import nn

from isomorphic.inputs import Inputs
from isomorphic.measure.latency import Gain
from isomorphic.observe import eval_mode
from isomorphic.pruning.apply import Recovery, apply_plan
from isomorphic.pruning.options import PlanOptions
from isomorphic.pruning.planning import make_plan

# A rounding is worth naming if it makes a model so many times as fast as another one at the same MACs.
WORTH_NAMING = 1.03


def rounded_copy(model: nn.Module, inputs: Inputs, options: PlanOptions, round_to: int) -> nn.Module:
    """Returns a copy that is pruned at random to the budget of `options`, in widths of multiples of `round_to`.

    Args:
        model: the dense model, on the device of `inputs`; it is left as it was.
        inputs: what it takes.
        options: the budget, and what else shapes the copy.
        round_to: the multiple.

    Raises:
        UserError: the budget is out of reach in such widths, or met already.
    """
    asked = dataclasses.replace(options, round_to=round_to, criterion="random", data=None)
    with eval_mode(model):
        planned = make_plan(model, inputs, asked)
        pruned = copy.deepcopy(model)
        apply_plan(pruned, planned.graph, planned, inputs, Recovery())
    return pruned


def faster_rounding(gains: Mapping[int, Gain]) -> int | None:
    """Returns the multiple whose copy is the fastest at the same MACs, where it is faster by 3%, beyond doubt.

    Copies may differ in MACs by what a unit takes, so that times are held against MACs.

    Args:
        gains: of each copy, by its multiple, over the one to beat.
    """
    best = max(gains, key=lambda round_to: gains[round_to].kept)
    certain = gains[best].speedup.median - gains[best].speedup.error
    return best if certain >= WORTH_NAMING * gains[best].macs_ratio else None
