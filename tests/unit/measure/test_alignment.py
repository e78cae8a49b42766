"""Widths that fit a machine, and those that do not, by the MACs that are in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isomorphic.measure.alignment import misaligned_share, vector_width


@pytest.mark.parametrize(("capability", "widths"), [("AVX512", (16, 32)), ("AVX2", (8, 16)), ("DEFAULT", (4, 8))])
def test_numbers_that_a_cpu_computes_at_a_time(
    monkeypatch: pytest.MonkeyPatch, capability: str, widths: tuple[int, int]
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpu = torch.device("cpu")
    assert (vector_width(cpu), vector_width(cpu, torch.bfloat16)) == widths
    assert vector_width(torch.device("cuda"), torch.float16) == 8


def test_the_share_is_that_of_the_macs_in_layers_of_other_widths():
    # without biases 16·32 = 512 MACs of 16 and 32, and 32·24 = 768 of 32 and 24
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 24, bias=False))
    inputs = torch.zeros(1, 16)
    assert misaligned_share(model, inputs, 16) == pytest.approx(768 / 1280)
    assert misaligned_share(model, inputs, 8) == 0.0
    assert misaligned_share(model, inputs, 5) == 1.0


def test_a_depthwise_filter_has_one_width():
    depthwise = nn.Conv2d(32, 32, 3, groups=32)
    assert misaligned_share(depthwise, torch.zeros(1, 32, 5, 5), 16) == 0.0
    assert misaligned_share(nn.Conv2d(32, 32, 3, groups=2), torch.zeros(1, 32, 5, 5), 32) == 1.0  # 16 inputs each
    assert misaligned_share(nn.ReLU(), torch.zeros(1, 3), 16) == 0.0
