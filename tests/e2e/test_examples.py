"""The examples as a user runs them: what they print, and (slow) that finetuning brings the accuracy back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CHANCE = {"lstm_text": 44.0, "gat_graph": 16.7, "dgcnn_points": 16.7}  # the most frequent class, in percent
SCALE = {"K": 1e3, "M": 1e6, "G": 1e9}


class Stage(NamedTuple):
    """One line of the final table."""

    params: float
    macs: float
    accuracy: float


def read_table(out: str) -> dict[str, Stage]:
    rows = re.findall(r"^ *(\w+) +([\d.]+) ([KM]) +([\d.]+) ([KMG]) +([\d.]+)$", out, re.MULTILINE)
    return {
        stage: Stage(float(params) * SCALE[p], float(macs) * SCALE[m], float(accuracy))
        for stage, params, p, macs, m, accuracy in rows
    }


def read_widths(out: str) -> dict[str, tuple[int, int]]:
    rows = re.findall(r"^ *(\S+) +(\d+) => (\d+)$", out, re.MULTILINE)
    return {name: (int(before), int(after)) for name, before, after in rows}


@pytest.fixture
def run_example(call: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`run_example(name, *flags)`, in this process; what the examples share is found beside them."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    return lambda name, *flags: call(f"examples/{name}.py", *flags)


@pytest.mark.parametrize(
    ("name", "ratio"), [("lstm_text", "0.5"), ("lstm_text", "0.25"), ("gat_graph", "0.5"), ("dgcnn_points", "0.5")]
)
def test_an_example_prunes_what_it_is_told_to(name: str, ratio: str, run_example: Callable):
    done = run_example(name, "--epochs", "1", "--pruning-ratio", ratio)
    assert done.status == 0, done.err
    table, widths = read_table(done.out), read_widths(done.out)
    assert list(table) == ["dense", "pruned", "finetuned"]
    before, after = (sum(sizes) for sizes in zip(*widths.values(), strict=True))
    assert after / before == pytest.approx(1 - float(ratio), abs=0.02)
    assert table["pruned"].params == table["finetuned"].params < (1 - float(ratio)) * table["dense"].params
    assert table["pruned"].macs == table["finetuned"].macs < (1 - 0.8 * float(ratio)) * table["dense"].macs


def test_a_sparse_phase_comes_before_the_cut(run_example: Callable):
    done = run_example("dgcnn_points", "--epochs", "1", "--sparsify", "group", "--sparsify-reg", "1")
    assert done.status == 0, done.err
    table = read_table(done.out)
    assert list(table) == ["dense", "sparse", "pruned", "finetuned"]
    assert table["sparse"].params == table["dense"].params > 2 * table["pruned"].params


def test_bad_flags_are_refused(run_example: Callable):
    done = run_example("lstm_text", "--pruning-ratio", "1.5")
    assert done.status == 2 and "1.5 is not in [0, 1)" in done.err[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANCE)
def test_finetuning_brings_the_accuracy_back(name: str, start: Callable):
    done = start(f"examples/{name}.py")
    assert done.status == 0, done.err
    table = read_table(done.out)
    assert CHANCE[name] + 25 < table["dense"].accuracy < 97
    assert table["finetuned"].accuracy > table["dense"].accuracy - 3
    assert table["finetuned"].params < 0.5 * table["dense"].params
