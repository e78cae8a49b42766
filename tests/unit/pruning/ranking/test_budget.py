"""Plans are priced without touching the model, and a budget is met as nearly as single steps allow, from below."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isomorphic.errors import UserError
from isomorphic.measure.complexity import Complexity, count_complexity
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup, LayerNode, Member, SectionStructure
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.ranking.budget import PlanCost, plan_for_budget, shared_ratios
from isomorphic.pruning.ranking.leftover import CLOSE
from isomorphic.pruning.ranking.ranker import RANKINGS, Ranker, RankingRules, Ratios, steps_by_set
from isomorphic.pruning.scoring import normalize, score_groups

STABLE = settings(deadline=None, derandomize=True, max_examples=30)
THOROUGH = settings(deadline=None, derandomize=True, max_examples=600)
UNITS = ("macs_paper", "macs_exact", "params")


def ranker_of(subject, rules=None):
    scores = score_groups(subject.model, subject.groups, "l2")
    scores = {name: normalize(values, "mean") for name, values in scores.items()}
    return Ranker(subject.graph, scores, subject.classes, rules or RankingRules())


def widened(plan, group, round_to):
    """The plan with one step given back in every head of `group`; None where its heads are whole."""
    kept = plan.kept[group.name]
    heads = plan.kept_heads(group)
    head_dim = len(kept) // len(heads)
    back = min(round_to, group.section_size - head_dim)
    if not back:
        return None
    units = set(kept)
    for head in heads:
        missing = [u for u in range(head * group.section_size, (head + 1) * group.section_size) if u not in units]
        units.update(missing[:back])
    return PruningPlan({**plan.kept, group.name: tuple(sorted(units))})


def largest_step(plan, groups, cost, round_to=1):
    """One rounding step: what the costliest group's next units would add. Which of them does not matter."""
    wider = filter(None, (widened(plan, group, round_to) for group in groups))
    return max((cost(other) - cost(plan) for other in wider), default=0)


# --- the price of a plan -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_predictions_equal_the_recount_to_the_unit(subject, seed):
    plan = subject.random_plan(seed)
    predicted = PlanCost(subject.model, subject.graph, subject.inputs)(plan)
    assert predicted == count_complexity(subject.cut(plan), subject.inputs)


def test_the_dense_plan_costs_what_the_dense_model_does(subject, keep_all):
    cost = PlanCost(subject.model, subject.graph, subject.inputs)
    assert cost(keep_all(subject.groups)) == count_complexity(subject.model, subject.inputs)


