"""The search for the ratios of isomorphism classes: in the budget, reproducible, and better than where it starts."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from isomorphic.errors import UserError
from isomorphic.measure.complexity import Complexity, count_complexity
from isomorphic.pruning.plan import PruningPlan, load_plan, save_plan
from isomorphic.pruning.ranking.allocation import allocate, implied_exponents, share_lost, tilted
from isomorphic.pruning.ranking.budget import PlanCost, plan_for_budget, shared_ratios
from isomorphic.pruning.ranking.ranker import HEADS, Ranker, RankingPool, RankingRules, Ratios
from isomorphic.pruning.report import plan_lines
from isomorphic.pruning.scoring import normalize, score_groups

HEAD_DIMS = RankingPool("head_dims", "all")
SHARE = 0.5  # of the MACs


class QuickCost:
    """Takes the estimate of MACs at its word, so that a search takes no time."""

    def __init__(self, subject):
        self.groups = subject.groups
        self.about = PlanCost(subject.model, subject.graph, subject.inputs).estimate("macs_paper")

    def __call__(self, plan):
        heads = {group.name: len(plan.kept_heads(group)) for group in self.groups}
        macs = round(self.about({name: (count, len(plan.kept[name]) // count) for name, count in heads.items()}))
        return Complexity(macs, macs, macs)

    def estimate(self, unit):
        return self.about


class Case:
    """A small model with a budget, and losses that are functions of what its pools keep."""

    def __init__(self, subject, rules=None, cost=None):
        scores = score_groups(subject.model, subject.groups, "l2")
        normalized = {name: normalize(values, "mean") for name, values in scores.items()}
        self.subject = subject
        self.ranker = Ranker(subject.graph, normalized, subject.classes, rules or RankingRules())
        self.cost = cost or QuickCost(subject)
        whole = PruningPlan({group.name: tuple(range(group.num_units)) for group in subject.groups})
        self.target = int(SHARE * self.cost(whole).macs_paper)
        self.pools = self.ranker.pools(separate_head_dims=True)
        self.seen = []

    def kept(self, plan):
        return {pool: 1 - share_lost(plan, pool, groups) for pool, groups in self.pools.items()}

    def loss(self, plan, prices=(30.0, 0.1, 3.0, 0.3)):
        """Convex, and far from flat: what a pool loses costs hundreds of times what it costs in another."""
        return sum(w * (1 - k) ** 2 for w, k in zip(itertools.cycle(prices), self.kept(plan).values(), strict=False))

    def allocate(self, loss=None, **options):
        def seen_by(plan):
            self.seen.append(plan)
            return (loss or self.loss)(plan)

        options = {"heads": None, "head_dims": None, "evaluations": 40, **options}
        return allocate(self.ranker, self.cost, "macs_paper", self.target, seen_by, **options)

    def plan_at(self, exponents=None, ranker=None, heads=None, head_dims=None):
        return plan_for_budget(
            ranker or self.ranker,
            lambda ratio: tilted(shared_ratios(ratio, heads, head_dims), exponents or {}),
            self.cost,
            "macs_paper",
            self.target,
        )

    def best_of_a_grid(self):
        """The least loss over all exponents 2^-3, 2^-1.5 … 2^3 of all pools but one."""
        losses = []
        for powers in itertools.product((-3.0, -1.5, 0.0, 1.5, 3.0), repeat=len(self.pools) - 1):
            exponents = dict(zip(self.pools, (1.0, *(2.0**power for power in powers)), strict=True))
            losses.append(self.loss(self.plan_at(exponents)))
        return min(losses)


@pytest.fixture
def case(traced):
    return lambda name, rules=None: Case(traced(name, "exact"), rules)


# --- what is found -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deit", "convnext", "resnet"])
def test_the_search_beats_both_starts_by_far_within_the_budget(case, name):
    one = case(name)
    found = one.allocate()
    assert found.uniform_loss == one.loss(one.plan_at())
    assert found.global_loss == one.loss(one.plan_at(ranker=one.ranker.with_ranking("global")))
    assert found.loss == one.loss(found.plan) < 0.75 * min(found.uniform_loss, found.global_loss)
    assert 0.97 * one.target < one.cost(found.plan).macs_paper <= one.target
    found.plan.check(one.subject.graph)


def test_the_budget_is_held_by_the_cut_model(traced):
    subject = traced("resnet", "exact")
    one = Case(subject, cost=PlanCost(subject.model, subject.graph, subject.inputs))
    found = one.allocate(evaluations=12)
    assert found.evaluations == 12
    recount = count_complexity(subject.cut(found.plan), subject.inputs)
    assert recount == one.cost(found.plan)
    assert recount.macs_paper <= one.target


@pytest.mark.parametrize("name", ["deit", "resnet"])
def test_the_search_comes_close_to_the_best_of_a_grid(case, name):
    """125 points of exponents, against 40: at least 97% of what can be gained."""
    one = case(name)
    found, best = one.allocate(), one.best_of_a_grid()
    assert found.uniform_loss - found.loss >= 0.97 * (found.uniform_loss - best)


@pytest.mark.parametrize("evaluations", [1, 2, 9, 40])
def test_no_plan_is_measured_twice_nor_more_than_asked_for(case, evaluations):
    one = case("deit")
    found = one.allocate(evaluations=evaluations)
    kept = [tuple(plan.kept.values()) for plan in one.seen]
    assert len(kept) == len(set(kept)) == found.evaluations <= max(evaluations, 2)
    assert found.loss == min(one.loss(plan) for plan in one.seen)
    assert all(one.cost(plan).macs_paper <= one.target for plan in one.seen)


def test_the_same_seed_gives_the_same_plan(case):
    found = [case("convnext").allocate(seed=3, evaluations=15) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].plan.ratios == found[1].plan.ratios


def test_a_loss_that_knows_only_the_uniform_plan_leaves_it(case):
    one = case("deit")
    uniform = one.plan_at()
    found = one.allocate(lambda plan: 0.0 if plan == uniform else 1.0)
    assert found.plan == uniform
    assert (found.loss, found.uniform_loss, found.global_loss) == (0.0, 0.0, 1.0)


# --- predicted from single pools ---------------------------------------------------------------------------


def additive(one, sensitivities=(4.0, 0.05, 1.0, 0.2)):
    """A loss that is what a prediction takes it for."""
    rates = dict(zip(one.pools, itertools.cycle(sensitivities), strict=False))
    return lambda plan: 0.3 * math.exp(-sum(s * math.log(one.kept(plan)[pool]) for pool, s in rates.items()))


@pytest.mark.parametrize("name", ["deit", "convnext", "resnet"])
def test_two_predicted_plans_are_as_good_as_a_search_where_the_loss_is_additive(case, name):
    one = case(name)
    loss, quick = additive(one), []
    budget = len(one.pools) + 5  # two starts, the single pools and none, and two more
    found = one.allocate(loss, evaluations=budget, quick_loss_of=lambda plan: quick.append(plan) or loss(plan))
    confirmed = one.seen.copy()
    searched = one.allocate(loss)
    assert (found.evaluations, found.confirmed) == (len(quick), len(confirmed)) == (budget, 3)
    start = min(found.uniform_loss, found.global_loss)
    assert start - found.loss >= 0.95 * (start - searched.loss) > 0
    assert found.line.endswith(f"({budget} evaluations and 3 on all images)")


def test_each_pool_is_cut_alone_and_explicit_shares_stay(case):
    one, quick = case("deit"), []
    one.allocate(evaluations=24, heads=0.25, quick_loss_of=lambda plan: quick.append(one.kept(plan)) or 1.0)
    assert all(kept[HEADS] == 0.75 for kept in quick)
    lost = [[pool for pool, share in kept.items() if share < 1 and pool != HEADS] for kept in quick[2:6]]
    assert lost == [[], *([pool] for pool in one.pools if pool != HEADS)]


def test_all_images_say_whether_what_was_found_is_better(case):
    """The quick loss says the opposite of the other: the better of the starts stays."""
    one = case("deit")
    found = one.allocate(additive(one), quick_loss_of=lambda plan: 1 / additive(one)(plan))
    assert found.loss == min(found.uniform_loss, found.global_loss)
    assert found.uniform_loss == additive(one)(one.plan_at())


def test_with_few_evaluations_nothing_is_predicted(case):
    one, quick = case("deit"), []
    found = one.allocate(additive(one), evaluations=5, quick_loss_of=lambda plan: quick.append(plan) or one.loss(plan))
    assert found.evaluations == len(quick) == 5
    assert all(one.cost(plan).macs_paper <= one.target for plan in quick)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_quick_losses_that_are_no_numbers_are_survived(case, bad):
    one = case("convnext")
    found = one.allocate(evaluations=12, quick_loss_of=lambda plan: bad)
    assert math.isfinite(found.loss) and found.loss <= min(found.uniform_loss, found.global_loss)


# --- the points of the search ------------------------------------------------------------------------------


def test_equal_exponents_are_the_papers_allocation(case):
    one = case("deit")
    for exponent in (1.0, 0.5):
        plan = one.plan_at(dict.fromkeys(one.pools, exponent))
        assert one.kept(plan) == pytest.approx(one.kept(one.plan_at()), abs=0.02)
    assert one.plan_at(dict.fromkeys(one.pools, 1.0)) == one.plan_at()


def test_exponents_are_powers_of_what_is_kept():
    ratios = tilted(Ratios(0.75, 0.5, 0.36), {HEADS: 2.0, HEAD_DIMS: 0.5, RankingPool("width", "1"): 0.0})
    assert [ratios.of(pool) for pool in (HEADS, HEAD_DIMS)] == pytest.approx([0.75, 0.2])
    assert [ratios.of(RankingPool("width", label)) for label in "12"] == [0.0, 0.75]
    whole = tilted(Ratios(1.0), {RankingPool("width", "1"): 0.0, RankingPool("width", "2"): 0.1})
    assert [whole.of(RankingPool("width", label)) for label in "12"] == [0.0, 1.0]


@pytest.mark.parametrize("name", ["deit", "convnext", "resnet", "swin"])
def test_a_global_ranking_is_an_isomorphic_one_with_other_ratios(case, name):
    """To the unit, with ratios and with exponents. A budget may add single steps, see test_leftover.py."""
    one = case(name)
    plan = one.ranker.with_ranking("global").plan(shared_ratios(0.6, None, None))
    lost = {pool: share_lost(plan, pool, groups) for pool, groups in one.pools.items()}
    assert one.ranker.plan(Ratios(0.0, 0.0, 0.0, by_pool=lost)) == plan
    exponents = implied_exponents(plan, one.pools, shared_ratios(0.5, None, None))
    assert max(exponents.values()) == 1.0
    width = next(pool for pool in one.pools if pool.kind == "width" and exponents[pool])
    ratio = 1 - (1 - lost[width]) ** (1 / exponents[width])
    assert one.ranker.plan(tilted(shared_ratios(ratio, None, None), exponents)) == plan


def test_exponents_of_a_plan_that_removes_nothing_are_equal(case, keep_all):
    one = case("deit")
    plan = keep_all(one.subject.groups)
    assert set(implied_exponents(plan, one.pools, Ratios(0.5, 0.5, 0.5)).values()) == {1.0}


# --- what is asked for, and what cannot be had -------------------------------------------------------------


@pytest.mark.parametrize(("heads", "head_dims"), [(0.25, 0.5), (0.0, None), (None, 0.0)])
def test_explicit_shares_stay_what_they_are(case, heads, head_dims):
    """Head dims to one step of two layers with 12 each: what a search for a budget gives back. Heads are exact."""
    one = case("deit")
    found = one.allocate(heads=heads, head_dims=head_dims, evaluations=15)
    assert found.evaluations > 2
    for share, pool, title, step in ((heads, HEADS, "heads", 0), (head_dims, HEAD_DIMS, "head dims", 1 / 24)):
        assert (title in found.plan.ratios) is (share is None)
        if share is not None:
            assert all(share - step <= share_lost(plan, pool, one.pools[pool]) <= share for plan in one.seen)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_worst(case, bad):
    one = case("convnext")
    first, second = next(iter(one.pools)), list(one.pools)[1]

    def loss(plan):
        kept = one.kept(plan)
        return bad if kept[first] < kept[second] else 1 - kept[first] + kept[second]

    found = one.allocate(loss)
    assert math.isfinite(found.loss)
    assert found.loss == loss(found.plan) <= min(found.uniform_loss, found.global_loss)
    nothing = one.allocate(lambda plan: bad, evaluations=6)
    assert nothing.plan == one.plan_at()
    assert (nothing.loss, nothing.uniform_loss) == (math.inf, math.inf)


def test_a_failing_loss_is_not_swallowed(case):
    def loss(plan):
        raise UserError("an unreadable image")

    with pytest.raises(UserError, match="an unreadable image"):
        case("deit").allocate(loss)


def test_a_budget_out_of_reach_is_the_same_error_as_without_a_search(case):
    one = case("resnet", RankingRules(max_pruning_ratio=0.1))
    with pytest.raises(UserError, match="out of reach: under these rules the model takes between"):
        one.allocate()
    assert not one.seen


def test_candidates_out_of_reach_are_passed_over(case):
    """A cap binds, and a class that stays whole leaves too much, which is what the loss would like best."""
    one = case("deit", RankingRules(max_pruning_ratio=0.5))
    one.target = int(1.3 * one.cost(one.ranker.plan(Ratios(1.0, 1.0, 1.0))).macs_paper)
    pool = list(one.pools)[-1]
    with pytest.raises(UserError, match="out of reach"):
        one.plan_at({**dict.fromkeys(one.pools, 1.0), pool: 0.0})
    found = one.allocate(lambda plan: share_lost(plan, pool, one.pools[pool]))
    assert found.loss < min(found.uniform_loss, found.global_loss)
    assert all(one.cost(plan).macs_paper <= one.target for plan in one.seen)


def test_a_class_that_a_global_ranking_leaves_whole_can_lose_something(traced):
    """Its exponent is 0 there, and no multiple of that is anything else.

    One unit of the stream's 48 takes about as many MACs as 29 of the class's 384, which is how near 10% can be had.
    """
    subject = traced("deit", "exact")
    one = Case(subject)
    scores = {g.name: torch.arange(g.num_units) + (1e6 if "mlp" in g.name else 0.0) for g in subject.groups}
    one.ranker = Ranker(subject.graph, scores, subject.classes, RankingRules())
    pool = list(one.pools)[-1]
    found = one.allocate(lambda plan: abs(share_lost(plan, pool, one.pools[pool]) - 0.1))
    assert found.global_loss == pytest.approx(0.1)
    assert found.uniform_loss > 0.1
    assert found.loss < 29 / 384 / 2


def test_one_pool_has_nothing_to_allocate(case):
    one = case("resnet")
    one.ranker = one.ranker.with_ranking("global")
    found = one.allocate()
    assert found.plan == one.plan_at()
    assert (found.evaluations, found.loss) == (1, found.uniform_loss)
    assert found.line == "Nothing to allocate: no two isomorphism classes can lose anything"
    assert list(found.plan.ratios) == ["conv1.0 (11 groups)"]


def test_pools_that_nothing_can_be_taken_from_are_no_part_of_the_search(case):
    """Widths of 12 and less, a head's included, stay whole where multiples of 16 are asked for."""
    one = case("deit", RankingRules(round_to=16))
    found = one.allocate(evaluations=4)
    assert list(found.plan.ratios) == ["heads", "patch_embed.proj (1 group)", "blocks.0.mlp.fc1 (2 groups)"]


