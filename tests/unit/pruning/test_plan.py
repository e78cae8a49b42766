"""Plans are plain data: what they say, what they refuse, and their JSON files."""

from __future__ import annotations

import dataclasses
import json

import pytest

from isomorphic.errors import UserError
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup, SectionStructure
from isomorphic.pruning.plan import PruningPlan, load_plan, save_plan

ATTENTION = "blocks.0.attn.qkv.weight:0"


@pytest.fixture
def deit(subjects):
    return subjects("deit")


def changed(plan, name, units):
    return PruningPlan({**plan.kept, name: tuple(units)})


def test_removed_units_and_kept_heads(deit, keep_all):
    group = deit.group(ATTENTION)
    plan = changed(keep_all(deit.groups), ATTENTION, (0, 5, 36, 47))  # two dims each of heads 0 and 3
    assert plan.kept_heads(group) == [0, 3]
    assert plan.removed(group) == sorted(set(range(48)) - {0, 5, 36, 47})
    assert plan.removed(deit.groups[0]) == []
    plan.check(deit.graph)


def test_a_plan_survives_its_file(subject, tmp_path):
    plan = subject.random_plan(1)
    path = tmp_path / "deep" / "plan.json"
    plan = dataclasses.replace(plan, kept_blocks={"stages.2.blocks": (0, 2)})
    save_plan(path, plan, subject.groups, {"model": subject.name})
    assert (load_plan(path).kept, load_plan(path).kept_blocks) == (plan.kept, plan.kept_blocks)
    load_plan(path).check(subject.graph)
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


def test_the_file_says_what_it_is_about(deit, keep_all, tmp_path):
    path = tmp_path / "plan.json"
    save_plan(path, keep_all(deit.groups), deit.groups, {"model": "deit", "macs": 12})
    stored = json.loads(path.read_text())
    assert (stored["format"], stored["model"], stored["macs"]) == (2, "deit", 12)
    assert list(stored["groups"]) == [group.name for group in deit.groups]
    assert stored["groups"][ATTENTION] == {"units": 48, "blocks": 4, "kept": list(range(48))}


def test_ratios_that_were_searched_for_are_in_the_file_and_others_are_not(deit, keep_all, tmp_path):
    plan = keep_all(deit.groups)
    save_plan(tmp_path / "without.json", plan, deit.groups, {})
    assert "ratios" not in json.loads((tmp_path / "without.json").read_text())
    assert load_plan(tmp_path / "without.json").ratios == {}
    ratios = {"heads": 0.25, "blocks.0.mlp.fc1 (2 groups)": 0.0}
    save_plan(tmp_path / "with.json", dataclasses.replace(plan, ratios=ratios), deit.groups, {})
    assert json.loads((tmp_path / "with.json").read_text())["ratios"] == ratios
    assert load_plan(tmp_path / "with.json").ratios == ratios
    assert load_plan(tmp_path / "with.json") == plan


def test_equal_plans_give_equal_files(deit, tmp_path):
    for name in ("one", "other"):
        save_plan(tmp_path / name, deit.random_plan(4), deit.groups, {})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "3",
        "[]",
        "{}",
        '"format"',
        '{"format": 2}',
        '{"format": 2, "groups": []}',
        '{"format": 2, "groups": {}, "ratios": [0.5]}',
        '{"format": 2, "groups": {}, "ratios": {"heads": "0.5"}}',
        '{"format": 2, "groups": {}, "ratios": {"heads": 1.5}}',
        '{"format": 2, "groups": {}, "ratios": {"heads": NaN}}',
        '{"format": 2, "groups": {"a": []}}',
        '{"format": 2, "groups": {"a": {}}}',
        '{"format": 2, "groups": {"a": {"kept": null}}}',
        '{"format": 2, "groups": {"a": {"kept": 3}}}',
        '{"format": 2, "groups": {"a": {"kept": ["x"]}}}',
        '{"format": 2, "groups": {"a": {"kept": [[1]]}}}',
        '{"format": 2, "groups": {"a": {"kept": [null]}}}',
        '{"format": 2, "groups": {"a": {"kept": [NaN]}}}',
        '{"format": 2, "groups": {"a": {"kept": [' + "9" * 5000 + "]}}}",
        '{"groups": {"a": {"kept": [1]}}}',
        '{"format": 2, "groups": {"a": {"units": 4, "blocks": 1, "kept": [Infinity]}}}',
        '{"format": 2, "groups": {"a": {"units": 4, "blocks": 1, "kept": "123"}}}',
        '{"format": 2, "groups": {"a": {"units": 4, "blocks": 1, "kept": ["1"]}}}',
        '{"format": 2, "groups": {"a": {"units": 4, "blocks": 1, "kept": [1.7]}}}',
        '{"format": 2, "groups": {"a": {"units": 4, "blocks": 1, "kept": [true]}}}',
        '{"format": 2, "groups": {"a": {"units": 4, "blocks": 1, "kept": {"0": 1}}}}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UserError, match="plan.json is not a pruning plan"):
        load_plan(path)


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="is not a pruning plan"):
        load_plan(path)


def test_a_file_cut_short_is_refused(deit, keep_all, tmp_path):
    path = tmp_path / "plan.json"
    save_plan(path, keep_all(deit.groups), deit.groups, {})
    path.write_text(path.read_text()[:-10])
    with pytest.raises(UserError, match="is not a pruning plan"):
        load_plan(path)


