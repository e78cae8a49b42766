"""What a page knows of a cut: widths, stages, histograms, in the dense model's names."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

import isomorphic as iso
from isomorphic.measure.complexity import count_by_module, count_complexity
from isomorphic.page.facts import BINS, REST, CutFacts, _histogram_of
from isomorphic.page.inventory import take_inventory

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(depth: int = 3) -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=depth, num_heads=3, num_classes=5
    ).eval()


def test_macs_of_modules_add_up_to_the_whole():
    model = vit()
    complexity, macs = count_by_module(model, IMAGE)
    assert complexity == count_complexity(model, IMAGE)
    assert macs["blocks"] == sum(macs[f"blocks.{index}"] for index in range(3))  # a list is never called
    # (17 tokens, 24) -> (17, 96): 17 x 24 x 96 products, and 96 for the bias
    assert macs["blocks.0.mlp.fc1"] == 17 * 24 * 96 + 96
    attention = macs["blocks.0.attn"]
    assert attention > macs["blocks.0.attn.qkv"] + macs["blocks.0.attn.proj"], "q.k and the softmax are no module's"


def test_a_module_that_is_called_twice_counts_twice():
    inner = nn.Linear(4, 4, bias=False)
    macs = count_by_module(nn.Sequential(inner, nn.ReLU(), inner), torch.randn(1, 4))[1]
    assert macs["0"] == 2 * 16


def test_seconds_are_of_every_module_that_is_called():
    seconds = take_inventory(vit(), IMAGE, timed=True).seconds
    assert 0 < seconds["blocks.0.mlp"] <= seconds["blocks.0"] <= seconds[""]


@pytest.mark.parametrize("remove_blocks", [0, 1])
def test_layers_and_stages_have_the_dense_models_names(remove_blocks: int):
    dense = vit()
    options = {"ratio": 0.5, "head_ratio": 0.34, "remove_blocks": remove_blocks, "criterion": "l2"}
    pruned = iso.prune(dense, IMAGE, **options)
    facts = pruned.facts
    layers = {layer.name: layer for layer in facts.layers}
    kept = pruned.plan.kept_blocks.get("blocks", (0, 1, 2))
    assert len(kept) == 3 - remove_blocks and next(iter(layers)) == "patch_embed.proj"
    blocks: Any = pruned.model.blocks
    for index in range(3):
        fc1 = layers[f"blocks.{index}.mlp.fc1"]
        after = blocks[kept.index(index)] if index in kept else None
        assert fc1.before == 96 and fc1.after == (after.mlp.fc1.out_features if after else 0)
        qkv = layers[f"blocks.{index}.attn.qkv"]
        assert (qkv.heads, len(qkv.kept_heads)) == ((3, after.attn.num_heads) if after else (0, 0))
    assert [stage.name for stage in facts.stages] == [
        "patch_embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head", REST
    ]  # fmt: skip
    for side, costs in ((0, pruned.before), (1, pruned.after)):
        assert sum(stage.macs[side] for stage in facts.stages) == costs.macs_exact
        assert sum(stage.params[side] for stage in facts.stages) == costs.params
    removed = [stage for stage in facts.stages if stage.macs[1] == 0 and stage.macs[0]]
    assert len(removed) == remove_blocks


def test_stages_that_hold_little_are_not_opened():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    )
    facts = iso.prune(model, torch.randn(1, 8), ratio=0.25, criterion="l2").facts
    assert [stage.name for stage in facts.stages] == ["0", "1", REST]


def test_classes_count_every_unit_and_the_cut_has_as_many_below_as_were_removed():
    pruned = iso.prune(vit(), IMAGE, ratio=0.5, criterion="l2")
    facts = pruned.facts
    for histogram, summary in zip(facts.classes, pruned.plan.summaries(), strict=True):
        assert (histogram.units, histogram.kept) == (len(summary.scores), summary.kept)
        assert sum(histogram.kept_bins) == summary.kept
        assert sum(histogram.removed_bins) == histogram.units - summary.kept
        scores = torch.cat([pruned.plan.normalized[group.name] for group in summary.groups])
        assert (
            histogram.cut is not None
            and int((scores.log10() < histogram.cut).sum()) == histogram.units - histogram.kept
        )


def test_histograms_of_zeros_of_one_value_and_of_all_that_is_kept():
    scores = torch.tensor([0.0, 0.0, 1.0, 10.0])
    two = _histogram_of("x", scores, torch.tensor([False, False, True, True]))
    assert two.removed_bins[0] == 2 and two.kept_bins[0] == 1 and two.kept_bins[BINS - 1] == 1
    assert (two.low, two.high) == (0.0, 1.0)
    same = _histogram_of("x", torch.full((3,), 2.0), torch.ones(3, dtype=torch.bool))
    assert same.cut is None and sum(same.kept_bins) == 3 and same.low < math.log10(2) < same.high
    nothing = _histogram_of("x", torch.zeros(3), torch.tensor([True, False, False]))
    assert nothing.removed_bins[0] == 2 and nothing.kept_bins[0] == 1


def test_facts_survive_json():
    facts = iso.prune(vit(1), IMAGE, ratio=0.5, criterion="l2", ignore=["blocks.0.mlp"]).facts
    again = CutFacts.from_dict(json.loads(json.dumps(facts.to_dict())))
    assert again.layers == facts.layers and again.stages == facts.stages and again.classes == facts.classes
    assert again.stays == facts.stays and again.before == dict(facts.before) and again.prunable == facts.prunable
    assert again.asked == {"ratio": 0.5, "ignore": ["blocks.0.mlp"], "ranking": "isomorphic", "criterion": "l2"}
    assert facts.stays[0].reason == "it reaches the model's output" and facts.stays[0].layers == "head"


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop("layers"),
        lambda facts: facts["classes"][0].update(kept_bins=[1]),
        lambda facts: facts["classes"][0].update(low=float("nan")),
        lambda facts: facts["stages"][0].update(macs=[1]),
        lambda facts: facts["before"].update(params="many"),
        lambda facts: facts["layers"][0].pop("name"),
        lambda facts: facts.update(errors={"x": [1.0]}),
    ],
)
def test_damaged_facts_are_an_error(change: Any):
    facts = json.loads(json.dumps(iso.prune(vit(1), IMAGE, ratio=0.5, criterion="l2").facts.to_dict()))
    change(facts)
    with pytest.raises((KeyError, TypeError, ValueError)):
        CutFacts.from_dict(facts)


def test_what_was_asked_reads_as_a_person_wrote_it():
    def mine(group: Any, weights: Any, gradients: Any) -> Any:
        return torch.ones(group.num_units)

    model = vit(1)
    assert iso.prune(model, IMAGE, macs="60%", criterion=mine).facts.asked == {
        "macs": "60%", "criterion": "mine", "ranking": "isomorphic"
    }  # fmt: skip
    stepwise = iso.prune(model, IMAGE, params=8_000, criterion="l1", ranking="local", steps=2)
    assert stepwise.facts.asked == {"params": 8_000, "ranking": "local", "criterion": "l1", "steps": 2}