def test_pricing_leaves_the_model_alone_and_forgets_earlier_plans(subject):
    model = subject.copy()
    before = copy.deepcopy(model.state_dict())
    cost = PlanCost(model, subject.graph, subject.inputs)
    small = cost(subject.random_plan(0))
    cost(subject.random_plan(1))
    assert cost(subject.random_plan(0)) == small
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Branching(nn.Module):
    """Looks at values, which a copy without data does not have, and keeps tensors that are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
        self.offsets, self.cache = {"stem": torch.zeros(1)}, {}

    def forward(self, x):
        x = self.first(x + self.offsets["stem"])
        size = self.cache.setdefault(x.shape[-1], torch.ones(1, device=x.device))
        if float(x.abs().max()) > 1e9:
            x = x * 0
        return self.head(self.second(x).relu().mean((2, 3)) * size)


def test_models_that_look_at_values_are_priced_on_a_copy_with_data():
    model, image = Branching().eval(), torch.randn(1, 3, 8, 8)
    graph = trace_groups(model, image)
    plan = PruningPlan({group.name: tuple(range(0, group.num_units, 2)) for group in graph.groups})
    priced = PlanCost(model, graph, image)(plan)
    cut(cut_model := copy.deepcopy(model), graph, plan)
    assert priced == count_complexity(cut_model, image)
    assert priced.params < count_complexity(model, image).params


# --- the estimate of that price ----------------------------------------------------------------------------


def kept_by(plan, groups):
    return {g.name: (len(heads := plan.kept_heads(g)), len(plan.kept[g.name]) // len(heads)) for g in groups}


@pytest.mark.parametrize("unit", UNITS)
def test_the_estimate_of_the_dense_plan_is_its_cost(subject, keep_all, unit):
    cost = PlanCost(subject.model, subject.graph, subject.inputs)
    plan = keep_all(subject.groups)
    assert round(cost.estimate(unit)(kept_by(plan, subject.groups))) == getattr(cost(plan), unit)


@pytest.mark.parametrize("seed", range(3))
def test_params_are_estimated_to_the_unit(subject, seed):
    cost, plan = PlanCost(subject.model, subject.graph, subject.inputs), subject.random_plan(seed)
    assert round(cost.estimate("params")(kept_by(plan, subject.groups))) == cost(plan).params


@pytest.mark.parametrize("unit", UNITS[:2])
@pytest.mark.parametrize("seed", range(3))
def test_macs_are_estimated_nearly(subject, seed, unit):
    cost, plan = PlanCost(subject.model, subject.graph, subject.inputs), subject.random_plan(seed)
    assert cost.estimate(unit)(kept_by(plan, subject.groups)) == pytest.approx(getattr(cost(plan), unit), rel=0.1)


# --- real models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "unit", "share", "round_to"),
    [
        ("deit", "macs_paper", 0.5, 1),
        ("deit", "macs_exact", 0.25, 2),
        ("deit", "params", 0.8, 1),
        ("convnext", "macs_paper", 0.25, 2),
        ("cnn", "macs_paper", 0.9, 1),
        ("cnn", "macs_exact", 0.5, 4),
        ("cnn", "params", 0.6, 1),
    ],
)
def test_a_budget_is_met_within_one_step(subjects, name, unit, share, round_to):
    subject = subjects(name)
    complexity = PlanCost(subject.model, subject.graph, subject.inputs)
    target = int(share * getattr(count_complexity(subject.model, subject.inputs), unit))
    ranker = ranker_of(subject, RankingRules(round_to=round_to))
    plan = plan_for_budget(ranker, lambda ratio: shared_ratios(ratio, None, None), complexity, unit, target)

    def cost(plan):
        return getattr(complexity(plan), unit)

    assert target - largest_step(plan, subject.groups, cost, round_to) <= cost(plan) <= target
    assert getattr(count_complexity(subject.cut(plan), subject.inputs), unit) == cost(plan)


def test_an_explicit_share_of_heads_stays_while_the_budget_is_searched(subjects):
    subject = subjects("deit")
    complexity = PlanCost(subject.model, subject.graph, subject.inputs)
    dense = complexity(PruningPlan({g.name: tuple(range(g.num_units)) for g in subject.groups}))
    for heads, expected in ((0.0, 8), (0.25, 6)):
        plan = plan_for_budget(
            ranker_of(subject),
            lambda ratio, heads=heads: shared_ratios(ratio, heads, 0.25),
            complexity,
            "macs_paper",
            dense.macs_paper // 2,
        )
        attention = [group for group in subject.groups if group.heads]
        assert sum(len(plan.kept_heads(group)) for group in attention) == expected


def test_explicit_shares_that_meet_the_budget_alone_leave_the_width(subjects):
    subject = subjects("deit")
    complexity, ranker = PlanCost(subject.model, subject.graph, subject.inputs), ranker_of(subject)
    alone = ranker.plan(Ratios(0.0, 0.5, 0.0))
    target = complexity(alone).macs_paper + 1000
    plan = plan_for_budget(ranker, lambda ratio: shared_ratios(ratio, 0.5, 0.0), complexity, "macs_paper", target)
    assert plan == alone


# --- the ratios of a search --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "head_dims", "expected"),
    [
        (None, None, Ratios(0.75, 0.5, 0.5)),
        (0.3, None, Ratios(0.75, 0.3, 0.75)),
        (0.0, None, Ratios(0.75, 0.0, 0.75)),
        (None, 0.1, Ratios(0.75, 0.75, 0.1)),
        (0.3, 0.0, Ratios(0.75, 0.3, 0.0)),
    ],
)
def test_shares_that_were_left_open_follow(heads, head_dims, expected):
    assert shared_ratios(0.75, heads, head_dims) == expected


@pytest.mark.parametrize("heads", [None, 0.5])
def test_nothing_goes_at_zero_and_all_at_one(heads):
    assert shared_ratios(0.0, heads, None).width == 0.0
    assert shared_ratios(0.0, None, None) == Ratios(0.0, 0.0, 0.0)
    assert shared_ratios(1.0, None, None) == Ratios(1.0, 1.0, 1.0)


# --- generated models: a stream, MLPs and attention of any price -------------------------------------------


@dataclass
class Toy:
    """Groups with scores, and a price that is a product of widths like that of a real model."""

    groups: list[CoupledGroup]
    scores: dict[str, torch.Tensor]
    prices: dict[str, int]

    @property
    def graph(self):
        return ChannelGraph(tuple(self.groups), {})

    def ranker(self, rules):
        classes = {
            group.name: (0 if not number else 2 if group.heads else 1) for number, group in enumerate(self.groups)
        }
        return Ranker(self.graph, self.scores, classes, rules)

    def cost(self, plan):
        stream = len(plan.kept[self.groups[0].name])
        inner = sum(self.prices[group.name] * len(plan.kept[group.name]) for group in self.groups[1:])
        return stream * (100 + inner)

    def complexity(self, plan):
        return Complexity(self.cost(plan), 2 * self.cost(plan), 3 * self.cost(plan))

    def estimate(self, kept):
        """The cost, of what is kept."""
        stream, *inner = (blocks * width for blocks, width in (kept[group.name] for group in self.groups))
        return stream * (100 + sum(self.prices[g.name] * n for g, n in zip(self.groups[1:], inner, strict=True)))


class ToyCost:
    """A toy's cost, which remembers the plans that were measured, and its estimate, which `guess` may spoil."""

    def __init__(self, toy, guess="exact"):
        self.toy, self.guess, self.measured = toy, GUESSES[guess], []

    def __call__(self, plan):
        self.measured.append(plan)
        return self.toy.complexity(plan)

    def estimate(self, unit):
        factor = 1 + UNITS.index(unit)
        return lambda kept: self.guess(factor * self.toy.estimate(kept))


