"""The tables of speed and latency: what is taken from where, and written. Nothing that they time is asserted."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isomorphic.checkpoints.save import save_model
from isomorphic.errors import UserError
from isomorphic.models import build_model, describe_model
from studies.speed import everything, latency, pruning
from tests.versions import needs_newest_export

FIGURES = {
    "against_latency_ms": 40.0,
    "against_macs": 400,
    "latency_ms": 10.0,
    "latency_cpu_share": 0.9,
    "macs_ratio": 5.0,
    "kept_share": 0.8,
    "round_to_1_latency_ms": 10.0,
    "round_to_1_macs": 80,
    "round_to_16_latency_ms": 8.0,
    "round_to_16_macs": 80,
    "faster_round_to": 16,
}


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    """Which models evaluate.py was called for, with which flags; every process finds another speed-up."""
    called: list[tuple[str, tuple[str, ...]]] = []

    def evaluate(checkpoint: Path, dense: str, options: latency.Options, words: list[str]) -> dict[str, Any]:
        assert dense == "deit_base_distilled_patch16_224.fb_in1k"
        called.append((checkpoint.stem, tuple(words)))
        row = FIGURES | {"speedup": 4.0 + 0.1 * len(called)}
        return row | {f"fp32_b32_{key}": value for key, value in row.items()}

    monkeypatch.setattr(latency, "evaluate", evaluate)
    monkeypatch.setattr(latency, "prune", lambda file, folder, *more: folder / f"{'_'.join([file.stem, *more])}.x")
    return called


def test_latency_is_of_fresh_processes_and_of_the_rounding_that_was_faster(evaluated: Any, tmp_path: Path):
    path = tmp_path / "latency_cpu.csv"
    latency.run(["deit_4.2G"], latency.Options(processes=2, roundings=[1, 16, 32]), path)
    rounding = ("--round-to", "1,16,32")
    again = "deit_4.2G_--round-to_16"
    assert evaluated == [("deit_4.2G", ()), ("deit_4.2G", ()), ("deit_4.2G", rounding), (again, ()), (again, ())]
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(latency.LatencyRow._fields) and len(rows) == 2 * (2 + 2 + 2), "of two sizes of batches"
    copy = next(row for row in rows if row["subject"] == "copy, --round-to 16")
    assert (copy["speedup"], copy["macs_ratio"], copy["kept"], copy["busy"]) == ("5.0", "5.0", "1.0", "0.1")
    table = path.with_suffix(".md").read_text().splitlines()
    assert "| deit_4.2G | pruned | fp32 | 1 | 40.0 ms | 10.0 ms | 4.15× (4.10 … 4.20) | 5.00× | 80% | 10% |" in table
    assert "| deit_4.2G | copy, --round-to 1 | fp32 | 32 | 40.0 ms | 10.0 ms | 4.00× | 5.00× | 80% | 10% |" in table


def test_what_evaluate_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def run(command: list[Any], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        words = list(map(str, command))
        assert words[words.index("--against") + 1] == "resnet10t" and env["OMP_NUM_THREADS"] == "3"
        assert words[words.index("--latency-batch-size") + 1] == "1,8" and "--no-pretrained" in words
        Path(words[words.index("--results-file") + 1]).write_text(json.dumps({"latency_ms": 1.0}))
        return subprocess.CompletedProcess(words, status, "", "loading\nevaluate.py: no such model\n")

    monkeypatch.setattr(latency.subprocess, "run", run)
    options, status = latency.Options(batch_sizes=[1, 8], threads=3), 0
    assert latency.evaluate(tmp_path / "p.safetensors", "resnet10t", options, []) == {"latency_ms": 1.0}
    status = 1
    with pytest.raises(UserError, match=r"evaluate.py failed for p.safetensors: .*no such model"):
        latency.evaluate(tmp_path / "p.safetensors", "resnet10t", options, [])


def test_ways_take_turns_and_ratios_are_those_of_each_round(monkeypatch: pytest.MonkeyPatch):
    now, order = [0.0], ""

    def way(name: str, seconds: list[float]) -> Callable[[], None]:
        def run() -> None:
            nonlocal order
            order += name
            now[0] += seconds.pop(0)

        return run

    monkeypatch.setattr(everything.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(everything.gc, "collect", lambda: None)
    found = everything.compare(way("o", [9.0, 1.0, 2.0, 4.0]), way("p", [9.0, 2.0, 8.0, 4.0]), 3)
    assert order == "opopopop" and found == ([1.0, 2.0, 4.0], [2.0, 8.0, 4.0])
    row = everything.speed_row("evaluation", "small", 32, found, "a loop")
    assert row == ("evaluation", "small", "images/s", 16.0, 8.0, 2.0, 1.0, 4.0, "a loop")
    assert everything.line(row).endswith("16 images/s      8 images/s   2.00 (1.00 … 4.00)  (a loop)")


def test_a_pruner_that_failed_is_a_row_without_its_figures():
    found = pruning.PruningRow("small", 5, ours=2.0, reference=3.0, ratio=0.5, ratio_min=0.25, ratio_max=0.8)
    assert everything.pruning_row(found)[3:] == (2.0, 3.0, 2.0, 1.25, 4.0, "BasePruner")
    broken = everything.pruning_row(pruning.PruningRow("small", 5, ours=2.0, status="BasePruner: KeyError"))
    assert broken[3:] == (2.0, None, None, None, None, "BasePruner: KeyError")
    (cells,) = everything.page([broken], everything.Options())[-1:]
    assert cells == "| group, rank, cut | small | 2 s | - | - | BasePruner: KeyError |"


def test_both_ways_of_scoring_and_evaluating_do_the_same_work():
    kwargs: dict[str, Any] = {"channels": [8, 12, 16, 24], "stem_width": 8, "num_classes": 10}
    spec = describe_model("resnet10t", kwargs=kwargs)
    model, options = build_model(spec), everything.Options(batches=1, batch_size=2, rounds=1, workers=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = everything.scoring_rows("small", model, torch.zeros(1, 3, 32, 32), options)
    rows += everything.evaluation_rows("small", model, spec, options)
    assert [(row.step, row.unit) for row in rows] == [
        ("scoring, Taylor", "images/s"),
        ("scoring, Taylor, bf16", "images/s"),
        ("scoring, Hessian", "images/s"),
        ("evaluation", "images/s"),
        ("evaluation, bf16", "images/s"),
    ]
    assert all(row.ours and row.plain and row.faster for row in rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@needs_newest_export
@pytest.mark.slow
def test_files_are_timed_beside_what_writes_no_check(tmp_path: Path):
    kwargs: dict[str, Any] = {"channels": [8, 12, 16, 24], "stem_width": 8, "num_classes": 10}
    spec = describe_model("resnet10t", kwargs=kwargs, input_size=32)
    checkpoint = tmp_path / "small.safetensors"
    save_model(checkpoint, build_model(spec), spec, provenance={})
    rows = everything.file_rows("small", checkpoint, everything.Options(rounds=1))
    has_onnx = all(importlib.util.find_spec(library) for library in ("onnx", "onnxscript", "onnxruntime"))
    steps = ["saving", "loading", "export, .pt2", *(["export, ONNX"] if has_onnx else [])]
    assert [row.step for row in rows] == steps
    assert all(row.unit == "s" and row.ours and row.plain for row in rows)
