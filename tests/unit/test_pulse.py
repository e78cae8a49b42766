"""How far long steps say they are: what is counted, and of how many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import isomorphic as iso
from isomorphic.data.folders import list_class_folders
from isomorphic.page.inventory import take_inventory
from isomorphic.progress import Bar
from isomorphic.provenance import file_sha256

Counted = dict[str, tuple[int, int | None]]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """What each bar had counted when it was closed, of how many, by its title."""
    found: Counted = {}
    close = Bar.close

    def note(bar: Bar) -> None:
        found.setdefault(bar.title, (bar.counted, bar.length))
        close(bar)

    monkeypatch.setattr(Bar, "close", note)
    return found


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_tracing_counts_the_calls_of_a_run_and_of_the_trial(net: nn.Module, counted: Counted):
    iso.trace(net, torch.zeros(1, 3, 8, 8))
    assert counted["tracing"] == (18, 18), "one for each of nine layers, in the run and again in the trial"


def test_recoveries_count_layers_groups_and_batches(net: nn.Module, counted: Counted):
    images = torch.randn(163, 3, 8, 8)  # 131 to fit, in batches of 64 at most, and 32 that are held out
    recover = ("fusion", "compensate", "bn")
    iso.prune(net, images[:1], ratio=0.5, criterion="l1", recover=recover, calibration=images)
    assert counted["compensating"] == (2, 2), "of the second convolution and the linear layer"
    assert counted["merging"] == (2, 2) and counted["recalibrating batch norms"] == (3, 3)


def test_a_search_counts_its_plans(net: nn.Module, counted: Counted):
    iso.plan(net, torch.zeros(1, 3, 8, 8), macs="50%", criterion="l1")
    count, total = counted["searching for the budget"]
    assert 1 <= count <= 40 and total is None


def test_layers_files_and_folders(net: nn.Module, counted: Counted, tmp_path: Path):
    take_inventory(net, torch.zeros(1, 3, 8, 8), timed=True)
    assert counted["timing its layers"] == (9, 9)
    (tmp_path / "weights").write_bytes(bytes((5 << 19) + 1))
    file_sha256(tmp_path / "weights")
    assert counted["hashing"] == (3, 3), "MiB, the last one begun"
    for name in ("ant", "bee", "cat"):
        (tmp_path / "val" / name).mkdir(parents=True)
    list_class_folders(tmp_path / "val", {"ant": 0, "bee": 1})
    assert counted[f"listing the images in {tmp_path / 'val'}"] == (3, 3)