# --- what is shown and stored ------------------------------------------------------------------------------


def test_the_ratios_are_printed_and_stored_with_the_plan(case, tmp_path):
    one = case("deit")
    found = one.allocate(evaluations=10)
    titles = ["heads", "patch_embed.proj (1 group)", "head dims", "blocks.0.mlp.fc1 (2 groups)"]
    assert list(found.plan.ratios) == titles
    mlp = [group for group in one.subject.groups if "mlp" in group.name]
    kept = sum(len(found.plan.kept[group.name]) for group in mlp) / sum(group.num_units for group in mlp)
    assert found.plan.ratios[titles[-1]] == pytest.approx(1 - kept)
    lines = [f"Ratio of {title}: {ratio:.2f}" for title, ratio in found.plan.ratios.items()]
    assert plan_lines(one.subject.graph, found.plan)[-4:] == lines
    save_plan(tmp_path / "plan.json", found.plan, one.subject.groups, {})
    assert load_plan(tmp_path / "plan.json").ratios == found.plan.ratios


def test_the_line_says_what_was_gained(case):
    one = case("deit")
    found = one.allocate(evaluations=10)
    start = f"{found.uniform_loss:.4f} uniform, {found.global_loss:.4f} global"
    assert found.line == f"Calibration loss: {start} => {found.loss:.4f} (10 evaluations)"
    assert dataclasses.replace(found, evaluations=1).line.endswith("(1 evaluation)")
