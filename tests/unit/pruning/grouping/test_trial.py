"""Trial cuts: who is to blame, and how many runs it takes to find out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from isomorphic.pruning.grouping import exact
from isomorphic.pruning.grouping.trial import Trial
from isomorphic.skeletons import shape_copy
from tests.unit.pruning.grouping.cutting import Net

TOKENS = torch.zeros(2, 5, 3)
BRANCHES = 16


def tried(breaks, shrink_together=()):
    """The modules to blame, and how often the net ran, where `breaks` says by the branches' widths if it does not."""
    runs = []

    def forward(m, x):
        runs.append(1)
        inner = [one(x) for one in m.ones]
        if breaks(*(branch.shape[-1] for branch in inner)):
            raise ValueError
        return sum(two(branch) for two, branch in zip(m.twos, inner, strict=True))

    ones, twos = ([nn.Linear(3, 6) for _ in range(BRANCHES)], [nn.Linear(6, 4) for _ in range(BRANCHES)])
    net = Net(forward, ones=nn.ModuleList(ones), twos=nn.ModuleList(twos))
    graph = exact.trace(net, TOKENS, tried=False)
    assert len(graph.groups) == BRANCHES
    names = tuple(tuple(f"ones.{number}.weight:0" for number in numbers) for numbers in shrink_together)
    trial = Trial(shape_copy(net), TOKENS)
    trial.shapes = [torch.Size([2, 5, 4])]
    runs.clear()
    failed = trial.failures(dataclasses.replace(graph, shrink_together=names))
    return {int(name.split(".")[1]) for name in failed}, len(runs)


def test_nobody_is_to_blame_after_one_run():
    assert tried(lambda *widths: False) == (set(), 1)


@pytest.mark.parametrize("culprit", [0, 5, 15])
def test_one_of_many_is_found_in_few_runs(culprit):
    failed, runs = tried(lambda *widths: widths[culprit] < 6)
    assert failed == {culprit} and runs == 9  # both halves of 16, 8, 4 and 2


def test_several_are_found():
    assert tried(lambda *widths: widths[2] < 6 or widths[11] < 6)[0] == {2, 11}


def test_where_all_are_to_blame_three_of_one_kind_stand_for_them():
    failed, runs = tried(lambda *widths: any(width < 6 for width in widths))
    assert failed == {*range(BRANCHES)} and runs == 6  # all, both halves, and the first, the middle and the last


def test_many_that_are_not_all_are_still_told_apart():
    assert tried(lambda *widths: any(width < 6 for width in widths[1:]))[0] == {*range(1, BRANCHES)}
    assert tried(lambda *widths: any(widths[n] < 6 for n in (0, 1, 2, 15)))[0] == {0, 1, 2, 15}


def test_groups_that_shrink_together_are_to_blame_together():
    assert tried(lambda *widths: widths[9] < 6, shrink_together=[(3, 9, 12)])[0] == {3, 9, 12}


def test_where_it_takes_two_the_smallest_part_with_both_is_to_blame():
    assert tried(lambda *widths: widths[4] + widths[6] < 9)[0] == {4, 5, 6, 7}
    assert tried(lambda *widths: widths[0] + widths[15] < 9)[0] == {*range(BRANCHES)}