def test_another_format_is_named(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"format": 1, "groups": {}}')
    with pytest.raises(UserError, match="is of plan format 1; this version reads format 2"):
        load_plan(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="cannot read the plan .*nothing.json: No such file"):
        load_plan(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="cannot read the plan"):
        load_plan(tmp_path)


def test_a_plan_that_cannot_be_written_is_an_error(deit, keep_all, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_plan(tmp_path / "file" / "plan.json", keep_all(deit.groups), deit.groups, {})


@pytest.mark.parametrize("units", [(), (0, 0), (1, 0), (-1, 0), (0, 192)], ids=str)
def test_units_that_do_not_exist_or_ascend_are_refused(deit, keep_all, units):
    name = "blocks.0.mlp.fc1.weight:0"
    plan = changed(keep_all(deit.groups), name, units)
    with pytest.raises(UserError, match=r"units of blocks\.0\.mlp\.fc1\.weight:0 are not an ascending part of 0 … 191"):
        plan.check(deit.graph)


def test_heads_of_unequal_width_are_refused(deit, keep_all):
    plan = changed(keep_all(deit.groups), ATTENTION, (0, 1, 12))
    with pytest.raises(UserError, match=r"heads of unequal width in blocks\.0\.attn\.qkv\.weight:0"):
        plan.check(deit.graph)


def make_group(name, units, blocks, *, are_heads):
    return CoupledGroup(name, units, (), (), frozenset(), SectionStructure(blocks, are_heads))


def test_heads_may_go_and_other_blocks_may_not():
    graph = ChannelGraph((make_group("group", 6, 3, are_heads=True),), {})
    PruningPlan({"group": (0, 1, 4, 5)}).check(graph)
    graph = ChannelGraph((make_group("group", 6, 3, are_heads=False),), {})
    PruningPlan({"group": (0, 3, 4)}).check(graph)
    with pytest.raises(UserError, match="removes whole blocks of group, which must all stay"):
        PruningPlan({"group": (0, 1, 4, 5)}).check(graph)
    with pytest.raises(UserError, match="blocks of unequal width in group"):
        PruningPlan({"group": (0, 1, 2, 4)}).check(graph)


def test_what_must_shrink_together_keeps_equal_shares_of_what_is_left_of_it():
    groups = make_group("attention", 6, 3, are_heads=True), make_group("stream", 10, 1, are_heads=False)
    graph = ChannelGraph(groups, {}, shrink_together=(("attention", "stream"),))
    PruningPlan({"attention": (0, 2, 5), "stream": (0, 1, 4, 6, 7)}).check(graph)
    with pytest.raises(UserError, match="keeps unequal shares of attention and stream, which must shrink together"):
        PruningPlan({"attention": (0, 2, 5), "stream": (0, 1, 4, 6)}).check(graph)
    PruningPlan({"attention": (0, 4), "stream": (0, 1, 4, 6, 7)}).check(graph)
    with pytest.raises(UserError, match="keeps unequal shares"):
        PruningPlan({"attention": (0, 1), "stream": (0, 1, 4, 6, 7)}).check(graph)


def test_a_plan_of_another_model_is_refused(subjects):
    for name, other in (("deit", "convnext"), ("convnext", "resnet"), ("cnn", "vit")):
        plan = subjects(other).random_plan(0)
        with pytest.raises(UserError, match="the plan belongs to another model: they differ in "):
            plan.check(subjects(name).graph)


def test_a_plan_of_another_size_of_the_family_is_refused(subjects, keep_all, tmp_path):
    """The groups of a DeiT-T have the names of a DeiT-B's, and its units are numbers that exist there."""
    graph = subjects("deit").graph
    groups = graph.groups
    smaller = [dataclasses.replace(group, num_units=group.num_units // 2) for group in groups]
    fewer_heads = [
        dataclasses.replace(group, sections=group.heads and dataclasses.replace(group.heads, num_sections=2))
        for group in groups
    ]
    for others in (smaller, fewer_heads):
        save_plan(tmp_path / "plan.json", keep_all(others), others, {})
        plan = load_plan(tmp_path / "plan.json")
        plan.check(ChannelGraph(tuple(others), {}))
        with pytest.raises(UserError, match="the plan belongs to another model"):
            plan.check(graph)


def test_a_plan_that_lacks_a_group_or_has_one_too_many_is_refused(deit, keep_all):
    plan = keep_all(deit.groups)
    fewer = PruningPlan({name: units for name, units in plan.kept.items() if name != ATTENTION})
    for wrong in (fewer, changed(plan, "stranger", (0,))):
        with pytest.raises(UserError, match=r"differ in (blocks\.0\.attn\.qkv\.weight:0|stranger)"):
            wrong.check(deit.graph)


def test_a_refused_plan_leaves_the_model_whole(deit, keep_all):
    model = deit.copy()
    shapes = [tensor.shape for tensor in model.state_dict().values()]
    plan = changed(deit.random_plan(0), deit.groups[-1].name, (1, 0))
    with pytest.raises(UserError):
        cut(model, deit.graph, plan)
    assert [tensor.shape for tensor in model.state_dict().values()] == shapes


def test_a_plan_equals_itself_after_a_trip_through_its_file(deit, keep_all, tmp_path):
    plan = keep_all(deit.groups)
    save_plan(tmp_path / "plan.json", plan, deit.groups, {})
    assert load_plan(tmp_path / "plan.json") == plan
