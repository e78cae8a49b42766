"""The examples of one task each, as a user runs them: half of the MACs go, and the file holds what was finetuned."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ["dense", "pruned", "finetuned", "reloaded"]
SCALE = {"K": 1e3, "M": 1e6, "G": 1e9}


def read_table(out: str) -> dict[str, tuple[float, float, float]]:
    """Params, MACs and score by stage."""
    rows = re.findall(r"^ *(\w+) +([\d.]+) ([KM]) +([\d.]+) ([KMG]) +([\d.]+)$", out, re.MULTILINE)
    return {
        stage: (float(params) * SCALE[p], float(macs) * SCALE[m], float(score))
        for stage, params, p, macs, m, score in rows
    }


def cuts_are_equal(out: str) -> None:
    table = read_table(out)
    macs = [table[stage][1] / table["dense"][1] for stage in ("dense", "cut1", "cut2", "cut3", "pruned")]
    assert macs == pytest.approx([1, 0.875, 0.75, 0.625, 0.5], abs=0.02)


def the_check_found_nothing(out: str) -> None:
    assert re.search(r"^Self-check passed: cut and masked model differ by \S+e-1\d ", out, re.MULTILINE)


def half_of_the_heads_are_left(out: str) -> None:
    found = re.search(r"^Heads of vit.layers: 4 4 4 4 => (\d) (\d) (\d) (\d)$", out, re.MULTILINE)
    assert found and sum(map(int, found.groups())) == 8


def a_sentence_goes_on(out: str) -> None:
    found = re.search(r"^It goes on: ([\d ]+) … ([\d ]+)$", out, re.MULTILINE)
    assert found and [len(part.split()) for part in found.groups()] == [4, 8]


class Example(NamedTuple):
    """How an example is shortened, what its output also says, and what scores it must reach, in percent."""

    short: tuple[str, ...]
    check: Callable[[str], None]
    short_score: float  # of the shortened run, finetuned: above chance where so little training does that
    score: float  # of the whole run, finetuned


EXAMPLES = {
    "training_loop": Example(("--epochs", "1"), cuts_are_equal, 80, 97),
    "detection": Example(("--steps", "4"), the_check_found_nothing, 0, 90),
    "segmentation": Example(("--steps", "6"), the_check_found_nothing, 0, 75),
    "transformers_vit": Example(("--epochs", "3"), half_of_the_heads_are_left, 20, 95),
    "language_model": Example(("--steps", "60"), a_sentence_goes_on, 20, 90),
}
OF_TRANSFORMERS = ("transformers_vit", "language_model")
each = pytest.mark.parametrize("name", EXAMPLES)


def need(name: str) -> None:
    if name in OF_TRANSFORMERS:
        pytest.importorskip("transformers", reason="needs pip install -r requirements-examples.txt")


@each
def test_half_of_the_macs_go_and_the_file_holds_the_rest(name: str, call: Callable, tmp_path: Path):
    need(name)
    done = call(f"examples/{name}.py", *EXAMPLES[name].short)
    assert done.status == 0, done.err
    table = read_table(done.out)
    assert [stage for stage in table if not stage.startswith("cut")] == STAGES
    (params, macs, _), (less_params, less_macs, _) = table["dense"], table["pruned"]
    assert 0.45 * macs < less_macs < 0.52 * macs and less_params < 0.6 * params
    assert table["finetuned"][:2] == table["pruned"][:2] and table["reloaded"] == table["finetuned"]
    assert EXAMPLES[name].short_score <= table["finetuned"][2] <= 100
    EXAMPLES[name].check(done.out)
    assert (tmp_path / f"output/examples/{name}.safetensors").stat().st_size == pytest.approx(4 * less_params, rel=0.25)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_what_to_install_is_said_in_one_line(name: str, call: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    done = call(f"examples/{name}.py")
    assert done.out == "" and "pip install -r requirements-examples.txt" in str(done.status)  # a text: exit status 1
    assert (REPOSITORY / "requirements-examples.txt").is_file()


@each
def test_an_example_is_short_and_says_what_it_prints(name: str):
    text = (REPOSITORY / f"examples/{name}.py").read_text()
    said = read_table(text.split('"""')[1])
    assert len(text.splitlines()) <= 100 and f".venv/bin/python examples/{name}.py" in text
    assert list(said)[-1] == "reloaded" and said["finetuned"][2] >= EXAMPLES[name].score


@pytest.mark.slow
@each
def test_finetuning_brings_the_score_back(name: str, start: Callable):
    need(name)
    done = start(f"examples/{name}.py")
    assert done.status == 0, done.err
    table = read_table(done.out)
    EXAMPLES[name].check(done.out)
    assert table["finetuned"][2] >= max(EXAMPLES[name].score, table["dense"][2] - 3)
