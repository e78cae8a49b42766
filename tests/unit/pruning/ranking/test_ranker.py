"""Step 4: quotas, ties, pools, heads, and what wins when asks conflict."""

from __future__ import annotations

import itertools
from collections import defaultdict
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isomorphic.pruning.groups import ChannelGraph, CoupledGroup, LayerNode, Member, SectionStructure
from isomorphic.pruning.ranking.ranker import HEADS, RANKINGS, Ranker, RankingPool, RankingRules, Ratios

STABLE = settings(deadline=None, derandomize=True, max_examples=60)
THOROUGH = settings(deadline=None, derandomize=True, max_examples=3000)


def make_group(name, units, heads=None, *, sections=None, split_dim=""):
    """One linear layer; ranking looks at names, counts, sections and split dims alone."""
    member = Member(name, "weight", 0, torch.arange(units)[:, None], 0)
    count = heads or sections
    structure = SectionStructure(count, are_heads=heads is not None) if count else None
    return CoupledGroup(
        f"{name}.weight:0", units, (member,), (LayerNode(name, "linear", "out"),), frozenset(), structure, split_dim
    )


def make_graph(groups, together=()):
    return ChannelGraph(tuple(groups), {}, shrink_together=tuple(together))


def rank(case, ratios, rules=None, *, order=None):
    graph, scores, classes = case
    if order:
        graph = make_graph([graph.groups[position] for position in order], graph.shrink_together)
    return Ranker(graph, scores, classes, rules or RankingRules()).plan(ratios)


def joined(*cases, numbers, together=()):
    """One case of several, each of them all of a class."""
    groups = [group for graph, _, _ in cases for group in graph.groups]
    scores = {name: values for _, scores, _ in cases for name, values in scores.items()}
    classes = {name: number for (_, scores, _), number in zip(cases, numbers, strict=True) for name in scores}
    return make_graph(groups, together), scores, classes


def one_class(**scores):
    """Plain groups of one class, by name."""
    groups = [make_group(name, len(values)) for name, values in scores.items()]
    by_name = {f"{name}.weight:0": torch.tensor(values, dtype=torch.float32) for name, values in scores.items()}
    return make_graph(groups), by_name, dict.fromkeys(by_name, 0)


def attention(*layers):
    """Attention groups of one class, named layer0, layer1 …, from scores (heads, head dims)."""
    groups = [make_group(f"layer{i}", len(s) * len(s[0]), len(s)) for i, s in enumerate(layers)]
    scores = {g.name: torch.tensor(s, dtype=torch.float32).flatten() for g, s in zip(groups, layers, strict=True)}
    return make_graph(groups), scores, dict.fromkeys(scores, 0)


# --- a reference that is as plain as the criteria ----------------------------------------------------------


def naive_plan(case, ratios, rules):
    """Takes one step after the other, in exact arithmetic."""
    graph, scores, classes = case
    exact = {g.name: [Fraction(float(s)) for s in scores[g.name]] for g in graph.groups}
    sets = naive_sets(graph)
    heads = naive_heads([*itertools.chain(*sets)], exact, ratios.heads, rules)
    pools = defaultdict(list)
    for members in sets:
        dim = naive_dim(members, sets)
        if all(group.heads for group in members) and ratios.head_dims is not None:
            key, ratio = ("dims", dim if rules.ranking == "local" else ""), ratios.head_dims
        else:
            alike = tuple(sorted(classes[group.name] for group in members))
            label = {"isomorphic": alike, "global": 0, "local": dim}[rules.ranking]
            key, ratio = ("width", label), ratios.width
        pools[key, ratio].append(members)
    kept = {}
    for (_, ratio), members in pools.items():
        kept |= naive_widths(members, exact, heads, ratio, rules)
    return kept


def naive_sets(graph):
    """Groups that shrink together, by name; single ones as sets of their own."""
    together = {name: names for names in graph.shrink_together for name in names}
    sets = {tuple(sorted(together.get(group.name, [group.name]))) for group in graph.groups}
    return [[next(g for g in graph.groups if g.name == name) for name in names] for names in sorted(sets)]


def naive_dim(members, sets):
    """The names of all groups that a set is related to through the dims that several groups divide among them."""
    related = {group.name for group in members}
    for _ in sets:
        dims = {group.split_dim for other in sets for group in other if group.name in related} - {""}
        for other in sets:
            if dims & {group.split_dim for group in other}:
                related |= {group.name for group in other}
    return frozenset(related)


