"""scripts/dimap: each masks a Swin and finetunes it by the paper's recipe; and what a masked checkpoint does since."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isomorphic.checkpoints.open import open_model, read_header
from isomorphic.checkpoints.save import save_model
from isomorphic.commands.prune_flags import parse_args as parse_pruning
from isomorphic.commands.train_flags import parse_finetune_args
from isomorphic.models import describe_model, example_inputs
from isomorphic.pruning.weights.dimap import mask
from isomorphic.pruning.weights.layer_roles import assign_roles
from isomorphic.training.optim import learning_rate
from isomorphic.training.recipe import ScheduleRecipe

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((REPOSITORY / "scripts" / "dimap").glob("swin_*.sh"))
# Of the paper's table: dense top-1, params and MACs; of DIMAP1 to 3 top-1, params and MACs.
PAPER = {
    "tiny": ("81.16 28.3 4.5", "81.17 24.4 3.8", "81.11 19.2 3.0", "80.35 14.0 2.2"),
    "small": ("83.19 49.6 8.7", "83.08 42.5 7.5", "82.99 33.1 5.8", "82.63 23.7 4.1"),
    "base": ("83.48 87.8 15.4", "83.52 75.2 13.2", "83.43 58.4 10.2", "83.28 41.7 7.3"),
}
PERCENTS = (15, 35, 55)
# Stands in for python: says with which words it was called, a line each, and fails where it is told to.
RECORDER = """#!/usr/bin/env bash
printf '%s\\t' "$@"
echo
case "$1" in "$FAIL_AT") exit 3 ;; esac
"""


def commands(script: Path, folder: Path, *words: str, fail_at: str = "nothing") -> tuple[int, list[list[str]]]:
    """The exit status of a script of a copy of the repository's scripts, and the words of each command that it runs."""
    recorder = folder / "recorder"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    if not (folder / "scripts").exists():
        (folder / "scripts").symlink_to(REPOSITORY / "scripts")
    environment = os.environ | {"ISOMORPHIC_PYTHON": str(recorder), "FAIL_AT": fail_at}
    environment.pop("NPROC_PER_NODE", None)
    done = subprocess.run(
        ["bash", f"scripts/dimap/{script.name}", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not done.stderr
    return done.returncode, [line.rstrip("\t").split("\t") for line in done.stdout.splitlines()]


def finetuning(words: list[str]) -> argparse.Namespace:
    return parse_finetune_args(words[words.index("finetune.py") + 1 :])


def test_there_is_one_for_each_row_of_the_papers_table():
    assert {path.stem for path in SCRIPTS} == {f"swin_{size}_{percent}" for size in PAPER for percent in PERCENTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_masks_and_finetunes_by_the_recipe(script: Path, tmp_path: Path):
    _, size, percent = script.stem.split("_")
    status, (prune, finetune) = commands(script, tmp_path, "--dataset", "synthetic", "--", "--epochs", "20")
    assert status == 0 and prune[0] == "prune.py"
    args = parse_pruning(prune[1:])
    assert args.model == f"swin_{size}_patch4_window7_224.ms_in1k"
    assert (args.pruning_type, args.unstructured, args.pruning_ratio) == ("dimap", True, int(percent) / 100)
    assert (args.dataset, args.interpolation, args.val_resize_size) == ("synthetic", "bicubic", 256)

    assert finetune[:2] == ["-m", "torch.distributed.run"] and "--nproc_per_node=8" in finetune
    args, pruned = finetuning(finetune), args.save_as
    assert args.model == pruned == f"output/pruned/dimap_{script.stem}.safetensors"
    assert (args.dataset, args.epochs, args.batch_size, args.output_dir) == (
        "synthetic",
        20,
        128,
        f"output/finetuned/dimap_{script.stem}",
    )
    assert (args.opt, args.lr, args.lr_min, args.weight_decay) == ("adamw", 2e-5, 2e-7, 1e-8)
    assert (args.lr_scheduler, args.lr_warmup_epochs, args.lr_warmup_method) == ("cosineannealinglr", 15, "linear")


def test_the_learning_rate_of_the_recipe(tmp_path: Path):
    _, (_, words) = commands(SCRIPTS[0], tmp_path)
    args = finetuning(words)
    recipe = ScheduleRecipe(
        args.lr,
        args.epochs,
        args.lr_scheduler,
        args.lr_warmup_epochs,
        args.lr_warmup_method,
        args.lr_warmup_decay,
        lr_min=args.lr_min,
    )
    rates = [learning_rate(recipe, epoch) for epoch in range(31)]
    assert rates[0] == pytest.approx(2e-7) and rates[15] == 2e-5 == max(rates) and rates[30] == pytest.approx(2e-7)
    assert rates[:16] == sorted(rates[:16]) and rates[15:] == sorted(rates[15:], reverse=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_comment_has_the_papers_figures(script: Path):
    text = re.sub(r"\n# *", " ", script.read_text())
    assert len(script.read_text().splitlines()) <= 15 and max(map(len, script.read_text().splitlines())) <= 120
    _, size, percent = script.stem.split("_")
    dense, pruned = PAPER[size][0].split(), PAPER[size][1 + PERCENTS.index(int(percent))].split()
    assert f"top-1 {pruned[0]} (dense: {dense[0]})" in text
    assert f"params {dense[1]} M => {pruned[1]} M, MACs {dense[2]} G => {pruned[2]} G." in text
    assert f"Masks {percent}% of Swin-{size.title()}'s" in text and f"(DIMAP{1 + PERCENTS.index(int(percent))})" in text
    assert "Hardware: " in text and f"= {8 * 128} a step, {-(-1_281_167 // 1024)} steps an epoch" in text


def test_what_is_pruned_already_is_taken_as_it_is(tmp_path: Path):
    pruned = REPOSITORY / "output" / "pruned" / f"dimap_{SCRIPTS[0].stem}.safetensors"
    _, (first, _) = commands(SCRIPTS[0], tmp_path, "--device", "cpu")
    assert first[-2:] == ["--device", "cpu"] and not pruned.exists()
    where = tmp_path / "output" / "pruned"
    where.mkdir(parents=True)
    (where / pruned.name).touch()
    status, found = commands(SCRIPTS[0], tmp_path, "--device", "cpu", "--", "--resume", "auto")
    assert status == 0 and len(found) == 1
    assert found[0][-4:] == ["--device", "cpu", "--resume", "auto"] and "finetune.py" in found[0]


@pytest.mark.parametrize(("fail_at", "begun"), [("prune.py", 1), ("-m", 2)])
def test_a_command_that_fails_ends_the_script(fail_at: str, begun: int, tmp_path: Path):
    status, found = commands(SCRIPTS[0], tmp_path, fail_at=fail_at)
    assert (status, len(found)) == (3, begun)


# --- the commands on a masked checkpoint ---

SPEC = describe_model("vit_tiny_patch16_224", kwargs={"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2,
                                                      "num_classes": 10}, input_size=32)  # fmt: skip
DIGITS = ["--dataset", "digits", "--workers", 0, "--device", "cpu"]


@pytest.fixture
def masked_file(tmp_path: Path) -> Path:
    """A vision transformer of which 55% of the weights are masked."""
    torch.manual_seed(0)
    model, _ = open_model(SPEC.name, kwargs=SPEC.kwargs, pretrained=False)
    names = mask(model, assign_roles(model, example_inputs(SPEC)), 0.55).names
    save_model(tmp_path / "masked.safetensors", model, SPEC.masking(names), provenance={})
    return tmp_path / "masked.safetensors"


def test_finetuning_and_evaluating_a_masked_model(
    masked_file: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
):
    folder = tmp_path / "run"
    recipe = ["--hflip", 0, "--batch-size", 96, "--opt", "adamw", "--lr", 2e-3, "--epochs", 2, "--model-ema"]
    status, output, error = run_command("finetune", "--model", masked_file, *DIGITS, *recipe, "--output-dir", folder)
    assert status == 0, error
    before, spec = open_model(masked_file)
    nonzero = sum(p.numel() for p in before.parameters()) - sum(
        int((before.get_parameter(name) == 0).sum()) for name in spec.masked
    )
    lines = output.splitlines()
    assert lines[-3].startswith("MACs: ") and lines[-2].startswith("Non-zero MACs: ")
    assert f", Params: {nonzero / 1e3:.4f} K" in lines[-2] and lines[-1].startswith("Accuracy: ")
    for name in ("best", "last"):
        after, same_spec = open_model(folder / f"{name}.safetensors")
        assert same_spec.masked == spec.masked
        for parameter in spec.masked:
            assert torch.equal(after.get_parameter(parameter) == 0, before.get_parameter(parameter) == 0)
            assert not torch.equal(after.get_parameter(parameter), before.get_parameter(parameter))
    assert read_header(folder / "best.safetensors")["provenance"]["params_nonzero"] == nonzero

    results = tmp_path / "results.json"
    options = ["--model", folder / "best.safetensors", *DIGITS, "--results-file", results]
    status, output, error = run_command("evaluate", *options)
    assert status == 0, error
    assert output.splitlines()[1] == lines[-2]
    row = json.loads(results.read_text())
    assert row["params_nonzero"] == nonzero < row["params"] and row["macs_nonzero"] < row["macs"]
