"""Step 4: quotas, ties, pools, heads, and what wins when asks conflict."""

from __future__ import annotations

import itertools
from collections import defaultdict
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isomorphic.pruning.groups import CoupledGroup, HeadStructure, LayerNode, Member
from isomorphic.pruning.ranking import RANKINGS, Ranker, RankingRules, Ratios

STABLE = settings(deadline=None, derandomize=True, max_examples=60)
THOROUGH = settings(deadline=None, derandomize=True, max_examples=3000)


def make_group(name, units, heads=None):
    """One linear layer; ranking looks at names, counts and heads alone."""
    member = Member(name, "weight", 0, torch.arange(units)[:, None], 0)
    structure = None if heads is None else HeadStructure(name, heads)
    return CoupledGroup(
        f"{name}.weight:0", units, (member,), (LayerNode(name, "linear", "out"),), frozenset(), structure
    )


def rank(case, ratios, rules=None, *, order=None):
    groups, scores, classes = case
    groups = [groups[position] for position in order] if order else groups
    return Ranker(groups, scores, classes, rules or RankingRules()).plan(ratios)


def one_class(**scores):
    """Plain groups of one class, by name."""
    groups = [make_group(name, len(values)) for name, values in scores.items()]
    by_name = {f"{name}.weight:0": torch.tensor(values, dtype=torch.float32) for name, values in scores.items()}
    return groups, by_name, dict.fromkeys(by_name, 0)


def attention(*layers):
    """Attention groups of one class, named layer0, layer1 …, from scores (heads, head dims)."""
    groups = [make_group(f"layer{i}", len(s) * len(s[0]), len(s)) for i, s in enumerate(layers)]
    scores = {g.name: torch.tensor(s, dtype=torch.float32).flatten() for g, s in zip(groups, layers, strict=True)}
    return groups, scores, dict.fromkeys(scores, 0)


# --- a reference that is as plain as the criteria ----------------------------------------------------------


def naive_plan(case, ratios, rules):
    """Takes one step after the other, in exact arithmetic."""
    groups, scores, classes = case
    exact = {g.name: [Fraction(float(s)) for s in scores[g.name]] for g in groups}
    heads = naive_heads(groups, exact, ratios.heads, rules)
    pools = defaultdict(list)
    for group in groups:
        if group.heads and ratios.head_dims is not None:
            key, ratio = ("dims", group.name if rules.ranking == "local" else ""), ratios.head_dims
        else:
            label = {"isomorphic": classes[group.name], "global": 0, "local": group.name}[rules.ranking]
            key, ratio = ("width", label), ratios.width
        pools[key, ratio].append(group)
    kept = {}
    for (_, ratio), members in pools.items():
        kept |= naive_widths(members, exact, heads, ratio, rules)
    return kept


def naive_heads(groups, exact, ratio, rules):
    layers = {g.name: g for g in groups if g.heads}
    pools = [[name] for name in layers] if rules.ranking == "local" else [list(layers)]
    surviving = {}
    for pool in pools:
        ranked = {}
        for name in pool:
            means = [
                mean(exact[name][h * layers[name].head_dim : (h + 1) * layers[name].head_dim])
                for h in range(layers[name].num_heads)
            ]
            ranked[name] = sorted((value, head) for head, value in enumerate(means))
        limits = {name: limit(layers[name].num_heads, rules) for name in pool}
        candidates = [
            (value, Fraction(place + 1, layers[name].num_heads), name)
            for name in pool
            for place, (value, _) in enumerate(ranked[name][: limits[name]])
        ]
        total = sum(layers[name].num_heads for name in pool)
        lost = [name for _, _, name in sorted(candidates)[: nearest(range(len(candidates) + 1), ratio * total)]]
        for name in pool:
            surviving[name] = sorted(head for _, head in ranked[name][lost.count(name) :])
    return surviving