def naive_heads(groups, exact, ratio, rules):
    layers = {g.name: g for g in groups if g.heads}
    pools = [[name] for name in layers] if rules.ranking == "local" else [list(layers)]
    surviving = {}
    for pool in pools:
        ranked = {}
        for name in pool:
            means = [
                mean(exact[name][h * layers[name].section_size : (h + 1) * layers[name].section_size])
                for h in range(layers[name].num_sections)
            ]
            ranked[name] = sorted((value, head) for head, value in enumerate(means))
        limits = {name: limit(layers[name].num_sections, rules) for name in pool}
        candidates = [
            (value, Fraction(place + 1, layers[name].num_sections), name)
            for name in pool
            for place, (value, _) in enumerate(ranked[name][: limits[name]])
        ]
        total = sum(layers[name].num_sections for name in pool)
        lost = [name for _, _, name in sorted(candidates)[: nearest(range(len(candidates) + 1), ratio * total)]]
        for name in pool:
            surviving[name] = sorted(head for _, head in ranked[name][lost.count(name) :])
    return surviving


def naive_widths(sets, exact, heads, ratio, rules):
    by_rank, share = {}, {}  # sorted scores of each block, the share of units that stays
    for g in itertools.chain(*sets):
        blocks = heads.get(g.name, range(g.num_sections))
        by_rank[g.name] = [sorted(exact[g.name][b * g.section_size : (b + 1) * g.section_size]) for b in blocks]
        share[g.name] = Fraction(1)
    total = sum(len(block) for blocks in by_rank.values() for block in blocks)
    history = [(0, dict(share))]
    while True:
        offers = []
        for members in sets:
            smaller = naive_next_share(members, share[members[0].name], rules)
            if smaller is not None:
                goes = [
                    score
                    for g in members
                    for block in by_rank[g.name]
                    for score in block[int((1 - share[g.name]) * g.section_size) : int((1 - smaller) * g.section_size)]
                ]
                offers.append((mean(goes), 1 - smaller, members[0].name, len(goes), smaller, members))
        if not offers:
            break
        *_, size, smaller, members = min(offers, key=lambda offer: offer[:3])
        share |= {g.name: smaller for g in members}
        history.append((history[-1][0] + size, dict(share)))
    chosen = history[nearest([removed for removed, _ in history], ratio * total)][1]
    return {
        g.name: naive_kept(
            g, exact[g.name], heads.get(g.name, range(g.num_sections)), int((1 - chosen[g.name]) * g.section_size)
        )
        for g in itertools.chain(*sets)
    }


def naive_next_share(members, share, rules):
    """The next smaller share that leaves whole widths of every group, and widths that the rules allow."""
    size = members[0].section_size
    for kept in range(int(share * size) - 1, 0, -1):
        widths = [(Fraction(kept, size) * g.section_size, g.section_size) for g in members]
        if all(
            width.denominator == 1 and width % rules.round_to == 0 and dense - width <= limit(dense, rules)
            for width, dense in widths
        ):
            return Fraction(kept, size)
    return None


def naive_kept(group, scores, heads, removed):
    kept = []
    for head in heads:
        units = range(head * group.section_size, (head + 1) * group.section_size)
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
    names = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=max_groups, unique=True))
    size = draw(st.integers(0, 3))  # of the first groups, which shrink together
    ticks = draw(st.integers(1, 6))
    groups, scores, classes = [], {}, {}
    for number, name in enumerate(names):
        kind, count = ("sections", 1) if plain else draw(st.sampled_from(BLOCKS))
        widest = 12 if count == 1 else 6
        width = ticks * draw(st.integers(1, 3)) if number < size else draw(st.integers(1, widest))
        pool = "" if plain else draw(st.sampled_from(["", "", "p", "q"]))
        group = make_group(name, width * count, **{kind: count}, split_dim=pool)
        groups.append(group)
        values = draw(st.lists(scores_exact, min_size=group.num_units, max_size=group.num_units))
        scores[group.name] = torch.tensor(values, dtype=torch.float32)
        classes[group.name] = draw(st.integers(0, 1))
    together = [group.name for group in groups[:size]]
    return make_graph(groups, [] if plain or len(together) < 2 else [together]), scores, classes


