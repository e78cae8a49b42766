"""--macs-counter fvcore: a line with what it left out, a key of its own in the results, and no part in a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DEIT = ["--model", str(REPOSITORY / "pretrained" / "digits_deit.safetensors"), "--dataset", "digits", "--workers", "0"]
MASK = ["--pruning-type", "dimap", "--unstructured"]
FVCORE = ["--macs-counter", "fvcore"]
RESULTS = ["--results-file", "results.json"]


def line_of(count: int) -> str:
    return f"MACs by fvcore: {count / 1e6:.2f} M (not counted: "


def test_an_evaluation_prints_its_line_and_fills_the_results(call: Callable[..., Any], tmp_path: Path):
    done = call("evaluate.py", *DEIT, *FVCORE, *RESULTS)
    assert (done.status, done.err) == (0, [])
    row = json.loads((tmp_path / "results.json").read_text())
    assert row["macs_counter"] == "fvcore"
    assert row["macs"] == row["macs_fvcore"] and row["gmacs"] == round(row["macs"] / 1e9, 4)
    lines = done.out.splitlines()
    place = next(place for place, line in enumerate(lines) if line.startswith("MACs: "))
    assert lines[place + 1].startswith(line_of(row["macs_fvcore"]))
    assert "scaled_dot_product_attention ×" in lines[place + 1]
    assert row["top1"] == 98.8889

    call("evaluate.py", *DEIT, *RESULTS)
    paper = json.loads((tmp_path / "results.json").read_text())
    assert paper["macs_counter"] == "paper" and "macs_fvcore" not in paper
    assert paper["params"] == row["params"] and paper["gmacs_exact"] == row["gmacs_exact"]
    assert row["macs"] != paper["macs"]


def test_pruning_counts_the_cut_model(call: Callable[..., Any], tmp_path: Path):
    pruned = call("prune.py", *DEIT, *FVCORE, *RESULTS, "--pruning-type", "l1", "--save-as", "cut.safetensors")
    assert (pruned.status, pruned.err) == (0, [])
    count = json.loads((tmp_path / "results.json").read_text())["macs_fvcore"]
    assert sum(line.startswith(line_of(count)) for line in pruned.out.splitlines()) == 1
    done = call("evaluate.py", "--model", "cut.safetensors", *DEIT[2:], *FVCORE, *RESULTS)
    assert done.status == 0
    assert json.loads((tmp_path / "results.json").read_text())["macs_fvcore"] == count


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target-macs", "50%"], "a budget in MACs is in the paper's or the exact counter"),
        (["--allocate", "calibrate"], "a budget in MACs is in the paper's or the exact counter"),
        (MASK, "--unstructured leaves zeros, which fvcore counts"),
        (["--dry-run"], "--macs-counter fvcore counts the cut model, and --dry-run stops before the cut"),
    ],
)
def test_plans_have_no_cost_by_fvcore(call: Callable[..., Any], tmp_path: Path, flags: list[str], message: str):
    done = call("prune.py", *DEIT, *FVCORE, *flags)
    assert done.status == 2
    assert len(done.err) == 1 and message in done.err[0]
    assert not list(tmp_path.iterdir())


def test_a_masked_model_has_no_cost_by_fvcore(call: Callable[..., Any]):
    assert call("prune.py", *DEIT, *MASK, "--save-as", "masked.safetensors").status == 0
    done = call("evaluate.py", "--model", "masked.safetensors", *DEIT[2:], *FVCORE)
    assert done.status == 1
    assert len(done.err) == 1 and "has masked weights, whose zeros fvcore counts" in done.err[0]
