"""The commands on released `.pth` files: measured as they are, converted, trained; hostile ones do nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from isomorphic.checkpoints.open import load_model, read_header

RELEASED = Path(__file__).parents[1] / "data" / "legacy"
SMALL_DATA = ["--dataset", "synthetic", "--synthetic-size", "4", "--batch-size", "2", "--workers", "0"]
# Of each released file: what else its commands need, its MACs and its params.
FILES: dict[str, tuple[list[str], int, int]] = {
    "deit": ([], 770544, 42762),
    "deit_finetuned": ([], 770544, 42762),
    "swin": ([], 1781416, 18582),
    "convnext_finetuned": (["--input-size", "64"], 1119530, 37538),
    "mobilenet_v2": (["--input-size", "64"], 1637666, 131378),
}


@pytest.mark.parametrize("version", [pytest.param("0.9.2", marks=pytest.mark.slow), "1.0.7"])
@pytest.mark.parametrize("stem", FILES)
def test_a_released_file_is_measured_and_converted(stem: str, version: str, call: Callable[..., Any], tmp_path: Path):
    flags, macs, params = FILES[stem]
    path = str(RELEASED / f"timm_{version}" / f"{stem}.pth")
    done = call("tools/convert.py", path, "out/kept.safetensors", *flags)
    assert done.status == 0 and done.out.splitlines()[-1] == "Saving the converted model to out/kept.safetensors"
    results = []
    for model, more in ((path, flags), ("out/kept.safetensors", [])):
        done = call("evaluate.py", "--model", model, *more, *SMALL_DATA, "--results-file", "results.json")
        assert done.status == 0
        results.append(json.loads((tmp_path / "results.json").read_text()))
        assert (results[-1]["macs"], results[-1]["params"]) == (macs, params)
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-5)
    provenance = read_header(tmp_path / "out" / "kept.safetensors")["provenance"]
    assert provenance["source"] == f"{stem}.pth" and len(provenance["parent"]) == 64 and provenance["macs"] == macs


def test_a_released_file_is_finetuned_and_what_that_saves_loads(call: Callable[..., Any], tmp_path: Path):
    path = str(RELEASED / "timm_0.9.2" / "swin.pth")
    done = call("finetune.py", "--model", path, *SMALL_DATA, "--epochs", "1", "--max-steps", "1", "--output-dir", "run")
    assert done.status == 0 and "MACs: 1.7814 M, Params: 18.5820 K" in done.out
    tuned = load_model(tmp_path / "run" / "last.safetensors")
    assert sum(p.numel() for p in tuned.parameters()) == 18582
    before = torch.cat([p.flatten() for p in load_model(path).parameters()])
    assert not torch.equal(torch.cat([p.flatten() for p in tuned.parameters()]), before)


def test_a_released_file_is_pruned_further(call: Callable[..., Any], tmp_path: Path):
    path = str(RELEASED / "timm_0.9.2" / "deit.pth")
    flags = ["--pruning-type", "l1", "--target-macs", "50%", "--save-as", "x.safetensors", "--self-check"]
    done = call("prune.py", "--model", path, *SMALL_DATA, *flags)
    assert done.status == 0 and "Params: 42.76 K => " in done.out and "Self-check passed" in done.out
    assert sum(p.numel() for p in load_model(tmp_path / "x.safetensors").parameters()) < 30000


def test_a_name_that_the_file_does_not_tell_is_given(call: Callable[..., Any], tmp_path: Path):
    torch.save(torchvision.models.mobilenet_v3_small(num_classes=5), tmp_path / "unknown.pth")
    done = call("tools/convert.py", "unknown.pth", "x.safetensors")
    assert done.status == 1 and len(done.err) == 1 and "it wants torchvision.models.mobilenetv3" in done.err[0]
    torch.save(torchvision.models.resnet18(num_classes=5), tmp_path / "resnet.pth")
    tuning = ["--output-dir", "run", "--epochs", "1"]
    for command, flags in (("tools/convert.py", ["resnet.pth", "x.safetensors"]), ("finetune.py", tuning)):
        model = [] if command.startswith("tools") else ["--model", "resnet.pth", *SMALL_DATA]
        done = call(command, *model, *flags)
        assert done.status == 1 and len(done.err) == 1
        assert "could not be saved" in done.err[0] and "tools/convert.py resnet.pth OUT.safetensors" in done.err[0]
        assert "--name NAME" in done.err[0]
    assert not (tmp_path / "run").exists() and not (tmp_path / "x.safetensors").exists()
    done = call("tools/convert.py", "resnet.pth", "x.safetensors", "--name", "resnet18", "--is-torchvision",
                "--input-size", "32")  # fmt: skip
    assert done.status == 0 and "Params: 11.1791 M" in done.out
    model = load_model(tmp_path / "x.safetensors")
    assert isinstance(model, torchvision.models.ResNet) and model.fc.out_features == 5


@pytest.mark.parametrize("flags", [[], ["--use-ema"], ["--no-use-ema"]], ids=str)
def test_averaged_or_raw_weights_are_converted(flags: list[str], call: Callable[..., Any], tmp_path: Path):
    path = RELEASED / "timm_1.0.7" / "convnext_finetuned.pth"
    name = ["--name", "convnext_tiny"]  # it says convnext_base, which takes longer
    assert call("tools/convert.py", str(path), "x.safetensors", "--input-size", "64", *name, *flags).status == 0
    stored = torch.load(path.with_suffix(".io.pt"), weights_only=True)
    expected = stored["logits_state_dict" if flags == ["--no-use-ema"] else "logits"]
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path / "x.safetensors")(stored["input"]), expected, atol=1e-4)


class Bomb:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("code-was-run", "w")


def small() -> nn.Module:
    return timm.create_model("resnet18", num_classes=10, channels=(4, 4, 8, 8))


HOSTILE: dict[str, Callable[[], Any]] = {
    "bare": Bomb,
    "beside weights": lambda: {"model": small(), "args": argparse.Namespace(name=Bomb())},
    "after weights": lambda: {"state_dict": small().state_dict(), "optimizer": [Bomb()]},
}
COMMANDS: dict[str, list[str]] = {
    "prune.py": ["--model", "bomb.pth", "--save-as", "new/x.safetensors", "--taylor-batches", "1", *SMALL_DATA],
    "finetune.py": ["--model", "bomb.pth", "--output-dir", "new", "--epochs", "1", *SMALL_DATA],
    "evaluate.py": ["--model", "bomb.pth", *SMALL_DATA],
    "tools/convert.py": ["bomb.pth", "new/x.safetensors"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("content", HOSTILE)
def test_a_pickle_that_would_run_something_is_refused(
    content: str, command: str, call: Callable[..., Any], tmp_path: Path
):
    torch.save(HOSTILE[content](), tmp_path / "bomb.pth")
    done = call(command, *COMMANDS[command])
    assert done.status == 1 and len(done.err) == 1
    assert "bomb.pth is refused: it wants io.open" in done.err[0].replace("_io.", "io.")
    assert "--trust-checkpoint" in done.err[0]
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.pth"]


def test_a_trusted_file_is_loaded_all_the_same(call: Callable[..., Any], tmp_path: Path):
    torch.save({"model": small(), "args": Bomb()}, tmp_path / "bomb.pth")
    flags = ["--input-size", "32", "--trust-checkpoint"]
    assert call("evaluate.py", "--model", "bomb.pth", *SMALL_DATA, *flags).status == 0
    assert (tmp_path / "code-was-run").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_that_was_kept_in_half_precision_is_used(dtype: torch.dtype, call: Callable[..., Any], tmp_path: Path):
    torch.save(small().to(dtype), tmp_path / "half.pth")
    done = call("tools/convert.py", "half.pth", "x.safetensors", "--name", "resnet18", "--input-size", "32",
                "--model-kwargs", "channels=[4, 4, 8, 8]")  # fmt: skip
    assert (done.status, done.err) == (0, [])
    accuracies = []
    for model in ("half.pth", "x.safetensors"):
        done = call("evaluate.py", "--model", model, "--input-size", "32", *SMALL_DATA)
        assert (done.status, done.err) == (0, [])
        accuracies.append(done.out.splitlines()[-1])
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize(
    ("flags", "message", "status"),
    [
        (["linear.pth", "x.safetensors"], "linear.pth does not take images of 224×224 pixels", 1),
        (["claims.pth", "x.safetensors", "--input-size", "32"], "claims.pth is no classifier of 2000 classes", 1),
        (["relu.pth", "x.safetensors"], "relu.pth is no classifier of 1000 classes", 1),
        (["swin.pth", "x.safetensors", "--model-kwargs", "img_size=56"], "swin.pth holds a whole model", 1),
        (["short.pth", "x.safetensors"], "short.pth is not a whole file that torch.save wrote", 1),
        (["none.pth", "x.safetensors"], "no such checkpoint: none.pth", 1),
        (["swin.pth", "x.safetensors", "--input-size", "64"], "64×64 pixels", 1),
        (["swin.pth", "x.safetensors", "--use-ema"], "holds no averaged weights", 1),
        (["swin.pth", "x.safetensors", "--name", "resnet18"], "could not be saved", 1),
        (["swin.pth", "x.safetensors", "--name", "nonesuch"], "unknown timm model: nonesuch", 1),
        (["swin.pth", "short.pth/x.safetensors"], "cannot write short.pth/x.safetensors", 1),
        (["swin.pth", "swin.pth"], "swin.pth must end in .safetensors", 2),
        (["x.safetensors", "y.safetensors"], "x.safetensors must end in .pth", 2),
        (["swin.pth", "x.safetensors", "--is-torchvision"], "--is-torchvision needs --name", 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_converted_is_said_in_one_line(
    flags: list[str], message: str, status: int, call: Callable[..., Any], tmp_path: Path
):
    whole = (RELEASED / "timm_1.0.7" / "swin.pth").read_bytes()
    (tmp_path / "swin.pth").write_bytes(whole)
    (tmp_path / "short.pth").write_bytes(whole[: len(whole) // 2])
    torch.save(nn.Linear(32, 10), tmp_path / "linear.pth")
    torch.save(nn.Sequential(nn.ReLU()), tmp_path / "relu.pth")
    claims: Any = small()
    claims.num_classes = 2000
    torch.save(claims, tmp_path / "claims.pth")
    before = sorted(tmp_path.iterdir())
    done = call("tools/convert.py", *flags)
    assert done.status == status and len(done.err) == 1 and message in done.err[0]
    assert sorted(tmp_path.iterdir()) == before
