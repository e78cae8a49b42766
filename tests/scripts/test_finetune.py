"""finetune.py as its users run it: results, resuming, several processes, and what it says when it cannot."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isomorphic.checkpoints.open import load_model, read_header
from isomorphic.provenance import file_sha256

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ["patch_size=8", "embed_dim=32", "depth=1", "num_heads=2"]
DIGITS = ["--dataset", "digits", "--input-size", "32", "--workers", "0", "--no-pretrained", "--device", "cpu"]
DIGITS += ["--hflip", "0", "--batch-size", "96", "--opt", "adamw", "--lr", "2e-3"]
VIT = ["--model", "vit_tiny_patch16_224", "--model-kwargs", *TINY]
DEIT = ["--model", "deit_tiny_distilled_patch16_224", "--model-kwargs", *TINY]
LAST_LINES = r"MACs: [\d.]+ [GMK], Params: [\d.]+ [GMK].*\nAccuracy: [01]\.\d{4}, Loss: \d+\.\d{4}\n$"

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_finetune(run_command: Command) -> Command:
    """Runs finetune.py in this process: (exit status, stdout, stderr)."""
    return functools.partial(run_command, "finetune")


def metrics(folder: Path) -> list[dict[str, float]]:
    """Epoch by epoch, but for the times."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(row[key]) for key in row if key not in ("seconds", "images_per_second")} for row in rows]


def last_top1(folder: Path) -> float:
    return metrics(folder)[-1]["top1"]


def best_loss(folder: Path) -> float:
    return max(metrics(folder), key=lambda row: row["top1"])["val_loss"]


def assert_equal_weights(first: Path, second: Path, tolerance: float = 0.0) -> None:
    mine, other = load_file(first), load_file(second)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor, other[name], rtol=0, atol=tolerance), name


