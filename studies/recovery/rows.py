"""What studies.recovery measures for each of its tables: the rows of one dense model."""

from __future__ import annotations

import copy
import csv
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from isomorphic.checkpoints.open import open_model
from isomorphic.data.loaders import build_eval_loader
from isomorphic.data.sources import DataSource, build_dataset
from isomorphic.data.transforms import eval_transform
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.measure.complexity import count_complexity
from isomorphic.models import example_inputs
from isomorphic.pruning.apply import Recovery, apply_plan
from isomorphic.pruning.plan import PruningPlan
from studies.recovery.models import BATCH, dense_file, finetune_words, prune_words, run_command
from studies.recovery.tables import ONLY_HIDDEN, RecoveryRow
from studies.recovery.ways import (
    CPU,
    FLAGS,
    Subject,
    allocated_plan,
    budget_plan,
    cut_by,
    hidden_plan,
    is_hidden,
    open_subject,
)

HIDDEN_SHARES = (0.5, 0.7, 0.85, 0.95)
SHARES = (0.5, 0.25)
ALLOCATED_SHARES = {"convnext": (0.5, 0.25, 0.12)}
FINETUNED_SHARE = 0.25
HIDDEN_WAYS = ("plain", "mean shift", "compensate", "fusion, source", "fusion, mass")
WAYS = ("plain", "mean shift", ONLY_HIDDEN, "compensate", "fusion, source", "fusion, mass")
BN_WAYS = ("bn", "compensate + bn")
STARTS = ("plain", "compensate")


def hidden_rows(subject: Subject) -> Iterator[RecoveryRow]:
    """Table 1: only hidden units of MLPs go."""
    if not any(is_hidden(group) for group in subject.scored.graph.groups):
        return
    yield subject.row("hidden", 0.0, "dense", "dense", subject.model)
    for share in HIDDEN_SHARES:
        yield from _by_way(subject, "hidden", share, "isomorphic", hidden_plan(subject, share), HIDDEN_WAYS)


def whole_rows(subject: Subject) -> Iterator[RecoveryRow]:
    """Table 2: stream, heads and hidden units go together, to a share of the MACs."""
    yield subject.row("whole", 1.0, "dense", "dense", subject.model)
    ways = WAYS + (BN_WAYS if subject.has_batch_norm else ())
    for share in SHARES:
        yield from _by_way(subject, "whole", share, "isomorphic", budget_plan(subject, share), ways)


def allocation_rows(subject: Subject) -> Iterator[RecoveryRow]:
    """Table 3: which class loses how much, at equal MACs."""
    ways = ("plain", "compensate") + (BN_WAYS if subject.has_batch_norm else ())
    for share in ALLOCATED_SHARES.get(subject.family, SHARES):
        for ranking in ("global", "isomorphic"):
            yield from _by_way(subject, "allocation", share, ranking, budget_plan(subject, share, ranking), ways)
        for way in ways:
            yield from _by_way(subject, "allocation", share, "searched", allocated_plan(subject, share, way), [way])


def group_rows(subject: Subject) -> Iterator[RecoveryRow]:
    """Table 5: relative reconstruction errors by group, at half of the MACs."""
    model, recovery = copy.deepcopy(subject.model), Recovery(frozenset({"compensate"}), subject.calibration.images)
    plan = budget_plan(subject, SHARES[0])
    recovered = apply_plan(model, subject.scored.graph, plan, subject.scored.inputs, recovery)
    row = subject.row("groups", SHARES[0], "isomorphic", "compensate", model)
    for name, (before, after) in recovered.errors.items():
        yield row._replace(group=name.removesuffix(".weight:0"), before=before, after=after)


def finetuned_rows(folder: Path, family: str, seed: int) -> Iterator[RecoveryRow]:
    """Table 4: prune.py and finetune.py from either start; a row says what each epoch reached, 0 being the start."""
    dense = dense_file(folder, family, seed)
    for start in STARTS:
        output = folder / "finetuned" / f"{family}-{seed}-{start}"
        pruned = output / "pruned.safetensors"
        run_command(*prune_words(dense, pruned, FINETUNED_SHARE, FLAGS[start], seed))
        run_command(*finetune_words(family, dense, pruned, output, seed))
        subject_row = partial(RecoveryRow, "finetuned", family, seed, FINETUNED_SHARE, "isomorphic", start)
        macs, top1 = _reached(pruned)
        yield subject_row(macs, top1, epoch=0)
        with open(output / "metrics.csv", newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                yield subject_row(macs, 100 * float(line["top1"]), epoch=int(line["epoch"]))


def _reached(path: Path) -> tuple[int, float]:
    """MACs and top-1 in percent of a checkpoint."""
    model, spec = open_model(str(path))
    validation = build_dataset(DataSource("digits"), "val", eval_transform(spec.preprocessing))
    top1 = measure_accuracy(model, build_eval_loader(validation, BATCH, 0, CPU), CPU).top1
    return count_complexity(model, example_inputs(spec, CPU)).macs_paper, 100 * top1


def _by_way(
    subject: Subject, table: str, share: float, allocation: str, plan: PruningPlan, ways: Sequence[str]
) -> Iterator[RecoveryRow]:
    for way in ways:
        if model := cut_by(subject, plan, way):
            yield subject.row(table, share, allocation, way, model)


MEASURED = {"hidden": hidden_rows, "whole": whole_rows, "allocation": allocation_rows, "groups": group_rows}


def measure(folder: Path, table: str, family: str, seed: int) -> list[RecoveryRow]:
    """All rows of one table for one dense model."""
    torch.set_num_threads(1)
    if table == "finetuned":
        return list(finetuned_rows(folder, family, seed))
    return list(MEASURED[table](open_subject(folder, family, seed)))
