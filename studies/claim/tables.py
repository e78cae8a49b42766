"""Tables of studies.claim: what ranking inside isomorphic classes gains over the other rankings, and how sure that is.

Differences are paired: of two runs that differ by the ranking alone. A cell is their mean ± its standard error, in
points of top-1, over the dense models and the criteria of a row, with the number of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from studies.claim.runs import CRITERIA, RANKINGS, RECOVERIES, SHARES, Row
from studies.depgraph.models import FAMILIES
from studies.depgraph.tables import mean_and_error

OTHERS = RANKINGS[1:]
_Value = Callable[[Row], float | None]


def page(rows: Sequence[Row]) -> list[str]:
    """All tables that there are rows for, as markdown."""
    digits = [row for row in rows if row.model in FAMILIES]
    real = [row for row in rows if row.model not in FAMILIES]
    lines: list[str] = []
    if digits:
        lines += ["## Digits made hard", "", *dense_lines(digits), "", "### Just pruned", ""]
        lines += [*gain_table(digits, just_pruned), "", "### After equal finetuning", ""]
        lines += [*gain_table(digits, finetuned), "", "### Top-1 after equal finetuning, by criterion", ""]
        lines += level_table(digits, finetuned)
    for name in dict.fromkeys(row.model for row in real):
        own = [row for row in real if row.model == name]
        lines += ["", f"## {name}: agreement with the dense model", "", *level_table(own, just_pruned)]
    return lines


def just_pruned(row: Row) -> float | None:
    """Before any finetuning."""
    return row.top1


def finetuned(row: Row) -> float | None:
    """After it."""
    return row.finetuned


def dense_lines(rows: Sequence[Row]) -> Iterator[str]:
    """The dense models, and what the finetuning makes of them."""
    yield "| dense | top-1 | after the same finetuning | seeds |"
    yield "|---|---|---|---|"
    for name in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == name and row.recovery == "dense"]
        by_seed = {row.seed: row for row in own}.values()  # measured once a criterion
        cells = [mean_and_error([value for row in by_seed if (value := of(row)) is not None]) for of in VALUES]
        yield f"| {name} | {' | '.join(cells)} | {len(by_seed)} |"


VALUES: tuple[_Value, _Value] = (just_pruned, finetuned)


def gain_table(rows: Sequence[Row], value: _Value) -> list[str]:
    """What isomorphic ranking gains over the others, by share and recovery, over all models and criteria."""
    lines = [
        "| MACs left | recovery | isomorphic − global | − local | − allocated | pairs |",
        "|---|---|---|---|---|---|",
    ]
    for share in SHARES:
        for recovery in RECOVERIES:
            here = [row for row in rows if (row.share, row.recovery) == (share, recovery)]
            gains = [paired(here, other, value) for other in OTHERS]
            if any(gains):
                cells = [signed(mean_and_error(found)) for found in gains]
                lines.append(f"| {share:.0%} | {recovery} | {' | '.join(cells)} | {max(map(len, gains))} |")
    return lines


def paired(rows: Sequence[Row], other: str, value: _Value) -> list[float]:
    """Isomorphic minus another ranking, of runs that are alike in everything else."""
    by_run = {row.run: found for row in rows if (found := value(row)) is not None}
    pairs = [(run, run._replace(ranking=other)) for run in by_run if run.ranking == "isomorphic"]
    return [by_run[one] - by_run[another] for one, another in pairs if another in by_run]


def level_table(rows: Sequence[Row], value: _Value) -> list[str]:
    """The values themselves, a column a ranking."""
    lines = [f"| MACs left | recovery | criterion | {' | '.join(RANKINGS)} |", "|---" * (3 + len(RANKINGS)) + "|"]
    for share in SHARES:
        for recovery in RECOVERIES:
            for criterion in CRITERIA:
                here = [r for r in rows if (r.share, r.recovery, r.criterion) == (share, recovery, criterion)]
                cells = [
                    mean_and_error([v for r in here if r.ranking == ranking and (v := value(r)) is not None])
                    for ranking in RANKINGS
                ]
                if set(cells) != {mean_and_error([])}:
                    lines.append(f"| {share:.0%} | {recovery} | {criterion} | {' | '.join(cells)} |")
    return lines


def signed(mean: str) -> str:
    """The same with a plus before what is not negative: a difference."""
    return mean if mean[0] in "-–" else f"+{mean}"
