"""The runs of studies.claim: one is a dense model cut by one ranking to one share of its MACs, and recovered one way.

A part, which one process measures, is the runs of one dense model and criterion: it scores once. Each run is a row, and
stored when it is measured, so that a part that was stopped goes on after its last row.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from isomorphic.measure.complexity import count_complexity
from isomorphic.pruning.apply import Recovery, apply_plan
from isomorphic.pruning.options import PlanOptions, Target
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.planning import ScoredModel, score_model
from isomorphic.pruning.ranking.budget import plan_for_budget, shared_ratios
from isomorphic.pruning.recovery.distillation import DistillationRules
from studies.claim.subjects import BATCH, Sources, Subject, open_subject
from studies.rows import read_rows, write_rows

CRITERIA = ("l1", "taylor", "hessian")
RANKINGS = ("isomorphic", "global", "local", "allocated")
SHARES = (0.75, 0.5, 0.25)
RECOVERIES: dict[str, frozenset[str]] = {
    "plain": frozenset(),
    "compensated": frozenset({"compensate"}),
    "distilled": frozenset({"compensate", "distill"}),
}
DISTILLATION = DistillationRules(steps=50)


class Run(NamedTuple):
    """What is done: the key of a row."""

    model: str
    seed: int
    criterion: str
    ranking: str
    share: float
    recovery: str


class Row(NamedTuple):
    """One run.

    Attributes:
        model, seed, criterion, ranking, share, recovery: the run; ranking and recovery of the dense model are "dense".
        macs: that are left, by the paper's counter.
        top1: in percent: of the labels for digits, of agreement with the dense model for real weights.
        kl: mean KL(dense‖pruned) in nats.
        finetuned: top-1 after the finetuning; None for real weights.
        seconds: of the cut, the recovery, and the search for an allocation.
    """

    model: str
    seed: int
    criterion: str
    ranking: str
    share: float
    recovery: str
    macs: int
    top1: float
    kl: float
    finetuned: float | None
    seconds: float

    @property
    def run(self) -> Run:
        """Its key."""
        return Run(*self[:6])


@dataclass(frozen=True)
class Part:
    """What one process measures: the runs of a dense model and a criterion.

    Attributes:
        model, seed, criterion: which.
        recoveries: of `RECOVERIES`.
        threads: of the process.
    """

    model: str
    seed: int
    criterion: str
    recoveries: tuple[str, ...] = tuple(RECOVERIES)
    threads: int = 1

    def file(self, folder: Path) -> Path:
        """Where its rows are kept while it is measured."""
        return folder / "rows" / f"{self.model}-{self.seed}-{self.criterion}.csv"

    def runs(self) -> list[Run]:
        """The dense model, then every ranking, share and recovery."""
        first = Run(self.model, self.seed, self.criterion, "dense", 1.0, "dense")
        others = itertools.product(SHARES, RANKINGS, self.recoveries)
        return [first, *(Run(*first[:3], ranking, share, recovery) for share, ranking, recovery in others)]


def measure_part(folder: Path, sources: Sources, part: Part, known: Sequence[Row] = ()) -> Part:
    """Measures the runs of a part that are neither in `known` nor in its file, and adds each row to the file."""
    torch.set_num_threads(part.threads)
    file = part.file(folder)
    rows = read_rows(file, Row) if file.exists() else []
    done = {row.run for row in [*rows, *known]}
    missing = [run for run in part.runs() if run not in done]
    if missing:
        file.parent.mkdir(parents=True, exist_ok=True)
        for row in measure(open_subject(part.model, part.seed, folder, sources), missing):
            rows.append(row)
            write_rows(file, Row, rows)
    return part


def measure(subject: Subject, runs: Sequence[Run]) -> Iterator[Row]:
    """Yields the rows of runs of one dense model and criterion."""
    dense_macs = count_complexity(subject.model, subject.inputs).macs_paper
    scored: ScoredModel | None = None
    plans: dict[tuple[object, ...], tuple[PruningPlan, float]] = {}
    for run in runs:
        if run.ranking == "dense":
            found = subject.judge(subject.model)
            after = None
            if subject.finetune:
                longer = copy.deepcopy(subject.model)
                subject.finetune(longer)
                after = subject.judge(longer).top1
            yield Row(*run, dense_macs, found.top1, found.kl, after, 0.0)
            continue
        scored = scored or score_model(subject.model, subject.inputs, _options(subject, run))
        closed_form = RECOVERIES[run.recovery] - {"distill"} if run.ranking == "allocated" else None
        key = (run.ranking, run.share, closed_form)
        if key not in plans:
            begin = time.perf_counter()
            plan = _plan(subject, scored, run, round(run.share * dense_macs))
            plans[key] = plan, time.perf_counter() - begin
        yield _cut(subject, scored, run, *plans[key])


def _options(subject: Subject, run: Run) -> PlanOptions:
    return PlanOptions(
        macs=f"{100 * run.share:g}%",
        criterion=run.criterion,
        data=subject.data,
        loss=subject.loss,
        max_ratio=subject.max_ratio,
        allocate="calibrate",
        seed=run.seed,
    )


def _plan(subject: Subject, scored: ScoredModel, run: Run, target: int) -> PruningPlan:
    """The plan of a ranking, to a number of MACs."""
    if run.ranking == "allocated":
        recovery = Recovery(RECOVERIES[run.recovery], subject.calibration.images, importance=scored.scores)
        return scored.plan_by_calibration(
            Target("macs_paper", target), subject.calibration, recovery, BATCH, progress=False
        ).plan
    ranker = scored.ranker.with_ranking(run.ranking)
    return plan_for_budget(ranker, lambda ratio: shared_ratios(ratio, None, None), scored.cost, "macs_paper", target)


def _cut(subject: Subject, scored: ScoredModel, run: Run, plan: PruningPlan, planning: float) -> Row:
    begin = time.perf_counter()
    model, steps = copy.deepcopy(subject.model), RECOVERIES[run.recovery]
    images = subject.calibration.images if steps else None
    recovery = Recovery(steps, images, importance=scored.scores, distillation=DISTILLATION)
    apply_plan(model, scored.graph, plan, subject.inputs, recovery)
    seconds = planning + time.perf_counter() - begin
    found, after = subject.judge(model), None
    macs = count_complexity(model, subject.inputs).macs_paper
    if subject.finetune:
        subject.finetune(model)
        after = subject.judge(model).top1
    return Row(*run, macs, found.top1, found.kl, after, seconds)
