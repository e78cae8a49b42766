"""Random programs, traced exactly: whatever is cut computes what the masked program does.

Nothing may be cut wrongly, and nothing may be frozen without need: a tracer that froze everything would be exact.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.inputs import tensors_in
from isomorphic.pruning.classify import classify
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.self_check import cut_error, masked_copy
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.ranking.ranker import Ranker, RankingRules, Ratios
from isomorphic.pruning.scoring import normalize, score_groups
from tests.unit.pruning.grouping.programs import KINDS, Program, programs

LARGEST_ERROR = 1e-6  # of the output's spread, in double precision
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
LEAST_PRUNABLE = 0.6  # of a program's width, on average


@dataclass
class Tally:
    """How much of the programs' widths can be pruned.

    Attributes:
        shares: of each program's width.
        width, prunable: output channels of all layers but the classifiers, by kind of block that they lie in.
    """

    shares: list[float] = field(default_factory=list)
    width: Counter[str] = field(default_factory=Counter)
    prunable: Counter[str] = field(default_factory=Counter)

    def add(self, model: nn.Module, graph: ChannelGraph) -> None:
        """Counts one program."""
        rows: dict[str, set[int]] = {}
        for member in (member for group in graph.groups for member in group.members if member.dim == 0):
            rows.setdefault(member.name, set()).update(member.index.flatten().tolist())
        width = {name: weight.shape[0] for name, weight in _producers(model).items()}
        for name in width:
            for kind in _kinds_around(model, name):
                self.width[kind] += width[name]
                self.prunable[kind] += len(rows.get(name, ()))
        self.shares.append(sum(len(rows.get(name, ())) for name in width) / sum(width.values()))

    def breakdown(self) -> dict[str, float]:
        """The share of the width that is prunable, by kind of block."""
        return {kind: round(self.prunable[kind] / width, 2) for kind, width in sorted(self.width.items())}


def _producers(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all layers but the classifier, which is the last."""
    names = [
        f"{name}.{tensor}"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention))
        for tensor in ("weight", "in_proj_weight")
        if isinstance(getattr(module, tensor, None), Tensor)
    ]
    return {name: model.get_parameter(name) for name in names[:-1]}


def _kinds_around(model: nn.Module, name: str) -> set[str]:
    """The kinds of the blocks that hold a tensor, one in the other."""
    parts = name.split(".")
    holders = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    return {str(holder.kind) for holder in holders if hasattr(holder, "kind")}


def plan_for(program: Program, model: nn.Module, graph: ChannelGraph) -> PruningPlan:
    """The plan that a program asks for."""
    scores = score_groups(model, graph.groups, program.criterion, seed=program.seed)
    normalized = {name: normalize(score, "mean") for name, score in scores.items()}
    rules = RankingRules(program.ranking, program.round_to)
    return Ranker(graph, normalized, classify(graph.groups), rules).plan(Ratios(program.ratio, program.head_ratio))


def check(program: Program, tally: Tally) -> None:
    """Traces, cuts and compares one program."""
    model, images = program.build()
    try:
        graph = trace_groups(model, images, tracer="exact")
    except UserError as error:
        assert "nothing in this model can be pruned (" in str(error), "the reasons follow"
        tally.add(model, ChannelGraph((), {}))
        return
    tally.add(model, graph)
    assert all(frozen.reason for frozen in graph.frozen.values()), "whatever is frozen has a reason"
    plan = plan_for(program, model, graph)
    plan.check(graph)
    pruned = copy.deepcopy(model)
    cut(pruned, graph, plan)
    assert cut_error(masked_copy(model, graph, plan), pruned, images) < LARGEST_ERROR
    shapes = [[tensor.shape for tensor in tensors_in(net.train()(images))] for net in (model, pruned)]
    assert shapes[0] == shapes[1], "train mode"


@pytest.mark.parametrize("examples", [3, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_from_a_random_program_is_exact_and_much_can_be_cut(kind, examples):
    tally = Tally()

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=SLOW)
    @given(programs(kind))
    def check_all(program: Program) -> None:
        check(program, tally)

    check_all()
    share, breakdown = sum(tally.shares) / len(tally.shares), tally.breakdown()
    print(f"{share:.2f} of the widths of {len(tally.shares)} programs can be pruned; by kind of block: {breakdown}")
    assert len(tally.shares) == examples
    assert tally.prunable[kind] > 0
    assert share > LEAST_PRUNABLE
