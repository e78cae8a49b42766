"""The study of sparse training: its images, its tables by rows whose answers are known, and one tiny run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from studies import hard_digits
from studies.depgraph.models import FAMILIES, INPUTS
from studies.depgraph.tables import difference_table, family_table, findings, mean_and_error
from studies.depgraph.ways import Row, first_layer_l1
from studies.rows import read_rows


def test_digits_are_made_hard_the_same_way_each_time():
    images, labels = hard_digits.validation()
    again, _ = hard_digits.validation()
    assert images.shape == (1440, 3, 16, 16) and labels.bincount().min() > 100
    assert torch.equal(images, again) and not torch.equal(images[:360], images[360:720])
    assert images.mean().abs() < 0.6 and 0.5 < images.std() < 1.5
    drawn = [list(hard_digits.epoch(torch.Generator().manual_seed(seed), 50)) for seed in (1, 1, 2)]
    assert len(drawn[0]) == 20
    assert torch.equal(drawn[0][3][0], drawn[1][3][0]) and not torch.equal(drawn[0][3][0], drawn[2][3][0])


def test_training_images_are_none_of_the_validation_images():
    training, validation = (hard_digits.plain_digits(training=each)[0] for each in (True, False))
    assert (len(training), len(validation)) == (1000, 360)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_the_images(name: str):
    model = FAMILIES[name].build()
    assert model(INPUTS).shape == (1, 10)
    has_batch_norm = any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert has_batch_norm == FAMILIES[name].has_batch_norm


def row(seed: int, way: str, speedup: int, pruned: float, finetuned: float | None, recover: str = "") -> Row:
    return Row("resnet", seed, way, speedup, recover, 1000, 100, 95.0, pruned, finetuned, 0.25)


ROWS = [
    row(0, "dense", 1, 95, None),
    *[row(seed, "l1, first layer", 2, 35 + 10 * seed, 90 + seed) for seed in (0, 1)],
    *[row(seed, "isomorphic taylor", 2, 60, 91) for seed in (0, 1)],
    *[row(seed, "group norm + group sparsity", 2, 85, 93 + 2 * seed) for seed in (0, 1)],
    *[row(seed, "group norm + group sparsity", 2, 94, 94, "compensate") for seed in (0, 1)],
]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_mean_has_its_standard_error():
    assert mean_and_error([1.0, 3.0]) == "2.00 ± 1.00"
    assert (mean_and_error([2.5]), mean_and_error([])) == ("2.50", "–")


def test_a_family_s_table():
    lines = {(found := cells(line))[0] + found[1]: found for line in family_table(ROWS)}
    assert lines["l1, first layer–"][:7] == [
        "l1, first layer",
        "–",
        "2",
        "0.250",
        "95.00 ± 0.00",
        "40.00 ± 5.00",
        "90.50 ± 0.50",
    ]
    assert lines["group norm + group sparsitycompensate"][5:7] == ["94.00 ± 0.00", "94.00 ± 0.00"]
    assert lines["dense"][2:5] == ["1", "0.250", "95.00"]


def test_differences_are_of_pairs():
    lines = {(found := cells(line))[0]: found for line in difference_table(ROWS)}
    assert lines["l1, first layer"][2] == "-0.50 ± 0.50"
    assert "isomorphic taylor" not in lines


def test_what_a_sparse_phase_saves():
    assert list(findings(ROWS)) == [
        "- group norm + group sparsity, 2×: just pruned it loses 10.0 points where l1, first layer loses 55.0 (18%), "
        "with compensation 1.0"
    ]


def test_the_first_layer_s_l1_counts_no_other():
    weights = [torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.full((2, 5), 100.0)]
    assert first_layer_l1(None, weights, []).tolist() == [3.0, 3.0]


@pytest.mark.slow
def test_one_tiny_run(run_study: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, folder = tmp_path / "depgraph.csv", tmp_path / "parts"
    words = ["--families", "vgg", "--seeds", "0", "--jobs", "1", "--epochs", "1", "1", "--dense-epochs", "1"]
    result = run_study("depgraph", *words, "--folder", str(folder), "--csv", str(path))
    assert result.returncode == 0, result.stderr
    rows = read_rows(path, Row)
    assert {one.way for one in rows} >= {"dense", "trained on", "sparse, bn", "bn scale + bn sparsity", "group norm"}
    dense = rows[0].macs
    for one in rows:
        if one.speedup > 1:
            assert dense / one.macs == pytest.approx(one.speedup, rel=0.1) and one.macs <= dense / one.speedup
            assert one.finetuned is not None
    assert "## vgg" in path.with_suffix(".md").read_text()
