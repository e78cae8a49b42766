"""Removing blocks as a user does: in the commands, in the files, and together with a budget."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.layers.drop import DropPath
from torch import Tensor, nn

from isomorphic.checkpoints.open import load_model, open_model, read_header
from isomorphic.measure.complexity import count_complexity
from isomorphic.measure.latency import Latency
from isomorphic.models import example_inputs
from isomorphic.pruning import planning

CONVNEXT = ["--model", "convnext_atto", "--no-pretrained", "--input-size", "32", "--workers", "0", "--batch-size", "16",
            "--model-kwargs", "depths=[1, 2, 5, 2]", "dims=[8, 16, 24, 32]", "drop_path_rate=0.3",
            "--dataset", "digits", "--taylor-batches", "2"]  # fmt: skip
SHORT = "short.safetensors"
REPOSITORY = Path(__file__).resolve().parents[2]


def depths(path: Path) -> list[int]:
    return [len(load_model(path).get_submodule(f"stages.{n}.blocks")) for n in range(4)]  # type: ignore[arg-type]


def macs(path: Path) -> int:
    model, spec = open_model(path)
    return count_complexity(model, example_inputs(spec)).macs_paper


@pytest.fixture
def short(call: Callable[..., Any], tmp_path: Path) -> Path:
    """A ConvNeXt that lost three of the five blocks of its third stage, and a quarter of its width."""
    words = ["--remove-blocks", "3", "--pruning-ratio", "0.25", "--plan-file", "plan.json", "--save-as", SHORT]
    done = call("prune.py", *CONVNEXT, *words)
    assert (done.status, done.err) == (0, [])
    assert "Blocks of stages.2.blocks: 2 stay (" in done.out
    return tmp_path / SHORT


def test_the_file_builds_the_shorter_model(short: Path, call: Callable[..., Any], tmp_path: Path):
    kept = json.loads((tmp_path / "plan.json").read_text())["kept_blocks"]
    assert read_header(short)["kept_blocks"] == kept and len(kept["stages.2.blocks"]) == 2
    assert depths(short) == [1, 2, 2, 2]
    rates = [module.drop_prob for module in load_model(short).modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.05 * n for n in range(1, 7)])  # as over seven blocks; the first has none

    evaluated = call("evaluate.py", "--model", SHORT, "--dataset", "digits", "--workers", "0")
    assert evaluated.status == 0 and f"MACs: {macs(short) / 1e6:.4f} M" in evaluated.out


def test_the_plan_brings_its_blocks(short: Path, call: Callable[..., Any], tmp_path: Path):
    done = call("prune.py", *CONVNEXT, "--from-plan", "plan.json", "--save-as", "again.safetensors")
    assert (done.status, done.err) == (0, [])
    first, again = load_file(short), load_file(tmp_path / "again.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_training_keeps_the_depth_and_pruning_goes_on_from_it(short: Path, call: Callable[..., Any], tmp_path: Path):
    data = ["--dataset", "digits", "--workers", "0"]
    done = call("finetune.py", "--model", SHORT, *data, "--max-steps", "1", "--output-dir", "run")
    assert (done.status, done.err) == (0, [])
    assert depths(tmp_path / "run" / "last.safetensors") == [1, 2, 2, 2]

    words = ["--remove-layers", "3", "--remove-blocks-scope", "all", "--pruning-ratio", "0", "--pruning-type", "l1"]
    done = call("prune.py", "--model", "run/last.safetensors", *data, *words, "--save-as", "shorter.safetensors")
    assert (done.status, done.err) == (0, [])
    assert depths(tmp_path / "shorter.safetensors") == [1, 1, 1, 1]
    before, after = (read_header(tmp_path / name)["kept_blocks"] for name in (SHORT, "shorter.safetensors"))
    assert set(after["stages.2.blocks"]) < set(before["stages.2.blocks"])  # counted in the dense model's blocks
    assert sorted(after) == ["stages.1.blocks", "stages.2.blocks", "stages.3.blocks"]


@pytest.mark.parametrize("flags", [("--round-to", "8"), ("--self-check",), ("--graph", "depgraph")])
def test_blocks_and_a_budget(flags: tuple[str, ...], call: Callable[..., Any], tmp_path: Path):
    results = ["--results-file", "results.json", "--save-as", SHORT]
    done = call("prune.py", *CONVNEXT, "--remove-blocks", "2", "--target-macs", "40%", *flags, *results)
    assert (done.status, done.err) == (0, [])
    dense, _ = open_model("convnext_atto", kwargs={"depths": [1, 2, 5, 2], "dims": [8, 16, 24, 32]}, pretrained=False,
                          num_classes=10)  # fmt: skip
    target = 0.4 * count_complexity(dense, torch.randn(1, 3, 32, 32)).macs_paper
    assert macs(tmp_path / SHORT) == json.loads((tmp_path / "results.json").read_text())["macs"]
    assert (0.75 if "--round-to" in flags else 0.97) * target < macs(tmp_path / SHORT) <= target
    assert depths(tmp_path / SHORT) == [1, 2, 3, 2]
    if "--round-to" in flags:
        widths = {tensor.shape[0] for name, tensor in load_file(tmp_path / SHORT).items() if "fc1.weight" in name}
        assert widths and all(width % 8 == 0 for width in widths)


def test_blocks_alone_may_meet_the_budget(call: Callable[..., Any], tmp_path: Path):
    done = call("prune.py", *CONVNEXT, "--remove-blocks", "4", "--target-macs", "99%", "--save-as", SHORT)
    assert (done.status, done.err) == (0, [])
    assert depths(tmp_path / SHORT) == [1, 2, 1, 2]
    assert load_model(tmp_path / SHORT).get_parameter("stages.3.blocks.0.mlp.fc1.weight").shape[:2] == (128, 32)


def test_a_latency_with_its_spread(call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def one_nanosecond_a_mac(model: nn.Module, image: Tensor, batch_size: int = 1, *, amp_dtype: Any = None) -> Latency:
        seconds = 1e-9 * batch_size * count_complexity(model, image).macs_exact
        return Latency(seconds, 0.9 * seconds, 1.2 * seconds, batch_size, 20)

    monkeypatch.setattr(planning, "measure_latency", one_nanosecond_a_mac)
    words = ["--remove-blocks", "1", "--target-latency", "60%", "--latency-batch-size", "2", "--round-to", "2"]
    outputs = ["--results-file", "results.json", "--save-as", SHORT]
    done = call("prune.py", *CONVNEXT, *words, *outputs)
    assert (done.status, done.err) == (0, []) and depths(tmp_path / SHORT) == [1, 2, 4, 2]
    dense, pruned = (float(value) for value in re.findall(r"([\d.]+) ms \(batch 2; 80% of 20 runs", done.out))
    assert 0.9 * 0.6 * dense < pruned <= 0.6 * dense
    results = json.loads((tmp_path / "results.json").read_text())
    found = [results[key] for key in ("latency_ms", "latency_ms_p10", "latency_ms_p90", "latency_batch_size")]
    assert found == pytest.approx([pruned, 0.9 * pruned, 1.2 * pruned, 2], abs=0.01)


@pytest.mark.slow
def test_two_processes_remove_the_same_blocks_as_one(start: Callable[..., Any], tmp_path: Path):
    words = [*CONVNEXT, "--remove-blocks", "2", "--remove-blocks-scope", "all", "--target-macs", "50%"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(REPOSITORY / "prune.py")]
    runs = {"one": ["prune.py"], "two": torchrun}
    for name, command in runs.items():
        outputs = ["--plan-file", f"{name}.json", "--save-as", f"{name}.safetensors"]
        done = start(*command, *words, *outputs, OMP_NUM_THREADS="1")
        assert done.status == 0, done.err
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in runs)
    assert one["kept_blocks"] == two["kept_blocks"] and one["groups"] == two["groups"]


NESTED = """
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x).relu()

class Net(nn.Module):
    def __init__(self, depth=4, width=8, num_classes=10):
        super().__init__()
        blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.body = nn.ModuleDict({"stem": nn.Conv2d(3, width, 3), "blocks": blocks})
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.body["stem"](x)
        for block in self.body["blocks"]:
            x = block(x)
        return self.head(x.mean((2, 3)))
"""


def test_blocks_of_a_users_own_model(call: Callable[..., Any], tmp_path: Path):
    (tmp_path / "net.py").write_text(NESTED)
    model = ["--model", "net.py:Net", "--input-size", "16", "--dataset", "digits", "--workers", "0"]
    done = call("prune.py", *model, "--pruning-type", "l1", "--remove-blocks", "3", "--save-as", SHORT)
    assert (done.status, done.err) == (0, []) and "Blocks of body.blocks: 1 stay (" in done.out
    done = call("evaluate.py", "--model", SHORT, "--builder-file", "net.py", "--dataset", "digits", "--workers", "0")
    assert (done.status, done.err) == (0, []) and "Accuracy: 0." in done.out