def test_teaching_a_distilled_student_from_a_checkpoint(run_finetune: Command, tmp_path: Path):
    """Every part of the published recipe at once; the same command twice gives the same file."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    status, output, _ = run_finetune(*VIT, *DIGITS, "--epochs", 1, "--output-dir", teacher)
    assert status == 0
    weights = teacher / "best.safetensors"
    assert f"Saving the best model, of epoch 1, to {weights}" in output

    recipe = ["--teacher-model", weights, "--epochs", 1, "--lr-scheduler", "cosineannealinglr"]
    recipe += ["--label-smoothing", 0.1, "--mixup-alpha", 0.8, "--cutmix-alpha", 1.0, "--auto-augment", "ra"]
    recipe += ["--random-erase", 0.25, "--ra-sampler", "--clip-grad-norm", 5, "--amp"]
    for folder in (student, tmp_path / "again"):
        status, output, error = run_finetune(*DEIT, *DIGITS, *recipe, "--output-dir", folder)
        assert status == 0, error
    assert_equal_weights(student / "best.safetensors", tmp_path / "again" / "best.safetensors")

    provenance = read_header(student / "best.safetensors")["provenance"]
    assert provenance["teacher"] == file_sha256(weights) and provenance["parent"] is None
    assert provenance["arguments"]["distillation"] == "hard" and provenance["top1"] == round(
        100 * last_top1(student), 4
    )
    model = load_model(student / "best.safetensors")
    assert provenance["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert json.loads((student / "run.json").read_text())["arguments"]["ra_sampler"] is True

    status, output, _ = run_finetune("--model", student / "best.safetensors", *DIGITS, "--test-only")
    assert status == 0 and f"Accuracy: {last_top1(student):.4f}" in output
    assert re.search(LAST_LINES, output)


def test_killed_run_resumes_to_the_same_weights(run_finetune: Command, tmp_path: Path):
    """Killed somewhere after its first epoch, a run goes on from the newest of the states that it keeps.

    It is a sparse one, whose regularizer has a state of its own.
    """
    arguments = [*VIT, *DIGITS, "--epochs", "3", "--mixup-alpha", "0.8", "--resume", "auto", "--checkpoint-steps", "4"]
    arguments += ["--sparsify", "growing", "--sparsify-delta", "0.5"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "finetune.py", *arguments, "--output-dir", str(killed)]
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, cwd=REPOSITORY, env=threads, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("epoch 1/3") for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL

    status, output, _ = run_finetune(*arguments, "--output-dir", killed)
    assert status == 0 and "steps done; going on" in output and "epoch 3/3" in output
    assert run_finetune(*arguments, "--output-dir", whole)[0] == 0
    assert_equal_weights(whole / "last.safetensors", killed / "last.safetensors")
    assert metrics(whole) == metrics(killed) and len(metrics(whole)) == 3
    shares = [row["weak_half"] for row in metrics(whole)]
    assert 0.5 > shares[0] > shares[1] > shares[2] > 0.1
    kept = {"state.pt", "state.1.pt", "best.safetensors", "last.safetensors", "metrics.csv", "run.json"}
    assert {path.name for path in killed.iterdir()} == kept

    before = (killed / "state.pt").stat().st_mtime_ns
    status, output, _ = run_finetune(*arguments, "--output-dir", killed)
    assert status == 0 and "3 epochs and 45 steps done; finished, nothing left to do" in output
    assert output.endswith(
        f"Accuracy: {max(row['top1'] for row in metrics(whole)):.4f}, Loss: {best_loss(whole):.4f}\n"
    )
    assert (killed / "state.pt").stat().st_mtime_ns == before

    status, _, error = run_finetune(*arguments, "--lr", "0.1", "--output-dir", killed)
    assert status == 1 and "lr 0.002 (now 0.1)" in error and error.count("\n") == 1
    status, _, error = run_finetune(*arguments, "--sparsify-delta", "0.1", "--output-dir", killed)
    assert status == 1 and "sparsify_delta 0.5 (now 0.1)" in error and error.count("\n") == 1


def test_torchrun_starts_two_processes_that_equal_one(run_finetune: Command, tmp_path: Path):
    """Same images, same order, no randomness beyond them: SGD's weights agree, and so does the accuracy.

    The training is sparse, so that the regularizer must see the same gradients, too.
    """
    plain = ["--scale", 1, 1, "--ratio", 1, 1, "--opt", "sgd", "--lr", 0.05, "--epochs", 1, "--max-steps", 3]
    plain += ["--sparsify", "group", "--sparsify-reg", 0.05]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_finetune(*VIT, *DIGITS, *plain, "--batch-size", 64, "--output-dir", one)[0] == 0

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "finetune.py"]
    arguments = [*VIT, *DIGITS, *plain, "--batch-size", 32, "--output-dir", two]
    result = subprocess.run(
        [*torchrun, *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 1/1") == 1  # one process speaks
    assert_equal_weights(one / "last.safetensors", two / "last.safetensors", tolerance=1e-5)
    assert last_top1(one) == last_top1(two)


def test_a_finished_epoch_survives_a_loss_that_diverges(run_finetune: Command, tmp_path: Path):
    diverging = [*VIT, *DIGITS, "--opt", "sgd", "--lr", "1e30", "--epochs", 3, "--output-dir", tmp_path]
    status, _, error = run_finetune(*diverging)
    assert status == 1
    assert "the loss is not finite at epoch 1, step " in error and error.count("\n") == 1


def test_soft_distillation_of_a_student_without_a_token(run_finetune: Command, tmp_path: Path):
    arguments = ["--model", "resnet10t", "--teacher-model", "vit_tiny_patch16_224", *DIGITS, "--input-size", 224]
    soft = ["--distillation", "soft", "--distillation-tau", 3, "--batch-size", 2, "--dataset", "synthetic"]
    arguments += [*soft, "--synthetic-size", 4, "--max-steps", 1, "--output-dir", tmp_path]
    status, _, error = run_finetune(*arguments)
    assert status == 0, error
    assert read_header(tmp_path / "best.safetensors")["provenance"]["arguments"]["distillation"] == "soft"


TEACHER = REPOSITORY / "pretrained" / "digits_deit.safetensors"
DISTILLED = ["--model", "deit_tiny_distilled_patch16_224", "--model-kwargs", "patch_size=8", "embed_dim=64", "depth=2",
             "num_heads=4", "weight_init=jax"]  # fmt: skip
CONVNEXT = ["--model", "convnext_atto", "--model-kwargs", "depths=[1,1,2,1]", "dims=[16,32,64,128]", "patch_size=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "way", "gain"), [(DISTILLED, "hard", 0.3), (DISTILLED, "soft", 0.3), (CONVNEXT, "soft", 0.6)]
)
def test_students_learn(run_finetune: Command, tmp_path: Path, student: list[str], way: str, gain: float):
    recipe = ["--teacher-model", TEACHER, "--distillation", way, "--distillation-tau", 2, "--batch-size", 32]
    recipe += ["--scale", 0.8, 1, "--lr-scheduler", "cosineannealinglr", "--epochs", 5, "--output-dir", tmp_path]
    status, output, error = run_finetune(*student, *DIGITS, *recipe, "--test-only")
    assert status == 0, error
    initial = float(output.split("Accuracy: ")[1].split(",")[0])
    status, _, error = run_finetune(*student, *DIGITS, *recipe)
    assert status == 0, error
    assert initial < 0.2 and last_top1(tmp_path) > initial + gain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
        (["--distillation", "hard"], "--distillation hard needs --teacher-model"),
        (["--amp-dtype", "bf16"], "--amp-dtype needs --amp"),
        (["--opt", "lion"], "invalid choice: 'lion'"),
    ],
)
def test_usage_errors_exit_with_2(run_finetune: Command, arguments: list[str], message: str):
    status, _, error = run_finetune(*VIT, *DIGITS, *arguments)
    assert status == 2 and message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-kwargs", "num_classes=7", *TINY], "the model has 7 classes but dataset 'digits' has 10"),
        (["--teacher-model", "absent/teacher.safetensors"], "no such checkpoint: absent/teacher.safetensors"),
        (["--teacher-model", "no_such_teacher"], "no_such_teacher"),
        (["--amp", "--amp-dtype", "fp16"], "pass --amp-dtype bf16"),
        (["--resume", "absent/state.pt"], "no such training state: absent/state.pt"),
        (["--hflip", "2"], "--hflip 2"),
        (["--auto-augment", "rand-m9-x3"], "timm's 'rand' has no section 'x3'"),
        (["--train-crop-size", "48"], "does not take images of 48×48 pixels"),
        (["--output-dir", f"{__file__}/here"], "cannot write "),
    ],
)
def test_errors_of_the_user_are_one_line_and_exit_with_1(
    run_finetune: Command, tmp_path: Path, arguments: list[str], message: str
):
    status, _, error = run_finetune(*VIT, *DIGITS, "--output-dir", tmp_path, *arguments)
    assert status == 1 and message in error
    assert error.startswith("finetune.py: ") and error.count("\n") == 1


def test_train_and_validation_crops_apart(run_finetune: Command, tmp_path: Path):
    arguments = ["--model", "resnet10t", *DIGITS, "--max-steps", 1, "--train-crop-size", 24, "--val-crop-size", 40]
    status, _, error = run_finetune(*arguments, "--val-resize-size", 44, "--output-dir", tmp_path)
    assert status == 0, error
    assert read_header(tmp_path / "last.safetensors")["preprocessing"]["input_size"] == 40
    assert run_finetune(*arguments, "--val-resize-size", 36, "--output-dir", tmp_path)[0] == 1


SMALL = ["--model", "resnet10t", *DIGITS, "--dataset", "synthetic", "--opt", "sgd", "--lr", "0.01", "--epochs", "1"]
SMALL += ["--model-kwargs", "num_classes=10"]  # its last batch norms are on maps of one pixel


@pytest.mark.parametrize(("images", "batch", "accumulate", "steps"), [(9, 8, 1, 1), (9, 4, 2, 1), (13, 4, 2, 2)])
def test_a_last_batch_of_one_image_does_not_end_training(
    images: int, batch: int, accumulate: int, steps: int, run_finetune: Command, tmp_path: Path
):
    words = [*SMALL, "--synthetic-size", images, "--batch-size", batch, "--accumulate", accumulate]
    status, output, error = run_finetune(*words, "--output-dir", tmp_path)
    assert status == 0, error
    told = f"one image, which batch norms cannot take: 1 of the {images} training images are left out of each epoch"
    assert output.count(told) == 1 and len(metrics(tmp_path)) == 1
    status, output, error = run_finetune(*words, "--output-dir", tmp_path, "--resume", "auto")
    assert status == 0 and f"1 epochs and {steps} steps done; finished" in output, error


def test_one_image_at_a_time_is_refused_where_batch_norms_refuse_it(run_finetune: Command, tmp_path: Path):
    for words in (["--synthetic-size", 3, "--batch-size", 1], ["--synthetic-size", 1]):
        status, _, error = run_finetune(*SMALL, *words, "--output-dir", tmp_path)
        assert status == 1 and error.count("\n") == 1
        assert "batch norms cannot be trained on one image at a time: take --batch-size 2 or more" in error


@pytest.mark.parametrize(
    ("schedule", "alone", "told"),
    [
        ("steplr", True, "0.01 was the learning rate of epoch 1, 0.01 is that of epoch 2"),
        ("exponentiallr --lr-gamma 0.5", True, "0.01 was the learning rate of epoch 1, 0.005 is that of epoch 2"),
        ("cosineannealinglr", True, "0.01 was the learning rate of epoch 1, 0.005 is that of epoch 2"),
        ("cosineannealinglr --epochs 2", False, "0.005 was the learning rate of epoch 2, 0.0025 is that of epoch 3"),
        ("steplr --model-ema --model-ema-decay 0.9999", False, "where 1 were planned: steplr goes by 2 epochs"),
    ],
)
def test_a_finished_run_goes_on_for_more_epochs(
    schedule: str, alone: bool, told: str, run_finetune: Command, tmp_path: Path
):
    """By itself, where it is what it would have been from the start, else with --extend."""
    words = [*SMALL, "--synthetic-size", 16, "--batch-size", 8, "--lr-scheduler", *schedule.split()]
    words += ["--output-dir", tmp_path]
    assert run_finetune(*words)[0] == 0
    done = len(metrics(tmp_path))
    longer = [*words, "--epochs", done + 1, "--resume", "auto"]
    if not alone:
        status, _, error = run_finetune(*longer)
        assert status == 1 and f"epochs {done} (now {done + 1})" in error and "(--extend lets a run go on" in error
    status, output, error = run_finetune(*longer, *([] if alone else ["--extend"]))
    assert status == 0 and told in output, error
    assert [row["epoch"] for row in metrics(tmp_path)] == list(range(1, done + 2))
    status, output, _ = run_finetune(*longer, "--extend")
    assert status == 0 and f"{done + 1} epochs and {2 * done + 2} steps done; finished" in output
    assert told not in output
    assert run_finetune(*words, "--epochs", 1, "--resume", "auto", "--extend")[0] == 1
