"""What a run shows: the table of classes, to the letter, and a picture that opens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from isomorphic.errors import UserError
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup, Frozen, LayerNode, SectionStructure, short_name
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.report import class_table, draw_scores, plan_lines, summarize_classes


def make_group(name, units, num_layers=2, heads=None):
    nodes = tuple(LayerNode(f"{name}.{number}", "linear", "out") for number in range(num_layers))
    blocks = heads and SectionStructure(heads, are_heads=True)
    return CoupledGroup(f"{name}.weight:0", units, (), nodes, frozenset(), blocks)


@pytest.fixture
def summaries_and_plan():
    groups = [
        make_group("stem", 4, num_layers=3),
        make_group("blocks.0.attn.qkv", 8, heads=4),
        make_group("blocks.0.mlp.fc1", 10),
        make_group("blocks.1.attn.qkv", 8, heads=4),
    ]
    classes = {"stem": 0, "blocks.0.attn.qkv": 1, "blocks.0.mlp.fc1": 2, "blocks.1.attn.qkv": 1}
    scores = [[1.0, 2.0, 3.0, 6.0], [0.5] * 8, [0.0] * 10, [1.5] * 7 + [123456.0]]
    kept = [(0, 3), (0, 1, 2, 3, 4, 5), tuple(range(10)), (2, 3)]
    plan = PruningPlan({group.name: units for group, units in zip(groups, kept, strict=True)})
    by_name = {group.name: torch.tensor(values) for group, values in zip(groups, scores, strict=True)}
    numbers = {f"{name}.weight:0": number for name, number in classes.items()}
    return summarize_classes(groups, numbers, by_name, plan), plan


def test_the_table_of_classes(summaries_and_plan):
    expected = """\
class  first group        groups  layers  units      mean  min       max    kept
    0  stem                    1       3      4         3    1         6   50.0%
    1  blocks.0.attn.qkv       2       2     16  7.72e+03  0.5  1.23e+05   50.0%
         heads                 2              8                            50.0%
    2  blocks.0.mlp.fc1        1       2     10         0    0         0  100.0%
