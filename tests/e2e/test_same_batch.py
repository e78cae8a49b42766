"""Two processes of 32 images, or two batches of 32 in a row, train as one process with a batch of 64 does."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import convnext_train
import finetune
from isomorphic.commands import entry
from tests.processes import Outcome, run_together
from tests.versions import needs_sharding_on_cpu

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = "ISOMORPHIC_TEST_FOLDER"  # environment variable: where the runs write
TOLERANCE = {"model": 1e-5, "ema": 1e-5, "optimizer": 5e-5}  # measured: 5e-6, 5e-6 and 1e-5 with batch norms, else 1e-6

VIT = "--model vit_tiny_patch16_224 --model-kwargs patch_size=8 embed_dim=32 depth=2 num_heads=2"
RESNET = "--model resnet10t --model-kwargs channels=[8,16,16,32] stem_width=8"
CONVNEXT = "--model convnext_atto --model-kwargs depths=[1,1,2,1] dims=[16,32,48,64] patch_size=2 ls_init_value=0.1"
DEIT = "--model deit_tiny_distilled_patch16_224 --model-kwargs patch_size=8 embed_dim=32 depth=2 num_heads=2"
TAUGHT = f"{DEIT} --teacher-model {REPOSITORY / 'pretrained' / 'digits_deit.safetensors'} --teacher-dtype fp32"
# The images are the same in every run, and nothing else is random.
RECIPE = "--dataset digits --input-size 32 --no-pretrained --device cpu --workers 0 --scale 1 1 --ratio 1 1 --hflip 0"
RECIPE += " --opt sgd --momentum 0.9 --lr 0.02 --epochs 2 --max-steps 5 --checkpoint-hist 1"
RECIPE += " --model-ema --model-ema-decay 0.9 --model-ema-steps 1"
PLAIN = "--random-erase 0 --mixup-alpha 0 --cutmix-alpha 0 --auto-augment ta_wide --weight-decay 0.05"


def train(name: str, words: str, batch_size: int, main: Any = finetune.main) -> None:
    folder = Path(os.environ[FOLDER], name)
    sys.argv[:] = [
        "train",
        *words.split(),
        *RECIPE.split(),
        "--batch-size",
        str(batch_size),
        "--output-dir",
        str(folder),
    ]
    entry.run(main)


def train_alone(name: str, words: str, batch_size: int = 64, main: Any = finetune.main) -> None:
    """As a plain `python finetune.py` does, which torchrun knows nothing of."""
    del os.environ["RANK"]
    train(name, words, batch_size, main)


# --- what the processes run: one of 64, two of 32, or one of twice 32 ---


def vit() -> None:
    train_alone("vit", VIT)


def vit_32() -> None:
    train_alone("vit_32", VIT, 32)


def vit_two() -> None:
    train("vit_two", VIT, 32)


def vit_accumulated() -> None:
    train_alone("vit_accumulated", f"{VIT} --accumulate 2", 32)


def vit_both() -> None:
    train("vit_both", f"{VIT} --accumulate 2", 16)


def vit_sharded() -> None:
    train("vit_sharded", f"{VIT} --fsdp", 32)


def resnet() -> None:
    train_alone("resnet", f"{RESNET} --sync-bn")


def resnet_two() -> None:
    train("resnet_two", f"{RESNET} --sync-bn", 32)


def deit() -> None:
    train_alone("deit", TAUGHT)


def deit_two() -> None:
    train("deit_two", TAUGHT, 32)


def convnext() -> None:
    train_alone("convnext", f"{CONVNEXT} {PLAIN}", main=convnext_train.main)


def convnext_both() -> None:
    train("convnext_both", f"{CONVNEXT} {PLAIN} --accumulate 2", 16, convnext_train.main)


SCENARIOS = {"vit": 1, "vit_32": 1, "vit_two": 2, "vit_accumulated": 1, "vit_both": 2, "vit_sharded": 2}
SCENARIOS |= {"resnet": 1, "resnet_two": 2, "deit": 1, "deit_two": 2, "convnext": 1, "convnext_both": 2}


Runs = tuple[Path, dict[str, list[Outcome]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The folder with a folder for each run, and how the runs' processes ended."""
    folder = tmp_path_factory.mktemp("same_batch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        yield folder, run_together("tests.e2e.test_same_batch", SCENARIOS)


def metrics(folder: Path) -> dict[str, float]:
    """Of the one epoch, but for the times."""
    with open(folder / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    return {key: float(row[key]) for key in row if key not in ("seconds", "images_per_second")}


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts, with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{path}/{key}")


@pytest.mark.parametrize(
    ("alone", "other"),
    [
        ("vit", "vit_two"),
        ("vit", "vit_accumulated"),
        ("vit", "vit_both"),
        pytest.param("vit", "vit_sharded", marks=needs_sharding_on_cpu),
        ("resnet", "resnet_two"),
        ("deit", "deit_two"),
        ("convnext", "convnext_both"),
    ],
)
def test_the_same_images_make_the_same_weights(runs: Runs, alone: str, other: str):
    folder, outcomes = runs
    for name in (alone, other):
        assert [outcome.status for outcome in outcomes[name]] == [0] * SCENARIOS[name], outcomes[name]
    one, two = (torch.load(folder / name / "state.pt", weights_only=True) for name in (alone, other))
    assert one["counters"]["step"] == two["counters"]["step"] == 5
    for part in ("model", "ema", "optimizer"):  # with running statistics and momentum
        mine, theirs = (dict(tensors(state[part])) for state in (one, two))
        assert mine.keys() == theirs.keys() and len(mine) > 10
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=TOLERANCE[part], msg=name)
    steps = [tensor.abs().max().item() for _, tensor in tensors(one["optimizer"])]
    assert max(steps) > 0.1  # there is something to agree on

    first, second = (metrics(folder / name) for name in (alone, other))
    assert first == pytest.approx(second, rel=0, abs=1e-5)


def test_another_batch_makes_other_weights(runs: Runs):
    folder, _ = runs
    one, two = (load_file(folder / name / "last.safetensors") for name in ("vit", "vit_32"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) > 1e-3
