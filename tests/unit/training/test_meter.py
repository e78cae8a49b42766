"""The loss of an epoch."""

from __future__ import annotations

import pytest
import torch

from isomorphic.errors import UserError
from isomorphic.training.meter import LossMeter

CPU = torch.device("cpu")


def test_meter_adds_up_by_images():
    meter = LossMeter(0, CPU)
    assert (meter.settle(), meter.mean, meter.images) == (0.0, 0.0, 0)
    meter.add(torch.tensor(2.0), 3, 1)
    meter.add(torch.tensor(4.0), 1, 2)
    assert (len(meter), meter.settle(), len(meter)) == (2, 2.5, 0)
    meter.add(torch.tensor(0.0), 4, 3)
    assert (meter.settle(), meter.mean, meter.loss_sum, meter.images) == (0.0, 1.25, 10.0, 8)


def test_meter_goes_on_from_sums():
    meter = LossMeter(0, CPU, images=6, loss_sum=12.0)
    meter.add(torch.tensor(4.0), 2, 9)
    assert (meter.settle(), meter.mean, meter.images) == (4.0, 2.5, 8)


def test_an_infinite_loss_is_not_finite_either():
    meter = LossMeter(4, CPU)
    meter.add(torch.tensor(1.0), 1, 41)
    meter.add(torch.tensor(float("inf")), 1, 42)
    meter.add(torch.tensor(float("-inf")), 1, 43)
    with pytest.raises(UserError, match="epoch 5, step 42"):
        meter.settle()