def naive_widths(members, exact, heads, ratio, rules):
    by_rank, taken = {}, dict.fromkeys((g.name for g in members), 0)
    for g in members:
        blocks = [exact[g.name][h * g.head_dim : (h + 1) * g.head_dim] for h in heads.get(g.name, range(g.num_heads))]
        by_rank[g.name] = [sorted(block) for block in blocks]
    total = sum(len(blocks) * len(blocks[0]) for blocks in by_rank.values())
    history = [(0, dict(taken))]
    while True:
        offers = []
        for g in members:
            size = (g.head_dim - taken[g.name]) % rules.round_to or rules.round_to
            if taken[g.name] + size <= limit(g.head_dim, rules):
                goes = [s for block in by_rank[g.name] for s in block[taken[g.name] : taken[g.name] + size]]
                fraction = Fraction(taken[g.name] + size, g.head_dim)
                offers.append((mean(goes), fraction, g.name, size))
        if not offers:
            break
        _, _, name, size = min(offers)
        taken[name] += size
        history.append((history[-1][0] + size * len(by_rank[name]), dict(taken)))
    chosen = history[nearest([removed for removed, _ in history], ratio * total)][1]
    return {
        g.name: naive_kept(g, exact[g.name], heads.get(g.name, range(g.num_heads)), chosen[g.name]) for g in members
    }


def naive_kept(group, scores, heads, removed):
    kept = []
    for head in heads:
        units = range(head * group.head_dim, (head + 1) * group.head_dim)
        kept += sorted(sorted(units, key=lambda unit: (scores[unit], unit))[removed:])
    return tuple(kept)


def mean(values):
    return sum(values, Fraction(0)) / len(values)


def limit(count, rules):
    """The most of `count` that may go: one stays, and the largest share binds."""
    return min(count - 1, int(Fraction(rules.max_pruning_ratio) * count))


def nearest(amounts, target):
    """Position of the first amount that is nearest to the target."""
    distances = [abs(amount - Fraction(target)) for amount in amounts]
    return distances.index(min(distances))


# --- generated cases ---------------------------------------------------------------------------------------

# Sixty-fourths and eighths are exact in binary, so that the reference and the code see the same ties.
ratios_exact = st.integers(0, 64).map(lambda k: k / 64)
scores_exact = st.one_of(st.integers(0, 3), st.integers(0, 1000)).map(lambda k: k / 8)


@st.composite
def cases(draw, max_groups=4, plain=False):
    groups, scores, classes = [], {}, {}
    names = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=max_groups, unique=True))
    for name in names:
        heads = None if plain else draw(st.sampled_from([None, None, 1, 2, 4]))
        width = draw(st.integers(1, 12 if heads is None else 6))
        group = make_group(name, width * (heads or 1), heads)
        groups.append(group)
        values = draw(st.lists(scores_exact, min_size=group.num_units, max_size=group.num_units))
        scores[group.name] = torch.tensor(values, dtype=torch.float32)
        classes[group.name] = draw(st.integers(0, 1))
    return groups, scores, classes


all_ratios = st.builds(Ratios, ratios_exact, ratios_exact, st.one_of(st.none(), ratios_exact))
all_rules = st.builds(
    RankingRules,
    st.sampled_from(RANKINGS),
    st.sampled_from([1, 1, 2, 3, 5]),
    st.one_of(st.just(1.0), st.integers(0, 16).map(lambda k: k / 16)),
)


@STABLE
@given(cases(), all_ratios, all_rules)
def test_plans_are_those_of_the_naive_reference(case, ratios, rules):
    assert rank(case, ratios, rules).kept == naive_plan(case, ratios, rules)


@pytest.mark.slow
@THOROUGH
@given(cases(max_groups=8), all_ratios, all_rules)
def test_plans_are_those_of_the_naive_reference_at_length(case, ratios, rules):
    assert rank(case, ratios, rules).kept == naive_plan(case, ratios, rules)


