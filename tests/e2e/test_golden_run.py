"""Two short runs on digits, with all the random parts of the recipes on: three epochs give stored numbers, and repeat.

The numbers are in tests/data/golden_runs.json. A change that is meant to move them replaces them by what the failing
test found. They were written down with one thread on a CPU with AVX-512. With two and four threads, with torch's
kernels for AVX2 or for no vectors at all, and with those of oneDNN and MKL for AVX2, losses differed by at most 7e-6
and accuracies not at all. An accuracy may be that of another image, whose logits tie.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import convnext_train
import finetune
from isomorphic.commands import entry
from tests.versions import IS_NEWEST_TIMM, IS_NEWEST_TORCH

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((REPOSITORY / "tests" / "data" / "golden_runs.json").read_text())
LOSS_TOLERANCE = 1e-4
TOP1_TOLERANCE = 1.5 / 360  # one of the images

DIGITS = "--no-pretrained --dataset digits --input-size 32 --val-resize-size 32 --workers 0 --device cpu --hflip 0"
DIGITS += " --epochs 3 --lr 1e-3 --batch-size 64"
DEIT = "--model deit_tiny_distilled_patch16_224 --model-kwargs patch_size=8 embed_dim=64 depth=2 num_heads=4"
DEIT += f" drop_path_rate=0.1 weight_init=jax --teacher-model {REPOSITORY}/pretrained/digits_deit.safetensors"
DEIT += " --teacher-dtype fp32 --batch-size 32 --opt adamw --weight-decay 0.05 --lr-scheduler cosineannealinglr"
DEIT += " --label-smoothing 0.1 --mixup-alpha 0.2 --cutmix-alpha 0.1 --auto-augment ra --ra-magnitude 5"
DEIT += " --random-erase 0.25 --ra-sampler --ra-reps 2 --clip-grad-norm 5 --scale 0.8 1"
CONVNEXT = "--model convnext_atto --model-kwargs depths=[1,1,2,1] dims=[16,32,64,128] patch_size=2 --accumulate 2"
CONVNEXT += " --drop 0.1 --drop-path 0.1 --train-interpolation random --model-ema --model-ema-decay 0.9"
COMMANDS = {"deit": (finetune.main, DEIT), "convnext": (convnext_train.main, CONVNEXT)}

Train = Callable[[str, Path], list[dict[str, float]]]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs one of `COMMANDS` into a folder; its metrics, epoch by epoch, but for the times."""

    def run(name: str, folder: Path) -> list[dict[str, float]]:
        main, words = COMMANDS[name]
        monkeypatch.setattr(sys, "argv", [name, *f"{DIGITS} {words} --output-dir {folder}".split()])
        entry.run(main)
        with open(folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return [{key: float(row[key]) for key in row if key not in ("seconds", "images_per_second")} for row in rows]

    return run


# MKL draws the numbers of dropout and drop path; a torch without it draws others.
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the numbers are those of a torch with MKL")
@pytest.mark.parametrize("name", COMMANDS)
def test_three_epochs_give_the_stored_numbers_and_repeat_bit_for_bit(name: str, train: Train, tmp_path: Path):
    found = train(name, tmp_path / "first")
    keys = GOLDEN[name].keys()
    assert len(found) == 3 and keys == {"train_loss", "val_loss", "top1", "raw_top1"}
    columns: dict[str, Any] = {key: [row[key] for row in found] for key in keys}
    for key, values in GOLDEN[name].items() if IS_NEWEST_TORCH and IS_NEWEST_TIMM else ():
        tolerance = LOSS_TOLERANCE if "loss" in key else TOP1_TOLERANCE
        assert columns[key] == pytest.approx(values, rel=0, abs=tolerance), json.dumps(columns)

    assert train(name, tmp_path / "second") == found
    for checkpoint in ("best.safetensors", "last.safetensors"):
        first, second = (load_file(tmp_path / run / checkpoint) for run in ("first", "second"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)
