"""What tools/plot_metrics.py does: read the tables of training runs, and draw their curves."""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from isomorphic.commands import flags
from isomorphic.errors import UserError
from isomorphic.files import atomic_write, check_writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

HEADER = ("run", "epochs", "best top-1", "at epoch", "last train loss", "images/s")
NEEDED = ("epoch", "lr", "train_loss", "val_loss", "top1", "images_per_second")
# Okabe and Ito's palette, without its yellow, which is too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("", "o", "s", "^", "D")  # for the first seven runs, the next seven, …
SIZE, DPI = (10.67, 4.2), 150  # 1600 × 630 pixels
LEGEND_WIDTH = 130  # characters that fit beside each other
FLAT = 20  # learning rates this many times apart do not go on one linear axis


@dataclass(frozen=True)
class Curves:
    """One run: its name, and the columns of its metrics.csv, a value an epoch. What is not finite is NaN."""

    name: str
    columns: dict[str, list[float]]

    def __getitem__(self, column: str) -> list[float]:
        return self.columns[column]

    @property
    def has_average(self) -> bool:
        """Whether top1 is that of averaged weights, so that raw_top1 is another curve."""
        pairs = zip(self["top1"], self.columns.get("raw_top1", self["top1"]), strict=True)
        return any(average != raw and not math.isnan(raw) for average, raw in pairs)


def parse_args() -> argparse.Namespace:
    parser = flags.make_parser("Draw loss, accuracy and learning rate of training runs.")
    parser.add_argument("runs", nargs="+", type=flags.not_empty, metavar="RUN", help="a run's folder, or a metrics.csv")
    parser.add_argument("--out", type=flags.picture_file, default="curves.png", metavar="FILE.png", help="the picture")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_writable(args.out)
    paths = [metrics_file(Path(run)) for run in args.runs]
    runs = [read_curves(path, name) for path, name in zip(paths, run_names(paths), strict=True)]
    print(table(runs))
    figure = draw(runs)
    with atomic_write(args.out) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
    print(f"Saving the curves to {args.out}")


def metrics_file(run: Path) -> Path:
    """The metrics.csv of a run's folder, or the file that was named itself."""
    if not run.exists():
        raise UserError(f"{run}: there is no such folder or file")
    path = run / "metrics.csv" if run.is_dir() else run
    if not path.is_file():
        raise UserError(f"{run} holds no metrics.csv: it is not a run's output folder, or no run has begun there")
    return path


def run_names(paths: Sequence[Path]) -> list[str]:
    """The runs' folders (of a table of another name: that name), with as many folders above as tell them apart."""
    places = [
        path.absolute().parent if path.name == "metrics.csv" else path.absolute().with_suffix("") for path in paths
    ]
    names: list[str] = []
    for count in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-count:]) for place in places]
        if len(set(names)) == len(set(places)):
            break
    return names


