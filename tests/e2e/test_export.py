"""tools/export.py, and models of the hub in every command, as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import isomorphic as iso
from isomorphic import progress
from isomorphic.checkpoints import hub
from isomorphic.checkpoints.open import read_header
from tests.stub_hub import StubHub, stub_hub
from tests.versions import needs_newest_export

pytestmark = needs_newest_export

REPOSITORY = Path(__file__).resolve().parents[2]
DIGITS = REPOSITORY / "pretrained" / "digits_deit.safetensors"
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    from huggingface_hub import constants

    with stub_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setenv("HF_TOKEN", "nobody")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        hub.fetch.cache_clear()
        yield served
        hub.fetch.cache_clear()


def test_a_checkpoint_as_onnx(call: Callable, tmp_path: Path):
    for name in LIBRARIES:
        pytest.importorskip(name, reason="needs the libraries of requirements-export.txt")
    done = call("tools/export.py", str(DIGITS), "out/digits.onnx", "--opset", "21", "--latency")
    lines = done.out.splitlines()
    assert (done.status, done.err) == (0, [])
    assert lines[0].startswith("out/digits.onnx: ") and lines[0].endswith(" MB, opset 21, any batch size")
    assert lines[1].startswith("Largest difference: ") and float(lines[1].split()[2]) < 1e-5
    assert lines[2].startswith("Latency: torch ") and ", onnxruntime " in lines[2]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["digits.onnx"]


def test_a_model_by_name_for_one_batch_size_in_half(call: Callable, tmp_path: Path):
    kwargs = ["depths=[1,1,1,1]", "dims=[8,8,16,16]", "num_classes=10"]
    options = ["--no-pretrained", "--input-size", "32", "--fixed-batch", "2", "--half", "--model-kwargs", *kwargs]
    done = call("tools/export.py", "convnext_atto", "net.pt2", *options)
    assert (done.status, done.err) == (0, [])
    assert "batches of 2 only" in done.out and "at most 2e-02 (batch 2)" in done.out
    written = torch.export.load(tmp_path / "net.pt2").module()
    assert written(torch.zeros(2, 3, 32, 32).half()).shape == (2, 10)


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(16, 8), nn.Linear(8, 3)

    def forward(self, ids, mask):
        return {"scores": (self.head(self.table(ids)) * mask[..., None]).sum(1)}

def build():
    return Net()

def batches(split):
    yield {"ids": torch.randint(16, (4, 6)), "mask": torch.ones(4, 6)}, torch.zeros(4)
"""


def test_a_user_s_own_model_takes_what_its_batches_hold(call: Callable, tmp_path: Path):
    (tmp_path / "net.py").write_text(OWN)
    done = call("tools/export.py", "net.py:build", "net.pt2")
    assert (done.status, done.err) == (0, []) and "any batch size" in done.out
    written = torch.export.load(tmp_path / "net.pt2").module()
    found = written(ids=torch.ones(5, 6, dtype=torch.long), mask=torch.ones(5, 6))
    assert found["scores"].shape == (5, 3)


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["OUT.tflite"], 2, "OUT.tflite must end in .onnx, .pt2, or / for a folder for the hub (--help lists"),
        (["deit_4.2G"], 2, "deit_4.2G must end in .onnx, .pt2, or / for a folder"),
        (["net.pt2", "--opset", "18"], 2, "--opset is of ONNX, and net.pt2 is none"),
        (["net/", "--half"], 2, "--half is of .onnx and .pt2, and net/ is a folder"),
        (["net.pt2", "--push-to-hub", "me/net"], 2, "--push-to-hub uploads a folder: OUT must end in /, unlike net"),
        (["net.pt2", "--hlf"], 2, "unrecognized arguments: --hlf"),
        (["net.onnx", "--opset", "0"], 2, "argument --opset: 0 is less than 1"),
        (["net.onnx", "--opset", "99"], 1, "there is no opset 99 to write: choose one of 18 to "),
        (["code/net.pt2"], 1, "cannot write code/net.pt2: Not a directory"),
        (["code/net.onnx"], 1, "cannot write code/net.onnx: Not a directory"),
        (["code/net/"], 1, "cannot write code/net"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    call: Callable, tmp_path: Path, words: list[str], status: int, told: str
):
    (tmp_path / "code").write_text("a file")
    done = call("tools/export.py", str(DIGITS), *words)
    assert done.status == status and len(done.err) == 1 and done.err[0].startswith(f"export.py: {told}")
    assert [file.name for file in tmp_path.iterdir()] == ["code"]


