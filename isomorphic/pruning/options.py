"""What is asked of a plan: how much is to go, by which measure, under which rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from isomorphic.errors import UserError
from isomorphic.measure.complexity import Complexity, format_amount, format_macs, format_params
from isomorphic.measure.latency import Latency, format_seconds
from isomorphic.measure.paper_counter import is_paper_model
from isomorphic.measure.precision import AUTO
from isomorphic.pruning.blocks.depth import SCOPES
from isomorphic.pruning.gradients import Loss, check_data, check_loss
from isomorphic.pruning.grouping.trace import TRACERS
from isomorphic.pruning.ranking.amounts import Amount, parse_amount, parse_duration
from isomorphic.pruning.ranking.budget import shared_ratios
from isomorphic.pruning.ranking.ranker import RANKINGS, Ratios
from isomorphic.pruning.scoring import NORMALIZERS, CustomCriterion
from isomorphic.pruning.selection import check_names, check_share

CLASS_LABELS = ("paper", "detailed")
ALLOCATIONS = ("uniform", "calibrate")
MACS_COUNTERS = ("paper", "exact")


def _as_text(name: str, value: Any) -> Any:
    """An option as JSON values that a person can read: "50%", "4.17 G", "5.00 ms", the name of a function."""
    if not isinstance(value, Amount):
        return getattr(value, "__name__", value)
    if value.relative:
        return f"{100 * value.value:g}%"
    return {"macs": format_macs, "params": format_params, "latency": format_seconds}[name](value.value)


@dataclass(frozen=True)
class PlanOptions:
    """What is to go, and by which measure. Each default stands here, and only here.

    How much: one of the first four; what stays open is 0 where heads, blocks or layers by name say what goes.

    Attributes:
        ratio: share of the width to remove, in [0, 1), in each isomorphism class.
        macs: budget in multiply-accumulates: "4.2G", "50%" of the dense model's, or a number.
        params: budget in parameters: "20M", "50%", or a number.
        latency: budget in time of one batch: "5ms", "50%", or a number of seconds; measured on this device.
        head_ratio: share of the attention heads, as wholes; None: none of them, or what a budget asks for.
        head_dim_ratio: share of the dims of each head; None: like any width, or what a budget asks for.
        ignore: modules that keep the width of their outputs, by name, with * and ?.
        ratios: shares for modules of their own, by name, with * and ?, whatever the others lose.
        ranking: "isomorphic" ranks inside a class, "global" over all groups, "local" inside a group.
        round_to: widths become multiples of this (a head's, in attention).
        max_ratio: the largest share that any group may lose.
        class_labels: "paper", or "detailed": kernel sizes and groups of convolutions tell classes apart, too.
        criterion: a key of `CRITERIA`, or a function (group, weights, gradients) -> scores (n,).
        data: batches that a criterion with gradients is computed on.
        loss: (model, batch) -> scalar; None: cross entropy of model(batch[0]) and batch[1].
        normalizer: of the scores inside a group, a key of `NORMALIZERS`.
        score_bias: biases count, too.
        amp_dtype: autocast dtype of scoring and of measured latency; None: the model's own precision; "auto": that, but
            bfloat16 for scoring where it pays and ranks alike (`measure/precision.py`).
        remove_blocks: residual blocks to remove first, the least important ones.
        remove_blocks_scope: "stage": from the stage with most blocks, "all": from all.
        allocate: "uniform": one ratio for all classes; "calibrate": ratios searched for on calibration images.
        allocation_evaluations: models that this search may cut and try on a quarter of the images.
        macs_counter: which MACs a budget is in: "paper" or "exact".
        latency_batch_size: items of a batch where latency is measured.
        tracer: "exact" or "depgraph".
        seed: of the random criterion and of the search.
    """

    ratio: float | None = None
    macs: str | float | Amount | None = None
    params: str | float | Amount | None = None
    latency: str | float | Amount | None = None
    head_ratio: float | None = None
    head_dim_ratio: float | None = None
    ignore: Sequence[str] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    ranking: str = "isomorphic"
    round_to: int = 1
    max_ratio: float = 1.0
    class_labels: str = "paper"
    criterion: str | CustomCriterion = "taylor"
    data: Iterable[Any] | None = None
    loss: Loss | None = None
    normalizer: str = "mean"
    score_bias: bool = False
    amp_dtype: torch.dtype | Literal["auto"] | None = AUTO
    remove_blocks: int = 0
    remove_blocks_scope: str = "stage"
    allocate: str = "uniform"
    allocation_evaluations: int = 24
    macs_counter: str = "paper"
    latency_batch_size: int = 1
    tracer: str = "exact"
    seed: int = 0

    def told(self) -> dict[str, Any]:
        """Returns how much was asked for, by which criterion and ranking, and what else differs from the defaults."""
        told = {}
        for option in dataclasses.fields(self):
            name, value = option.name, getattr(self, option.name)
            if name in ("data", "loss", "amp_dtype") or value in (None, (), {}):
                continue
            if name in ("criterion", "ranking") or value != option.default:
                told[name] = _as_text(name, value)
        return told

    def __post_init__(self) -> None:
        """Raises a UserError for what no model could be planned with."""
        given = [name for name in ("ratio", "macs", "params", "latency") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are two answers to how much is to go: give one of them")
        says_what = self.ratios or self.head_ratio or self.head_dim_ratio or self.remove_blocks
        if not given and not says_what:
            raise UserError('say how much is to go: ratio=0.5, macs="50%", params="20M", latency="5ms", or plan=')
        check_names(self.ignore, self.ratios)
        check_data(self.data)
        check_loss(self.loss)
        if isinstance(self.amp_dtype, str) and self.amp_dtype != AUTO:
            raise UserError(f"amp_dtype = {self.amp_dtype!r} is no torch.dtype, None or {AUTO!r}")
        for name in ("ratio", "head_ratio", "head_dim_ratio"):
            if getattr(self, name) is not None:
                check_share(getattr(self, name), name)
        if not 0 <= self.max_ratio <= 1:
            raise UserError(f"max_ratio = {self.max_ratio!r} is not a share in [0, 1]")
        for name in ("round_to", "latency_batch_size", "allocation_evaluations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)!r} is not at least 1")
        choices = {
            "ranking": RANKINGS,
            "class_labels": CLASS_LABELS,
            "normalizer": tuple(NORMALIZERS),
            "remove_blocks_scope": SCOPES,
            "allocate": ALLOCATIONS,
            "macs_counter": MACS_COUNTERS,
            "tracer": TRACERS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} = {getattr(self, name)!r} is none of {', '.join(known)}")

    def with_data(self, data: Iterable[Any] | None) -> PlanOptions:
        """Returns the same with batches to score on."""
        return dataclasses.replace(self, data=data)

    @property
    def budget(self) -> tuple[str, Amount] | None:
        """What is budgeted ("macs_paper", "macs_exact", "params" or "latency") and the amount; None for ratios."""
        if self.macs is not None:
            return f"macs_{self.macs_counter}", _amount(self.macs, parse_amount)
        if self.params is not None:
            return "params", _amount(self.params, parse_amount)
        if self.latency is not None:
            return "latency", _amount(self.latency, parse_duration)
        return None

    def plain_ratios(self) -> Ratios:
        """Returns the ratios as they were given: heads stay unless some were to go."""
        return Ratios(self.ratio or 0.0, self.head_ratio or 0.0, self.head_dim_ratio)

    def ratios_at(self, ratio: float) -> Ratios:
        """Returns all ratios of a budget search at one ratio in [0, 1]."""
        return shared_ratios(ratio, self.head_ratio, self.head_dim_ratio)

    def part(self, step: int, steps: int, dense: Complexity, latency: Latency | None) -> PlanOptions:
        """Returns what is asked for up to one of several steps of equal size; blocks go in the first.

        Of ratio=0.5 in four steps: 0.125, 0.25, 0.375, 0.5, all of the dense model. Of a budget of 4 G MACs under a
        dense model of 16 G: 13, 10, 7, 4 G.

        Args:
            step: from 1 to `steps`.
            dense: costs of the dense model.
            latency: its latency, where that is the budget.
        """
        share = step / steps
        parts: dict[str, Any] = {"ratios": {name: ratio * share for name, ratio in self.ratios.items()}}
        for name in ("ratio", "head_ratio", "head_dim_ratio"):
            ratio = getattr(self, name)
            parts[name] = None if ratio is None else ratio * share
        if self.budget is not None:
            unit, wanted = self.budget
            takes = latency.median if latency else getattr(dense, unit)
            amount = Amount(takes - (takes - wanted.of(takes)) * share)
            parts["macs" if unit.startswith("macs") else unit] = amount
        if step > 1:
            parts["remove_blocks"] = 0
            if self.ratio is None and self.budget is None:
                parts["ratio"] = 0.0  # blocks, heads or names alone say what goes
        return dataclasses.replace(self, **parts)


@dataclass(frozen=True)
class Target:
    """A budget for this model: what it is of, and how much of it may be taken (seconds, for a latency)."""

    unit: str
    amount: float

    @property
    def whole(self) -> int:
        """The most whole MACs or parameters that are within it: 435 of 435.6, and 29 of 0.29 × 100, a little less."""
        return math.floor(self.amount * (1 + 1e-12))


def find_target(
    options: PlanOptions, before: Complexity, latency: Latency | None, *, may_be_met: bool = False
) -> Target | None:
    """Returns the budget in absolute numbers, if there is one.

    Raises:
        UserError: the model meets it already, unless that may be.
    """
    if options.budget is None:
        return None
    unit, wanted = options.budget
    takes = latency.median if latency else getattr(before, unit)
    amount = wanted.of(takes)
    if amount > takes and not may_be_met:
        raise UserError(f"a budget of {_shown(amount, unit)} is met already: the model takes {_shown(takes, unit)}")
    return Target(unit, amount)


def check_counter(options: PlanOptions, model: nn.Module, before: Complexity, flag: str) -> None:
    """Refuses a budget in the paper's MACs, which nobody asked for by name, where these say little about the model.

    That is a model that the two counters disagree about, and none of the paper's, whose tables are in these MACs.

    Args:
        options: what is to go.
        model, before: the dense model, and its costs.
        flag: how the user names a counter, with {} in the counter's place.

    Raises:
        UserError: the counters disagree.
    """
    in_macs = options.macs is not None or (options.allocate == "calibrate" and options.params is None)
    if not in_macs or options.macs_counter != "paper" or not before.disputed or is_paper_model(model):
        return
    paper, exact = _shown(before.macs_paper, "macs_paper"), _shown(before.macs_exact, "macs_exact")
    raise UserError(
        f"the model takes {paper} by the paper's counter, which a budget is in, and {exact} by the exact one: "
        f"ask for that, {flag.format('exact')} (or for the other all the same, {flag.format('paper')})"
    )


def _shown(amount: float, unit: str) -> str:
    return format_seconds(amount) if unit == "latency" else format_amount(amount, unit)


def _amount(value: str | float | Amount, parse: Callable[[str | float], Amount]) -> Amount:
    return value if isinstance(value, Amount) else parse(value)
