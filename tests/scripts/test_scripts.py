"""The scripts of the published models: their commands parse, their numbers are the recipes', and users' flags win."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = {
    f"{folder}/{path.stem}": path
    for folder in ("pruning", "finetuning", "evaluation")
    for path in sorted((REPOSITORY / "scripts" / folder).glob("*.sh"))
}
DEIT = "deit_{}_distilled_patch16_224.fb_in1k"
COMMANDS = {"pruning": "prune.py", "finetuning": "finetune.py", "evaluation": "evaluate.py"}

# Name: dense model, pruning ratios of widths, heads and head dims; MACs (G) and params (M) before and after.
PRUNING = {
    "deit_4.2G": ("base", 0.50, 0.50, 0.25, "17.69 G => 4.16 G", "87.34 M => 20.69 M"),
    "deit_2.6G": ("base", 0.60, 0.60, 0.30, "17.69 G => 2.61 G", "87.34 M => 13.07 M"),
    "deit_1.2G": ("small", 0.50, 0.50, 0.10, "4.64 G => 1.21 G", "22.44 M => 5.74 M"),
    "deit_0.6G": ("tiny", 0.25, 0.30, 0.30, "1.27 G => 0.62 G", "5.91 M => 3.08 M"),
}
# Name: images a process, and top-1 after finetuning.
FINETUNING = {
    "deit_4.2G": (256, "82.41"),
    "deit_2.6G": (256, "81.13"),
    "deit_1.2G": (256, "77.50"),
    "deit_0.6G": (512, "72.60"),
}
DEIT_RECIPE = {
    "epochs": 300,
    "opt": "adamw",
    "lr": 5e-4,
    "weight_decay": 0.05,
    "lr_scheduler": "cosineannealinglr",
    "lr_warmup_epochs": 0,
    "lr_min": 0.0,
    "label_smoothing": 0.1,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "auto_augment": "ra",
    "ra_magnitude": 9,
    "random_erase": 0.25,
    "ra_sampler": True,
    "ra_reps": 3,
    "teacher_model": "regnety_160.deit_in1k",
    "distillation": "hard",
    "amp": True,
    "clip_grad_norm": None,
    "interpolation": "bicubic",
    "val_resize_size": 256,
    "data_path": "data/imagenet",
    "no_imagenet_mean_std": False,
}
EVALUATION = {
    DEIT.format("base"): ("17.69 G", "87.34 M", "83.32"),
    DEIT.format("small"): ("4.6391 G", "22.4364 M", "81.17"),
    DEIT.format("tiny"): ("1.27 G", "5.91 M", None),
}

# Stands in for python: says where it was started and with which words.
RECORDER = """#!/usr/bin/env bash
pwd
printf '%s\\0' "$@"
exit "${RECORDER_STATUS:-0}"
"""


def run(script: str, *words: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    recorder = tmp_path / "recorder"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if name != "NPROC_PER_NODE"}
    return subprocess.run(
        ["bash", str(SCRIPTS[script]), *words],
        cwd=tmp_path,
        env=inherited | {"ISOMORPHIC_PYTHON": str(recorder)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def command_of(script: str, *words: str, tmp_path: Path, **environment: str) -> list[str]:
    """The words that the script calls python with, from the repository's root."""
    done = run(script, *words, tmp_path=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    folder, _, recorded = done.stdout.partition("\n")
    assert Path(folder).samefile(REPOSITORY)
    return recorded.removesuffix("\0").split("\0")


@pytest.fixture
def parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a script and gives its flags to the real parser of the command that it calls."""

    def parse(script: str, *words: str) -> argparse.Namespace:
        entry = COMMANDS[script.partition("/")[0]]
        command = command_of(script, *words, tmp_path=tmp_path)
        monkeypatch.setattr(sys, "argv", command[command.index(entry) :])
        return importlib.import_module(entry.removesuffix(".py")).parse_args()

    return parse


def opening(script: str) -> str:
    """The comment that a script opens with, on one line."""
    lines = SCRIPTS[script].read_text().splitlines()
    comment = lines[1 : next(number for number, line in enumerate(lines) if line and not line.startswith("#"))]
    return " ".join(line.removeprefix("#").strip() for line in comment)


def test_the_tables_cover_every_script():
    tables = {"pruning": PRUNING, "finetuning": FINETUNING, "evaluation": EVALUATION}
    assert set(SCRIPTS) == {f"{folder}/{name}" for folder, table in tables.items() for name in table}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_short_and_ends_in_the_users_flags(script: str, tmp_path: Path):
    text = SCRIPTS[script].read_text()
    assert len(text.splitlines()) <= 25
    assert text.endswith('  "$@"\n')
    assert "Hardware: " in opening(script) and "GPU" in opening(script)
    command = command_of(script, "--flag", "two words", "", tmp_path=tmp_path)
    assert command[-3:] == ["--flag", "two words", ""]
    assert run(script, tmp_path=tmp_path, RECORDER_STATUS="3").returncode == 3


@pytest.mark.parametrize("name", PRUNING)
def test_pruning_scripts(name: str, parsed):
    size, ratio, heads, head_dims, macs, params = PRUNING[name]
    args = parsed(f"pruning/{name}")
    assert args.model == DEIT.format(size) and not args.no_pretrained
    assert (args.pruning_ratio, args.head_pruning_ratio, args.head_dim_pruning_ratio) == (ratio, heads, head_dims)
    assert (args.pruning_type, args.taylor_batches, args.batch_size) == ("taylor", 50, 64)
    assert (args.ranking, args.round_to, args.normalizer, args.max_pruning_ratio) == ("isomorphic", 2, "mean", 1.0)
    assert (args.dataset, args.data_path, args.val_resize_size) == ("", "data/imagenet", 256)
    assert args.interpolation == "bicubic" and not args.amp and not args.score_bias
    assert args.save_as == f"output/pruned/{name}.safetensors"
    assert args.target_macs is None and args.target_params is None
    assert f"MACs {macs}" in opening(f"pruning/{name}") and f"params {params}" in opening(f"pruning/{name}")
    assert FINETUNING[name][1] in opening(f"pruning/{name}")


def test_deit_1_2g_says_that_it_follows_the_script_and_not_the_abstract():
    assert "abstract" in opening("pruning/deit_1.2G") and "DeiT-Small" in opening("pruning/deit_1.2G")


@pytest.mark.parametrize("name", FINETUNING)
def test_finetuning_scripts(name: str, parsed, tmp_path: Path):
    batch_size, top1 = FINETUNING[name]
    args = parsed(f"finetuning/{name}")
    assert args.batch_size == batch_size
    assert {key: getattr(args, key) for key in DEIT_RECIPE} == DEIT_RECIPE
    assert args.model == parsed(f"pruning/{name}").save_as
    assert args.output_dir == f"output/finetuned/{name}"

    command = command_of(f"finetuning/{name}", tmp_path=tmp_path)
    assert command[:2] == ["-m", "torch.distributed.run"] and "--nproc_per_node=8" in command
    two = command_of(f"finetuning/{name}", tmp_path=tmp_path, NPROC_PER_NODE="2")
    assert "--nproc_per_node=2" in two

    arithmetic = re.search(r"(\d+) processes × (\d+) images = (\d+) a step", opening(f"finetuning/{name}"))
    assert arithmetic is not None
    processes, images, total = map(int, arithmetic.groups())
    assert (processes, images, total) == (8, batch_size, 8 * batch_size)
    after = [text.split(" => ")[1] for text in PRUNING[name][4:]]
    assert all(figure in opening(f"finetuning/{name}") for figure in (*after, f"top-1 {top1}"))


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_scripts(name: str, parsed):
    macs, params, top1 = EVALUATION[name]
    args = parsed(f"evaluation/{name}")
    assert args.model == name and not args.no_pretrained
    assert (args.val_resize_size, args.interpolation, args.batch_size) == (256, "bicubic", 64)
    assert not args.amp and not args.no_imagenet_mean_std and args.input_size is None
    assert f"MACs {macs}, params {params}" in opening(f"evaluation/{name}")
    assert top1 is None or f"top-1 {top1}" in opening(f"evaluation/{name}")


def test_the_users_flags_win(parsed):
    words = ["--dataset", "synthetic", "--no-pretrained", "--taylor-batches", "1", "--batch-size", "4",
             "--pruning-ratio", "0.1", "--target-macs", "4.16G", "--save-as", "mine.safetensors"]  # fmt: skip
    args = parsed("pruning/deit_4.2G", *words)
    assert (args.dataset, args.no_pretrained, args.taylor_batches, args.batch_size) == ("synthetic", True, 1, 4)
    assert (args.pruning_ratio, args.target_macs.value, args.save_as) == (0.1, 4.16e9, "mine.safetensors")
    assert (args.head_pruning_ratio, args.model) == (0.5, DEIT.format("base"))

    args = parsed("finetuning/deit_4.2G", "--epochs", "3", "-b", "8", "--wd", "0.1", "--model", "other.safetensors")
    assert (args.epochs, args.batch_size, args.weight_decay, args.model) == (3, 8, 0.1, "other.safetensors")
    args = parsed(f"evaluation/{DEIT.format('tiny')}", "--val-resize", "248", "--interpolation", "bilinear")
    assert (args.val_resize_size, args.interpolation) == (248, "bilinear")
