"""scripts/depgraph: dense training, sparse training, pruning in steps, finetuning, evaluation, as one command each."""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from isomorphic.commands import evaluate
from isomorphic.commands.prune_flags import parse_args as parse_pruning
from isomorphic.commands.train_flags import parse_finetune_args
from isomorphic.measure.complexity import count_complexity, format_macs, format_params
from isomorphic.models import build_model, describe_model, example_inputs
from isomorphic.pruning.grouping.trace import trace_groups

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "scripts" / "depgraph"
SHARED = ("chain", "cifar")
SCRIPTS = sorted(path for path in FOLDER.glob("*.sh") if path.stem not in SHARED)
CIFAR_TRAIN, IMAGENET_TRAIN, DIGITS_TRAIN = 50_000, 1_281_167, 1437  # images


class Cifar(NamedTuple):
    """What is published of a run on CIFAR, and the model on the digits."""

    network: str
    classes: int
    macs: tuple[str, str]
    params: tuple[str, str]
    top1: tuple[str, str, str, str]  # dense, after the sparse phase, just pruned, finetuned
    speed_up: float
    digits_width: int


class ImageNet(NamedTuple):
    """A model that is pretrained: its cost, and how it is trained. No figures of pruned ones are published."""

    model: str
    builder: str
    macs: tuple[str, str]
    params: str
    budget: str
    processes: int
    batch_size: int
    finetuning: dict[str, Any]


SGD = {"opt": "sgd", "lr": 0.04, "epochs": 100, "lr_scheduler": "steplr", "lr_step_size": 30, "weight_decay": 1e-4}
MOBILENET = {"opt": "sgd", "lr": 0.036, "epochs": 300, "lr_scheduler": "cosineannealinglr", "weight_decay": 2e-5}
VIT = {"opt": "adamw", "lr": 5e-4, "epochs": 300, "lr_scheduler": "cosineannealinglr", "mixup_alpha": 0.8}
CIFAR = {
    "resnet56_cifar10_2.11x": Cifar(
        "resnet56", 10, ("127.12 M", "59.88 M"), ("0.86 M", "0.43 M"), ("93.53", "93.24", "88.85", "93.89"), 2.11, 8
    ),
    "resnet56_cifar10_2.57x": Cifar(
        "resnet56", 10, ("127.12 M", "48.69 M"), ("0.86 M", "0.29 M"), ("93.53", "93.56", "79.60", "93.57"), 2.57, 8
    ),
    "vgg19_cifar100_8.9x": Cifar(
        "vgg19_bn", 100, ("512.73 M", "57.16 M"), ("20.09 M", "1.18 M"), ("73.50", "72.71", "2.40", "70.60"), 8.9, 16
    ),
}
IMAGENET = {
    "resnet50_2.0G": ImageNet("resnet50.tv_in1k", "timm", ("4.12 G", "2.00 G"), "25.56 M", "2.0G", 4, 64, SGD),
    "densenet121": ImageNet("densenet121.tv_in1k", "timm", ("2.88 G", "1.44 G"), "7.98 M", "50%", 4, 64, SGD),
    "resnext50": ImageNet("resnext50_32x4d.tv_in1k", "timm", ("4.27 G", "2.14 G"), "25.03 M", "50%", 4, 64, SGD),
    "mobilenet_v2": ImageNet("mobilenet_v2", "torchvision", ("0.32 G", "0.15 G"), "3.50 M", "0.15G", 4, 512, MOBILENET),
    "vit_b16": ImageNet(
        "vit_base_patch16_224.augreg_in1k", "timm", ("17.59 G", "10.56 G"), "86.57 M", "60%", 8, 128, VIT
    ),
}
# Stands in for python: says with which words it was called, a line each, and fails where it is told to.
RECORDER = """#!/usr/bin/env bash
printf 'called\\t'
printf '%s\\t' "$@"
echo
case " $* " in *"$FAIL_AT"*) exit 3 ;; esac
"""
script = pytest.mark.parametrize("name", [*CIFAR, *IMAGENET])


