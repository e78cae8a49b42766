"""The scripts of the published models: their commands parse, their numbers are the recipes', no script names another
one's files, and users' flags win."""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from isomorphic.commands import evaluate, prune_flags, train_flags
from isomorphic.measure.complexity import count_complexity, format_macs, format_params
from isomorphic.models import build_model, describe_model, example_inputs

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = {
    f"{folder}/{path.stem}": path
    for folder in ("pruning", "finetuning", "evaluation")
    for path in sorted((REPOSITORY / "scripts" / folder).glob("*.sh"))
}
IMAGENET_TRAIN = 1_281_167  # images


class Dense(NamedTuple):
    """An evaluation script: the figures in its comment."""

    macs: str
    params: str
    top1: str | None = None
    interpolation: str = "bicubic"
    is_torchvision: bool = False


class Pruning(NamedTuple):
    """A pruning script: its flags, and the figures in its comment ("not known": none is published)."""

    model: str
    ratio: float
    macs: str
    params: str
    top1: str | None  # after finetuning
    heads: float | None = None
    head_dims: float | None = None
    batches: int = 50
    remove_blocks: int = 0
    kwargs: dict[str, float] = {}  # noqa: RUF012
    interpolation: str = "bicubic"


class Finetuning(NamedTuple):
    """A finetuning script: its flags by the parser's names, and the batch that its comment tells."""

    processes: int
    batch_size: int
    recipe: dict[str, Any]
    accumulate: int = 1


DEIT = "deit_{}_distilled_patch16_224.fb_in1k"
CONVNEXT = "convnext_base.fb_in1k"
SWIN = "swin_base_patch4_window7_224.ms_in1k"
DROPOUT = {"drop_rate": 0.1}

EVALUATION = {
    DEIT.format("base"): Dense("17.69 G", "87.34 M", "83.32"),
    DEIT.format("small"): Dense("4.6391 G", "22.4364 M", "81.17"),
    DEIT.format("tiny"): Dense("1.27 G", "5.91 M"),
    CONVNEXT: Dense("15.36 G", "88.59 M", "83.83"),
    "convnext_small.fb_in1k": Dense("8.69 G", "50.22 M"),
    "convnext_tiny.fb_in1k": Dense("4.46 G", "28.59 M"),
    "resnet50.tv_in1k": Dense("4.12 G", "25.56 M", "76.13", "bilinear"),
    "resnet101.tv_in1k": Dense("7.85 G", "44.55 M", "77.38", "bilinear"),
    "resnet152.tv_in1k": Dense("11.58 G", "60.19 M", None, "bilinear"),
    "mobilenet_v2": Dense("0.32 G", "3.50 M", None, "bilinear", is_torchvision=True),
    SWIN: Dense("15.48 G", "87.77 M"),
    "swin_tiny_patch4_window7_224.ms_in1k": Dense("4.51 G", "28.29 M"),
}
PRUNING = {
    "deit_4.2G": Pruning(DEIT.format("base"), 0.50, "4.16 G", "20.69 M", "82.41", 0.50, 0.25),
    "deit_2.6G": Pruning(DEIT.format("base"), 0.60, "2.61 G", "13.07 M", "81.13", 0.60, 0.30),
    "deit_1.2G": Pruning(DEIT.format("small"), 0.50, "1.21 G", "5.74 M", "77.50", 0.50, 0.10),
    "deit_0.6G": Pruning(DEIT.format("tiny"), 0.25, "0.62 G", "3.08 M", "72.60", 0.30, 0.30),
    "convnext_8.5G": Pruning(
        CONVNEXT, 0.26, "8.48 G", "47.36 M", "83.17", kwargs={"drop_rate": 0.1, "drop_path_rate": 0.4}
    ),
    "convnext_4.2G": Pruning(
        CONVNEXT, 0.25, "4.19 G", "25.32 M", "82.19", remove_blocks=18, kwargs={"drop_path_rate": 0.1}
    ),
    "resnet50_2.0G": Pruning("resnet50.tv_in1k", 0.26, "2.06 G", "15.05 M", "75.91", kwargs=DROPOUT),
    "resnet101_3.8G": Pruning(
        "resnet101.tv_in1k", 0.28, "3.85 G", "24.87 M", "77.43", batches=100, kwargs=DROPOUT, interpolation="bilinear"
    ),
    "resnet101_4.5G": Pruning(
        "resnet101.tv_in1k", 0.22, "4.48 G", "29.14 M", "77.56", batches=100, kwargs=DROPOUT, interpolation="bilinear"
    ),
    "resnet152_4.0G": Pruning(
        "resnet152.tv_in1k",
        0.40,
        "about 4.0 G",
        "not known",
        None,
        batches=100,
        kwargs=DROPOUT,
        interpolation="bilinear",
    ),
    "mobilenet_v2_0.15G": Pruning("mobilenet_v2", 0.27, "about 0.15 G", "not known", None, interpolation="bilinear"),
    "swin_4.5G": Pruning(SWIN, 0.47, "about 4.5 G", "not known", None, heads=0.0),
}

