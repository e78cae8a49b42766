"""Held-out images: which they are, what is measured on them, and that what loses there is undone, whole."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isomorphic.processes import distributed
from isomorphic.pruning.recovery.held_out import ERROR, KL, Judge, Kept, Trials, held_out_mask, hold_out
from tests.processes import run_together


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classifier() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


IMAGES = random(23, 3, 2, 2)


def test_every_fifth_item_of_the_order_of_sums_is_held_out():
    keys = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0, 3.5, 8.0, 9.7, 0.5]  # in order: .5 1 1.5 2.6 (3) 3.5 4 5 8 (9) 9.7
    images = torch.tensor(keys)[:, None]
    assert images[held_out_mask(images), 0].tolist() == [3.0, 9.0]
    shuffled = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(1))]
    assert sorted(shuffled[held_out_mask(shuffled), 0].tolist()) == [3.0, 9.0]


@pytest.mark.parametrize(("images", "expected"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 1), (9, 1), (10, 2)])
def test_of_few_images_one_is_held_out_and_a_single_one_is_fitted(images: int, expected: int):
    assert int(held_out_mask(random(images, 3, 2, 2)).sum()) == expected


def test_images_that_are_all_alike_are_split_all_the_same():
    assert int(held_out_mask(torch.ones(20, 3, 2, 2)).sum()) == 4


def test_inputs_by_name_are_split_by_item():
    batch = {"x": random(10, 3), "mask": torch.ones(10, 2), "scale": torch.ones(5)}
    fitted, judge = hold_out(Named().eval(), batch)
    assert isinstance(fitted, dict) and [len(fitted[key]) for key in batch] == [8, 8, 5]
    assert judge is not None and judge.num_images == 2


class Named(nn.Module):
    """Returns a mapping, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor, mask: Tensor, scale: Tensor) -> dict[str, Any]:
        return {"logits": self.layer(x) * mask[:, :1], "places": torch.ones(len(x), dtype=torch.long), "big": 1e3 * x}


def test_classifiers_are_judged_by_the_mean_divergence():
    dense, model = classifier(), classifier()
    with torch.no_grad():
        model[3].weight.mul_(0.5)
        p, q = dense(IMAGES).double().softmax(1), model(IMAGES).double().softmax(1)
        expected = (p * (p / q).log()).sum(1).mean().item()
    judge = Judge(dense, IMAGES)
    assert (judge.measure, judge.num_images, judge.works) == (KL, 23, True)
    assert judge.loss_of(model) == pytest.approx(expected, rel=1e-9)
    assert judge.loss_of(dense) == pytest.approx(0, abs=1e-12)


def test_others_are_judged_by_the_relative_error_of_each_output():
    dense = Named().eval()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.layer.bias.add_(1.0)
    batch = {"x": random(10, 3), "mask": torch.ones(10, 2), "scale": torch.ones(5)}
    judge = Judge(dense, batch)
    with torch.no_grad():
        logits = dense(**batch)["logits"].double()
    share = 40 / logits.square().sum().item()  # of the other output, which is a thousand times larger, nothing
    assert judge.measure == ERROR
    assert judge.loss_of(model) == pytest.approx(math.sqrt(share / 2), rel=1e-6)


def test_a_judge_that_can_tell_nothing_says_so():
    spoilt = classifier()
    with torch.no_grad():
        spoilt[3].bias.fill_(math.nan)
    assert not Judge(spoilt, IMAGES).works
    assert hold_out(spoilt, IMAGES)[1] is None
    assert hold_out(classifier(), IMAGES[:1])[1] is None  # nothing to hold out


def test_numbers_that_are_not_finite_are_as_far_as_can_be():
    judge, model = Judge(classifier(), IMAGES), classifier()
    with torch.no_grad():
        model[3].bias.fill_(math.inf)
    assert judge.loss_of(model) == math.inf


def test_what_was_kept_comes_back_as_the_same_objects():
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 4))
    model[2].weight = nn.Parameter(random(4, 4))
    objects, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    kept = Kept(model)
    with torch.no_grad():
        model[0].bias = nn.Parameter(torch.ones(4))
        model[1].running_mean.fill_(3.0)
        model[2].weight = nn.Parameter(torch.zeros(4, 4))
        model[1].weight.zero_()
    kept.restore()
    assert model[0].bias is None
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in objects.items()}
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def spoil(model: Any) -> str:
    with torch.no_grad():
        model[3].weight.add_(random(4, 8, seed=5))
    return "spoilt"


def test_a_step_that_loses_is_undone_and_one_that_gains_stays():
    dense, model = classifier(), classifier()
    with torch.no_grad():
        model[3].weight.mul_(0.5)
    before = copy.deepcopy(model.state_dict())
    trials = Trials(model, Judge(dense, IMAGES))
    start = trials.loss
    assert trials.take("spoil", lambda: spoil(model)) == ("spoilt", False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trials.take("mend", lambda: model.load_state_dict(dense.state_dict()))[1]
    (lost, won) = trials.judged
    assert (lost.step, lost.before, lost.stays) == ("spoil", start, False) and lost.after > start
    assert (won.step, won.before, won.stays) == ("mend", start, True) and won.after == trials.loss < start
    assert lost.line(6) == f"spoil   {start:.4f} => {lost.after:.4f}, undone"


def test_without_a_judge_every_step_stays():
    trials = Trials(classifier(), None)
    assert trials.take("spoil", lambda: spoil(trials.model)) == ("spoilt", True) and not trials.judged


def judged_with(images: Tensor) -> tuple[list[float], float, int]:
    model = classifier()
    spoil(model)
    fitted, judge = hold_out(classifier(), images)
    assert judge is not None
    return sorted(fitted.sum((1, 2, 3)).tolist()), judge.loss_of(model), judge.num_images  # type: ignore[union-attr]


def one_process() -> tuple[list[float], float, int]:
    return judged_with(IMAGES)


def its_share() -> tuple[list[float], float, int]:
    """Of two processes: the second has three images, and may hold out none."""
    distributed.init("cpu")
    found = judged_with((IMAGES[:20], IMAGES[20:])[distributed.rank()])
    distributed.shutdown()
    return found


@pytest.mark.slow
def test_two_processes_hold_out_what_one_does():
    outcomes = run_together(__name__, {"one_process": 1, "its_share": 2})
    found = [*outcomes["one_process"], *outcomes["its_share"]]
    assert [outcome.status for outcome in found] == [0, 0, 0], [outcome.err for outcome in found]
    (sums, loss, count), (left, *told), (right, *other) = (outcome.value for outcome in found)
    assert sorted(left + right) == pytest.approx(sums, abs=1e-5)
    assert told == other and told[1] == count == 4 and told[0] == pytest.approx(loss, rel=1e-6)