def commands(
    name: str, folder: Path, *words: str, fail_at: str = "nothing at all", **environment: str
) -> tuple[int, list[list[str]]]:
    """The exit status of a script, started beside a link to the scripts, and the words of each command that it runs."""
    recorder = folder / "recorder"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    if not (folder / "scripts").exists():
        (folder / "scripts").symlink_to(REPOSITORY / "scripts")
    inherited = {key: value for key, value in os.environ.items() if key not in ("NPROC_PER_NODE", "STEPS")}
    inherited |= {"CIFAR10": "", "CIFAR100": "", "ISOMORPHIC_PYTHON": str(recorder), "FAIL_AT": fail_at}
    call = ["bash", f"scripts/depgraph/{name}.sh", *words]
    done = subprocess.run(call, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=60)
    assert not done.stderr
    lines = [line.rstrip("\t").split("\t")[1:] for line in done.stdout.splitlines() if line.startswith("called\t")]
    return done.returncode, lines


def training(words: list[str]) -> argparse.Namespace:
    return parse_finetune_args(words[words.index("finetune.py") + 1 :])


def opening(name: str) -> str:
    """The comment that a script opens with, on one line."""
    lines = (FOLDER / f"{name}.sh").read_text().splitlines()
    comment = lines[1 : next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.removeprefix("#").strip() for line in comment)


def cost(spec: Any) -> Any:
    with torch.device("meta"):
        return count_complexity(build_model(spec, pretrained=False), example_inputs(spec, "meta"))


# --- the models ---


def cifar_spec(network: str, **kwargs: int) -> Any:
    path = f"{REPOSITORY}/examples/cifar_models.py:{network}"
    return describe_model(path, builder="file", kwargs=kwargs, input_size=32)


@pytest.mark.parametrize("name", CIFAR)
def test_the_models_cost_what_is_published(name: str):
    row = CIFAR[name]
    counted = cost(cifar_spec(row.network, num_classes=row.classes))
    assert (f"{counted.macs_paper / 1e6:.2f} M", format_params(counted.params, 2)) == (row.macs[0], row.params[0])


@pytest.mark.parametrize(
    ("network", "groups", "macs", "params"),
    [
        ("resnet56", 30, 127_115_914, 855_770),
        ("vgg19_bn", 16, 512_685_066, 20_040_522),
        ("densenet121", 120, 898_762_762, 6_956_298),
        ("mobilenet_v2", 25, 92_758_538, 2_236_682),
    ],
)
def test_all_of_the_models_but_their_logits_can_be_pruned(network: str, groups: int, macs: int, params: int):
    spec = cifar_spec(network)
    counted = cost(spec)
    assert (counted.macs_paper, counted.params) == (macs, params)
    graph = trace_groups(build_model(spec, pretrained=False).eval(), example_inputs(spec))
    assert len(graph.groups) == groups and list(graph.frozen) == ["classifier.weight:0"]


@pytest.mark.parametrize("name", IMAGENET)
def test_the_figures_of_pretrained_models_are_what_is_counted(name: str):
    row = IMAGENET[name]
    counted = cost(describe_model(row.model, builder=row.builder))
    assert (format_macs(counted.macs_paper, 2), format_params(counted.params, 2)) == (row.macs[0], row.params)
    share = float(row.budget.rstrip("%")) / 100 if "%" in row.budget else None
    assert share is None or format_macs(share * counted.macs_paper, 2) == row.macs[1]


# --- what stands in the scripts ---


def test_the_tables_cover_every_script():
    assert {path.stem for path in SCRIPTS} == CIFAR.keys() | IMAGENET.keys()


@script
def test_every_script_is_short_and_ends_in_the_users_flags(name: str):
    text = (FOLDER / f"{name}.sh").read_text()
    assert len(text.splitlines()) <= 25 and max(map(len, text.splitlines())) <= 120
    assert text.endswith('source scripts/depgraph/chain.sh "$@"\n')
    assert "Hardware: " in opening(name) and "GPU" in opening(name)


@pytest.mark.parametrize("name", CIFAR)
def test_the_comment_has_the_published_figures(name: str):
    row, text = CIFAR[name], opening(name)
    assert f"MACs {row.macs[0]} => {row.macs[1]}, params {row.params[0]} => {row.params[1]};" in text
    dense, sparse, pruned, finetuned = row.top1
    assert f"top-1 {dense} dense, {sparse} after the sparse phase, {pruned} just pruned, {finetuned} finetuned" in text
    assert f"128 images a step, {math.ceil(CIFAR_TRAIN / 128)} steps an epoch, 400 epochs" in text
    assert f"22 epochs of {math.ceil(DIGITS_TRAIN / 64)} steps" in text


