"""A table of an embedding that is the output layer's weight, too, counts as that layer's weight would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.pruning.gradients import accumulate
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.scoring import score_groups

TOKENS = torch.arange(12).view(2, 6)
STREAM = "emb.weight:1"


class Language(nn.Module):
    """Words in, logits of words out, by the table of the words in several ways of writing that."""

    def __init__(self, tie: str, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tie, self.emb, self.norm = tie, nn.Embedding(40, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)
        self.lm = nn.Linear(width, 40, bias=False) if tie in ("two names", "untied") else None
        if self.lm is not None:
            self.lm.weight.data.copy_(self.emb.weight.data)
        if self.lm is not None and tie == "two names":
            self.lm.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.emb(tokens))
        x = x + self.down(self.up(x).relu())
        if self.lm is not None:
            return self.lm(x)
        return F.linear(x, self.emb.weight) if self.tie == "functional" else x @ self.emb.weight.t()


def scores(tie: str, criterion: str, statistic: Any = None) -> Tensor:
    model = Language(tie).eval()
    return score_groups(model, trace_groups(model, TOKENS).groups, criterion, statistic=statistic)[STREAM]


@pytest.mark.parametrize("tie", ["two names", "functional", "matmul"])
def test_tied_weights_are_scored_as_untied_ones(tie: str):
    for criterion in ("l1", "l2", "dimap"):
        torch.testing.assert_close(scores(tie, criterion), scores("untied", criterion))  # but for the order of sums
    model = Language(tie).eval()
    [group] = [group for group in trace_groups(model, TOKENS).groups if group.name == STREAM]
    assert [one.name for one in group.scored_members()].count("emb.weight") == 1
    kinds = sorted(node.kind for node in group.nodes)
    assert kinds == ["embedding", "linear", "linear", "norm"]  # the layers of the class are as they were
    loss = lambda model, batch: model(batch[0]).square().mean()  # noqa: E731
    gradient = accumulate(model, [(TOKENS,)], "gradient", loss=loss)
    parts = [(w * gradient[n]).abs() for n, w in model.named_parameters() if n in ("emb.weight", "up.weight")]
    parts += [(model.norm.weight * gradient["norm.weight"]).abs()[None]]
    parts += [(model.down.weight * gradient["down.weight"]).abs().T]
    expected = torch.stack([one.detach().sum(0) for one in parts]).mean(0)
    torch.testing.assert_close(scores(tie, "taylor", gradient), expected)


@pytest.mark.parametrize("tie", ["two names", "functional", "matmul", "untied"])
def test_dead_channels_of_the_table_go_first(tie: str):
    model = Language(tie)
    with torch.no_grad():
        for table in {model.emb.weight, model.emb.weight if model.lm is None else model.lm.weight}:
            table[:, :4] = 0
    done = iso.prune(model, TOKENS, ratio=0.5, criterion="l2", self_check=True)
    assert done.plan.kept[STREAM] == (4, 5, 6, 7)


def test_an_embedding_alone_does_not_count():
    group = next(one for one in trace_groups(Language("untied"), TOKENS).groups if one.name == STREAM)
    assert "emb.weight" not in [one.name for one in group.scored_members()]