def read_curves(path: Path, name: str) -> Curves:
    """The columns of a metrics.csv.

    Raises:
        UserError: it cannot be read, is no such table, holds no epoch, or holds what is no number; as a row that was
            being written when the machine stopped.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows, header = list(reader), reader.fieldnames or []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if missing := [column for column in NEEDED if column not in header]:
        raise UserError(f"{path} is no metrics.csv of a training run: it lacks {', '.join(missing)}")
    if not rows:
        raise UserError(f"{path} holds no epoch yet: plot it when the first one is done")
    if long := [line for line, row in enumerate(rows, 2) if None in row]:
        raise UserError(f"{path}, line {long[0]}: it has more values than the header has names")
    columns = [column for column in header if column in (*NEEDED, "raw_top1")]
    values = [[_number(path, number, row, column) for column in columns] for number, row in enumerate(rows, 2)]
    return Curves(name, dict(zip(columns, map(list, zip(*values, strict=True)), strict=True)))


def _number(path: Path, line: int, row: dict[str, str | None], column: str) -> float:
    """A cell as a number, NaN where it is not finite."""
    try:
        value = float(row[column] or "nothing")
    except ValueError as error:
        raise UserError(
            f"{path}, line {line}: {row[column] or 'nothing'} is no number for {column}; "
            "a row that was cut short can be deleted"
        ) from error
    if column == "epoch" and not math.isfinite(value):
        raise UserError(f"{path}, line {line}: {value} is no number for epoch")
    return value if math.isfinite(value) else math.nan


def table(runs: Sequence[Curves]) -> str:
    """A line a run, aligned; accuracy in percent."""
    lines = [HEADER, *map(cells, runs)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def cells(run: Curves) -> tuple[str, ...]:
    """A run as `HEADER` names its columns; a dash where there is no finite value."""
    top1, epoch = best(run)
    speeds = [speed for speed in run["images_per_second"] if not math.isnan(speed)]
    return (
        run.name,
        str(len(run["epoch"])),
        "-" if math.isnan(top1) else f"{100 * top1:.2f}",
        "-" if math.isnan(top1) else f"{epoch:g}",
        "-" if math.isnan(run["train_loss"][-1]) else f"{run['train_loss'][-1]:.4f}",
        f"{statistics.median(speeds):.0f}" if speeds else "-",
    )


def best(run: Curves) -> tuple[float, float]:
    """The highest top-1 and the first epoch that has it; NaN where none is finite."""
    found = [(top1, -epoch) for top1, epoch in zip(run["top1"], run["epoch"], strict=True) if not math.isnan(top1)]
    top1, epoch = max(found, default=(math.nan, math.nan))
    return top1, -epoch


def draw(runs: Sequence[Curves]) -> Figure:
    """Three panels, one colour a run: loss, top-1 in percent, learning rate."""
    from matplotlib.figure import Figure  # a second of import time, which what is wrong with a run need not wait for
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=SIZE, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    panels = figure.subplots(1, 3)
    for axes, title in zip(panels, ("Loss", "Top-1 accuracy, %", "Learning rate"), strict=True):
        prepare(axes, title)
    handles = [draw_run(panels, run, position) for position, run in enumerate(runs)]
    single = all(len(run["epoch"]) == 1 for run in runs)
    explain(panels[0], "validation", "training", "--", points=single)
    if any(run.has_average for run in runs):
        explain(panels[1], "as reported", "before averaging (EMA)", ":", points=single)
    scale_rates(panels[2], runs)
    names = [legend_text(run.name) for run in runs]
    columns = max(1, min(len(runs), LEGEND_WIDTH // max(map(len, names))))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def prepare(axes: Axes, title: str) -> None:
    """What all panels have in common."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("epoch", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def draw_run(panels: Sequence[Axes], run: Curves, position: int) -> Line2D:
    """The curves of one run, and a point at its best top-1; returns the line that its legend shows."""
    loss, accuracy, rate = panels
    colour, epochs = COLOURS[position % len(COLOURS)], run["epoch"]
    marker = MARKERS[position // len(COLOURS) % len(MARKERS)] or ("o" if len(epochs) == 1 else "")

    def plot(axes: Axes, values: Sequence[float], style: str, width: float, fill: str = colour) -> Line2D:
        (line,) = axes.plot(epochs, values, style, color=colour, linewidth=width)
        line.set(marker=marker, markersize=4, markevery=max(len(epochs) // 8, 1), markerfacecolor=fill)
        return line

    plot(loss, run["train_loss"], "--", 1.1, "white")
    plot(loss, run["val_loss"], "-", 1.6)
    if run.has_average:
        plot(accuracy, percent(run["raw_top1"]), ":", 1.3, "white")
    line = plot(accuracy, percent(run["top1"]), "-", 1.6)
    top1, epoch = best(run)
    accuracy.plot([epoch], [100 * top1], "o", color=colour, markersize=6, markeredgecolor="white", zorder=3)
    plot(rate, run["lr"], "-", 1.6)
    return line


def percent(fractions: Sequence[float]) -> list[float]:
    return [100 * fraction for fraction in fractions]


def explain(axes: Axes, solid: str, broken: str, style: Literal["--", ":"], *, points: bool = False) -> None:
    """A legend of the two line styles, which are the same for all runs; `points` shows the markers' fill as well."""
    from matplotlib.lines import Line2D

    grey, marker = "0.3", "o" if points else ""
    handles = [
        Line2D([], [], color=grey, linestyle="-", marker=marker, markersize=4),
        Line2D([], [], color=grey, linestyle=style, marker=marker, markersize=4, markerfacecolor="white"),
    ]
    axes.legend(handles, [solid, broken], loc="best", fontsize=8, framealpha=0.8, edgecolor="none", handlelength=2.6)


def scale_rates(axes: Axes, runs: Sequence[Curves]) -> None:
    """From zero; or a logarithmic axis, where the rates of some run would lie flat on the bottom."""
    from matplotlib.ticker import FuncFormatter

    peaks = [max(positive) for run in runs if (positive := [rate for rate in run["lr"] if rate > 0])]
    if peaks and max(peaks) > FLAT * min(peaks):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(peaks) / 1000)  # a cosine's last steps go to zero, and would take all the space
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(rate_text))


def rate_text(rate: float, position: int | None = None) -> str:
    """A learning rate as people write it: 5e-4, 0.05."""
    if 0 < rate < 0.01:
        digits, exponent = f"{rate:e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{rate:g}"


def legend_text(name: str) -> str:
    """A name as it stands: matplotlib reads mathematics between dollars, and leaves out what begins with "_"."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")
