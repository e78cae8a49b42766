"""Residual scales that start at zero: nothing behind them has a gradient, and everything is pruned as asked."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from isomorphic.measure.complexity import count_complexity
from isomorphic.pruning.classify import classify
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.gradients import accumulate
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.ranking.ranker import RANKINGS, Ranker, RankingRules, Ratios
from isomorphic.pruning.scoring import normalize, score_groups

CPU = torch.device("cpu")


def convnext() -> nn.Module:
    """Its layer scales, and so all that they scale, are zero."""
    model = timm.create_model("convnext_tiny", depths=(1, 2, 3, 1), dims=(8, 16, 24, 32), num_classes=10)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.zeros_(parameter)
    return model


def resnet() -> nn.Module:
    """As timm builds it: the last norm of every block has scale zero."""
    channels: Any = (16, 24, 32, 48)
    model = timm.create_model("resnet50", channels=channels, stem_width=16, num_classes=10)
    assert not model.get_parameter("layer1.0.bn3.weight").any()
    return model


@pytest.mark.parametrize("build", [convnext, resnet])
@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
@pytest.mark.parametrize("ranking", RANKINGS)
def test_every_group_is_scored_and_loses_its_share(build, criterion, ranking, batches):
    torch.manual_seed(0)
    model = build().eval()
    graph = trace_groups(model, batches[0][0])
    wanted = {"taylor": "gradient", "hessian": "squared_gradient"}[criterion]
    scores = score_groups(model, graph.groups, criterion, statistic=accumulate(model, batches, wanted, device=CPU))
    zeros = [name for name, values in scores.items() if not values.any()]
    assert zeros and all(torch.isfinite(values).all() for values in scores.values())

    normalized = {name: normalize(values, "mean") for name, values in scores.items()}
    plan = Ranker(graph, normalized, classify(graph.groups), RankingRules(ranking)).plan(Ratios(0.5))
    shares = {group.name: len(plan.kept[group.name]) / group.num_units for group in graph.groups}
    assert all(share > 0 for share in shares.values()), shares
    if ranking != "global":  # there all of the zeros go before anything else does
        assert len(shares) == {convnext: 11, resnet: 36}[build] and all(share < 1 for share in shares.values()), shares
        assert [shares[name] for name in zeros] == pytest.approx([0.5] * len(zeros), abs=0.05)
    units = sum(group.num_units for group in graph.groups)
    assert sum(map(len, plan.kept.values())) == pytest.approx(units / 2, abs=len(shares))

    before = count_complexity(model, batches[0][0]).params
    cut(model, graph, plan)
    assert count_complexity(model, batches[0][0]).params < (0.65 if ranking == "global" else 0.4) * before