All scores are zero in class 2: its groups lose equal shares, in order of position"""
    assert class_table(*summaries_and_plan) == expected


def test_summaries_hold_the_scores_and_counts_of_their_groups(summaries_and_plan):
    stem, attention, mlp = summaries_and_plan[0]
    assert [group.name for group in attention.groups] == ["blocks.0.attn.qkv.weight:0", "blocks.1.attn.qkv.weight:0"]
    assert attention.scores.tolist() == [0.5] * 8 + [1.5] * 7 + [123456.0]
    assert (stem.kept, attention.kept, mlp.kept) == (2, 8, 10)
    assert attention.title == "1: blocks.0.attn.qkv (2 groups)"


def test_a_real_model_fills_one_line_a_class(subject):
    plan = subject.random_plan(0)
    scores = {group.name: torch.rand(group.num_units) for group in subject.groups}
    summaries = summarize_classes(subject.groups, subject.classes, scores, plan)
    assert [summary.number for summary in summaries] == sorted(set(subject.classes.values()))
    assert sum(len(summary.scores) for summary in summaries) == sum(group.num_units for group in subject.groups)
    assert sum(summary.kept for summary in summaries) == sum(map(len, plan.kept.values()))
    lines = class_table(summaries, plan).splitlines()
    attention = sum(summary.groups[0].heads is not None for summary in summaries)
    zeros = sum(not summary.scores.any() for summary in summaries)
    assert len(lines) == 1 + len(summaries) + attention + bool(zeros)
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("name", "short"),
    [("stem.0.weight:0", "stem.0"), ("conv1.weight:0:16", "conv1:16"), ("pos_embed:2", "pos_embed:2")],
)
def test_names_of_groups_are_short(name: str, short: str):
    assert short_name(name) == short


def test_what_stays_is_listed_by_reason():
    frozen = {f"blocks.{n}.conv.weight:0": Frozen("grouped", 8, 8) for n in range(5)}
    frozen |= {"stem.weight:0": Frozen("grouped", 2, 8), "head.weight:0": Frozen("it reaches the model's output", 4, 4)}
    assert plan_lines(ChannelGraph((), frozen), PruningPlan({})) == [
        "Kept: blocks.0.conv, blocks.1.conv, blocks.2.conv and 3 more (grouped)",
        "Kept: head (it reaches the model's output)",
    ]
    graph = ChannelGraph((), {"stem.weight:0": Frozen("picked", 2, 8)})
    assert plan_lines(graph, PruningPlan({})) == ["Kept: stem (2 of 8) (picked)"]


def test_heads_that_were_to_go_and_cannot_are_said_to_stay():
    attention, other = make_group("attn", 8, heads=4), make_group("stem", 8)
    whole = PruningPlan({group.name: tuple(range(8)) for group in (attention, other)})
    assert plan_lines(ChannelGraph((attention, other), {}), whole, heads_wanted=True) == []
    assert plan_lines(ChannelGraph((other,), {}), whole, heads_wanted=True) == ["There are no heads to prune"]


def test_heads_are_counted_by_stage_where_any_go():
    names = ["layers.0.blocks.0.attn.qkv", "layers.0.blocks.1.attn.qkv", "layers.1.blocks.0.attn.qkv",
             "encoder.layer_0.attn.qkv", "encoder.layer_1.attn.qkv", "attn.qkv"]  # fmt: skip
    groups = tuple(make_group(name, 8, heads=4) for name in names)
    kept = [range(8), (0, 1, 6, 7), range(8), (0, 1), range(8), (2, 3, 4, 5, 6, 7)]
    plan = PruningPlan({group.name: tuple(units) for group, units in zip(groups, kept, strict=True)})
    assert plan_lines(ChannelGraph(groups, {}), plan) == [
        "Heads of layers.0.blocks: 4 4 => 4 2",
        "Heads of encoder: 4 4 => 1 4",
        "Heads of attn.qkv.weight: 4 => 3",
    ]


def test_blocks_that_stay_are_listed():
    plan = PruningPlan({}, kept_blocks={"stages.2.blocks": (0, 1, 4)})
    assert plan_lines(ChannelGraph((), {}), plan) == ["Blocks of stages.2.blocks: 3 stay (0 1 4)"]


def test_ratios_that_were_searched_for_are_listed():
    plan = PruningPlan({}, ratios={"heads": 0.25, "blocks.0.mlp.fc1 (12 groups)": 0.618})
    lines = ["Ratio of heads: 0.25", "Ratio of blocks.0.mlp.fc1 (12 groups): 0.62"]
    assert plan_lines(ChannelGraph((), {}), plan) == lines


def test_the_picture_is_written_with_one_row_a_class(summaries_and_plan, tmp_path):
    """8 inches at 150 dots, and bars in each class's color."""
    path = tmp_path / "new" / "scores.png"
    draw_scores(path, summaries_and_plan[0], title="small: taylor scores")
    assert path.read_bytes().startswith(b"\x89PNG")
    picture = imread(path)[..., :3]
    height, width, _ = picture.shape
    assert width == 1200
    assert height == int(150 * (0.9 + 3 * 0.75))
    for color in ("C0", "C1", "C2"):
        shown = 0.85 * np.array(to_rgb(color)) + 0.15
        assert (np.abs(picture - shown).max(axis=2) < 0.02).sum() > 50, f"no bars in {color}"
    assert [file.name for file in path.parent.iterdir()] == ["scores.png"]


@pytest.mark.parametrize("values", [[0.0, 0.0], [2.0, 2.0], [1e-30, 1e30], [0.0, 3.0], [5.0]])
def test_any_scores_can_be_drawn(tmp_path, values):
    group = make_group("one", len(values))
    plan = PruningPlan({group.name: (0,)})
    summaries = summarize_classes([group], {group.name: 0}, {group.name: torch.tensor(values)}, plan)
    draw_scores(tmp_path / "scores.png", summaries, title="edge")
    assert imread(tmp_path / "scores.png").std() > 0.01


def test_a_picture_that_cannot_be_written_is_an_error(summaries_and_plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        draw_scores(tmp_path / "file" / "scores.png", summaries_and_plan[0], title="nowhere")
