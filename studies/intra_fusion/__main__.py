#!/usr/bin/env python3
"""Intra-Fusion beside plain pruning, without finetuning: one group a run, on a fresh copy of the dense model each time.

    python -m studies.intra_fusion --model output/intra_fusion/vgg11_bn_digits/best.safetensors \
        --builder-file examples/cifar_models.py --dataset digits \
        --groups 1 2 7 --sparsities 0.3 0.5 0.7 --criteria l1 taylor --normalizations source mass

This is the comparison of the paper (ICLR 2024), as its commands ran it. Groups are counted from the output: 0 is the
one that the last convolution makes. Importance is taken after batch norms are folded into their layers, for both
columns alike; of n units, the int(n · (1 − sparsity)) most important ones stay. ℓ1 is the mean over the group's layers
of a unit's out- or in-slice, without biases; Taylor takes 5 batches of 128 training images. Batch norms that are
folded, and so all ones, do not count. Printed is top-1 in percent:

    group  producer                           units  sparsity  criterion   plain  source    mass
        7  features.0.weight                16 => 8      0.50  l1          19.17   86.94   63.33
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isomorphic import progress
from isomorphic.commands import entry, flags, opening
from isomorphic.commands.images import check_readable, evaluation_loader, scoring_batches
from isomorphic.errors import UserError
from isomorphic.files import atomic_write, check_writable
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.models import ModelSpec, example_inputs
from isomorphic.processes import distributed
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.gradients import accumulate
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery.batch_norm import fold
from isomorphic.pruning.recovery.fusion import (
    MASSES,
    NORMALIZATIONS,
    FusionRules,
    from_output,
    fuse,
    layer_members,
    unmergeable,
)
from isomorphic.pruning.recovery.watching import Watched, watch
from isomorphic.pruning.scoring import CRITERIA, score_groups

Top1 = Callable[[nn.Module], float]


@dataclass(frozen=True)
class FusionRow:
    """One run: its group, what it kept, and top-1 in percent by column."""

    group: int
    producer: str
    units: int
    kept: int
    sparsity: float
    criterion: str
    top1: dict[str, float]


def parse_args() -> argparse.Namespace:
    parser = flags.make_parser("Compare Intra-Fusion with plain pruning, one group at a time, without finetuning.")
    flags.add_model_arguments(parser)
    flags.add_data_arguments(parser, batch_size=128)
    add = parser.add_argument_group("comparison").add_argument
    add("--groups", type=flags.non_negative_int, nargs="+", metavar="INDEX", help="from the output (default: all)")
    add("--sparsities", type=flags.ratio, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7], help="shares that go")
    add("--criteria", choices=tuple(CRITERIA), nargs="+", default=["l1"], help="importance criteria")
    add("--normalizations", choices=NORMALIZATIONS, nargs="+", default=["source"], help="of the transport map")
    add("--masses", choices=MASSES, default="uniform", help="of the transport problem")
    add("--taylor-batches", "--taylor-batchs", type=flags.positive_int, default=5, help="batches to score on")
    add("--results-file", type=flags.file_name(".csv"), metavar="FILE.csv", help="write the rows there")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.results_file:
        check_writable(args.results_file)
    progress.stage(f"opening {args.model}")
    device = entry.start(args)
    model, spec = opening.open_model_from(args)
    model.to(device).eval()
    inputs = example_inputs(spec, device)
    graph, watched = trace_groups(model, inputs), watch(model, inputs)
    numbered = chosen_groups(model, graph, watched, args.groups)
    scores = {criterion: score_folded(args, criterion, model, spec, graph, watched) for criterion in args.criteria}
    top1 = validation(args, model, spec, device)
    entry.say(f"Dense: {top1(model):.2f}\n\n{header(args.normalizations)}")
    rows = []
    for criterion in args.criteria:
        for sparsity in args.sparsities:
            for number, group in numbered.items():
                plan = plan_for(graph, group, scores[criterion][group.name], sparsity)
                fused = compare(args, model, graph, plan, inputs, scores[criterion], top1)
                name, units = group.name.rpartition(":")[0], group.num_units
                rows.append(FusionRow(number, name, units, len(plan.kept[group.name]), sparsity, criterion, fused))
                entry.say(line(rows[-1]))
    entry.say("\n".join(["", *mean_lines(rows)]))
    if args.results_file and distributed.is_main():
        write(args.results_file, rows)


def chosen_groups(
    model: nn.Module, graph: ChannelGraph, watched: Watched, wanted: Sequence[int] | None
) -> dict[int, CoupledGroup]:
    """The groups that were asked for, by number from the output; those that cannot be merged are named and left out.

    Raises:
        UserError: there is no group of that number, or none that can be merged.
    """
    groups = dict(enumerate(from_output(graph, watched)))
    unknown = sorted(set(wanted or ()) - set(groups))
    if unknown:
        raise UserError(f"--groups {unknown[0]}: the model has {len(groups)} groups, 0 to {len(groups) - 1}")
    reasons = unmergeable(model, graph, watched)
    chosen = {number: groups[number] for number in wanted or groups}
    for number, group in chosen.items():
        if group.name in reasons:
            entry.say(f"Group {number}, {group.name}, is left out: {reasons[group.name]}")
    chosen = {number: group for number, group in chosen.items() if group.name not in reasons}
    if not chosen:
        raise UserError("none of these groups can be merged")
    return chosen


def score_folded(
    args: argparse.Namespace, criterion: str, model: nn.Module, spec: ModelSpec, graph: ChannelGraph, watched: Watched
) -> dict[str, Tensor]:
    """Importance of every group's units by the weights of the folded model."""
    folded = copy.deepcopy(model)
    fold(folded, watched.pairs)
    statistic, wanted = None, CRITERIA[criterion].statistic
    if wanted:
        device = next(model.parameters()).device
        images = opening.evaluation_images(args, "train", model, spec)
        batches = scoring_batches(args, images, device, args.taylor_batches, "Scoring")
        statistic = accumulate(folded, batches, wanted, device=device)
    groups = [dataclasses.replace(group, members=tuple(layer_members(group, watched.pairs))) for group in graph.groups]
    return score_groups(folded, groups, criterion, statistic=statistic, seed=args.seed)


