"""prune.py on a user's model that is no classifier: without labels, with a loss, and on batches of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import isomorphic as iso

FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 1)

    def forward(self, points):
        return self.two(self.one(points).relu())

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

def batches(split):
    for seed in range(4):
        points = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        yield points, points.sum(1, keepdim=True)
"""
SEGMENTER = """
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
"""


def test_a_loss_and_batches_of_ones_own(call: Callable[..., Any], tmp_path: Path):
    (tmp_path / "net.py").write_text(FILE)
    done = call("prune.py", "--model", "net.py:Net", "--no-pretrained", "--taylor-batches", "4", "--device", "cpu",
                "--target-params", "50%", "--save-as", "pruned.safetensors")  # fmt: skip
    assert (done.status, done.err) == (0, [])
    model: Any = iso.load_model(tmp_path / "pruned.safetensors", builder_file=tmp_path / "net.py")
    assert model.one.out_features == model.two.in_features == 7  # 7 · 8 + 1 params of at most 64


def test_a_segmenter_needs_no_labels_unless_its_scores_do(call: Callable[..., Any], tmp_path: Path):
    (tmp_path / "seg.py").write_text(SEGMENTER)
    model = ["--model", "seg.py:build", "--no-pretrained", "--input-size", "32", "--device", "cpu"]
    done = call("prune.py", *model, "--pruning-type", "l2", "--ratios", "0=0.75", "--ignore", "2",
                "--save-as", "pruned.safetensors")  # fmt: skip
    assert (done.status, done.err) == (0, []) and "Spared: 2 (to be ignored)" in done.out
    pruned: Any = iso.load_model(tmp_path / "pruned.safetensors", builder_file=tmp_path / "seg.py")
    assert (pruned[0].out_channels, pruned[2].out_channels) == (4, 8)
    done = call("prune.py", *model)
    assert done.status == 1 and "define loss(model, batch) in seg.py, or take --pruning-type l1" in done.err[-1]


EXPERTS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Linear(6, 16), nn.Linear(16, 1)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, points):
        y = self.stem(points)
        z = y.clone()
        for sign, expert in enumerate(self.experts):
            mine = (points[:, 0] > 0) == bool(sign)
            if mine.any():
                z[mine] = expert(y[mine])
        return self.out(z.relu())

def loss(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()

def batches(split):
    yield torch.cat([torch.ones(4, 6), -torch.ones(4, 6)]), torch.ones(8, 1)
"""


def test_batches_that_take_other_branches_than_the_traced_item(call: Callable[..., Any], tmp_path: Path):
    (tmp_path / "net.py").write_text(EXPERTS)
    prune = ["prune.py", "--model", "net.py:Net", "--no-pretrained", "--device", "cpu", "--save-as", "n.safetensors"]
    for scores in ("taylor", "l2"):
        done = call(*prune, "--pruning-type", scores)
        assert done.status == 1 and "that the inputs do not: experts.0 was not traced" in done.err[-1]
        assert not (tmp_path / "n.safetensors").exists()
    assert call(*prune, "--ignore", "stem").status == 0


FUNCTIONAL = """
import torch
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.randn(16, n)) for n in (3 * 16 * 16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, images):
        return self.head(F.linear(F.linear(images.flatten(1), self.w1).relu(), self.w2).relu())
"""


def test_a_budget_in_macs_that_the_counters_disagree_about(call: Callable[..., Any], tmp_path: Path):
    (tmp_path / "net.py").write_text(FUNCTIONAL)
    words = ["--model", "net.py:Net", "--no-pretrained", "--input-size", "16", "--device", "cpu",
             "--pruning-type", "l2", "--target-macs", "50%", "--dry-run"]  # fmt: skip
    done = call("prune.py", *words)
    assert done.status == 1
    assert "by the exact one: ask for that, --macs-counter exact (or for the other all the same," in done.err[-1]
    done = call("prune.py", *words, "--macs-counter", "exact", "--results-file", "exact.json")
    assert (done.status, done.err) == (0, []) and '"macs_counter": "exact"' in (tmp_path / "exact.json").read_text()
    done = call("prune.py", *words[:-3], "--dry-run", "--results-file", "paper.json")
    assert done.status == 0 and '"macs_counter": "paper"' in (tmp_path / "paper.json").read_text()
    done = call("prune.py", *words, "--macs-counter", "paper")
    assert done.status == 0 or "by the exact one" not in done.err[-1]
