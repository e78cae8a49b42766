"""The search for a latency, on clocks that behave and on one that does not."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from isomorphic.errors import UserError
from isomorphic.measure.latency import Latency
from isomorphic.pruning.ranking import latency_budget
from isomorphic.pruning.ranking.budget import PlanCost, shared_ratios
from isomorphic.pruning.ranking.latency_budget import CLOSE, PlanLatency, plan_for_latency
from isomorphic.pruning.ranking.ranker import Ranker, RankingRules, Ratios
from isomorphic.pruning.scoring import normalize, score_groups


@pytest.fixture(params=["deit", "cnn"])
def subject(request, traced):
    """Two small models are enough: the search asks for nothing but plans and seconds."""
    return traced(request.param, "exact")


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
    plan, found = plan_for_latency(ranker, ratios_at, clock, target)
    assert found == clock(plan) and found.median <= target
    looks, units = clock.looks, sum(map(len, plan.kept.values()))
    assert looks <= 2 + latency_budget.BISECTIONS + 6  # both ends, the bisection, a few steps back
    wider = next(
        other
        for n in reversed(range(2**latency_budget.BISECTIONS))
        if sum(map(len, (other := ranker.plan(ratios_at(n / 2**latency_budget.BISECTIONS))).kept.values())) > units
    )
    assert clock(wider).median > (1 - CLOSE) * target


def test_noise_moves_the_result_by_no_more_than_itself(subject, ranker):
    exact, noisy = Clock(subject), Clock(subject, noise=0.05)
    target = 0.5 * exact(ranker.plan(Ratios(0.0))).median
    plan, found = plan_for_latency(ranker, ratios_at, noisy, target)
    assert found.median <= target and exact(plan).median == pytest.approx(found.median, rel=0.06)


def test_one_slow_moment_is_made_good(subject, ranker):
    steady = Clock(subject)
    target = 0.5 * steady(ranker.plan(Ratios(0.0))).median

    def disturbed(plan) -> Latency:
        found = steady(plan)
        return replace(found, median=2 * found.median) if steady.looks == 4 else found  # the first look at the middle

    misled = steady(ranker.plan(ratios_at(0.5))).median
    steady.looks = 0
    plan, found = plan_for_latency(ranker, ratios_at, disturbed, target)
    assert misled < 0.9 * target < found.median <= target and found == steady(plan)


def test_a_latency_out_of_reach(subject, ranker):
    with pytest.raises(
        UserError, match=r"1e-06 ms is out of reach: under these rules the model takes .* ms .* at least"
    ):
        plan_for_latency(ranker, ratios_at, Clock(subject), 1e-9)


def test_explicit_shares_may_do_it_alone(subject, ranker):
    clock = Clock(subject)
    target = 1.5 * clock(ranker.plan(ratios_at(0.0))).median
    assert plan_for_latency(ranker, ratios_at, clock, target)[0] == ranker.plan(ratios_at(0.0))


def test_what_is_measured_is_a_model_really_cut(subject, ranker):
    params = []

    def measure(model) -> Latency:
        params.append(sum(parameter.numel() for parameter in model.parameters()))
        return Latency(1.0, 1.0, 1.0, 1, 1)

    before = copy.deepcopy(subject.model.state_dict())
    plan = ranker.plan(Ratios(0.5))
    PlanLatency(subject.model, subject.graph, measure)(plan)
    assert params == [PlanCost(subject.model, subject.graph, subject.inputs)(plan).params]
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
