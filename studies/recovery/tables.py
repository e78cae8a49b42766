"""The rows of studies.recovery, and what its tables and findings make of them: text, nothing is measured here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

TITLES = {
    "hidden": "Hidden units of MLPs alone",
    "whole": "The whole model",
    "allocation": "Allocation at equal MACs",
    "finetuned": "After finetuning with an equal budget",
    "groups": "Reconstruction errors by group",
}
ONLY_HIDDEN = "compensate, hidden units"  # the readers of residual streams stay as they are
TOO_LITTLE = 1.0  # points of top-1: what plain selection must lose for a recovery to show


class RecoveryRow(NamedTuple):
    """One measurement: the columns of recovery.csv.

    Attributes:
        table: a key of `TITLES`.
        family, seed: the dense model.
        share: of hidden units that were removed, in table "hidden"; of the dense MACs that are left, in the others.
        allocation: "isomorphic", "global" or "searched"; "dense" for the dense model.
        recovery: how the cut was recovered.
        macs: that are left, paper's counter.
        top1: in percent, on the validation images.
        loss: on the calibration images.
        group: whose readers the errors are of, in table "groups".
        before, after: relative reconstruction error, in table "groups".
        epoch: of finetuning, 0 for its start, in table "finetuned".
    """

    table: str
    family: str
    seed: int
    share: float
    allocation: str
    recovery: str
    macs: int
    top1: float
    loss: float | None = None
    group: str = ""
    before: float | None = None
    after: float | None = None
    epoch: int | None = None


class Line(NamedTuple):
    """A line of a table: its family, its share, and for table "allocation" the recovery."""

    family: str
    share: float
    recovery: str = ""


def page(rows: Sequence[RecoveryRow]) -> Iterator[str]:
    """All tables with what was found, as Markdown."""
    for table, title in TITLES.items():
        chosen = [row for row in rows if row.table == table]
        if chosen:
            yield from ("", f"## {title}", "", *TABLES[table](chosen))


def mean_and_deviation(values: Sequence[float]) -> str:
    """As "93.06 ± 1.20", with the sample's deviation; one value has none."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def recovery_table(rows: Sequence[RecoveryRow]) -> list[str]:
    """Tables 1 and 2: recoveries side by side, and by how much each makes up for what plain selection loses."""
    cut_rows = [row for row in rows if row.recovery != "dense"]
    ways = list(dict.fromkeys(row.recovery for row in sorted(cut_rows, key=lambda row: row.recovery in LAST)))
    dense = {family: _top1(rows, family=family, recovery="dense") for family in _families(rows)}
    share = "hidden units removed" if rows[0].table == "hidden" else "MACs asked for"
    lines = [_cells("family", share, "MACs", "seeds", "dense", *ways), _cells(*["---"] * (5 + len(ways)))]
    for line in _lines(cut_rows):
        here = [row for row in cut_rows if (row.family, row.share) == line[:2]]
        top1 = [mean_and_deviation(_top1(here, recovery=way)) for way in ways]
        head = (line.family, f"{line.share:.0%}", _macs(here), str(_seeds(here)))
        lines.append(_cells(*head, mean_and_deviation(dense[line.family]), *top1))
    return [*lines, "", *(_made_up_for(rows, line) for line in _lines(cut_rows))]


def _made_up_for(rows: Sequence[RecoveryRow], line: Line) -> str:
    """Which share of the accuracy that plain selection loses stays lost, and what readers of residual streams add."""
    here = [row for row in rows if (row.family, row.share) == line[:2]]
    dense = statistics.fmean(_top1(rows, family=line.family, recovery="dense"))
    top1 = {way: statistics.fmean(_top1(here, recovery=way)) for way in dict.fromkeys(row.recovery for row in here)}
    plain, compensated = (dense - top1[way] for way in ("plain", "compensate"))
    place = f"- {line.family}, {line.share:.0%}: plain loses {plain:.2f} points"
    if plain < TOO_LITTLE:
        return f"{place}, too little to tell (compensate {compensated:.2f})"
    stream = ""
    if ONLY_HIDDEN in top1:
        stream = f"; what reads residual streams accounts for {top1['compensate'] - top1[ONLY_HIDDEN]:+.2f} points"
    return f"{place}, compensate {compensated:.2f}, {compensated / plain:.0%} of that{stream}"