@STABLE
@given(cases(), all_ratios, all_rules)
def test_the_precedence_of_rules(case, ratios, rules):
    """The cut model runs > a unit and a head stay > max_pruning_ratio > round_to > quota."""
    plan = rank(case, ratios, rules)
    plan.check(case[0])
    for group in case[0]:
        heads = plan.kept_heads(group)
        per_head = [[unit for unit in plan.kept[group.name] if unit // group.head_dim == head] for head in heads]
        assert heads
        assert len({len(units) for units in per_head}) == 1
        head_dim = len(per_head[0])
        assert 1 <= head_dim <= group.head_dim
        assert group.num_heads - len(heads) <= rules.max_pruning_ratio * group.num_heads
        assert group.head_dim - head_dim <= rules.max_pruning_ratio * group.head_dim
        assert head_dim == group.head_dim or head_dim % rules.round_to == 0


@STABLE
@given(cases(), all_ratios, all_rules)
def test_each_head_keeps_its_own_best_dims(case, ratios, rules):
    groups, scores, _ = case
    plan = rank(case, ratios, rules)
    for group in groups:
        kept = set(plan.kept[group.name])
        for head in plan.kept_heads(group):
            units = range(head * group.head_dim, (head + 1) * group.head_dim)
            gone = [scores[group.name][unit] for unit in units if unit not in kept]
            stay = [scores[group.name][unit] for unit in units if unit in kept]
            assert not gone or max(gone) <= min(stay)


@STABLE
@given(cases(), all_ratios, all_rules)
def test_heads_are_whole_blocks_ranked_by_their_mean(case, ratios, rules):
    groups, scores, _ = case
    plan = rank(case, ratios, rules)
    for group in groups:
        means = scores[group.name].double().view(group.num_heads, -1).mean(1)
        kept = plan.kept_heads(group)
        gone = [means[head] for head in range(group.num_heads) if head not in kept]
        assert not gone or max(gone) <= min(means[head] for head in kept)


@STABLE
@given(cases(plain=True), ratios_exact, st.sampled_from(RANKINGS))
def test_quotas_are_exact_where_nothing_binds(case, ratio, ranking):
    groups, _, classes = case
    plan = rank(case, Ratios(ratio), RankingRules(ranking))
    pools = defaultdict(list)
    for group in groups:
        pools[{"isomorphic": classes[group.name], "global": 0, "local": group.name}[ranking]].append(group)
    for members in pools.values():
        total = sum(group.num_units for group in members)
        removed = total - sum(len(plan.kept[group.name]) for group in members)
        if ratio * total <= total - len(members):  # one unit of each stays
            assert abs(removed - ratio * total) <= 0.5
        else:
            assert removed == total - len(members)


@STABLE
@given(cases(), st.tuples(ratios_exact, ratios_exact), ratios_exact, st.one_of(st.none(), ratios_exact), all_rules)
def test_a_larger_ratio_removes_what_a_smaller_one_does(case, widths, heads, head_dims, rules):
    small, large = (rank(case, Ratios(ratio, heads, head_dims), rules) for ratio in sorted(widths))
    for group in case[0]:
        assert set(large.kept[group.name]) <= set(small.kept[group.name])


@STABLE
@given(cases(), st.tuples(ratios_exact, ratios_exact), all_rules)
def test_larger_ratios_of_heads_and_of_head_dims_are_nested_too(case, pair, rules):
    for ratios in (lambda ratio: Ratios(0.0, ratio, 0.0), lambda ratio: Ratios(0.0, 0.0, ratio)):
        small, large = (rank(case, ratios(ratio), rules) for ratio in sorted(pair))
        for group in case[0]:
            assert set(large.kept[group.name]) <= set(small.kept[group.name])


@STABLE
@given(cases(), all_ratios, all_rules, st.randoms(use_true_random=False))
def test_the_order_of_the_groups_does_not_matter(case, ratios, rules, rng):
    order = rng.sample(range(len(case[0])), len(case[0]))
    assert rank(case, ratios, rules).kept == rank(case, ratios, rules, order=order).kept


@STABLE
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=5),
    ratios_exact,
    st.sampled_from([0.0, 1.0, 0.1]),
    st.sampled_from(["isomorphic", "global"]),
)
def test_ties_cost_every_group_about_the_same_share(sizes, ratio, value, ranking):
    """All scores equal: no group is a whole unit ahead of another, whoever stands first."""
    case = one_class(**{f"g{number}": [value] * size for number, size in enumerate(sizes)})
    plan = rank(case, Ratios(ratio), RankingRules(ranking))
    removed = {group.name: len(plan.removed(group)) for group in case[0]}
    for one, other in itertools.permutations(case[0], 2):
        if removed[other.name] < other.num_units - 1:  # it could have given one more
            ahead = Fraction(removed[one.name], one.num_units)
            assert ahead <= Fraction(removed[other.name] + 1, other.num_units)


