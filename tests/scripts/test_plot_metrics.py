"""The curves of training runs: what is printed, what is drawn, and what is said of files that are no runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from isomorphic.commands import plot_metrics as plot
from isomorphic.errors import UserError

HEADER = "epoch,lr,train_loss,val_loss,top1,top5,raw_top1,seconds,images_per_second"
ROWS = [
    "1,0.5,4.0,3.0,0.25,0.5,0.25,9.0,100.0",
    "2,0.25,3.0,2.0,0.75,0.9,0.75,9.0,300.0",
    "3,0,2.5,2.5,0.5,0.8,0.5,9,110",
]
AVERAGED = ["1,0.5,4.0,3.0,0.25,0.5,0.125,9.0,100.0", "2,0.25,3.0,2.0,0.75,0.9,0.5,9.0,300.0"]


@pytest.fixture
def run_plot(run_tool: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(run_tool, "plot_metrics")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A run's folder with a metrics.csv of these rows."""

    def made(name: str, *rows: str, header: str = HEADER, end: str = "\n") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("\n".join([header, *rows]) + end)
        return folder

    return made


def points(line: Any) -> list[tuple[float, float]]:
    return list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))


def curves(axes: Any, style: str) -> list[list[tuple[float, float]]]:
    """The lines of a style, markers apart, as (epoch, value)."""
    return [points(line) for line in axes.lines if line.get_linestyle() == style]


def test_table_and_picture(run_plot: Callable[..., Any], make_run: Callable[..., Path], tmp_path: Path):
    first, second = make_run("deit", *ROWS), make_run("convnext_4.2G", *AVERAGED)
    done = run_plot(first, second / "metrics.csv", "--out", tmp_path / "curves.png")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    header, deit, convnext, last = done.stdout.splitlines()
    assert header == "          run  epochs  best top-1  at epoch  last train loss  images/s"
    assert deit.split() == ["deit", "3", "75.00", "2", "2.5000", "110"]  # the median, not the mean of 170
    assert convnext.split() == ["convnext_4.2G", "2", "75.00", "2", "3.0000", "200"]
    assert len({len(line) for line in (header, deit, convnext)}) == 1
    assert last == f"Saving the curves to {tmp_path / 'curves.png'}"
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and picture.size == (1600, 630)
        assert picture.convert("L").getextrema() == (0, 255)