def allocation_table(rows: Sequence[RecoveryRow]) -> list[str]:
    """Table 3: allocations side by side, and how the searched one stands to the better of the others."""
    allocations = ("global", "isomorphic", "searched")
    lines = [_cells("family", "MACs asked for", "MACs", "recovery", "seeds", *allocations, "searched − better")]
    lines.append(_cells(*["---"] * 9))
    for line in _lines(rows, by_recovery=True):
        here = [row for row in rows if (row.family, row.share, row.recovery) == line]
        top1 = {name: _top1(here, allocation=name) for name in allocations}
        gain = "-"
        if all(top1.values()):
            means = {name: statistics.fmean(values) for name, values in top1.items()}
            gain = f"{means['searched'] - max(means['global'], means['isomorphic']):+.2f}"
        head = (line.family, f"{line.share:.0%}", _macs(here), line.recovery, str(_seeds(here)))
        lines.append(_cells(*head, *(mean_and_deviation(values) for values in top1.values()), gain))
    return lines


def finetuned_table(rows: Sequence[RecoveryRow]) -> list[str]:
    """Table 4: where both starts begin and end, and when the compensated one is where the plain one ends."""
    lines = [
        _cells("family", "MACs", "seeds", "start", "at the start", "at the end", "at best", "epochs to plain's end")
    ]
    lines.append(_cells(*["---"] * 8))
    for family in _families(rows):
        runs = {start: _runs(rows, family, start) for start in dict.fromkeys(row.recovery for row in rows)}
        here = [row for row in rows if row.family == family]
        for start, found in runs.items():
            needed = [
                _epochs_to(curve, runs["plain"][seed][-1]) for seed, curve in found.items() if seed in runs["plain"]
            ]
            stages = [[curve[0] for curve in found.values()], [curve[-1] for curve in found.values()]]
            stages.append([max(curve[1:]) for curve in found.values()])
            texts = [mean_and_deviation(values) for values in stages]
            epochs = ", ".join("never" if number is None else str(number) for number in needed)
            lines.append(_cells(family, _macs(here), str(len(found)), start, *texts, epochs))
    return [*lines, "", *(_beside_plain(rows, family) for family in _families(rows))]


def _beside_plain(rows: Sequence[RecoveryRow], family: str) -> str:
    """Whether the compensated start ends worse than the plain one by more than one standard deviation of that one."""
    plain, compensated = ([run[-1] for run in _runs(rows, family, start).values()] for start in ("plain", "compensate"))
    gain = round(statistics.fmean(compensated) - statistics.fmean(plain), 2) + 0.0  # no -0.00
    if len(plain) < 2:
        return f"- {family}: compensate ends {gain:+.2f} points from plain, of one seed"
    deviation = statistics.stdev(plain)
    verdict = "worse by more than that" if gain < -deviation else "not worse by more than that"
    return f"- {family}: compensate ends {gain:+.2f} points from plain, whose deviation is {deviation:.2f}: {verdict}"


def _runs(rows: Sequence[RecoveryRow], family: str, start: str) -> Mapping[int, list[float]]:
    """Top-1 of all epochs, the start's first, by seed."""
    runs: dict[int, list[float]] = {}
    for row in sorted((r for r in rows if (r.family, r.recovery) == (family, start)), key=lambda row: row.epoch or 0):
        runs.setdefault(row.seed, []).append(row.top1)
    return runs


def _epochs_to(curve: Sequence[float], top1: float) -> int | None:
    return next((epoch for epoch, reached in enumerate(curve) if reached >= top1), None)


def group_table(rows: Sequence[RecoveryRow]) -> list[str]:
    """Table 5: one example of each family."""
    lines = [_cells("family", "group", "before", "after"), _cells(*["---"] * 4)]
    first = min(row.seed for row in rows)
    return lines + [
        _cells(row.family, row.group, f"{row.before:.4f}", f"{row.after:.4f}") for row in rows if row.seed == first
    ]


TABLES: Mapping[str, Callable[[Sequence[RecoveryRow]], list[str]]] = {
    "hidden": recovery_table,
    "whole": recovery_table,
    "allocation": allocation_table,
    "finetuned": finetuned_table,
    "groups": group_table,
}
LAST = ("bn", "compensate + bn")  # columns that not every family has


def _lines(rows: Sequence[RecoveryRow], *, by_recovery: bool = False) -> list[Line]:
    return list(dict.fromkeys(Line(row.family, row.share, row.recovery if by_recovery else "") for row in rows))


def _top1(rows: Sequence[RecoveryRow], **wanted: object) -> list[float]:
    return [row.top1 for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def _families(rows: Sequence[RecoveryRow]) -> list[str]:
    return list(dict.fromkeys(row.family for row in rows))


def _seeds(rows: Sequence[RecoveryRow]) -> int:
    return len({row.seed for row in rows})


def _macs(rows: Sequence[RecoveryRow]) -> str:
    return f"{statistics.fmean(row.macs for row in rows) / 1e6:.2f} M"


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