@pytest.mark.parametrize("name", IMAGENET)
def test_the_comment_does_the_arithmetic_of_the_batch(name: str):
    row, text = IMAGENET[name], opening(name)
    total = row.processes * row.batch_size
    steps = math.ceil(IMAGENET_TRAIN / total)
    assert f"{row.processes} processes × {row.batch_size} images = {total} a step, {steps} steps" in text
    assert f"30 + {row.finetuning['epochs']} epochs" in text and f"Hardware: {row.processes} GPUs" in text
    fewer = re.search(r"NPROC_PER_NODE=(\d+) … -- --batch-size (\d+)", text)
    assert fewer is not None and int(fewer[1]) * int(fewer[2]) == total
    assert f"MACs {row.macs[0]} => {row.macs[1]}, params {row.params} => not known" in text
    assert "No figures come with the published script" in text


# --- what they run ---


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("images", [None, "images"])
def test_cifar_chains(name: str, images: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    row = CIFAR[name]
    found = {} if images is None else {f"CIFAR{row.classes}": images}
    status, (*trained, evaluated) = commands(name, tmp_path, **found)
    pruned = trained.pop(2)
    dense, sparse, finetuned = map(training, trained)
    args = parse_pruning(pruned[1:])
    monkeypatch.setattr(sys, "argv", evaluated)
    last = evaluate.parse_args()

    out = f"output/depgraph/{row.network}_{'digits' if images is None else f'cifar{row.classes}'}"
    cut = f"{out}/{name.rpartition('_')[2]}"
    assert status == 0 and dense.model == f"examples/cifar_models.py:{row.network}" and dense.no_pretrained
    assert (dense.output_dir, sparse.model) == (f"{out}/dense", f"{out}/dense/best.safetensors")
    assert (sparse.output_dir, args.model) == (f"{out}/sparse", f"{out}/sparse/last.safetensors")
    assert args.save_as == finetuned.model == f"{cut}/pruned.safetensors"
    assert (finetuned.output_dir, last.model) == (f"{cut}/finetuned", f"{cut}/finetuned/best.safetensors")
    assert {each.builder_file for each in (sparse, args, finetuned, last)} == {"examples/cifar_models.py"}
    assert (args.pruning_type, args.normalizer, args.ranking) == ("group_norm", "top", "global") and args.test_accuracy
    assert args.target_macs.value == pytest.approx(1 / row.speed_up, abs=1e-4) and args.target_macs.relative

    three = (dense, sparse, finetuned)
    assert {(each.resume, each.opt, each.momentum, each.weight_decay) for each in three} == {("auto", "sgd", 0.9, 5e-4)}
    assert [each.sparsify for each in three] == ["none", "group", "none"]
    everything = (*three, args, last)
    if images is None:
        assert {(each.dataset, each.workers) for each in everything} == {("digits", 0)}
        assert dict(dense.model_kwargs) == {"width": row.digits_width}
        assert sum(each.epochs for each in three) == 22 and {each.batch_size for each in three} == {64}
        assert {each.hflip for each in three} == {0} and args.steps == 20
        return
    assert {each.dataset for each in everything} == {f"torch/cifar{row.classes}"}
    assert {Path(each.data_path) for each in everything} == {tmp_path / "images"}
    assert {(each.batch_size, each.crop_padding, each.hflip) for each in three} == {(128, 4, 0.5)}
    assert not dense.model_kwargs and args.steps == 400 and sparse.sparsify_reg == 5e-4
    assert (dense.lr, dense.epochs, dense.lr_milestones) == (0.1, 200, [120, 150, 180])
    for each in (sparse, finetuned):
        assert (each.lr, each.epochs, each.lr_milestones) == (0.01, 100, [60, 80])
    assert {(each.lr_scheduler, each.lr_gamma) for each in three} == {("multisteplr", 0.1)}


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_chains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    row = IMAGENET[name]
    status, (sparse_words, pruned, finetuned_words, evaluated) = commands(name, tmp_path)
    for words in (sparse_words, finetuned_words):
        assert words[:2] == ["-m", "torch.distributed.run"] and f"--nproc_per_node={row.processes}" in words
    sparse, finetuned, args = training(sparse_words), training(finetuned_words), parse_pruning(pruned[1:])
    monkeypatch.setattr(sys, "argv", evaluated)
    last = evaluate.parse_args()
    assert status == 0 and (sparse.model, sparse.is_torchvision) == (row.model, row.builder == "torchvision")
    assert not sparse.no_pretrained and args.model == f"{sparse.output_dir}/last.safetensors"
    assert args.save_as == finetuned.model and last.model == f"{finetuned.output_dir}/best.safetensors"
    assert (args.pruning_type, args.normalizer, args.ranking, args.steps) == ("group_norm", "top", "global", 100)
    assert args.target_macs == parse_pruning(["--model", "x", "--target-macs", row.budget]).target_macs
    assert (sparse.sparsify, sparse.sparsify_reg, sparse.epochs, sparse.opt) == ("group", 5e-4, 30, "sgd")
    for each in (sparse, finetuned):
        assert (each.batch_size, each.resume, each.amp) == (row.batch_size, "auto", True)
    assert {key: getattr(finetuned, key) for key in row.finetuning} == row.finetuning
    assert finetuned.sparsify == "none"
    for each in (sparse, args, finetuned, last):
        assert (each.data_path, each.no_imagenet_mean_std) == ("data/imagenet", name == "vit_b16")
    _, (fewer, *_) = commands(name, tmp_path, NPROC_PER_NODE="2")
    assert "--nproc_per_node=2" in fewer


def test_flags_go_to_every_command_or_to_the_trainings_alone(tmp_path: Path):
    _, found = commands("vgg19_cifar100_8.9x", tmp_path, "--device", "cpu", "--", "--epochs", "1", STEPS="7")
    assert ["finetune.py" in words for words in found] == [True, True, False, True, False]
    for words in found:
        if "finetune.py" in words:
            assert words[-4:] == ["--device", "cpu", "--epochs", "1"] and training(words).epochs == 1
        else:
            assert words[-2:] == ["--device", "cpu"]
    assert parse_pruning(found[2][1:]).steps == 7


@pytest.mark.parametrize(("fail_at", "begun"), [("/dense ", 1), ("prune.py", 3), ("2.11x/finetuned ", 4)])
def test_a_command_that_fails_ends_the_script(fail_at: str, begun: int, tmp_path: Path):
    status, found = commands("resnet56_cifar10_2.11x", tmp_path, fail_at=fail_at)
    assert (status, len(found)) == (3, begun)


def test_a_pruned_model_is_kept_while_it_is_newer_than_the_sparse_one(tmp_path: Path):
    out = tmp_path / "output" / "depgraph" / "resnet56_digits"
    sparse, pruned = out / "sparse" / "last.safetensors", out / "2.57x" / "pruned.safetensors"
    for path in (sparse, pruned):
        path.parent.mkdir(parents=True)
        path.touch()
    for age, count in ((1, 4), (-1, 5)):
        os.utime(pruned, (sparse.stat().st_atime, sparse.stat().st_mtime + age))
        _, found = commands("resnet56_cifar10_2.57x", tmp_path)
        assert len(found) == count and ("prune.py" in [words[0] for words in found]) == (count == 5)


@pytest.mark.slow
def test_a_whole_chain_and_the_same_command_again(tmp_path: Path):
    for name in ("scripts", "examples", "isomorphic", "data"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    for command in REPOSITORY.glob("*.py"):
        shutil.copy(command, tmp_path)
    environment = os.environ | {"ISOMORPHIC_PYTHON": sys.executable, "CIFAR10": "", "STEPS": "3"}
    words = ["bash", "scripts/depgraph/resnet56_cifar10_2.11x.sh", "--device", "cpu", "--", "--max-steps", "4"]
    printed = []
    for _ in range(2):
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        printed.append(done.stdout)
    first, again = printed
    costs = re.search(r"^MACs: ([\d.]+) M => ([\d.]+) M", first, re.MULTILINE)
    assert costs is not None and float(costs[2]) <= 0.474 * float(costs[1])
    evaluated = re.search(r"MACs: ([\d.]+) M", first.partition("== evaluation")[2])
    assert evaluated is not None and f"{float(evaluated[1]):.2f}" == costs[2]
    assert again.count("finished, nothing left to do") == 3
    assert "== pruning: output/depgraph/resnet56_digits/2.11x/pruned.safetensors is there already" in again
    assert first.splitlines()[-1] == again.splitlines()[-1] and first.splitlines()[-1].startswith("Accuracy: ")
