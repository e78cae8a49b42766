"""The search for a latency, on clocks that behave and on one that does not."""

from __future__ import annotations

import copy

import pytest
import torch

from isomorphic.errors import UserError
from isomorphic.measure.latency import Latency
from isomorphic.pruning import latency_budget
from isomorphic.pruning.budget import PlanCost, shared_ratios
from isomorphic.pruning.importance import normalize, score_groups
from isomorphic.pruning.latency_budget import CLOSE, PlanLatency, plan_for_latency
from isomorphic.pruning.ranking import Ranker, RankingRules, Ratios


@pytest.fixture
def ranker(subject) -> Ranker:
    scores = score_groups(subject.model, subject.groups, "l1")
    scores = {name: normalize(values, "mean") for name, values in scores.items()}
    return Ranker(subject.graph, scores, subject.classes, RankingRules())


def ratios_at(ratio: float) -> Ratios:
    return shared_ratios(ratio, None, None)


class Clock:
    """A device that takes a nanosecond a MAC, give or take."""

    def __init__(self, subject, noise: float = 0.0) -> None:
        self.cost = PlanCost(subject.model, subject.graph, subject.inputs)
        self.noise, self.generator, self.looks = noise, torch.Generator().manual_seed(0), 0

    def __call__(self, plan) -> Latency:
        self.looks += 1
        factor = 1 + self.noise * (2 * torch.rand((), generator=self.generator).item() - 1)
        seconds = 1e-9 * self.cost(plan).macs_exact * factor
        return Latency(seconds, seconds, seconds, 1, 20)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_the_latency_is_met_from_below_as_nearly_as_the_ratio_allows(subject, ranker, share):
    clock = Clock(subject)
    target = share * clock(ranker.plan(Ratios(0.0))).median
    plan = plan_for_latency(ranker, ratios_at, clock, target)
    found = clock(plan).median
    assert found <= target and clock.looks <= 3 + latency_budget.BISECTIONS + 1
    if found < (1 - CLOSE) * target:  # then one step of the ratio less is too slow already
        grid = [ranker.plan(ratios_at(n / 2**10)) for n in range(2**10 + 1)]
        slower = [clock(other).median for other in grid if len(str(other.kept)) > len(str(plan.kept))]
        assert min(slower) > target


def test_noise_moves_the_result_by_no_more_than_itself(subject, ranker):
    exact, noisy = Clock(subject), Clock(subject, noise=0.05)
    target = 0.5 * exact(ranker.plan(Ratios(0.0))).median
    found = exact(plan_for_latency(ranker, ratios_at, noisy, target)).median
    assert 0.75 * target < found < 1.06 * target


def test_a_latency_out_of_reach(subject, ranker):
    with pytest.raises(
        UserError, match=r"0\.00 ms is out of reach: under these rules the model takes .* ms .* at least"
    ):
        plan_for_latency(ranker, ratios_at, Clock(subject), 1e-9)


def test_explicit_shares_may_do_it_alone(subject, ranker):
    clock = Clock(subject)
    target = 1.5 * clock(ranker.plan(ratios_at(0.0))).median
    assert plan_for_latency(ranker, ratios_at, clock, target) == ranker.plan(ratios_at(0.0))


def test_what_is_measured_is_a_model_really_cut(subject, ranker, monkeypatch):
    measured = {}

    def note(model, image, batch_size, *, amp_dtype):
        measured.update(params=sum(p.numel() for p in model.parameters()), image=image, batch=batch_size, amp=amp_dtype)
        return Latency(1.0, 1.0, 1.0, batch_size, 1)

    monkeypatch.setattr(latency_budget, "measure_latency", note)
    before = copy.deepcopy(subject.model.state_dict())
    plan = ranker.plan(Ratios(0.5))
    image = subject.inputs[:1]
    PlanLatency(subject.model, subject.graph, image, 4, torch.bfloat16)(plan)
    params = PlanCost(subject.model, subject.graph, subject.inputs)(plan).params
    assert measured == {"params": params, "image": image, "batch": 4, "amp": torch.bfloat16}
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
