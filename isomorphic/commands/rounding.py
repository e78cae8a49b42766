"""What evaluate.py finds out about `--round-to`: whether widths fit the machine, and which multiple is faster on it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isomorphic import progress
from isomorphic.checkpoints.open import is_checkpoint, is_pth, read_header
from isomorphic.commands import entry
from isomorphic.commands.subjects import DENSE, MODEL, Subject, Timed, counted
from isomorphic.errors import UserError
from isomorphic.measure.alignment import BADLY_ALIGNED, misaligned_share, vector_width
from isomorphic.measure.complexity import count_complexity, format_macs
from isomorphic.measure.execution import ExecutionMode
from isomorphic.measure.latency import format_seconds
from isomorphic.pruning.options import MACS_COUNTERS, PlanOptions
from isomorphic.pruning.ranking.amounts import Amount
from isomorphic.pruning.rounding import faster_rounding, rounded_copy

# Flags of prune.py that shape a model, and the fields of `PlanOptions` that they fill.
SHAPING = {
    "head_pruning_ratio": "head_ratio",
    "head_dim_pruning_ratio": "head_dim_ratio",
    "remove_blocks": "remove_blocks",
}
BUDGETS = ("target_macs", "target_params", "target_latency")


@dataclass(frozen=True)
class Advice:
    """What is to be said about `--round-to`.

    Attributes:
        copies: to be timed, by their rounding; all of the same MACs, as nearly as that rounding comes to them.
        base: the rounding that another one has to beat.
        table: print a row for each.
        misaligned: a line about widths that do not fit the machine; empty if they do.
    """

    copies: Mapping[int, Subject]
    base: int
    table: bool
    misaligned: str

    def tell(self, timed: Timed) -> dict[str, Any]:
        """Prints the table, and the rounding that was measured to be faster; returns what the results file says."""
        best = None
        found = "" if DENSE in timed.macs else "--against DENSE times what --round-to would bring"
        if self.copies:
            best = faster_rounding({r: timed.gain(str(r), over=str(self.base)) for r in self.copies})
            found = rounding_line(timed, list(self.copies), self.base, best)
        if self.table:
            for line in rounding_table(timed, list(self.copies)):
                entry.say(line)
        if self.misaligned or self.copies:
            entry.say("; ".join(filter(None, [self.misaligned, found])))
        results: dict[str, Any] = {"faster_round_to": best} if self.copies else {}
        for round_to in self.copies:
            results[f"round_to_{round_to}_latency_ms"] = round(1e3 * timed.latency(str(round_to)).median, 4)
            results[f"round_to_{round_to}_macs"] = timed.macs[str(round_to)]
        return results


def find_advice(args: argparse.Namespace, subjects: Mapping[str, Subject], mode: ExecutionMode) -> Advice:
    """Returns the copies to time: those that `--round-to` asks for, or else those that bad alignment calls for.

    The latter are one with the rounding that `--model` was pruned with and one with the machine's. Both are cut in the
    same way, from `--against`, so that they differ in the rounding alone.
    """
    model, arguments = subjects[MODEL], pruning_arguments(args)
    multiple = vector_width(model.image.device, mode.amp_dtype or model.image.dtype)
    share = misaligned_share(model.model, model.image, multiple)
    misaligned = ""
    if share >= BADLY_ALIGNED:
        why = f"no multiples of {multiple}, what this {model.image.device.type.upper()} computes at a time"
        misaligned = f"Widths: {share:.0%} of the MACs are in layers of widths that are {why}"
    base = min(args.round_to, default=0) or arguments.get("round_to", 1)
    wanted = args.round_to or ([base, multiple] if misaligned and DENSE in subjects and base % multiple else [])
    copies = cut_copies(args, subjects, wanted, arguments) if wanted else {}
    if base not in copies:
        base = min(copies, default=base)
    return Advice(copies, base, bool(args.round_to), misaligned)


def cut_copies(
    args: argparse.Namespace, subjects: Mapping[str, Subject], roundings: list[int], arguments: Mapping[str, Any]
) -> dict[int, Subject]:
    """Returns copies at the same MACs, by their rounding, and says which ones cannot be had.

    They are cut from `--against` to the MACs of `--model`, or from `--model` itself; `--target-macs` overrides.
    """
    dense, model = subjects.get(DENSE, subjects[MODEL]), subjects[MODEL]
    counter = args.macs_counter if args.macs_counter in MACS_COUNTERS else "exact"
    macs = Amount(0.5, relative=True)
    if dense is not model:
        macs = Amount(getattr(count_complexity(model.model, model.image), f"macs_{counter}"))
    shape = shaping_of(arguments)
    options = PlanOptions(macs=args.target_macs or macs, macs_counter=counter, criterion="random", **shape)
    entry.say(f"Cutting copies with --round-to {', '.join(map(str, roundings))}...")
    copies = {}
    for round_to in progress.Bar(roundings, desc="Cutting copies", unit="copy", leave=False):
        try:
            copy = rounded_copy(dense.model, dense.image, options, round_to)
            copies[round_to] = counted(args, copy, dense.image)
        except UserError as error:
            entry.say(f"No copy with --round-to {round_to}: {error}")
    return copies


def rounding_table(timed: Timed, roundings: list[int]) -> list[str]:
    """Returns a heading and a line for each rounding: MACs, latency, gain over the dense model, kept share of it."""
    first = next(iter(timed.macs))
    lines = [f"{'round-to':>8}  {'MACs':>9}  {'latency':>10}  {'speed-up':>8}  {'MACs ratio':>10}  {'kept':>5}"]
    for name in map(str, roundings):
        macs, latency, gain = format_macs(timed.macs[name]), timed.latency(name), timed.gain(name, over=first)
        cells = f"{macs:>9}  {format_seconds(latency.median):>10}  {gain.speedup.median:>7.2f}×"
        lines.append(f"{name:>8}  {cells}  {gain.macs_ratio:>9.2f}×  {gain.kept:>5.0%}")
    return lines


def rounding_line(timed: Timed, roundings: list[int], base: int, best: int | None) -> str:
    """Returns `--round-to 16 was measured to be 1.21× as fast at the same MACs (…)`, or that none was faster."""
    if best is None:
        return f"of --round-to {', '.join(map(str, roundings))}, none is clearly faster than {base} at the same MACs"
    gain = timed.gain(str(best), over=str(base)).speedup.median
    shown = [
        f"{format_macs(timed.macs[name])} in {format_seconds(timed.latency(name).median)}"
        for name in (str(best), str(base))
    ]
    return (
        f"--round-to {best} was measured to be {gain:.2f}× as fast at the same MACs "
        f"({shown[0]}; {shown[1]} with --round-to {base})"
    )


def pruning_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the flags that prune.py noted in the checkpoint `--model`; none of any other model."""
    if not is_checkpoint(args.model) or is_pth(args.model):
        return {}
    provenance = read_header(args.model).get("provenance")
    arguments = provenance.get("arguments") if isinstance(provenance, dict) else None
    return arguments if isinstance(arguments, dict) and isinstance(arguments.get("round_to"), int) else {}


def shaping_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `PlanOptions` under which copies lose as many heads and blocks as the pruned model.

    Without a budget, a run takes no heads that it was not told to take; under one, heads share it.
    """
    found = {field: arguments[flag] for flag, field in SHAPING.items() if isinstance(arguments.get(flag), (int, float))}
    if arguments and not any(arguments.get(budget) for budget in BUDGETS):
        found.setdefault("head_ratio", 0.0)
    return found
