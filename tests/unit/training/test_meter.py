"""The loss of an epoch."""

from __future__ import annotations

import pytest
import torch

from isomorphic.errors import UserError
from isomorphic.training.meter import LossMeter

CPU = torch.device("cpu")


def test_meter_adds_up_by_images():
    meter = LossMeter(0, CPU)
    meter.settle()
    assert (meter.loss_sum, meter.images) == (0.0, 0)
    meter.add(torch.tensor(2.0), 3, 1)
    meter.add(torch.tensor(4.0), 1, 2)
    assert meter.images == 0  # nobody has looked
    meter.settle()
    assert (meter.loss_sum, meter.images) == (10.0, 4)
    meter.add(torch.tensor(0.5), 4, 3)
    meter.settle()
    assert (meter.loss_sum, meter.images) == (12.0, 8)


def test_the_recent_mean_is_since_the_last_one_however_often_it_was_settled():
    meter = LossMeter(0, CPU, images=6, loss_sum=12.0)  # of an epoch that was interrupted
    meter.add(torch.tensor(4.0), 2, 9)
    assert (meter.recent_mean(), meter.loss_sum, meter.images) == (4.0, 20.0, 8)
    meter.add(torch.tensor(1.0), 1, 10)
    meter.settle()
    meter.add(torch.tensor(3.0), 3, 11)
    assert (meter.recent_mean(), meter.images) == (2.5, 12)


def test_an_infinite_loss_is_not_finite_either():
    meter = LossMeter(4, CPU)
    meter.add(torch.tensor(1.0), 1, 41)
    meter.add(torch.tensor(float("inf")), 1, 42)
    meter.add(torch.tensor(float("-inf")), 1, 43)
    with pytest.raises(UserError, match="epoch 5, step 42"):
        meter.settle()
