"""The study of the claim: its tables by rows whose answers are known, and a tiny run that is stopped and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isomorphic.pruning.planning import Calibration
from studies.claim import runs
from studies.claim.__main__ import merged, write
from studies.claim.figures import draw_scores
from studies.claim.runs import Part, Row, measure_part
from studies.claim.subjects import Judged, Sources, Subject
from studies.claim.tables import finetuned, gain_table, just_pruned, level_table, page, paired
from studies.rows import read_rows


def row(ranking: str, top1: float, after: float | None, **others: Any) -> Row:
    made = Row("resnet", 0, "taylor", ranking, 0.5, "plain", 1000, top1, 0.5, after, 1.0)
    return made._replace(**others)


ROWS = [
    *[row("isomorphic", 60.0 + seed, 90.0, seed=seed) for seed in (0, 1)],
    *[row("global", 50.0, 91.0 + 2 * seed, seed=seed) for seed in (0, 1)],
    row("local", 70.0, 90.5),
    row("dense", 95.0, 95.5, share=1.0, recovery="dense"),
]


def test_differences_are_of_runs_that_differ_by_the_ranking_alone():
    assert paired(ROWS, "global", just_pruned) == [10.0, 11.0]
    assert paired(ROWS, "global", finetuned) == [-1.0, -3.0]
    assert paired(ROWS, "local", just_pruned) == [-10.0]
    assert paired([*ROWS, row("isomorphic", 1.0, 1.0, criterion="l1")], "global", just_pruned) == [10.0, 11.0]
    assert "| 50% | plain | +10.50 ± 0.50 | -10.00 | – | 2 |" in gain_table(ROWS, just_pruned)


def test_levels_and_the_page():
    assert "| 50% | plain | taylor | 60.50 ± 0.50 | 50.00 | 70.00 | – |" not in level_table(ROWS[1:], just_pruned)
    assert "| 50% | plain | taylor | 60.50 ± 0.50 | 50.00 ± 0.00 | 70.00 | – |" in level_table(ROWS, just_pruned)
    text = page([*ROWS, *[one._replace(model="mine", finetuned=None) for one in ROWS]])
    assert "| resnet | 95.00 | 95.50 | 1 |" in text
    assert "## mine: agreement with the dense model" in text


def test_rows_have_one_order_and_one_row_a_run():
    new = row("global", 99.0, None)
    found = merged(ROWS, [new])
    assert len(found) == len(ROWS)
    assert found == merged(list(reversed(ROWS)), [new])


@pytest.fixture
def subject() -> Subject:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(10 * 25, 4)).eval()
    images = torch.randn(40, 3, 16, 16)
    labels = model(images).argmax(1)

    def judge(pruned: nn.Module) -> Judged:
        return Judged(100 * (pruned(images).argmax(1) == labels).float().mean().item(), 0.25)

    data = [(images[:20], labels[:20]), (images[20:], labels[20:])]
    return Subject(model, images[:1], data, None, Calibration(images, labels), judge, None, max_ratio=0.9)


def test_a_part_that_was_stopped_goes_on_after_its_last_row(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """And what the CSV has is not measured again."""
    monkeypatch.setattr(runs, "open_subject", lambda *arguments: subject)
    monkeypatch.setattr(runs, "SHARES", (0.5,))
    measured: list[runs.Run] = []
    whole = runs.measure

    def stopping(after: int) -> Any:
        def measure(subject: Subject, wanted: list[runs.Run]) -> Iterator[Row]:
            for count, found in enumerate(whole(subject, wanted)):
                if count == after:
                    raise KeyboardInterrupt
                measured.append(found.run)
                yield found

        return measure

    part = Part("mine", 0, "taylor", ("plain", "compensated"))
    monkeypatch.setattr(runs, "measure", stopping(3))
    with pytest.raises(KeyboardInterrupt):
        measure_part(tmp_path, Sources(), part)
    first = read_rows(part.file(tmp_path), Row)
    assert len(first) == 3
    monkeypatch.setattr(runs, "measure", stopping(99))
    measure_part(tmp_path, Sources(), part)
    rows = read_rows(part.file(tmp_path), Row)
    assert measured == [one.run for one in rows] == part.runs()
    assert rows[:3] == first
    dense, *others = rows
    assert (dense.top1, dense.ranking) == (100.0, "dense")
    assert all(0.3 * dense.macs < one.macs <= 0.5 * dense.macs for one in others)
    write(tmp_path / "claim.csv", rows)
    part.file(tmp_path).unlink()
    measure_part(tmp_path, Sources(), part, read_rows(tmp_path / "claim.csv", Row))
    assert not part.file(tmp_path).exists()
    assert (tmp_path / "claim.md").read_text().count("taylor") > 0


def test_scores_are_drawn_by_class(subject: Subject, tmp_path: Path):
    draw_scores(replace(subject, max_ratio=1.0), "taylor", "mine", tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