ALL_RECIPES = {"amp": True, "clip_grad_norm": None, "lr_warmup_epochs": 0, "norm_weight_decay": None,
               "dataset": "", "data_path": "data/imagenet", "no_imagenet_mean_std": False}  # fmt: skip
SGD_RECIPE = ALL_RECIPES | {
    "epochs": 100,
    "opt": "sgd",
    "momentum": 0.9,
    "lr": 0.04,
    "weight_decay": 1e-4,
    "lr_scheduler": "steplr",
    "lr_step_size": 30,
    "lr_gamma": 0.1,
    "scale": (0.08, 1.0),
    "hflip": 0.5,
    "auto_augment": None,
    "random_erase": 0.0,
    "label_smoothing": 0.0,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
    "ra_sampler": False,
    "teacher_model": None,
    "distillation": "none",
}
MOBILENET_RECIPE = SGD_RECIPE | {
    "epochs": 300,
    "lr": 0.036,
    "weight_decay": 2e-5,
    "lr_scheduler": "cosineannealinglr",
    "lr_min": 0.0,
}
DEIT_RECIPE = ALL_RECIPES | {
    "epochs": 300,
    "opt": "adamw",
    "lr": 5e-4,
    "weight_decay": 0.05,
    "lr_scheduler": "cosineannealinglr",
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
}
CONVNEXT_RECIPE = {
    "data_path": "data/imagenet",
    "epochs": 300,
    "opt": "adamw",
    "lr": 2e-3,
    "weight_decay": 0.05,
    "lr_scheduler": "cosineannealinglr",
    "lr_min": 1e-6,
    "label_smoothing": 0.1,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erase": 0.25,
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
    "color_jitter": 0,
    "amp": True,
    "model_ema": True,
    "model_ema_decay": 0.9999,
}
FINETUNING = {
    "deit_4.2G": Finetuning(8, 256, DEIT_RECIPE),
    "deit_2.6G": Finetuning(8, 256, DEIT_RECIPE),
    "deit_1.2G": Finetuning(8, 256, DEIT_RECIPE),
    "deit_0.6G": Finetuning(8, 512, DEIT_RECIPE),
    "swin_4.5G": Finetuning(8, 256, DEIT_RECIPE | {"distillation": "soft"}),
    "resnet50_2.0G": Finetuning(4, 64, SGD_RECIPE),
    "resnet101_3.8G": Finetuning(4, 256, SGD_RECIPE),
    "resnet101_4.5G": Finetuning(4, 256, SGD_RECIPE),
    "resnet152_4.0G": Finetuning(4, 256, SGD_RECIPE),
    "mobilenet_v2_0.15G": Finetuning(4, 512, MOBILENET_RECIPE),
    "convnext_8.5G": Finetuning(
        8, 128, CONVNEXT_RECIPE | {"drop": 0.1, "drop_path": 0.4, "train_interpolation": "bicubic"}, accumulate=2
    ),
    "convnext_4.2G": Finetuning(
        8, 256, CONVNEXT_RECIPE | {"drop": 0, "drop_path": 0.1, "train_interpolation": "random"}
    ),
}
# What the published scripts got wrong, or say differently from the paper, and ours say so.
CONFESSIONS = {
    "pruning/deit_1.2G": ("abstract", "DeiT-Small"),
    "pruning/convnext_8.5G": ("convnext_small_8.5G", "ConvNeXt-Base"),
    "pruning/convnext_4.2G": ("convnext_tiny_4.2G", "ConvNeXt-Base", "depths 3, 3, 9, 3"),
    "pruning/resnet50_2.0G": ("Bicubic here, as published", "bilinear"),
    "finetuning/resnet50_2.0G": ("published file trains the ResNet-152 checkpoint by mistake",),
    "finetuning/convnext_8.5G": ("jitter of 0.4 has no effect",),
    "finetuning/convnext_4.2G": ("dropout of 0.1, which had no effect",),
    "finetuning/swin_4.5G": ("recipe is ours",),
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


def entry_of(script: str) -> str:
    """The command that a script has to call."""
    folder, _, name = script.partition("/")
    finetune = "convnext_train.py" if name.startswith("convnext") else "finetune.py"
    return {"pruning": "prune.py", "finetuning": finetune, "evaluation": "evaluate.py"}[folder]


PARSERS = {
    "prune.py": prune_flags.parse_args,
    "evaluate.py": evaluate.parse_args,
    "finetune.py": train_flags.parse_finetune_args,
    "convnext_train.py": train_flags.parse_convnext_args,
}


@pytest.fixture
def parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a script and gives its flags to the real parser of the command that it calls."""

    def parse(script: str, *words: str) -> argparse.Namespace:
        entry = entry_of(script)
        command = command_of(script, *words, tmp_path=tmp_path)
        flags = command[command.index(entry) :]
        monkeypatch.setattr(sys, "argv", flags)
        return PARSERS[entry]()

    return parse


def opening(script: str) -> str:
    """The comment that a script opens with, on one line."""
    lines = SCRIPTS[script].read_text().splitlines()
    comment = lines[1 : next(number for number, line in enumerate(lines) if line and not line.startswith("#"))]
    return " ".join(line.removeprefix("#").strip() for line in comment)


def rounded(figure: str) -> str:
    """A figure of the paper as its tables print it."""
    number, unit = figure.split()
    return f"{float(number):.2f} {unit}"


def test_the_tables_cover_every_script():
    tables = {"pruning": PRUNING, "finetuning": FINETUNING, "evaluation": EVALUATION}
    assert set(SCRIPTS) == {f"{folder}/{name}" for folder, table in tables.items() for name in table}
    assert [len(table) for table in tables.values()] == [12, 12, 12] and PRUNING.keys() == FINETUNING.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_short_and_ends_in_the_users_flags(script: str, tmp_path: Path):
    text = SCRIPTS[script].read_text()
    assert len(text.splitlines()) <= 25 and max(map(len, text.splitlines())) <= 120
    assert text.endswith('  "$@"\n')
    assert "Hardware: " in opening(script) and "GPU" in opening(script)
    command = command_of(script, "--flag", "two words", "", tmp_path=tmp_path)
    assert [word for word in command if word.endswith(".py")] == [entry_of(script)]
    assert command[-3:] == ["--flag", "two words", ""]
    assert run(script, tmp_path=tmp_path, RECORDER_STATUS="3").returncode == 3


@pytest.mark.parametrize("name", PRUNING)
def test_pruning_scripts(name: str, parsed):
    row, dense = PRUNING[name], EVALUATION[PRUNING[name].model]
    args = parsed(f"pruning/{name}")
    assert (args.model, args.is_torchvision, args.no_pretrained) == (row.model, dense.is_torchvision, False)
    assert (args.pruning_ratio, args.head_pruning_ratio) == (row.ratio, row.heads)
    assert args.head_dim_pruning_ratio == row.head_dims
    assert (args.remove_blocks, args.remove_blocks_scope) == (row.remove_blocks, "stage")
    assert dict(args.model_kwargs) == row.kwargs
    assert (args.pruning_type, args.taylor_batches, args.batch_size) == ("taylor", row.batches, 64)
    assert (args.ranking, args.round_to, args.normalizer, args.max_pruning_ratio) == ("isomorphic", 2, "mean", 1.0)
    assert (args.dataset, args.data_path, args.val_resize_size) == ("", "data/imagenet", 256)
    assert args.interpolation == row.interpolation and not args.amp and not args.score_bias
    assert args.target_macs is None and args.target_params is None

    text = opening(f"pruning/{name}")
    assert f"MACs {rounded(dense.macs)} => {row.macs}, params {rounded(dense.params)} => {row.params};" in text
    assert f"top-1 after scripts/finetuning/{name}.sh: {row.top1 or 'not known'}" in text
    assert f"Scores {row.batches} batches × 64 = {row.batches * 64:,} training images" in text
    assert f"(dense: {dense.top1})." in text or row.top1 is None or dense.top1 is None
    assert f"--target-macs {row.macs.removeprefix('about ').replace(' ', '')} " in text


@pytest.mark.parametrize("name", FINETUNING)
def test_finetuning_scripts(name: str, parsed, tmp_path: Path):
    row, pruned = FINETUNING[name], PRUNING[name]
    args = parsed(f"finetuning/{name}")
    assert (args.batch_size, args.interpolation) == (row.batch_size, EVALUATION[pruned.model].interpolation)
    assert {key: getattr(args, key) for key in row.recipe} == row.recipe
    assert getattr(args, "accumulate", 1) == row.accumulate
    assert args.val_resize_size == 256

    command = command_of(f"finetuning/{name}", tmp_path=tmp_path)
    assert command[:2] == ["-m", "torch.distributed.run"] and f"--nproc_per_node={row.processes}" in command
    two = command_of(f"finetuning/{name}", tmp_path=tmp_path, NPROC_PER_NODE="2")
    assert "--nproc_per_node=2" in two

    text = opening(f"finetuning/{name}")
    after = (pruned.macs, *([pruned.params] if pruned.params != "not known" else []))
    assert all(figure in text for figure in after)
    assert (f"top-1 {pruned.top1}" if pruned.top1 else "top-1 not known") in text


@pytest.mark.parametrize("name", FINETUNING)
def test_finetuning_scripts_do_the_arithmetic_of_their_batch(name: str):
    row, text = FINETUNING[name], opening(f"finetuning/{name}")
    total = row.processes * row.batch_size * row.accumulate
    times = f" × {row.accumulate} accumulated" if row.accumulate > 1 else ""
    steps = math.ceil(IMAGENET_TRAIN / total)
    assert f"{row.processes} processes × {row.batch_size} images{times} = {total} a step, {steps} steps" in text
    fewer = re.search(r"NPROC_PER_NODE=(\d+) … --(batch-size|accumulate) (\d+)", text)
    assert fewer is not None and f"Hardware: {row.processes} GPUs" in text
    factor = row.accumulate if fewer[2] == "batch-size" else row.batch_size
    assert int(fewer[1]) * int(fewer[3]) * factor == total


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_scripts(name: str, parsed):
    row = EVALUATION[name]
    args = parsed(f"evaluation/{name}")
    assert (args.model, args.is_torchvision, args.no_pretrained) == (name, row.is_torchvision, False)
    assert (args.val_resize_size, args.interpolation, args.batch_size) == (256, row.interpolation, 64)
    assert not args.amp and not args.no_imagenet_mean_std and args.input_size is None
    assert f"MACs {row.macs}, params {row.params}" in opening(f"evaluation/{name}")
    assert row.top1 is None or f"top-1 {row.top1}" in opening(f"evaluation/{name}")


@pytest.mark.parametrize("name", EVALUATION)
def test_the_figures_of_dense_models_are_what_is_counted(name: str):
    row = EVALUATION[name]
    spec = describe_model(name, builder="torchvision" if row.is_torchvision else "timm")
    with torch.device("meta"):
        counted = count_complexity(build_model(spec), example_inputs(spec, "meta"))
    digits = len(row.macs.split()[0].partition(".")[2])
    counts = (format_macs(counted.macs_paper, digits), format_params(counted.params, digits))
    assert counts == (row.macs, row.params)


# --- what belongs together ---


@pytest.mark.parametrize("name", PRUNING)
def test_a_model_keeps_its_name_from_script_to_script(name: str, parsed):
    pruning, finetuning = parsed(f"pruning/{name}"), parsed(f"finetuning/{name}")
    assert pruning.save_as == finetuning.model == f"output/pruned/{name}.safetensors"
    assert finetuning.output_dir == f"output/finetuned/{name}"
    assert f"Run scripts/pruning/{name}.sh first." in opening(f"finetuning/{name}")
    for script in (f"pruning/{name}", f"finetuning/{name}"):
        text = SCRIPTS[script].read_text()
        assert not [other for other in PRUNING if other != name and other in text]


@pytest.mark.parametrize("name", PRUNING)
def test_a_name_says_the_family_and_the_macs(name: str, parsed):
    family, _, macs = name.rpartition("_")
    assert parsed(f"pruning/{name}").model.startswith(family)
    expected = float(PRUNING[name].macs.removeprefix("about ").removesuffix(" G"))
    size = macs.removesuffix("G")
    assert abs(expected - float(size)) < 10 ** -len(size.partition(".")[2])  # some are rounded, some cut off


@pytest.mark.parametrize("name", FINETUNING)
def test_teachers_teach_whom_the_recipe_says(name: str, parsed):
    args = parsed(f"finetuning/{name}")
    teacher, way = getattr(args, "teacher_model", None), getattr(args, "distillation", "none")
    if name.startswith(("deit", "swin")):
        assert teacher == "regnety_160.deit_in1k" and (way == "hard") == ("distilled" in PRUNING[name].model)
        assert "RegNetY-16GF" in opening(f"finetuning/{name}")
    else:
        assert (teacher, way) == (None, "none") and "without a teacher" in opening(f"finetuning/{name}")


@pytest.mark.parametrize("name", [name for name in FINETUNING if name.startswith("convnext")])
def test_convnexts_train_with_the_rates_that_they_are_built_with(name: str, parsed):
    args, built = parsed(f"finetuning/{name}"), PRUNING[name].kwargs
    assert (args.drop, args.drop_path) == (built.get("drop_rate", 0), built["drop_path_rate"])


@pytest.mark.parametrize("script", CONFESSIONS)
def test_what_departs_from_the_published_scripts_is_said(script: str):
    assert not [words for words in CONFESSIONS[script] if words not in opening(script)]


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