# How an estimate may be off.
GUESSES = {
    "exact": lambda cost: cost,
    "half": lambda cost: 0.5 * cost,
    "flat": lambda cost: cost**0.5,
    "steep": lambda cost: cost**3,
    "offset": lambda cost: cost + 1e6,
    "nothing": lambda cost: 0.0,
    "constant": lambda cost: 1e4,
    "upside down": lambda cost: 1e9 / (1 + cost),
}


def make_group(name, units, heads=None):
    member = Member(name, "weight", 0, torch.arange(units)[:, None], 0)
    structure = None if heads is None else SectionStructure(heads, are_heads=True)
    return CoupledGroup(
        f"{name}.weight:0", units, (member,), (LayerNode(name, "linear", "out"),), frozenset(), structure
    )


@st.composite
def toys(draw):
    groups = [make_group("stream", draw(st.sampled_from([8, 48])))]
    for number in range(draw(st.integers(1, 4))):
        groups.append(make_group(f"mlp{number}", draw(st.sampled_from([4, 64, 300]))))
    for number in range(draw(st.integers(0, 2))):
        heads = draw(st.sampled_from([1, 3, 4]))
        groups.append(make_group(f"attention{number}", heads * draw(st.sampled_from([2, 12])), heads))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    power = draw(st.sampled_from([0, 1, 4]))  # 0: ties everywhere
    scores = {group.name: torch.rand(group.num_units, generator=generator) ** power for group in groups}
    prices = {group.name: draw(st.sampled_from([1, 4, 64, 300])) for group in groups}
    return Toy(groups, scores, prices)


rules_any = st.builds(
    RankingRules, st.sampled_from(RANKINGS), st.sampled_from([1, 1, 2, 4]), st.sampled_from([1.0, 1.0, 0.75])
)
share_or_none = st.sampled_from([None, None, 0.0, 0.5])


