"""The four commands read weights alike: of another trainer, with another head, at another size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from isomorphic.checkpoints.open import open_model, read_header
from isomorphic.models import build_model, describe_model
from isomorphic.provenance import file_sha256

KWARGS = {"embed_dim": 24, "depth": 1, "num_heads": 3}
NAMED = ["--model", "deit_tiny_patch16_224", "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]
SIZE = ["--input-size", "32", "--workers", "0", "--batch-size", "4"]
RECIPE = ["--epochs", "1", "--lr", "0.01", "--output-dir", "out"]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Images of three classes."""
    for split in ("train", "val"):
        for number, name in enumerate(("ant", "bee", "cat")):
            for copy in range(2):
                path = tmp_path / "data" / split / name / f"{copy}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (80 * number, 40 * copy, 9)).save(path)
    return ["--data-path", "data"]


@pytest.fixture
def lightning(tmp_path: Path) -> Path:
    """What Lightning writes of a model of seven classes."""
    torch.manual_seed(3)
    model = build_model(describe_model("deit_tiny_patch16_224", kwargs=KWARGS, num_classes=7, input_size=32))
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state | {"loss.weight": torch.ones(7)}, "epoch": 3}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_pruned_finetuned_and_evaluated_with_a_head_for_other_classes(
    call: Callable[..., Any], data: list[str], lightning: Path, tmp_path: Path
):
    told = "last.ckpt: taken from model.*, without loss.weight"
    weights = ["--checkpoint", "last.ckpt", *SIZE]
    done = call("prune.py", *NAMED, *weights, *data, "--pruning-type", "l2", "--save-as", "p.safetensors")
    assert (done.status, len(done.err)) == (1, 1)
    assert "the model has 7 classes but the data under data has 3: --num-classes auto gives it" in done.err[0]
    noise = ["--dataset", "synthetic", "--pruning-type", "l2"]
    done = call("prune.py", *NAMED, *weights, *noise, "--save-as", "p.safetensors")
    assert (done.status, done.err) == (0, []) and told in done.out
    header = read_header(tmp_path / "p.safetensors")
    assert header["kwargs"]["num_classes"] == 7 and header["provenance"]["parent"] == file_sha256(lightning)
    kept = open_model(tmp_path / "p.safetensors")[0].get_parameter("patch_embed.proj.bias")

    train = ["--model", "p.safetensors", "--num-classes", "auto", *SIZE, *data, *RECIPE]
    done = call("finetune.py", *train)
    assert (done.status, done.err) == (0, [])
    assert "New head for 3 classes in place of 7: deit_tiny_patch16_224 keeps" in done.out
    model, spec = open_model(tmp_path / "out" / "best.safetensors")
    assert spec.kwargs["num_classes"] == 3 and model.get_parameter("patch_embed.proj.bias").shape == kept.shape
    done = call("finetune.py", *train, "--resume", "auto")
    assert (done.status, done.err) == (0, []) and "finished, nothing left to do" in done.out
    done = call("evaluate.py", "--model", "out/best.safetensors", *data, "--workers", "0", "--input-size", "64")
    assert (done.status, done.err) == (0, []) and "resampled to the model's input size: pos_embed" in done.out


def test_other_commands_and_the_teacher_read_the_same_files(
    call: Callable[..., Any], data: list[str], lightning: Path, tmp_path: Path
):
    weights = ["--checkpoint", "last.ckpt", *SIZE]
    done = call("convnext_train.py", *NAMED, *weights, "--num-classes", "auto", *data, *RECIPE)
    assert (done.status, done.err) == (0, []) and "New head for 3 classes in place of 7" in done.out
    provenance = read_header(tmp_path / "out" / "best.safetensors")["provenance"]
    assert provenance["parent"] == file_sha256(lightning)
    torch.manual_seed(0)
    teacher = build_model(describe_model("test_resnet", num_classes=3))
    torch.save({"net": teacher.state_dict()}, tmp_path / "teacher.pth")
    words = ["--teacher-model", "test_resnet", "--teacher-checkpoint", "teacher.pth"]
    done = call("finetune.py", *NAMED, *weights, "--num-classes", "3", *data, *RECIPE[:4], *words)
    assert (done.status, done.err) == (0, [])
    done = call("evaluate.py", *NAMED, *weights, "--dataset", "synthetic")
    assert (done.status, done.err) == (0, []) and "Evaluating last.ckpt..." in done.out


@pytest.mark.parametrize(
    ("command", "words", "message", "status"),
    [
        ("prune.py", ["--checkpoint", "none.ckpt"], "no such checkpoint: none.ckpt", 1),
        ("prune.py", ["--checkpoint", "w.safetensors", "--save-as", "./w.safetensors"], "is the model to prune", 1),
        ("finetune.py", ["--no-use-ema"], "there is no checkpoint", 2),
        ("finetune.py", ["--teacher-checkpoint", "x.pth"], "--teacher-checkpoint needs --teacher-model", 2),
        ("evaluate.py", ["--checkpoint", "strange.pth"], "strange.pth does not fit the model: cls_token is missing", 1),
    ],
)
def test_weights_that_cannot_be_had(
    command: str, words: list[str], message: str, status: int, call: Callable[..., Any], tmp_path: Path
):
    torch.save({"model": {"a": torch.ones(1), "b": torch.ones(1)}}, tmp_path / "strange.pth")
    done = call(command, *NAMED, *SIZE, "--dataset", "synthetic", *words)
    assert done.status == status and len(done.err) == 1 and message in done.err[0]


def test_weights_of_others_are_converted(call: Callable[..., Any], lightning: Path, tmp_path: Path):
    words = ["--name", "deit_tiny_patch16_224", *NAMED[2:], "--input-size", "32"]
    done = call("tools/convert.py", "last.ckpt", "c.safetensors", *words)
    assert (done.status, done.err) == (0, [])
    assert read_header(tmp_path / "c.safetensors")["kwargs"]["num_classes"] == 7