def test_what_is_drawn_is_what_the_files_say(make_run: Callable[..., Path]):
    runs = [
        plot.read_curves(make_run(name, *rows) / "metrics.csv", name) for name, rows in (("a", ROWS), ("b", AVERAGED))
    ]
    figure = plot.draw(runs)
    loss, accuracy, rate = figure.axes
    assert [axes.get_title("left") for axes in figure.axes] == ["Loss", "Top-1 accuracy, %", "Learning rate"]
    assert curves(loss, "--") == [[(1, 4.0), (2, 3.0), (3, 2.5)], [(1, 4.0), (2, 3.0)]]
    assert curves(loss, "-") == [[(1, 3.0), (2, 2.0), (3, 2.5)], [(1, 3.0), (2, 2.0)]]
    assert curves(accuracy, "-") == [[(1, 25.0), (2, 75.0), (3, 50.0)], [(1, 25.0), (2, 75.0)]]
    assert curves(accuracy, ":") == [[(1, 12.5), (2, 50.0)]]  # only where weights are averaged
    assert curves(accuracy, "None") == [[(2, 75.0)], [(2, 75.0)]]  # the best epochs
    assert curves(rate, "-") == [[(1, 0.5), (2, 0.25), (3, 0.0)], [(1, 0.5), (2, 0.25)]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    colours = [line.get_color() for line in rate.lines]
    assert colours == [handle.get_color() for handle in legend.get_lines()] and colours[0] != colours[1]


def test_a_file_without_raw_accuracy_is_drawn(make_run: Callable[..., Path]):
    header = HEADER.replace("raw_top1,", "")
    run = plot.read_curves(make_run("old", "1,0.5,4.0,3.0,0.25,0.5,9.0,100.0", header=header) / "metrics.csv", "old")
    _, accuracy, _ = plot.draw([run]).axes
    assert curves(accuracy, "-") == [[(1, 25.0)]] and curves(accuracy, ":") == []
    assert accuracy.get_legend() is None


def test_a_single_epoch_is_a_point(make_run: Callable[..., Path]):
    figure = plot.draw([plot.read_curves(make_run("smoke", ROWS[0]) / "metrics.csv", "smoke")])
    assert {str(line.get_marker()) for axes in figure.axes for line in axes.lines} == {"o"}


def test_what_is_not_finite_is_a_gap(make_run: Callable[..., Path]):
    rows = [ROWS[0], "2,0.25,nan,inf,nan,nan,nan,9.0,300.0", ROWS[2]]
    run = plot.read_curves(make_run("gap", *rows) / "metrics.csv", "gap")
    loss, accuracy, _ = plot.draw([run]).axes
    for line in (*curves(loss, "-"), *curves(loss, "--"), *curves(accuracy, "-")):
        assert [math.isnan(value) for _, value in line] == [False, True, False]
    assert curves(accuracy, ":") == []  # two gaps in the same place are no other curve
    assert plot.cells(run) == ("gap", "3", "50.00", "3", "2.5000", "110")


def test_nothing_but_gaps_is_dashes(make_run: Callable[..., Path]):
    run = plot.read_curves(make_run("nan", "1,0.5,nan,nan,nan,nan,nan,9.0,nan") / "metrics.csv", "nan")
    plot.draw([run])
    assert plot.cells(run) == ("nan", "1", "-", "-", "-", "-")


@pytest.mark.parametrize(("rates", "scale"), [((0.5, 0.03), "linear"), ((0.5, 0.0005), "log")])
def test_rates_far_apart_share_a_logarithmic_axis(rates: tuple[float, ...], scale: str):
    columns = {"epoch": [1.0], "train_loss": [1.0], "val_loss": [1.0], "top1": [0.5], "images_per_second": [1.0]}
    runs = [plot.Curves(str(rate), columns | {"lr": [rate]}) for rate in rates]
    assert plot.draw(runs).axes[2].get_yscale() == scale


def test_rates_are_written_as_people_do():
    assert [plot.rate_text(rate) for rate in (0, 0.5, 0.05, 5e-4, 2.5e-5)] == ["0", "0.5", "0.05", "5e-4", "2.5e-5"]


def test_names_are_as_long_as_it_takes():
    def names(*paths: str) -> list[str]:
        return plot.run_names([Path("/runs", path) for path in paths])

    assert names("a/deit/metrics.csv", "a/swin/metrics.csv") == ["deit", "swin"]
    assert names("a/deit/metrics.csv", "b/deit/metrics.csv") == ["a/deit", "b/deit"]
    assert names("a/deit/metrics.csv", "a/deit/metrics.csv") == ["deit", "deit"]  # one run, named twice
    assert names("tables/deit_4.2G.csv", "deit/metrics.csv") == ["deit_4.2G", "deit"]


def test_names_stand_in_the_legend_as_they_are():
    columns = {key: [1.0] for key in plot.NEEDED}
    figure = plot.draw([plot.Curves(name, columns) for name in ("_mine", "a$b$c")])
    texts = figure.legends[0].get_texts()
    assert [text.get_text() for text in texts] == [" _mine", r"a\$b\$c"]


def test_more_runs_than_colours_are_told_apart():
    columns = {key: [1.0, 2.0] for key in plot.NEEDED}
    figure = plot.draw([plot.Curves(f"run{number}", columns) for number in range(20)])
    looks = {(handle.get_color(), handle.get_marker()) for handle in figure.legends[0].get_lines()}
    assert len(looks) == 20


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no epoch yet: plot it when the first one is done"),
        ([ROWS[0], "2,0.25,3.0"], "line 3: nothing is no number for val_loss; a row that was cut short can be deleted"),
        (
            [ROWS[0], "2,0.25,3.0,1.5e"],
            "line 3: 1.5e is no number for val_loss; a row that was cut short can be deleted",
        ),
        (["nan,0.5,4.0,3.0,0.25,0.5,0.25,9.0,100.0"], "line 2: nan is no number for epoch"),
        ([ROWS[0] + ",7"], "line 2: it has more values than the header has names"),
    ],
)
def test_a_table_with_a_flaw_is_one_line(make_run: Callable[..., Path], rows: list[str], message: str):
    path = make_run("flawed", *rows, end="") / "metrics.csv"
    with pytest.raises(UserError) as raised:
        plot.read_curves(path, "flawed")
    assert str(path) in str(raised.value) and message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lacks epoch, lr, train_loss, val_loss, top1, images_per_second"),
        (HEADER.replace("val_loss,", "").encode(), "it lacks val_loss"),
        (b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_what_is_no_table_of_a_run_is_one_line(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        plot.read_curves(tmp_path / "metrics.csv", "run")


def test_what_is_no_run_is_one_line_and_leaves_no_picture(
    run_plot: Callable[..., Any], make_run: Callable[..., Path], tmp_path: Path
):
    good, picture = make_run("good", *ROWS), tmp_path / "curves.png"
    (tmp_path / "empty").mkdir()
    for run, message in (
        (tmp_path / "nowhere", "there is no such folder or file"),
        (tmp_path / "empty", "holds no metrics.csv: it is not a run's output folder, or no run has begun there"),
    ):
        done = run_plot(good, run, "--out", picture)
        assert (done.returncode, done.stdout) == (1, "") and not picture.exists()
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"plot_metrics.py: {run}") and line.endswith(message)


def test_the_picture_is_a_png(run_plot: Callable[..., Any], make_run: Callable[..., Path], tmp_path: Path):
    done = run_plot(make_run("good", *ROWS), "--out", tmp_path / "curves.pdf")
    assert done.returncode == 2 and done.stderr.endswith("must end in .png (--help lists all flags)\n")