BLOCKS = [("sections", 1), ("sections", 1), ("heads", 1), ("heads", 2), ("heads", 4), ("sections", 2)]
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
    for group in case[0].groups:
        heads = plan.kept_heads(group)
        per_head = [[unit for unit in plan.kept[group.name] if unit // group.section_size == head] for head in heads]
        assert heads
        assert len({len(units) for units in per_head}) == 1
        head_dim = len(per_head[0])
        assert 1 <= head_dim <= group.section_size
        assert group.num_sections - len(heads) <= rules.max_pruning_ratio * group.num_sections
        assert group.section_size - head_dim <= rules.max_pruning_ratio * group.section_size
        assert head_dim == group.section_size or head_dim % rules.round_to == 0


@STABLE
@given(cases(), all_ratios, all_rules)
def test_each_head_keeps_its_own_best_dims(case, ratios, rules):
    graph, scores, _ = case
    plan = rank(case, ratios, rules)
    for group in graph.groups:
        kept = set(plan.kept[group.name])
        for head in plan.kept_heads(group):
            units = range(head * group.section_size, (head + 1) * group.section_size)
            gone = [scores[group.name][unit] for unit in units if unit not in kept]
            stay = [scores[group.name][unit] for unit in units if unit in kept]
            assert not gone or max(gone) <= min(stay)


@STABLE
@given(cases(), all_ratios, all_rules)
def test_heads_are_whole_blocks_ranked_by_their_mean(case, ratios, rules):
    graph, scores, _ = case
    plan = rank(case, ratios, rules)
    for group in graph.groups:
        means = scores[group.name].double().view(group.num_sections, -1).mean(1)
        kept = plan.kept_heads(group)
        gone = [means[head] for head in range(group.num_sections) if head not in kept]
        assert not gone or max(gone) <= min(means[head] for head in kept)


@STABLE
@given(cases(plain=True), ratios_exact, st.sampled_from(RANKINGS))
def test_quotas_are_exact_where_nothing_binds(case, ratio, ranking):
    graph, _, classes = case
    plan = rank(case, Ratios(ratio), RankingRules(ranking))
    pools = defaultdict(list)
    for group in graph.groups:
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
    for group in case[0].groups:
        assert set(large.kept[group.name]) <= set(small.kept[group.name])


@STABLE
@given(cases(), st.tuples(ratios_exact, ratios_exact), all_rules)
def test_larger_ratios_of_heads_and_of_head_dims_are_nested_too(case, pair, rules):
    for ratios in (lambda ratio: Ratios(0.0, ratio, 0.0), lambda ratio: Ratios(0.0, 0.0, ratio)):
        small, large = (rank(case, ratios(ratio), rules) for ratio in sorted(pair))
        for group in case[0].groups:
            assert set(large.kept[group.name]) <= set(small.kept[group.name])


@STABLE
@given(cases(), all_ratios, all_rules, st.randoms(use_true_random=False))
def test_the_order_of_the_groups_does_not_matter(case, ratios, rules, rng):
    order = rng.sample(range(len(case[0].groups)), len(case[0].groups))
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
    removed = {group.name: len(plan.removed(group)) for group in case[0].groups}
    for one, other in itertools.permutations(case[0].groups, 2):
        if removed[other.name] < other.num_units - 1:  # it could have given one more
            ahead = Fraction(removed[one.name], one.num_units)
            assert ahead <= Fraction(removed[other.name] + 1, other.num_units)


# --- single facts ------------------------------------------------------------------------------------------


def test_ties_go_by_rank_fraction_then_name_then_unit():
    case = one_class(b=[0.0] * 4, a=[0.0] * 8, c=[0.0] * 4)
    plans = [rank(case, Ratios(count / 16)) for count in range(5)]
    removed = [{(group.name[0], unit) for group in case[0].groups for unit in plan.removed(group)} for plan in plans]
    order = [(after - before).pop() for before, after in itertools.pairwise(removed)]
    assert order == [("a", 0), ("a", 1), ("b", 0), ("c", 0)]  # an eighth, then a quarter of each


def test_two_layers_with_equal_scores_lose_equal_shares():
    """The library removes every score up to the threshold: half a layer, or all of it."""
    case = one_class(large=[1.0] * 20, small=[1.0] * 10)
    plan = rank(case, Ratios(0.5))
    assert [len(plan.kept[group.name]) for group in case[0].groups] == [10, 5]


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
    assert [len(plan.kept[group.name]) for group in case[0].groups] == [6, 8]


@pytest.mark.parametrize(("share", "units"), [(0.29, 100), (0.57, 100), (0.58, 50), (0.7, 10)])
def test_the_largest_share_is_reached_exactly(share, units):
    """0.29 × 100 is 28.999… in floats."""
    case = one_class(a=[float(score) for score in range(units)])
    plan = rank(case, Ratios(1.0), RankingRules(max_pruning_ratio=share))
    assert len(plan.removed(case[0].groups[0])) == round(share * units)


def test_the_largest_share_wins_over_the_multiple():
    case = one_class(a=[float(score) for score in range(8)])
    plan = rank(case, Ratios(1.0), RankingRules(round_to=4, max_pruning_ratio=0.4))
    assert len(plan.kept["a.weight:0"]) == 8  # 4 would be the half of it
    plan = rank(case, Ratios(1.0), RankingRules(round_to=4, max_pruning_ratio=0.5))
    assert plan.kept["a.weight:0"] == (4, 5, 6, 7)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_ratio_zero_keeps_everything_and_ratio_one_keeps_one(ranking):
    heads = attention([[3.0, 1, 2], [6, 5, 4]], [[9.0, 7, 8], [1, 2, 3]])
    case = joined(heads, one_class(single=[0.0], plain=[1.0, 2.0]), numbers=(0, 1))
    nothing = rank(case, Ratios(0.0, 0.0, 0.0), RankingRules(ranking))
    assert all(len(nothing.kept[group.name]) == group.num_units for group in case[0].groups)
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
    assert [plan.kept_heads(group) for group in case[0].groups] == [[1], [1]]


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
    groups = [*case[0].groups, make_group("apart", 4, 4)]
    scores = case[1] | {"apart.weight:0": torch.tensor([0.5, 0.6, 0.7, 5.0])}
    case = make_graph(groups), scores, case[2] | {"apart.weight:0": 1}  # not isomorphic, the same ranking all the same
    kept = {ranking: rank(case, Ratios(0.0, 0.5), RankingRules(ranking)) for ranking in RANKINGS}
    for ranking in ("isomorphic", "global"):
        assert [len(kept[ranking].kept_heads(group)) for group in groups] == [1, 2, 1]
    assert [len(kept["local"].kept_heads(group)) for group in groups] == [1, 1, 2]


def test_a_step_of_attention_counts_once_for_every_head():
    case = joined(attention([[1.0, 9.0]] * 4), one_class(mlp=[2.0] * 8), numbers=(0, 0))
    plan = rank(case, Ratios(0.25))  # 4 of 16 units: one dim of 4 heads
    assert [len(plan.kept[group.name]) for group in case[0].groups] == [4, 8]


def test_head_dims_are_a_pool_of_their_own_only_with_a_ratio():
    case = joined(attention([[5.0, 6.0, 7.0, 8.0]]), one_class(mlp=[1.0, 2.0, 3.0, 4.0]), numbers=(0, 0))
    together = rank(case, Ratios(0.25))
    assert [len(together.kept[group.name]) for group in case[0].groups] == [4, 2]
    apart = rank(case, Ratios(0.25, head_dims=0.75))
    assert [len(apart.kept[group.name]) for group in case[0].groups] == [1, 3]


def test_pools_are_classes_everything_or_single_groups():
    first = one_class(a=[1.0, 2.0, 3.0, 4.0], b=[3.0, 4.0, 5.0, 6.0])
    case = joined(first, one_class(c=[0.1, 0.2, 0.3, 0.4]), numbers=(0, 1))
    widths = {
        ranking: [len(rank(case, Ratios(0.5), RankingRules(ranking)).kept[group.name]) for group in case[0].groups]
        for ranking in RANKINGS
    }
    assert widths["isomorphic"] == [1, 3, 2]
    assert widths["global"] == [2, 3, 1]
    assert widths["local"] == [2, 2, 2]


@pytest.mark.parametrize(("ratio", "removed"), [(0.0, 0), (0.04, 0), (0.06, 1), (0.5, 5), (0.95, 9), (1.0, 9)])
def test_the_nearest_number_of_units_goes(ratio, removed):
    case = one_class(a=[float(score) for score in range(10)])
    assert len(rank(case, Ratios(ratio)).removed(case[0].groups[0])) == removed


def test_of_two_equally_near_quotas_the_smaller_wins():
    case = one_class(a=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert len(rank(case, Ratios(0.5)).removed(case[0].groups[0])) == 2


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
    case = subject.graph, scores, subject.classes
    ratios = Ratios(0.5, 0.25, 0.25)
    for ranking in RANKINGS:
        rules = RankingRules(ranking, 2)
        assert rank(case, ratios, rules).kept == naive_plan(case, ratios, rules)


# --- groups that shrink together ----------------------------------------------------------------------------


def together(case, *names):
    """The case with these groups in one set."""
    graph, scores, classes = case
    return make_graph(graph.groups, [[f"{name}.weight:0" for name in names]]), scores, classes


def test_groups_of_a_set_keep_the_same_fraction_each_its_own_best():
    case = together(one_class(a=[1.0, 2.0, 3.0, 4.0], b=[6.0, 5.0, 8.0, 7.0, 2.0, 1.0, 4.0, 3.0]), "a", "b")
    plan = rank(case, Ratios(0.5))
    assert plan.kept == {"a.weight:0": (2, 3), "b.weight:0": (0, 1, 2, 3)}
    assert rank(case, Ratios(0.2)).kept == {"a.weight:0": (1, 2, 3), "b.weight:0": (0, 1, 2, 3, 6, 7)}


def test_a_set_shrinks_by_the_finest_fraction_that_all_blocks_have():
    """Of 6 and 9 units, thirds; of 5 and 7, nothing but all."""
    case = together(one_class(a=[0.0] * 6, b=[0.0] * 9), "a", "b")
    widths = {tuple(map(len, rank(case, Ratios(ratio)).kept.values())) for ratio in (0, 0.2, 0.4, 0.6, 1)}
    assert widths == {(6, 9), (4, 6), (2, 3)}
    case = together(one_class(a=[0.0] * 5, b=[0.0] * 7), "a", "b")
    assert [len(units) for units in rank(case, Ratios(1.0)).kept.values()] == [5, 7]


def test_rounding_and_caps_hold_for_every_group_of_a_set():
    case = together(one_class(a=[0.0] * 8, b=[0.0] * 24), "a", "b")

    def widths(rules):
        return sorted({tuple(map(len, rank(case, Ratios(k / 32), rules).kept.values())) for k in range(33)})

    assert widths(RankingRules(round_to=4)) == [(4, 12), (8, 24)]
    assert widths(RankingRules(round_to=6)) == [(6, 18), (8, 24)]
    assert widths(RankingRules(round_to=16)) == [(8, 24)]
    assert widths(RankingRules(max_pruning_ratio=0.3)) == [(6, 18), (7, 21), (8, 24)]


def test_a_set_competes_by_the_mean_of_all_that_a_step_removes():
    """One of a's and two of b's go at (1 + 4 + 4) / 3 = 3, after c's 2 and before its 3.5."""
    case = together(one_class(a=[1.0, 9.0], b=[4.0, 4.0, 9.0, 9.0], c=[2.0, 3.5, 9.0, 9.0]), "a", "b")
    left = {
        k: [len(units) for units in rank(case, Ratios(k / 10), RankingRules("global")).kept.values()] for k in (1, 4, 5)
    }
    assert left == {1: [2, 4, 3], 4: [1, 2, 3], 5: [1, 2, 2]}


def test_sets_of_unlike_classes_are_a_class_of_their_own():
    """And sets of like classes compete with each other alone."""
    parts = [
        one_class(**{name: [float(value)] * 4}) for name, value in (("a", 1), ("b", 1), ("c", 2), ("d", 2), ("e", 9))
    ]
    graph, scores, classes = joined(*parts, numbers=(0, 1, 1, 0, 0))
    pairs = [["a.weight:0", "b.weight:0"], ["c.weight:0", "d.weight:0"]]
    plan = rank((make_graph(graph.groups, pairs), scores, classes), Ratios(0.375))
    assert [len(units) for units in plan.kept.values()] == [1, 1, 4, 4, 3]


def test_heads_of_a_set_go_and_what_is_left_of_them_shrinks_along():
    poor, rich = attention([[0.0, 0.1]] * 4), one_class(a=[5.0, 5.0], b=[5.0] * 4)
    graph, scores, classes = joined(poor, rich, numbers=(0, 1))
    alone = rank((graph, scores, classes), Ratios(0.0, heads=0.75))
    assert alone.kept_heads(graph.groups[0]) == [3]
    pair = [["layer0.weight:0", "a.weight:0"]]
    plan = rank((make_graph(graph.groups, pair), scores, classes), Ratios(0.5, heads=0.75))
    assert plan.kept == {"layer0.weight:0": (7,), "a.weight:0": (1,), "b.weight:0": (2, 3)}
    plan.check(graph)


def test_a_set_of_heads_alone_counts_as_head_dims_and_blocks_do_not():
    case = together(attention([[1.0, 2.0]] * 2, [[2.0, 1.0, 4.0, 3.0]] * 2), "layer0", "layer1")
    assert rank(case, Ratios(0.0, head_dims=0.5)).kept == {"layer0.weight:0": (1, 3), "layer1.weight:0": (2, 3, 6, 7)}
    groups = [make_group("norm", 4, sections=2)]
    case = make_graph(groups), {"norm.weight:0": torch.tensor([1.0, 2.0, 4.0, 3.0])}, {"norm.weight:0": 0}
    assert rank(case, Ratios(0.0, 0.5, head_dims=0.5)).kept == {"norm.weight:0": (0, 1, 2, 3)}
    assert rank(case, Ratios(0.5, 0.5, head_dims=0.0)).kept == {"norm.weight:0": (1, 2)}


def test_groups_that_one_dim_was_divided_into_are_one_group_in_local_ranking():
    groups = [make_group("left", 4, split_dim="dim"), make_group("right", 4, split_dim="dim"), make_group("other", 4)]
    scores = dict(zip((g.name for g in groups), (torch.full((4,), float(k)) for k in (1, 2, 3)), strict=True))
    case = make_graph(groups), scores, dict.fromkeys(scores, 0)
    plan = rank(case, Ratios(0.375), RankingRules("local"))
    assert [len(units) for units in plan.kept.values()] == [1, 4, 3]


@STABLE
@given(cases(), all_ratios, all_rules)
def test_plans_keep_what_shrinks_together_together(case, ratios, rules):
    graph = case[0]
    plan = rank(case, ratios, rules)
    plan.check(graph)
    for names in graph.shrink_together:
        members = [group for group in graph.groups if group.name in names]
        widths = [Fraction(len(plan.kept[group.name]), len(plan.kept_heads(group))) for group in members]
        assert len({width / group.section_size for width, group in zip(widths, members, strict=True)}) == 1
        assert all(len(plan.kept_heads(group)) == group.num_sections or group.heads for group in members)


# --- pools, and ratios of their own -------------------------------------------------------------------------


def two_classes():
    """Two heads of four dims in class 0, and eight plain units in class 1; scores ascend."""
    heads, plain = attention([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]), one_class(a=[float(k) for k in range(8)])
    return joined(heads, plain, numbers=(0, 1))


def test_the_ratio_of_a_pool_wins_over_that_of_its_kind():
    heads, dims, width = HEADS, RankingPool("head_dims", "all"), RankingPool("width", "1")
    case = two_classes()
    for by_pool, expected in (
        ({}, ((6, 7), (4, 5, 6, 7))),
        ({width: 0.25}, ((6, 7), (2, 3, 4, 5, 6, 7))),
        ({dims: 0.0, width: 0.75}, ((4, 5, 6, 7), (6, 7))),
        ({heads: 0.0, dims: 0.25}, ((1, 2, 3, 5, 6, 7), (4, 5, 6, 7))),
        ({RankingPool("width", "stranger"): 1.0}, ((6, 7), (4, 5, 6, 7))),
    ):
        assert tuple(rank(case, Ratios(0.5, 0.5, 0.5, by_pool)).kept.values()) == expected


def test_pools_are_what_can_lose_anything():
    graph, scores, classes = two_classes()
    first, plain = graph.groups

    def pools(rules, separate_head_dims=True):
        return Ranker(graph, scores, classes, rules).pools(separate_head_dims=separate_head_dims)

    width, dims = RankingPool("width", "1"), RankingPool("head_dims", "all")
    assert pools(RankingRules()) == {HEADS: [first], dims: [first], width: [plain]}
    assert pools(RankingRules(), separate_head_dims=False) == {
        HEADS: [first],
        RankingPool("width", "0"): [first],
        width: [plain],
    }
    assert pools(RankingRules(round_to=4)) == {HEADS: [first], width: [plain]}
    assert pools(RankingRules(max_pruning_ratio=0.25)) == {dims: [first], width: [plain]}
    assert pools(RankingRules(max_pruning_ratio=0.0)) == {}


@STABLE
@given(cases(), all_ratios, all_rules, st.sampled_from(RANKINGS))
def test_a_ranker_of_another_ranking_is_as_if_made_so(case, ratios, rules, ranking):
    graph, scores, classes = case
    other = Ranker(graph, scores, classes, rules).with_ranking(ranking)
    assert other.plan(ratios) == rank(case, ratios, RankingRules(ranking, rules.round_to, rules.max_pruning_ratio))
