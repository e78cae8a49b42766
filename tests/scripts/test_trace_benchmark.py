"""The benchmark of tracing: what it compares, counts and writes. Nothing that it times is asserted."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isomorphic.models import build_model, describe_model

WAYS = ["exact", "exact, tried", "depgraph", "depgraph, shapes"]
RESNET: dict[str, Any] = {"channels": [8, 12, 16, 24], "stem_width": 8, "num_classes": 10}


@pytest.fixture
def benchmark(tool: Callable[[str], Any]) -> Any:
    return tool("trace_benchmark")


@pytest.fixture
def run_benchmark(run_tool: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(run_tool, "trace_benchmark")


def test_ratios_are_those_of_each_round(benchmark: Any):
    seconds = {"exact": [1.0, 4.0, 3.0], "depgraph": [2.0, 4.0, 12.0]}
    assert benchmark.compare(seconds, "depgraph") == (4.0, 0.5, 0.25, 1.0)
    assert benchmark.compare(seconds, "exact") == (3.0, 1.0, 1.0, 1.0)


def test_all_ways_take_turns_and_leave_the_model_as_it_was(benchmark: Any, monkeypatch: pytest.MonkeyPatch):
    model = build_model(describe_model("resnet10t", kwargs=RESNET))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    order: list[str] = []
    for way, construct in benchmark.WAYS.items():
        monkeypatch.setitem(benchmark.WAYS, way, lambda *args, w=way, c=construct: (order.append(w), c(*args)))
    seconds = benchmark.take_turns(model, torch.zeros(1, 3, 32, 32), 2)
    assert order == 3 * WAYS
    assert {way: len(times) for way, times in seconds.items()} == dict.fromkeys(WAYS, 2)
    assert not model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rows_and_table(run_benchmark: Callable[..., Any], tmp_path: Path):
    done = run_benchmark(
        "--models", "resnet10t", "--repetitions", "2", "--threads", "1", "--csv", tmp_path / "rows.csv"
    )
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == WAYS
    assert {(row["model"], row["rounds"], row["threads"]) for row in rows} == {("resnet10t", "2", "1")}
    assert [row["groups"] for row in rows] == ["10", "10", "11", "11"]  # the library counts the outputs as one more
    assert all(float(row["added_mib"]) >= 0 for row in rows)
    assert all(float(row["ratio_min"]) <= float(row["ratio"]) <= float(row["ratio_max"]) for row in rows)
    header, *table, last = done.stdout.splitlines()
    assert header.startswith("model") and len(table) == len(WAYS)
    assert all(line.startswith(f"resnet10t{'':21}{way}") for line, way in zip(table, WAYS, strict=True))
    assert last == f"Saving the rows to {tmp_path / 'rows.csv'}"


def test_an_unknown_model_is_one_line_before_anything_is_measured(run_benchmark: Callable[..., Any], tmp_path: Path):
    done = run_benchmark("--models", "resnet10t", "resnet0", "--csv", tmp_path / "rows.csv")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("trace_benchmark.py: ") and "resnet0" in line
