"""A network of the user's own, in a file of the user's own, through all commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isomorphic import load_model
from isomorphic.checkpoints.open import read_header
from isomorphic.provenance import file_sha256

LAYERS = """
from torch import nn

class ConvBN(nn.Sequential):
    def __init__(self, inputs, outputs, stride=1):
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU())
"""
NET = """
import torch
from torch import nn
from own_layers import ConvBN

class Net(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.width = width  # of each half: the forward splits by it
        self.stem = ConvBN(3, 2 * width, stride=2)
        self.left = nn.Sequential(ConvBN(width, 2 * width), ConvBN(2 * width, width))
        self.body = nn.Sequential(ConvBN(2 * width, 3 * width, stride=2), ConvBN(3 * width, 2 * width))
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        left, right = self.stem(x).split((self.width, self.width), dim=1)
        x = self.body(torch.cat((self.left(left), right), dim=1))
        return self.head(x.mean((2, 3)))

def build(width=8, num_classes=1000):
    return Net(width, num_classes)
"""
DATA = ["--dataset", "digits", "--workers", "0", "--device", "cpu"]
MODEL = ["--model", "code/net.py:build", "--no-pretrained", "--input-size", "16", *DATA]
PRUNED = ["--model", "pruned.safetensors", "--builder-file", "code/net.py", *DATA]


@pytest.fixture(autouse=True)
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "own_layers.py").write_text(LAYERS)
    (folder / "net.py").write_text(NET)
    return folder


def test_a_network_of_ones_own_is_pruned_finetuned_and_evaluated(
    start: Callable[..., Any], call: Callable[..., Any], tmp_path: Path, code: Path
):
    done = start("prune.py", *MODEL, "--batch-size", "64", "--taylor-batches", "2", "--target-macs", "60%",
                 "--test-accuracy", "--results-file", "pruned.json", "--save-as", "pruned.safetensors")  # fmt: skip
    assert (done.status, done.err) == (0, [])
    after = next(line for line in done.out.splitlines() if line.startswith("After: "))
    results = json.loads((tmp_path / "pruned.json").read_text())

    # the file names the code, and neither brings it along nor says where it lay
    header = read_header(tmp_path / "pruned.safetensors")
    assert (header["builder"], header["name"], header["kwargs"]) == ("file", "net.py:build", {"num_classes": 10})
    assert header["sha256"] == file_sha256(code / "net.py")
    model: Any = load_model(tmp_path / "pruned.safetensors", builder_file=code / "net.py")
    dense: Any = load_model(f"{code}/net.py:build", kwargs={"num_classes": 10})
    pruned_params, dense_params = (sum(p.numel() for p in m.parameters()) for m in (model, dense))
    assert pruned_params == results["params"] < 0.8 * dense_params
    assert header["structure"]["attributes"][""] == {"width": model.width}
    assert model.width == model.get_parameter("stem.0.weight").shape[0] // 2 < dense.width
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 10)

    # read back in a process of its own, it scores what prune.py said
    done = start("evaluate.py", *PRUNED, "--results-file", "evaluated.json")
    assert (done.status, done.err) == (0, [])
    assert done.out.splitlines()[-1] == after.removeprefix("After: ")
    evaluated = json.loads((tmp_path / "evaluated.json").read_text())
    assert (evaluated["macs"], evaluated["params"]) == (results["macs"], results["params"])

    # and learns, from a teacher by its code and from one by its checkpoint, to a file that is read in the same way
    training = ["--epochs", "1", "--max-steps", "3", "--hflip", "0", "--lr", "0.01"]
    for teacher, folder in (("code/net.py:build", "first"), ("first/best.safetensors", "second")):
        words = [*training, "--no-pretrained", "--teacher-model", teacher, "--output-dir", folder]
        done = call("finetune.py", *PRUNED, *words)
        assert (done.status, done.err) == (0, [])
        provenance = read_header(tmp_path / folder / "best.safetensors")["provenance"]
        assert provenance["teacher"] == file_sha256(tmp_path / teacher.removesuffix(":build"))
    trained = call("evaluate.py", "--model", "second/best.safetensors", *PRUNED[2:])
    assert (trained.status, trained.out.splitlines()[-1]) == (0, done.out.splitlines()[-1])


def test_a_teacher_may_have_another_file_than_its_student(call: Callable[..., Any], code: Path, tmp_path: Path):
    (code / "big.py").write_text(NET.replace("width=8", "width=12"))
    training = ["--max-steps", "1", "--hflip", "0", "--no-pretrained", *DATA]
    big = ["--model", "code/big.py:build", "--input-size", "16", *training, "--output-dir", "big"]
    assert call("finetune.py", *big).status == 0
    student = [*MODEL, *training, "--teacher-model", "big/best.safetensors"]
    done = call("finetune.py", *student, "--output-dir", "new")
    assert done.status == 1 and "big/best.safetensors is a model of big.py" in done.err[0] and len(done.err) == 1
    done = call("finetune.py", *student, "--teacher-builder-file", "code/big.py", "--output-dir", "new")
    assert (done.status, done.err) == (0, [])
    assert read_header(tmp_path / "new" / "best.safetensors")["name"] == "net.py:build"


def test_code_that_changed_is_no_continuation_of_a_run(call: Callable[..., Any], code: Path):
    run = [*MODEL, "--max-steps", "1", "--hflip", "0", "--output-dir", "run", "--resume", "auto"]
    assert call("finetune.py", *run).status == 0
    (code / "net.py").write_text(NET + "\n# now with a comment\n")
    done = call("finetune.py", *run)
    assert done.status == 1 and len(done.err) == 1 and "parent" in done.err[0]


# What is run, and a part of the one line that is said.
CASES: dict[str, tuple[str, list[str], str]] = {
    "no such file": ("prune.py", ["--model", "code/nit.py:build"], "no such file: code/nit.py"),
    "no factory": ("evaluate.py", ["--model", "code/net.py"], "as in code/net.py:build"),
    "wrong factory": ("finetune.py", ["--model", "code/net.py:make"], "'make' is not in it (it defines Net, build)"),
    "file that raises": ("prune.py", ["--model", "code/broken.py:build"], "division by zero (line 3)"),
    "factory that raises": ("prune.py", ["--model", "code/net.py:Net"], "missing 2 required positional arguments"),
    "wrong size": ("prune.py", ["--model", "code/fixed.py:Fixed"], "(without --input-size) does not take"),
    "classes": ("evaluate.py", ["--model", "code/net.py:build"], "1000 classes but dataset 'digits' has 10"),
    "checkpoint without its file": ("evaluate.py", ["--model", "net.safetensors"], "--builder-file path/to/net.py"),
    "checkpoint with another file": (
        "prune.py", ["--model", "net.safetensors", "--builder-file", "code/own_layers.py"], "own_layers.py differs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(case: str, call: Callable[..., Any], code: Path, tmp_path: Path):
    (code / "broken.py").write_text("\nwidth = 8\nhalf = width / 0\n")
    (code / "fixed.py").write_text(
        "from torch import nn\nclass Fixed(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(192, 10))\n"
    )
    if "checkpoint" in case:
        assert call("finetune.py", *MODEL, "--max-steps", "1", "--output-dir", ".").status == 0
        (tmp_path / "best.safetensors").rename(tmp_path / "net.safetensors")
    command, words, message = CASES[case]
    done = call(command, *words, *DATA)
    assert done.status == 1 and len(done.err) == 1, done
    assert done.err[0].startswith(f"{command}: ") and message in done.err[0]
