"""convnext_train.py as its users run it: timm's spellings, a pruned model, drop rates, the moving average."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers.drop import DropPath

from isomorphic.checkpoints.open import load_model, read_header

DIGITS = ["--dataset", "digits", "--workers", "0", "--device", "cpu"]
CONVNEXT = ["--model", "convnext_atto", "--no-pretrained", "--input-size", "32", "--val-resize-size", "32"]
SMALL = ["--model-kwargs", "depths=[1,1,2,1]", "dims=[16,32,64,128]", "patch_size=2"]
DEEP = ["--model-kwargs", "depths=[1,2,5,2]", "dims=[8,16,24,32]", "drop_path_rate=0.3"]
# As timm's users write it, and the published scripts.
TIMM_SPELLINGS = (
    "--sched cosine --opt adamw --lr 2e-3 --min-lr 1e-6 --smoothing 0.1 --aa rand-m5-mstd0.5-inc1 --reprob 0.25 "
    "--remode pixel --mixup 0.2 --cutmix 1.0 --color-jitter 0 --train-interpolation random --grad-accum-steps 2 "
    "--drop 0.1 --drop-path 0.2 --model-ema --model-ema-decay 0.9 --clip-grad 5 --hflip 0"
)

Command = Callable[..., tuple[int, str, str]]


def metrics(folder: Path) -> list[dict[str, float]]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_timms_spellings_train_a_pruned_convnext_with_other_rates(run_command: Command, tmp_path: Path):
    short, folder = tmp_path / "short.safetensors", tmp_path / "run"
    pruning = ["--pruning-type", "l1", "--remove-blocks", 3, "--pruning-ratio", 0.25, "--save-as", short]
    status, _, error = run_command("prune", *CONVNEXT, *DEEP, *DIGITS, "--batch-size", 16, *pruning)
    assert status == 0, error

    words = [
        "--pruned-model",
        short,
        *DIGITS,
        *TIMM_SPELLINGS.split(),
        "--batch-size",
        64,
        "--epochs",
        2,
        "--max-steps",
        14,
    ]
    status, _, error = run_command("convnext_train", *words, "--output", folder)
    assert status == 0, error
    assert [row["lr"] for row in metrics(folder)] == [2e-3, pytest.approx(1e-3, abs=1e-6)]  # 12 steps of 2 × 64 images

    model, header = load_model(folder / "best.safetensors"), read_header(folder / "best.safetensors")
    assert (header["kwargs"]["drop_rate"], header["kwargs"]["drop_path_rate"]) == (0.1, 0.2)
    assert header["kept_blocks"] == read_header(short)["kept_blocks"]
    assert len(list(model.get_submodule("stages.2.blocks").children())) == 2
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates[-6:] == pytest.approx(
        [0.2 * n / 6 for n in range(1, 7)]
    )  # seven blocks are left; the first never skips
    assert model.get_submodule("head.drop").p == 0.1
    arguments = header["provenance"]["arguments"]
    assert (arguments["accumulate"], arguments["lr_scheduler"], arguments["random_erase"]) == (
        2,
        "cosineannealinglr",
        0.25,
    )


def test_drop_path_takes_effect_on_what_is_learned(run_command: Command, tmp_path: Path):
    """The same steps without it, and with it, end in other weights; eval mode knows of neither."""
    words = [*CONVNEXT, *SMALL, *DIGITS, "--batch-size", 32, "--epochs", 1, "--max-steps", 2]
    for rate in (0, 0.5):
        status, _, error = run_command(
            "convnext_train", *words, "--drop-path", rate, "--output-dir", tmp_path / str(rate)
        )
        assert status == 0, error
    without, dropped = (load_file(tmp_path / rate / "last.safetensors") for rate in ("0", "0.5"))
    assert without.keys() == dropped.keys()
    assert max((without[name] - dropped[name]).abs().max().item() for name in without) > 1e-4


def test_the_moving_average_learns_and_is_the_result(run_command: Command, tmp_path: Path):
    recipe = [
        "--lr",
        1e-3,
        "--batch-size",
        64,
        "--accumulate",
        2,
        "--hflip",
        0,
        "--model-ema",
        "--model-ema-decay",
        0.9,
    ]
    status, output, error = run_command("convnext_train", *CONVNEXT, *SMALL, *DIGITS, *recipe, "--test-only")
    assert status == 0, error
    initial = float(output.split("Accuracy: ")[1].split(",")[0])
    assert initial < 0.2

    words = [*CONVNEXT, *SMALL, *DIGITS, *recipe, "--epochs", 3, "--output-dir", tmp_path]
    status, output, error = run_command("convnext_train", *words)
    assert status == 0, error
    rows = metrics(tmp_path)
    best = max(row["top1"] for row in rows)
    assert best > initial + 0.4 and rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert f"(raw {rows[0]['raw_top1']:.4f})" in output  # the weights themselves do differently
    last_line = output.splitlines()[-1]
    assert last_line.startswith(f"Accuracy: {best:.4f}, Loss: ")

    checkpoint = tmp_path / "best.safetensors"
    status, output, error = run_command("evaluate", "--model", checkpoint, *DIGITS, "--use-ema")
    assert status == 0 and last_line in output.splitlines(), error
    status, output, error = run_command("evaluate", "--model", checkpoint, *DIGITS, "--no-use-ema")
    assert status == 1 and error.count("\n") == 1 and "averaged" in error
    trained = torch.load(tmp_path / "state.pt", weights_only=True)
    averaged = load_file(tmp_path / "last.safetensors")
    assert all(torch.equal(averaged[name], tensor) for name, tensor in trained["ema"].items())
    assert not torch.equal(averaged["head.fc.weight"], trained["model"]["head.fc.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--aa", "rand-m9-x3"], "timm's 'rand' has no section 'x3'"),
        (["--model-ema", "--model-ema-decay", "1.5"], "--model-ema-decay 1.5: must be at least 0 and at most 1"),
        (["--resume", "absent/state.pt"], "no such training state: absent/state.pt"),
        (["--sched", "cosine", "--min-lr", "-1"], "--lr-min -1.0: must be at least 0"),
    ],
)
def test_errors_of_the_user_are_one_line_and_exit_with_1(
    run_command: Command, tmp_path: Path, arguments: list[str], message: str
):
    words = [*CONVNEXT, *SMALL, *DIGITS, "--output-dir", tmp_path, *arguments]
    status, _, error = run_command("convnext_train", *words)
    assert status == 1 and message in error
    assert error.startswith("convnext_train.py: ") and error.count("\n") == 1