def plan_for(graph: ChannelGraph, group: CoupledGroup, scores: Tensor, sparsity: float) -> PruningPlan:
    """The most important units of one group, at least one, and all of the others."""
    count = max(int(group.num_units * (1 - sparsity) + 1e-9), 1)  # 10 × (1 - 0.9) is 0.999… in floats
    best = scores.argsort(descending=True, stable=True)[:count].sort().values
    everything = {other.name: tuple(range(other.num_units)) for other in graph.groups}
    return PruningPlan(everything | {group.name: tuple(best.tolist())})


def compare(
    args: argparse.Namespace,
    model: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    inputs: Tensor,
    scores: dict[str, Tensor],
    top1: Top1,
) -> dict[str, float]:
    """Top-1 by column: of the model that is merely cut, and of one that was fused first for each normalisation."""
    found = {}
    for column in ("plain", *args.normalizations):
        candidate = copy.deepcopy(model)
        if column != "plain":
            fuse(candidate, graph, plan, inputs, rules=FusionRules(column, args.masses), importance=scores)
        cut(candidate, graph, plan)
        found[column] = top1(candidate)
    return found


def validation(args: argparse.Namespace, model: nn.Module, spec: ModelSpec, device: torch.device) -> Top1:
    """Top-1 in percent on the validation images, which are read once."""
    batches = list(evaluation_loader(args, opening.evaluation_images(args, "val", model, spec), device))
    check_readable(args, measure_accuracy(model, batches, device))
    return lambda candidate: 100 * measure_accuracy(candidate, batches, device).top1


def header(normalizations: Sequence[str]) -> str:
    columns = "".join(f"{name:>8}" for name in ("plain", *normalizations))
    return f"{'group':>5}  {'producer':<28}{'units':>12}  sparsity  {'criterion':<9}{columns}"


def line(row: FusionRow) -> str:
    units, columns = f"{row.units} => {row.kept}", "".join(f"{value:8.2f}" for value in row.top1.values())
    return f"{row.group:>5}  {row.producer:<28}{units:>12}  {row.sparsity:>8.2f}  {row.criterion:<9}{columns}"


def mean_lines(rows: Sequence[FusionRow]) -> list[str]:
    """The mean over groups, for each criterion and sparsity."""
    lines = []
    for criterion, sparsity in dict.fromkeys((row.criterion, row.sparsity) for row in rows):
        same = [row.top1 for row in rows if (row.criterion, row.sparsity) == (criterion, sparsity)]
        means = "".join(f"{statistics.fmean(top1[name] for top1 in same):8.2f}" for name in same[0])
        lines.append(f"{'mean':>5}  {f'{len(same)} groups':<28}{'':>12}  {sparsity:>8.2f}  {criterion:<9}{means}")
    return lines


def write(path: str, rows: Sequence[FusionRow]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        records = [{**{k: v for k, v in vars(row).items() if k != "top1"}, **row.top1} for row in rows]
        table = csv.DictWriter(file, records[0], lineterminator="\n")
        table.writeheader()
        table.writerows(records)
    entry.say(f"Saving the rows to {path}")


if __name__ == "__main__":
    entry.run(main)