def test_what_it_has_not_written_is_not_replaced(call: Callable, tmp_path: Path):
    folder = tmp_path / "net"
    folder.mkdir()
    for name in ("net.pt2", "empty.pt2", "net/README.md", "net/config.json"):
        (tmp_path / name).write_text("" if name == "empty.pt2" else "mine")
    for output in ("net.pt2", "empty.pt2"):
        done = call("tools/export.py", str(DIGITS), output)
        told = "choose another OUT, or replace it by --overwrite"
        assert done.status == 1 and done.err[0].startswith(f"export.py: {output} is no") and done.err[0].endswith(told)
    done = call("tools/export.py", str(DIGITS), "net/")
    assert done.status == 1 and "net/config.json is not written by this command: choose another OUT/" in done.err[0]
    assert sorted(file.read_text() for file in folder.iterdir()) == ["mine", "mine"]
    for output in ("net.pt2", "net/"):
        assert call("tools/export.py", str(DIGITS), output, "--overwrite").status == 0
        assert call("tools/export.py", str(DIGITS), output).status == 0  # what it has written goes unasked
    (folder / "model.safetensors").write_bytes(b"a model")
    done = call("tools/export.py", str(DIGITS), "net/")
    assert "net/model.safetensors is not the checkpoint of a config.json beside it" in done.err[0]


UNCAPTURED = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        y = self.head(x.mean((2, 3)))
        return y if y.sum() > 0 else -y

def build():
    return Net()
"""


@pytest.mark.parametrize("output", ["net.pt2", "net.onnx"])
def test_a_model_that_torch_cannot_capture_is_told_by_its_line_and_what_to_do(
    call: Callable, tmp_path: Path, output: str
):
    (tmp_path / "net.py").write_text(UNCAPTURED)
    done = call("tools/export.py", "net.py:build", output)
    assert done.status == 1 and len(done.err) == 1 and [file.name for file in tmp_path.iterdir()] == ["net.py"]
    assert "torch.export cannot capture the model at " in done.err[0]
    assert "net.py:11, `return y if y.sum() > 0 else -y`: it decides by numbers that are only known when" in done.err[0]
    assert done.err[0].endswith(
        "; rewrite that line (torch.where, torch.cond), or export the part of the model before it"
    )


@pytest.mark.parametrize("source", ["no_such_model", "missing.safetensors", "net.py:build", "hf-hub:nobody"])
def test_a_source_that_is_not_there(call: Callable, tmp_path: Path, source: str):
    done = call("tools/export.py", source, "net.pt2", "--no-pretrained")
    assert done.status == 1 and len(done.err) == 1 and not list(tmp_path.iterdir())


def test_it_says_what_it_is_doing(call: Callable, monkeypatch: pytest.MonkeyPatch):
    stages: list[str] = []
    monkeypatch.setattr(progress, "stage", stages.append)
    assert call("tools/export.py", str(DIGITS), "digits.pt2", "--latency").status == 0
    assert stages == [
        f"opening {DIGITS}",
        "running the original",
        "timing the original",
        "capturing the graph",
        "reading digits.pt2 back and comparing it with the original",
        "timing digits.pt2",
    ]
    stages.clear()
    assert call("tools/export.py", str(DIGITS), "digits/").status == 0
    assert stages == [f"opening {DIGITS}", "writing digits/", "reading digits/ back and comparing it with the original"]


def test_a_folder_is_uploaded_and_every_command_takes_it_from_the_hub(call: Callable, server: StubHub, tmp_path: Path):
    done = call("tools/export.py", str(DIGITS), "hub/digits/", "--push-to-hub", "me/digits")
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1] == f"Uploaded to {server.endpoint}/me/digits"
    data = ["--dataset", "digits", "--workers", "0", "--device", "cpu"]
    local = call("evaluate.py", "--model", "hub/digits/", *data, "--results-file", "local.json")
    fetched = call("evaluate.py", "--model", "hf-hub:me/digits", *data, "--results-file", "fetched.json")
    assert (local.status, fetched.status) == (0, 0), fetched.err
    results = [json.loads((tmp_path / name).read_text()) for name in ("local.json", "fetched.json")]
    assert results[0]["top1"] == results[1]["top1"] == pytest.approx(98.8889)

    flags = ["--pruning-type", "l1", "--pruning-ratio", "0.3", *data]
    pruned = call("prune.py", "--model", "hf-hub:me/digits@main", *flags)
    assert pruned.status == 0, pruned.err
    told = read_header(tmp_path / "output" / "pruned" / "digits.safetensors")["provenance"]
    assert told["arguments"]["model"] == "hf-hub:me/digits@main" and len(told["parent"]) == 64
    assert iso.load_model(tmp_path / "output" / "pruned" / "digits.safetensors") is not None

    one_step = ["--max-steps", "1", "--epochs", "1", "--output-dir", "run", "--batch-size", "8"]
    tuned = call("finetune.py", "--model", "hub/digits/", "--teacher-model", "hf-hub:me/digits", *data, *one_step)
    assert tuned.status == 0, tuned.err


def test_a_pruned_model_does_not_replace_the_folder_that_it_comes_from(call: Callable, tmp_path: Path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "model.safetensors").write_bytes(DIGITS.read_bytes())
    done = call("prune.py", "--model", "net/", "--pruning-type", "l1", "--save-as", "net/model.safetensors")
    assert done.status == 1 and "is the model to prune: choose another name" in done.err[0]