# --- single facts ------------------------------------------------------------------------------------------


def test_ties_go_by_rank_fraction_then_name_then_unit():
    case = one_class(b=[0.0] * 4, a=[0.0] * 8, c=[0.0] * 4)
    plans = [rank(case, Ratios(count / 16)) for count in range(5)]
    removed = [{(group.name[0], unit) for group in case[0] for unit in plan.removed(group)} for plan in plans]
    order = [(after - before).pop() for before, after in itertools.pairwise(removed)]
    assert order == [("a", 0), ("a", 1), ("b", 0), ("c", 0)]  # an eighth, then a quarter of each


def test_two_layers_with_equal_scores_lose_equal_shares():
    """The library removes every score up to the threshold: half a layer, or all of it."""
    case = one_class(large=[1.0] * 20, small=[1.0] * 10)
    plan = rank(case, Ratios(0.5))
    assert [len(plan.kept[group.name]) for group in case[0]] == [10, 5]


def test_a_layer_under_the_threshold_keeps_one_unit_not_its_full_width():
    case = one_class(poor=[0.1, 0.2, 0.3, 0.4], rich=[5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    plan = rank(case, Ratios(0.5))
    assert plan.kept == {"poor.weight:0": (3,), "rich.weight:0": (2, 3, 4, 5)}


def test_the_largest_share_binds_within_the_one_step():
    case = one_class(poor=[0.1, 0.2, 0.3, 0.4], rich=[5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    plan = rank(case, Ratios(0.5), RankingRules(max_pruning_ratio=0.5))
    assert plan.kept == {"poor.weight:0": (2, 3), "rich.weight:0": (3, 4, 5)}


def test_round_to_counts_dims_of_a_head():
    """The library held a head's dims against the width of all heads, and floored."""
    case = attention([[1.0, 2, 3, 4, 5, 6, 7, 8]] * 3)
    for ratio, expected in ((0.2, 6), (0.26, 6), (0.375, 6), (0.5, 4), (0.9, 2)):
        plan = rank(case, Ratios(ratio), RankingRules(round_to=2))
        assert len(plan.kept["layer0.weight:0"]) == 3 * expected


def test_the_first_step_brings_an_odd_width_to_a_multiple():
    case = one_class(a=[float(score) for score in range(10)])
    widths = [len(rank(case, Ratios(ratio), RankingRules(round_to=4)).kept["a.weight:0"]) for ratio in (0, 0.2, 0.5, 1)]
    assert widths == [10, 8, 4, 4]


def test_a_multiple_beyond_the_width_leaves_the_group_whole():
    case = one_class(narrow=[0.0] * 6, wide=[1.0] * 16)
    plan = rank(case, Ratios(1.0), RankingRules(round_to=8))
    assert [len(plan.kept[group.name]) for group in case[0]] == [6, 8]


@pytest.mark.parametrize(("share", "units"), [(0.29, 100), (0.57, 100), (0.58, 50), (0.7, 10)])
def test_the_largest_share_is_reached_exactly(share, units):
    """0.29 × 100 is 28.999… in floats."""
    case = one_class(a=[float(score) for score in range(units)])
    plan = rank(case, Ratios(1.0), RankingRules(max_pruning_ratio=share))
    assert len(plan.removed(case[0][0])) == round(share * units)


def test_the_largest_share_wins_over_the_multiple():
    case = one_class(a=[float(score) for score in range(8)])
    plan = rank(case, Ratios(1.0), RankingRules(round_to=4, max_pruning_ratio=0.4))
    assert len(plan.kept["a.weight:0"]) == 8  # 4 would be the half of it
    plan = rank(case, Ratios(1.0), RankingRules(round_to=4, max_pruning_ratio=0.5))
    assert plan.kept["a.weight:0"] == (4, 5, 6, 7)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_ratio_zero_keeps_everything_and_ratio_one_keeps_one(ranking):
    groups, scores, classes = attention([[3.0, 1, 2], [6, 5, 4]], [[9.0, 7, 8], [1, 2, 3]])
    plain, more, _ = one_class(single=[0.0], plain=[1.0, 2.0])
    case = groups + plain, scores | more, classes | dict.fromkeys(more, 1)
    nothing = rank(case, Ratios(0.0, 0.0, 0.0), RankingRules(ranking))
    assert all(len(nothing.kept[group.name]) == group.num_units for group in case[0])
    most = rank(case, Ratios(1.0, 1.0, 1.0), RankingRules(ranking))
    assert most.kept == {
        "layer0.weight:0": (4 - 1,),  # the better head's best dim
        "layer1.weight:0": (0,),
        "single.weight:0": (0,),
        "plain.weight:0": (1,),
    }


def test_heads_go_where_the_width_ratio_is_zero():
    """The library skips head pruning there."""
    case = attention([[1.0, 1.0], [2.0, 2.0]], [[3.0, 3.0], [4.0, 4.0]])
    plan = rank(case, Ratios(0.0, heads=0.25))
    assert plan.kept == {"layer0.weight:0": (2, 3), "layer1.weight:0": (0, 1, 2, 3)}


def test_a_layer_of_poor_heads_keeps_one():
    """The library leaves num_heads = 0."""
    case = attention([[0.1, 0.1], [0.2, 0.2]], [[3.0, 3.0], [4.0, 4.0]])
    plan = rank(case, Ratios(0.0, heads=0.5))
    assert [plan.kept_heads(group) for group in case[0]] == [[1], [1]]


def test_heads_stay_without_a_ratio_of_their_own():
    case = attention([[0.0, 0.0], [9.0, 9.0]])
    assert rank(case, Ratios(0.5)).kept["layer0.weight:0"] == (1, 3)


def test_dims_are_ranked_among_the_surviving_heads():
    """Half of the heads, then a quarter of what is left: 4 of 8 units, then 1 dim of 4."""
    case = attention([[0.0, 1.0, 2.0, 3.0], [9.0, 6.0, 7.0, 8.0]])
    plan = rank(case, Ratios(0.0, heads=0.5, head_dims=0.25))
    assert plan.kept["layer0.weight:0"] == (4, 6, 7)


def test_every_head_chooses_its_own_dims():
    """The library removes equal dims of all heads."""
    case = attention([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    assert rank(case, Ratios(1 / 3)).kept["layer0.weight:0"] == (1, 2, 3, 5)


def test_heads_of_all_layers_form_one_ranking_unless_it_is_local():
    case = attention([[1.0], [2.0]], [[3.0], [4.0]])
    groups = [*case[0], make_group("apart", 4, 4)]
    scores = case[1] | {"apart.weight:0": torch.tensor([0.5, 0.6, 0.7, 5.0])}
    classes = case[2] | {"apart.weight:0": 1}  # not isomorphic, the same ranking all the same
    kept = {ranking: rank((groups, scores, classes), Ratios(0.0, 0.5), RankingRules(ranking)) for ranking in RANKINGS}
    for ranking in ("isomorphic", "global"):
        assert [len(kept[ranking].kept_heads(group)) for group in groups] == [1, 2, 1]
    assert [len(kept["local"].kept_heads(group)) for group in groups] == [1, 1, 2]


def test_a_step_of_attention_counts_once_for_every_head():
    groups, scores, classes = attention([[1.0, 9.0]] * 4)
    plain, more, _ = one_class(mlp=[2.0] * 8)
    case = groups + plain, scores | more, classes | dict.fromkeys(more, 0)
    plan = rank(case, Ratios(0.25))  # 4 of 16 units: one dim of 4 heads
    assert [len(plan.kept[group.name]) for group in case[0]] == [4, 8]


def test_head_dims_are_a_pool_of_their_own_only_with_a_ratio():
    groups, scores, classes = attention([[5.0, 6.0, 7.0, 8.0]])
    plain, more, _ = one_class(mlp=[1.0, 2.0, 3.0, 4.0])
    case = groups + plain, scores | more, classes | dict.fromkeys(more, 0)
    together = rank(case, Ratios(0.25))
    assert [len(together.kept[group.name]) for group in case[0]] == [4, 2]
    apart = rank(case, Ratios(0.25, head_dims=0.75))
    assert [len(apart.kept[group.name]) for group in case[0]] == [1, 3]


def test_pools_are_classes_everything_or_single_groups():
    groups, scores, _ = one_class(a=[1.0, 2.0, 3.0, 4.0], b=[3.0, 4.0, 5.0, 6.0], c=[0.1, 0.2, 0.3, 0.4])
    case = groups, scores, {"a.weight:0": 0, "b.weight:0": 0, "c.weight:0": 1}
    widths = {
        ranking: [len(rank(case, Ratios(0.5), RankingRules(ranking)).kept[group.name]) for group in groups]
        for ranking in RANKINGS
    }
    assert widths["isomorphic"] == [1, 3, 2]
    assert widths["global"] == [2, 3, 1]
    assert widths["local"] == [2, 2, 2]


@pytest.mark.parametrize(("ratio", "removed"), [(0.0, 0), (0.04, 0), (0.06, 1), (0.5, 5), (0.95, 9), (1.0, 9)])
def test_the_nearest_number_of_units_goes(ratio, removed):
    case = one_class(a=[float(score) for score in range(10)])
    assert len(rank(case, Ratios(ratio)).removed(case[0][0])) == removed


def test_of_two_equally_near_quotas_the_smaller_wins():
    case = one_class(a=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert len(rank(case, Ratios(0.5)).removed(case[0][0])) == 2


def test_a_plan_does_not_depend_on_earlier_plans():
    """No state is shared between plans or rankers (the library's pruners share default arguments)."""
    case = attention([[3.0, 1, 2], [6, 5, 4]], [[9.0, 7, 8], [1, 2, 3]])
    ranker = Ranker(*case, RankingRules())
    first = ranker.plan(Ratios(0.3, 0.25))
    ranker.plan(Ratios(0.9, 0.5, 0.9))
    Ranker(*case, RankingRules("local", 2, 0.5)).plan(Ratios(0.7, 0.7))
    assert ranker.plan(Ratios(0.3, 0.25)).kept == first.kept == rank(case, Ratios(0.3, 0.25)).kept


def test_real_groups_are_ranked_like_the_naive_reference(subject):
    """Rounded to eighths, so that ties are exact."""
    generator = torch.Generator().manual_seed(0)
    scores = {g.name: torch.randint(64, (g.num_units,), generator=generator) / 8 for g in subject.groups}
    case = subject.groups, scores, subject.classes
    ratios = Ratios(0.5, 0.25, 0.25)
    for ranking in RANKINGS:
        rules = RankingRules(ranking, 2)
        assert rank(case, ratios, rules).kept == naive_plan(case, ratios, rules)
