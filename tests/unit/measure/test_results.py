"""Printed lines as the paper's users know them, and result files with the keys of timm's validate.py."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from isomorphic.errors import UserError
from isomorphic.measure.accuracy import Accuracy
from isomorphic.measure.complexity import Complexity
from isomorphic.measure.fvcore_counter import FvcoreCount
from isomorphic.measure.results import (
    accuracy_line,
    accuracy_results,
    change_lines,
    complexity_line,
    complexity_results,
    fvcore_line,
    write_results,
)

DENSE = Complexity(macs_paper=17_690_000_000, macs_exact=17_691_000_000, params=87_338_192)
PRUNED = Complexity(macs_paper=4_162_612_345, macs_exact=4_219_000_000, params=20_694_321)
ROW: dict[str, Any] = {"model": "deit, “small”", "top1": 81.17, "img_size": 224, "interpolation": "bicubic"}


def test_complexity_line():
    assert complexity_line(DENSE) == "MACs: 17.6900 G, Params: 87.3382 M"


def test_the_exact_figure_stands_beside_the_papers_where_they_differ_by_more_than_a_thousandth():
    assert complexity_line(PRUNED) == ("MACs: 4.1626 G, Params: 20.6943 M (paper counter; exact MACs: 4.2190 G)")
    assert "exact" not in complexity_line(Complexity(1_000_000, 1_001_000, 5))
    assert "exact" in complexity_line(Complexity(1_000_000, 1_001_100, 5))
    assert "exact" in complexity_line(Complexity(1_001_100, 1_000_000, 5))


def test_change_lines():
    alike = Complexity(4_170_000_000, 4_170_000_000, 20_720_000)
    assert change_lines(DENSE, alike) == "MACs: 17.69 G => 4.17 G\nParams: 87.34 M => 20.72 M"
    assert change_lines(DENSE, PRUNED) == (
        "MACs: 17.69 G => 4.16 G (paper counter; exact: 17.69 G => 4.22 G)\nParams: 87.34 M => 20.69 M"
    )


def test_accuracy_line():
    assert accuracy_line(0.82412, 0.80358) == "Accuracy: 0.8241, Loss: 0.8036"


def test_accuracy_has_timms_keys_in_percent():
    accuracy = Accuracy(top1=1 / 3, top5=0.9, loss=0.25, num_images=30, images_per_second=7.0, unreadable=("a", "b"))
    assert accuracy_results(accuracy) == {
        "top1": 33.3333,
        "top1_err": 66.6667,
        "top5": 90.0,
        "top5_err": 10.0,
        "loss": 0.25,
        "num_images": 30,
        "num_unreadable": 2,
    }


def test_results_have_both_counters_and_timms_units():
    assert complexity_results(PRUNED) == {
        "param_count": 20.6943,
        "gmacs": 4.1626,
        "macs_counter": "paper",
        "gmacs_exact": 4.219,
        "macs": 4_162_612_345,
        "params": 20_694_321,
    }
    exact = complexity_results(PRUNED, "exact")
    assert (exact["gmacs"], exact["macs_counter"], exact["macs"]) == (4.219, "exact", 4_219_000_000)


def test_fvcores_line_names_its_gaps():
    gaps = {"scaled_dot_product_attention": 12, "softmax": 3}
    expected = "MACs by fvcore: 4.21 G (not counted: scaled_dot_product_attention ×12, softmax ×3)"
    assert fvcore_line(FvcoreCount(4_212_345_678, gaps)) == expected
    assert fvcore_line(FvcoreCount(4_610_000, {})) == "MACs by fvcore: 4.61 M"


def test_results_by_fvcore_have_its_figure_under_a_key_of_its_own():
    row = complexity_results(PRUNED, "fvcore", FvcoreCount(4_100_000_000, {"softmax": 12}))
    assert row == {
        "param_count": 20.6943,
        "gmacs": 4.1,
        "macs_counter": "fvcore",
        "gmacs_exact": 4.219,
        "macs": 4_100_000_000,
        "params": 20_694_321,
        "macs_fvcore": 4_100_000_000,
    }
    assert "macs_fvcore" not in complexity_results(PRUNED)


def test_json_results(tmp_path: Path):
    write_results(tmp_path / "new" / "results.json", ROW)
    text = (tmp_path / "new" / "results.json").read_text(encoding="utf-8")
    assert json.loads(text) == ROW and text.endswith("}\n")


def test_csv_results(tmp_path: Path):
    write_results(tmp_path / "results.csv", ROW)
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in ROW.items()}]


def test_results_take_the_place_of_older_ones(tmp_path: Path):
    for top1 in (1, 2):
        write_results(tmp_path / "results.json", {"top1": top1})
    assert json.loads((tmp_path / "results.json").read_text()) == {"top1": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*results.json") as error:
        write_results(tmp_path / "file" / "results.json", ROW)
    assert "\n" not in str(error.value)


def test_results_that_json_cannot_hold_leave_nothing_behind(tmp_path: Path):
    with pytest.raises(TypeError):
        write_results(tmp_path / "results.json", {"model": object()})
    assert not list(tmp_path.iterdir())
