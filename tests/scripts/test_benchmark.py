"""The benchmarks: what they compare, count and write. Nothing that they time is asserted."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isomorphic.errors import UserError
from isomorphic.models import build_model, describe_model

WAYS = ["exact", "exact, tried", "depgraph", "depgraph, shapes"]
RESNET: dict[str, Any] = {"channels": [8, 12, 16, 24], "stem_width": 8, "num_classes": 10}


@pytest.fixture
def benchmark(tool: Callable[[str], Any]) -> Any:
    return tool("benchmark_trace")


@pytest.fixture
def run_benchmark(run_tool: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(run_tool, "benchmark")


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
        "trace", "--models", "resnet10t", "--repetitions", "2", "--threads", "1", "--csv", tmp_path / "rows.csv"
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
    done = run_benchmark("trace", "--models", "resnet10t", "resnet0", "--csv", tmp_path / "rows.csv")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("benchmark.py: ") and "resnet0" in line


# --- prune -------------------------------------------------------------------------------------------------

SCRIPT = """#!/usr/bin/env bash
# The published batches were unseeded: append --target-macs 5M to fix the sizes.
"$ISOMORPHIC_PYTHON" prune.py --model resnet10t \\
  --model-kwargs channels=[8,12,16,24] stem_width=8 num_classes=10 --pruning-ratio 0.5 --round-to 2 "$@"
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "small.sh"
    path.write_text(SCRIPT)
    return path


def test_a_script_is_timed_for_its_published_macs(
    tool: Callable[[str], Any], script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    benchmark, path = tool("benchmark_prune"), tmp_path / "rows.csv"
    benchmark.run([str(script)], 1, 1, 100, path)
    with open(path, newline="") as file:
        (row,) = csv.DictReader(file)
    assert tuple(row) == benchmark.Row._fields
    told = {name: row[name] for name in ("script", "target", "rounds", "threads", "status")}
    assert told == {"script": "small", "target": "5000000", "rounds": "1", "threads": "1", "status": "ok"}
    assert 0.9 * 5e6 < int(row["macs"]) <= 5e6
    assert float(row["ours"]) == pytest.approx(sum(float(row[phase]) for phase in benchmark.PHASES))
    assert float(row["ratio"]) == pytest.approx(float(row["ours"]) / float(row["reference"]))
    header, line, last = capsys.readouterr().out.splitlines()
    assert header.startswith("script") and line.startswith("small ")
    assert last == f"Saving the rows to {path}"


def test_a_pruner_that_fails_is_a_row_that_says_so(
    tool: Callable[[str], Any], script: Path, monkeypatch: pytest.MonkeyPatch
):
    benchmark, rows = tool("benchmark_prune"), []
    monkeypatch.setattr(benchmark, "time_theirs", lambda *_: [][0])
    row = benchmark.measure("small", benchmark.read_script(script), 2, rows.append)
    assert rows[-1] == row and row.status == "BasePruner: IndexError: list index out of range"
    assert row.ours is not None and row.macs is not None and row.reference is None and row.ratio is None
    assert benchmark.line(row).endswith(row.status)


def test_a_script_that_takes_too_long_is_ended(tool: Callable[[str], Any], script: Path):
    benchmark = tool("benchmark_prune")
    row = benchmark.measure_apart("small", benchmark.read_script(script), 1, 1, 0.0)
    assert row.status == "start: took longer than 0 s" and row.ours is None


def test_the_reference_takes_what_the_published_scripts_ask_for(tool: Callable[[str], Any]):
    benchmark = tool("benchmark_prune")
    args = benchmark.read_script(Path(__file__).parents[2] / "scripts/pruning/deit_4.2G.sh")
    model = build_model(describe_model("deit_tiny_distilled_patch16_224", kwargs={"depth": 2, "num_classes": 7}))
    options = benchmark.pruner_options(model, args, 7)
    assert (options["pruning_ratio"], options["head_pruning_ratio"], options["round_to"]) == (0.5, 0.5, 2)
    assert options["prune_num_heads"] and options["prune_head_dims"] and options["isomorphic"]
    attention = [module for module in model.modules() if hasattr(module, "qkv")]
    assert options["num_heads"] == {module.qkv: 3 for module in attention}
    assert options["pruning_ratio_dict"] == {tuple(module.qkv for module in attention): 0.25}
    assert options["ignored_layers"] == [model.head, model.head_dist]


@pytest.mark.parametrize(
    ("text", "message"),
    [(SCRIPT.replace("--target-macs 5M", ""), "does not say"), (SCRIPT.replace("prune.py", "finetune.py"), "not call")],
)
def test_a_script_that_cannot_be_read_is_named(tool: Callable[[str], Any], script: Path, text: str, message: str):
    script.write_text(text)
    with pytest.raises(UserError, match=f"small.sh does {message.removeprefix('does ')}"):
        tool("benchmark_prune").read_script(script)
