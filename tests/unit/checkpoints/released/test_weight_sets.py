"""Where the weights are among what a trainer stored."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import nn

from isomorphic.checkpoints.released.weight_sets import choose_weights, told_names
from isomorphic.errors import UserError
from tests.faults import one_line

ONE, TWO = {"a.weight": torch.ones(1)}, {"a.weight": torch.zeros(1)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    "stored",
    [
        ONE,
        {"state_dict": ONE, "epoch": 3, "optimizer": OPTIMIZER},
        {"model_state_dict": ONE, "optimizer_state_dict": {"momentum": torch.ones(1)}, "loss": 0.1},
        {"net": ONE, "acc": 91.5},
        {"model": "resnet18", "network": ONE},
        {"student": ONE, "epoch": 3},
        {"model_ema": None, "module": ONE},
    ],
    ids=lambda stored: "+".join(stored),
)
def test_sets_under_the_keys_that_people_use(stored: dict[str, Any]):
    assert choose_weights(stored, None, "x.pth") == ONE


@pytest.mark.parametrize(
    ("stored", "names"),
    [
        ({"mine": ONE}, ["mine.a.weight"]),
        ({"stage": {"body": ONE, "loss": TWO}}, ["stage.body.a.weight", "stage.loss.a.weight"]),
        ({"ema": {"module": ONE, "decay": 0.9}}, ["module.a.weight"]),
        ({"mine": ONE, "my_scheduler": TWO, "rng_states": TWO}, ["mine.a.weight"]),
    ],
    ids=str,
)
def test_sets_under_other_keys_are_one_set_with_these_in_the_names(stored: dict[str, Any], names: list[str]):
    chosen = choose_weights(stored, None, "x.pth")
    assert isinstance(chosen, dict) and [*chosen] == names


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema_model", "teacher", "ema_state_dict"])
def test_averaged_ones_are_preferred_and_can_be_asked_for(key: str):
    stored = {"model": ONE, key: TWO}
    assert choose_weights(stored, None, "x.pth") is not choose_weights(stored, False, "x.pth")
    assert choose_weights(stored, True, "x.pth") == TWO and choose_weights(stored, False, "x.pth") == ONE
    with pytest.raises(UserError, match="x.pth holds averaged weights only: leave out --no-use-ema"):
        choose_weights({key: TWO}, False, "x.pth")
    with pytest.raises(UserError, match="x.pth holds no averaged weights"):
        choose_weights({"model": ONE}, True, "x.pth")
    in_names = {"state_dict": {"ema.a": torch.ones(1), "a": torch.ones(1)}}
    assert choose_weights(in_names, True, "x.pth") == in_names["state_dict"]


def test_whole_models_are_found_too():
    model = nn.Linear(1, 1)
    for stored in (model, {"model": model}, {"mine": model}, {"mine": {"best": model}}):
        assert choose_weights(stored, None, "x.pth") is model
    with pytest.raises(UserError, match="holds neither"):
        choose_weights({"mine": model, "yours": nn.Linear(1, 1)}, None, "x.pth")


@pytest.mark.parametrize("stored", [3, {}, {"epoch": 3}, {"model": {"depth": 3}}, {**ONE, "epoch": 3}, [ONE]], ids=str)
def test_what_holds_no_weights(stored: Any):
    with pytest.raises(UserError, match="x.pth holds neither a model nor weights") as error:
        choose_weights(stored, None, "x.pth")
    one_line(error)


def test_names_of_the_model_wherever_trainers_put_them():
    assert [*told_names({"arch": "a", "args": Namespace(model="b", lr=1)})] == ["a", "b"]
    assert [*told_names({"hyper_parameters": {"model_name": "c", "model": nn.Linear(1, 1)}})] == ["c"]
    assert [*told_names(ONE)] == [*told_names(nn.Linear(1, 1))] == []
