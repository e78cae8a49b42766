"""Bad input: one line on stderr, a non-zero exit status, no traceback, and nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from isomorphic.checkpoints.save import save_model
from isomorphic.models import build_model, describe_model

TINY = {"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
MODEL = ["--model", "convnext_atto", "--no-pretrained", "--input-size", "32", "--workers", "0", "--batch-size", "4",
         "--model-kwargs", "dims=[8, 8, 8, 8]", "depths=[1, 1, 1, 1]"]  # fmt: skip
DIGITS = ["--dataset", "digits"]
NOISE = ["--dataset", "synthetic", "--synthetic-size", "4", "--batch-size", "2", "--workers", "0"]
SAVE = ["--save-as", "new/folder/pruned.safetensors", "--taylor-batches", "1"]
PRUNE, EVALUATE = "prune.py", "evaluate.py"

# What is run, and a part of the one line that is said; then the status, where it is not 1.
CASES: dict[str, tuple[Any, ...]] = {
    "no data folder": (EVALUATE, [*MODEL, "--data-path", "nowhere"], "no data folder nowhere/val"),
    "no data folder to score on": (PRUNE, [*MODEL, *SAVE, "--data-path", "nowhere"], "no data folder nowhere/val"),
    "no training images": (PRUNE, [*MODEL, *SAVE, "--data-path", "only_val"], "no data folder only_val/train"),
    "empty class folder": (EVALUATE, [*MODEL, "--data-path", "empty"], "no images in class folder empty/val/dog"),
    "empty class folder to score on": (PRUNE, [*MODEL, *SAVE, "--data-path", "empty"], "folder empty/train/dog"),
    "unreadable image": (EVALUATE, [*MODEL, "--data-path", "damaged"], "cannot read image damaged/val/dog/0.png"),
    "unreadable image to score on": (PRUNE, [*MODEL, *SAVE, "--data-path", "damaged"], "damaged/train/dog/0.png"),
    "unknown data set": (EVALUATE, [*MODEL, "--dataset", "nonesuch"], "unknown dataset 'nonesuch'"),
    "torchvision's model": (PRUNE, ["--model", "mobilenet_v2", *DIGITS, *SAVE], "torchvision has it: --is-torchvision"),
    "unknown model": (PRUNE, ["--model", "nonesuch", *DIGITS, *SAVE], "unknown timm model: nonesuch"),
    "arguments that the model refuses": (PRUNE, [*MODEL, "depths=5", *DIGITS, *SAVE], "cannot build convnext_atto"),
    "truncated checkpoint": (PRUNE, ["--model", "short.safetensors", *DIGITS, *SAVE], "not a whole safetensors file"),
    "truncated checkpoint to evaluate": (EVALUATE, ["--model", "short.safetensors", *DIGITS], "short.safetensors"),
    "missing checkpoint": (EVALUATE, ["--model", "missing.safetensors", *DIGITS], "no such checkpoint: missing"),
    "arguments beside a checkpoint": (
        PRUNE, ["--model", "seven.safetensors", "--model-kwargs", "depths=5", *SAVE], "leave out",
    ),
    "size that a checkpoint does not take": (
        EVALUATE, ["--model", "seven.safetensors", "--input-size", "16", "--dataset", "synthetic"], "16×16 pixels",
    ),
    "arguments beside a whole model": (
        EVALUATE, ["--model", "whole.pth", "--model-kwargs", "num_classes=3", *DIGITS], "holds a whole model",
    ),
    "library beside a whole model": (PRUNE, ["--model", "whole.pth", "--is-torchvision", *SAVE], "holds a whole model"),
    "model without a layer that learns": (EVALUATE, ["--model", "relu.pth", *NOISE], "is no classifier of 1000"),
    "linear layer alone": (EVALUATE, ["--model", "linear.pth", *NOISE], "linear.pth does not take images of 224×224"),
    "classes that a model does not have": (
        EVALUATE, ["--model", "claims.pth", *NOISE], "claims.pth is no classifier of 2000 classes: for one image it",
    ),
    "classes that a checkpoint does not have": (
        EVALUATE, ["--model", "claims.safetensors", *NOISE], "is no classifier of 2000 classes",
    ),
    "heads that do not divide": (EVALUATE, ["--model", "heads.safetensors", *NOISE], "does not take images of 16×16"),
    "layer without numbers": (EVALUATE, ["--model", "empty.safetensors", *NOISE], "does not take images of 32×32"),
    "budget below what is reachable": (PRUNE, [*MODEL, *DIGITS, *SAVE, "--target-macs", "1K"], "7.8520 K MACs and"),
    "budget above the dense model": (PRUNE, [*MODEL, *DIGITS, *SAVE, "--target-params", "1G"], "is met already"),
    "latency out of reach": (PRUNE, [*MODEL, *DIGITS, *SAVE, "--target-latency", "1us"], "0.001 ms is out of reach"),
    "more blocks than there are": (PRUNE, [*MODEL, *DIGITS, *SAVE, "--remove-blocks", "1"], "cannot remove 1 blocks"),
    "blocks beside a plan": (
        PRUNE, [*MODEL, "--remove-blocks", "1", "--from-plan", "x.json"], "brings its own choice", 2,
    ),
    "seed that nothing takes": (EVALUATE, [*MODEL, *DIGITS, "--seed", "9" * 20], "is more than 2⁶³ - 1", 2),
    "weights of an unset variable": (EVALUATE, [*MODEL, *DIGITS, "--checkpoint", ""], "--checkpoint: it is empty", 2),
    "latency without a unit": (PRUNE, [*MODEL, "--target-latency", "5"], "write 5ms, 0.5s, 800us or 50%", 2),
    "two budgets, one of time": (PRUNE, [*MODEL, "--target-macs", "1G", "--target-latency", "5ms"], "not allowed", 2),
    "classes of a checkpoint": (
        EVALUATE, ["--model", "seven.safetensors", *DIGITS], "the model has 7 classes but dataset 'digits' has 10",
    ),
    "classes of a checkpoint to prune": (PRUNE, ["--model", "seven.safetensors", *DIGITS, *SAVE], "7 classes"),
    "classes of the arguments": (PRUNE, [*MODEL, "num_classes=7", *DIGITS, *SAVE], "7 classes but dataset 'digits'"),
    "model to a file's inside": (PRUNE, [*MODEL, *DIGITS, "--save-as", "file/x.safetensors"], "cannot write file/x"),
    "plan to a file's inside": (PRUNE, [*MODEL, *DIGITS, *SAVE, "--plan-file", "file/x.json"], "cannot write file/x"),
    "report to a file's inside": (PRUNE, [*MODEL, *DIGITS, *SAVE, "--report", "file/x.png"], "cannot write file/x"),
    "results to a file's inside": (
        EVALUATE, [*MODEL, *DIGITS, "--results-file", "file/x.json"], "cannot write file/x.json",
    ),
    "model over itself": (
        PRUNE, ["--model", "seven.safetensors", "--save-as", "./seven.safetensors"], "is the model to prune",
    ),
    "missing plan": (PRUNE, [*MODEL, *DIGITS, *SAVE, "--from-plan", "missing.json"], "cannot read the plan missing"),
    "no plan": (PRUNE, [*MODEL, *DIGITS, *SAVE, "--from-plan", "file"], "file is not a pruning plan"),
    "plan of another model": (PRUNE, [*MODEL, *DIGITS, *SAVE, "--from-plan", "plan.json"], "belongs to another model"),
    "unknown device": (PRUNE, [*MODEL, *DIGITS, *SAVE, "--device", "abacus"], "--device abacus: not to be had"),
    "unknown flag": (PRUNE, [*MODEL, *DIGITS, *SAVE, "--nonesuch"], "unrecognized arguments: --nonesuch", 2),
    "unknown flag of evaluate.py": (EVALUATE, [*MODEL, "--pruning-ratio", "0.5"], "unrecognized arguments", 2),
    "two budgets": (PRUNE, [*MODEL, "--target-macs", "1G", "--target-params", "1M"], "not allowed with", 2),
    "ratio beyond 1": (PRUNE, [*MODEL, "--pruning-ratio", "1.5"], "1.5 is not in [0, 1)", 2),
    "budget of more than everything": (PRUNE, [*MODEL, "--target-macs", "150%"], "more than the dense model", 2),
    "checkpoint of an unknown kind": (PRUNE, [*MODEL, "--save-as", "x.pth"], "must end in .safetensors", 2),
    "picture of an unknown kind": (PRUNE, [*MODEL, "--report", "x.pdf"], "must end in .png", 2),
    "results of an unknown kind": (PRUNE, [*MODEL, "--results-file", "x.txt"], "must end in .json or .csv", 2),
}  # fmt: skip


def make_images(folder: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 30)).save(folder / split / name / "0.png")


def make_contradictions(root: Path) -> None:
    """Files that can be read, and hold no classifier or not the one that they speak of."""
    torch.save(nn.Sequential(nn.ReLU()), root / "relu.pth")
    torch.save(nn.Linear(32, 10), root / "linear.pth")
    spec = describe_model("test_resnet", kwargs={"num_classes": 10}, input_size=32)
    model: Any = timm.create_model("resnet18", num_classes=10, channels=(4, 4, 8, 8))
    torch.save(model, root / "whole.pth")
    model.num_classes = 2000
    torch.save(model, root / "claims.pth")
    model = build_model(spec)
    model.num_classes = 2000
    save_model(root / "claims.safetensors", model, spec, provenance={})
    model.num_classes, model.fc.bias = 10, nn.Parameter(torch.zeros(0))
    save_model(root / "empty.safetensors", model, spec, provenance={})
    vit = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10}
    spec = describe_model("deit_tiny_patch16_224", kwargs=vit)
    model = build_model(spec)
    model.blocks[0].attn.num_heads = 5
    save_model(root / "heads.safetensors", model, spec, provenance={})


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all the files that the cases name."""
    root = tmp_path_factory.mktemp("materials")
    for name in ("empty", "damaged", "only_val"):
        make_images(root / name)
    for split in ("train", "val"):
        (root / "empty" / split / "dog" / "0.png").unlink()
        (root / "damaged" / split / "dog" / "0.png").write_text("not an image")
    shutil.rmtree(root / "only_val" / "train")
    (root / "file").write_text("in the way")
    (root / "plan.json").write_text(
        '{"format": 2, "groups": {"elsewhere.weight:0": {"units": 1, "blocks": 1, "kept": [0]}}}'
    )
    spec = describe_model("convnext_atto", kwargs=TINY, num_classes=7, input_size=32)
    save_model(root / "seven.safetensors", build_model(spec), spec, provenance={})
    make_contradictions(root)
    whole = (root / "seven.safetensors").read_bytes()
    (root / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(case: str, call: Callable[..., Any], materials: Path, tmp_path: Path):
    shutil.copytree(materials, tmp_path, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    command, words, message, *status = CASES[case]
    done = call(command, *words)
    expected = status[0] if status else 1
    assert done.status == expected
    assert len(done.err) == 1 and done.err[0].startswith(f"{command}: ") and message in done.err[0]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_a_hub_out_of_reach_is_one_line(start: Callable[..., Any], tmp_path: Path):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = start(PRUNE, "--model", "convnext_atto", *SAVE, "--dataset", "synthetic", **environment)
    assert done.status == 1 and len(done.err) == 1
    assert done.err[0].startswith("prune.py: cannot get the pretrained weights of convnext_atto")
    assert "--no-pretrained" in done.err[0]
    assert not (tmp_path / "new").exists()