def steps_taken(plan, groups, order):
    """How many of a pool's steps a plan took, by the widths that it left in a head; the groups' heads all stay."""
    left = {g.name: len(plan.kept[g.name]) // len(plan.kept_heads(g)) for g in groups}
    widths = {g.name: g.section_size for g in groups}
    for steps in range(len(order.owner) + 1):
        if all(widths[name] - taken == left[name] for name, taken in order.steps_by_set(steps).items()):
            return steps
    return None  # no prefix of the order: single sets got steps back


@STABLE
@given(toys(), st.sampled_from(RANKINGS), st.floats(0, 1))
def test_no_step_that_fits_is_left_in_any_pool(toy, ranking, position):
    """As near as steps allow: one more of any pool would be over, and one more of any set where more than 0.5% is left.

    By a good estimate a search measures few plans.
    """
    ranker = toy.ranker(RankingRules(ranking))
    least, most = (toy.cost(ranker.plan(Ratios(ratio, 0.0))) for ratio in (1.0, 0.0))
    target = least + int(position * (most - least))
    cost = ToyCost(toy)
    plan = plan_for_budget(ranker, lambda ratio: Ratios(ratio, 0.0), cost, "macs_paper", target)
    orders = ranker.width_orders({}, separate_head_dims=False)
    found = {pool: steps_taken(plan, toy.groups, order) for pool, order in orders.items()}
    steps = {pool: count for pool, count in found.items() if count is not None}
    if len(steps) == len(orders):
        for pool in filter(steps.__getitem__, steps):
            wider = ranker.plan_of({}, steps_by_set(orders, {**steps, pool: steps[pool] - 1}))
            assert toy.cost(wider) > target
    if toy.cost(plan) < (1 - CLOSE) * target:
        wider = filter(None, (widened(plan, group, 1) for group in toy.groups))
        assert all(toy.cost(other) > target for other in wider)
    assert len(cost.measured) <= 5


def check_search(toy, rules, heads, head_dims, position, guess):
    ranker = toy.ranker(rules)

    def ratios_at(ratio):
        return shared_ratios(ratio, heads, head_dims)

    least, most = (toy.cost(ranker.plan(ratios_at(ratio))) for ratio in (1.0, 0.0))
    target = least + int(position * (most - least))
    plan = plan_for_budget(ranker, ratios_at, ToyCost(toy, guess), "macs_paper", target)
    plan.check(toy.graph)
    step = largest_step(plan, toy.groups, toy.cost, rules.round_to)
    assert target - step <= toy.cost(plan) <= target


@STABLE
@given(toys(), rules_any, share_or_none, share_or_none, st.floats(0, 1), st.sampled_from(list(GUESSES)))
def test_any_budget_is_met_within_one_step(toy, rules, heads, head_dims, position, guess):
    """However good the estimate is."""
    check_search(toy, rules, heads, head_dims, position, guess)


@pytest.mark.slow
@THOROUGH
@given(toys(), rules_any, share_or_none, share_or_none, st.floats(0, 1), st.sampled_from(list(GUESSES)))
def test_any_budget_is_met_within_one_step_at_length(toy, rules, heads, head_dims, position, guess):
    check_search(toy, rules, heads, head_dims, position, guess)


@pytest.fixture
def toy():
    groups = [make_group("stream", 1000), make_group("mlp", 1000)]
    scores = {group.name: torch.arange(1.0, 1001.0) for group in groups}
    return Toy(groups, scores, dict.fromkeys(scores, 1000))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("guess", GUESSES)
def test_the_two_ends_can_be_had_exactly(toy, unit, guess):
    ranker = toy.ranker(RankingRules())
    for ratio in (0.0, 1.0):
        plan = ranker.plan(Ratios(ratio))
        target = getattr(toy.complexity(plan), unit)
        found = plan_for_budget(ranker, Ratios, ToyCost(toy, guess), unit, target)
        assert found.kept == plan.kept


def test_the_same_budget_gives_the_same_plan(toy):
    rankers = [toy.ranker(RankingRules(round_to=3)) for _ in range(2)]
    plans = [plan_for_budget(ranker, Ratios, ToyCost(toy), "params", 10**9) for ranker in rankers]
    assert plans[0].kept == plans[1].kept


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("unit", UNITS)
def test_a_budget_out_of_reach_says_what_is_reachable(toy, unit, guess):
    ranker = toy.ranker(RankingRules(max_pruning_ratio=0.5))
    least, most = (getattr(toy.complexity(ranker.plan(Ratios(ratio))), unit) for ratio in (1.0, 0.0))
    with pytest.raises(UserError, match="out of reach") as error:
        plan_for_budget(ranker, Ratios, ToyCost(toy, guess), unit, least // 2)
    named = amounts(str(error.value), "params" if unit == "params" else "MACs")
    assert named == pytest.approx([least // 2, least, most], rel=0.01)
    with pytest.raises(UserError, match="out of reach"):
        plan_for_budget(ranker, Ratios, ToyCost(toy, guess), unit, least - 1)
    for target in (most, 2 * most):
        plan = plan_for_budget(ranker, Ratios, ToyCost(toy, guess), unit, target)
        assert plan.kept == ranker.plan(Ratios(0.0)).kept


def amounts(message, what):
    """The numbers in front of a word: "1.50 G MACs" is 1.5e9."""
    scale = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}
    found = re.findall(rf"([\d.,]+) ([KMG]?) ?{what}", message)
    return [float(number.replace(",", "")) * scale[letter] for number, letter in found]


class GraphNet(nn.Module):
    """Messages of a graph's edges between two linear layers on its nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.edge, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x, edge_index):
        x = self.embed(x).relu()
        x = torch.zeros_like(x).index_add(0, edge_index[1], self.edge(x[edge_index[0]]).relu())
        return self.out(x)


def test_a_graph_is_priced_whole_though_a_copy_without_data_ran_on_one_node():
    model, inputs = GraphNet(), {"x": torch.randn(24, 8), "edge_index": torch.arange(160).reshape(2, 80) % 24}
    graph = trace_groups(model, inputs)
    plan = PruningPlan({group.name: tuple(range(group.num_units // 2)) for group in graph.groups})
    cost = PlanCost(model, graph, inputs)
    cut(cut_model := copy.deepcopy(model), graph, plan)
    assert cost(plan) == count_complexity(cut_model, inputs)
    assert cost(plan).as_given and cost(plan).macs_paper > 24 * 8 * 8 + 80 * 8 * 8
    dense = count_complexity(model, inputs).macs_exact
    estimate = cost.estimate("macs_exact")
    assert estimate({group.name: (group.num_sections, group.num_units) for group in graph.groups}) == dense
