"""The dense models of studies.recovery, one a family and seed, and the commands that train, prune and finetune them.

Small models on the handwritten digits, trained as scripts/quickstart.sh and scripts/digits_deit.sh do: a ConvNeXt, a
ResNet-18 of narrow stages, and a distilled DeiT whose teacher is the ConvNeXt of its seed. What a folder holds already
is used as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isomorphic.errors import UserError

DATA = ("--dataset", "digits", "--workers", "0")
TRAINING = (
    "--opt", "adamw", "--weight-decay", "0.05", "--lr-scheduler", "cosineannealinglr", "--lr-warmup-method", "linear",
    "--label-smoothing", "0.1", "--hflip", "0", "--scale", "0.6", "1",
)  # fmt: skip
SCORING_BATCHES, CALIBRATION_BATCHES, BATCH = 10, 8, 64


@dataclass(frozen=True)
class Family:
    """How the models of a family are made.

    Attributes:
        model: timm's name and the --model-kwargs.
        training: what finetune.py trains the dense model with, beside `TRAINING`.
        finetuning: what it trains the pruned one with.
        teacher: the family of the dense model's teacher, "" for none.
    """

    model: tuple[str, ...]
    training: tuple[str, ...]
    finetuning: tuple[str, ...]
    teacher: str = ""


_FINETUNING = ("--batch-size", "64", "--lr", "2e-3", "--epochs", "8", "--lr-warmup-epochs", "1")
_TRAINING = ("--lr", "4e-3", "--epochs", "20", "--lr-warmup-epochs", "2")
FAMILIES = {
    "convnext": Family(
        ("convnext_atto", "--model-kwargs", "depths=[1,1,3,1]", "dims=[24,48,96,192]", "patch_size=2"),
        _TRAINING,
        _FINETUNING,
    ),
    "resnet": Family(("resnet18", "--model-kwargs", "channels=[16,32,64,128]"), _TRAINING, _FINETUNING),
    "deit": Family(
        (
            "deit_tiny_distilled_patch16_224",
            *("--model-kwargs", "patch_size=4", "embed_dim=64", "depth=4", "num_heads=4"),
        ),
        ("--lr", "2e-3", "--epochs", "40", "--lr-warmup-epochs", "5"),
        ("--batch-size", "32", "--lr", "2e-3", "--epochs", "10", "--lr-warmup-epochs", "1"),
        teacher="convnext",
    ),
}


def dense_file(folder: Path, family: str, seed: int) -> Path:
    return folder / "dense" / f"{family}-{seed}" / "best.safetensors"


def train_dense(folder: Path, family: str, seed: int) -> None:
    """Trains the dense model, and its teacher first, unless the folder has it.

    Raises:
        UserError: finetune.py failed.
    """
    path = dense_file(folder, family, seed)
    if path.exists():
        return
    made, teacher = FAMILIES[family], FAMILIES[family].teacher
    words = [*made.model, *DATA, *TRAINING, *made.training, "--no-pretrained", "--seed", str(seed)]
    words += ["--input-size", "32", "--val-resize-size", "32", "--batch-size", str(BATCH)]
    if teacher:
        train_dense(folder, teacher, seed)
        words += ["--teacher-model", str(dense_file(folder, teacher, seed))]
    unfinished = path.parent.with_suffix(".training")
    shutil.rmtree(unfinished, ignore_errors=True)
    run_command("finetune.py", "--model", *words, "--output-dir", str(unfinished))
    unfinished.rename(path.parent)


def prune_words(dense: Path, pruned: Path, share: float, recover: Sequence[str], seed: int) -> list[str]:
    """prune.py's, to a share of the MACs."""
    words = ["prune.py", "--model", str(dense), *DATA, "--batch-size", str(BATCH), "--seed", str(seed)]
    words += ["--taylor-batches", str(SCORING_BATCHES), "--target-macs", f"{share:.0%}", "--save-as", str(pruned)]
    return words + (["--recover", *recover, "--calibration-batches", str(CALIBRATION_BATCHES)] if recover else [])


def finetune_words(family: str, dense: Path, pruned: Path, output: Path, seed: int) -> list[str]:
    """finetune.py's, with the dense model as the teacher."""
    words = ["finetune.py", "--model", str(pruned), "--teacher-model", str(dense), *DATA, *TRAINING]
    return [*words, *FAMILIES[family].finetuning, "--seed", str(seed), "--output-dir", str(output)]


def run_command(*words: str) -> None:
    """Runs one of the four commands on one thread, and waits.

    Raises:
        UserError: it failed; the message is the last line that it wrote.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"{words[0]} ended with status {done.returncode}: {lines[-1]}")
