"""Removing blocks: which may go, which do, and what is left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.pruning.depth import Stage, check_spare, choose_blocks, find_stages, remove_blocks, score_blocks

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TINY: dict[str, Any] = {"num_classes": 5}
MODELS = {
    "convnext": lambda: timm.create_model("convnext_tiny", depths=(1, 2, 4, 2), dims=(8, 12, 16, 24), **TINY),
    "resnet": lambda: timm.create_model("resnet26", channels=(8, 8, 16, 24), stem_width=8, layers=(2, 3, 2, 2), **TINY),
    "basic_resnet": lambda: timm.create_model("resnet18", channels=(64, 12, 16, 24), **TINY),
    "deit": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=64, embed_dim=24, depth=4, num_heads=3, **TINY
    ),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=8, depths=(2, 4), num_heads=(2, 2), **TINY
    ),
    "mobilenet": lambda: torchvision.models.mobilenet_v2(width_mult=0.25, **TINY),
    "vgg": lambda: torchvision.models.vgg11_bn(num_classes=5),
}
STAGES = {
    "convnext": [
        Stage("stages.0.blocks", 1, (0,)),
        Stage("stages.1.blocks", 2, (0, 1)),
        Stage("stages.2.blocks", 4, (0, 1, 2, 3)),
        Stage("stages.3.blocks", 2, (0, 1)),
    ],
    # the first block of a stage changes width, or stride, or both
    "resnet": [
        Stage("layer1", 2, (1,)),
        Stage("layer2", 3, (1, 2)),
        Stage("layer3", 2, (1,)),
        Stage("layer4", 2, (1,)),
    ],
    "deit": [Stage("blocks", 4, (0, 1, 2, 3))],
    "swin": [Stage("layers.0.blocks", 2, (0, 1)), Stage("layers.1.blocks", 4, (0, 1, 2, 3))],
    "mobilenet": [Stage("features", 19, (1, 3, 5, 6, 8, 9, 10, 12, 13, 15, 16))],
    "vgg": [],  # convolutions of equal width, with nothing around them
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is zero-initialised any more
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    F.cross_entropy(model(IMAGE), torch.tensor([1])).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", STAGES)
def test_residual_blocks_that_keep_their_shape_may_go(name):
    assert find_stages(build(name), IMAGE) == STAGES[name]


def test_zero_initialised_blocks_are_found_as_well():
    model = MODELS["basic_resnet"]().eval()  # timm's last gammas are zero: nothing shows that a block does anything
    assert [stage.removable for stage in find_stages(model, IMAGE)] == [(0, 1), (1,), (1,), (1,)]


def test_a_normalised_sum_is_no_residual_block():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    assert find_stages(model, torch.randn(1, 4, 8)) == []
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    assert find_stages(model, torch.randn(1, 4, 8)) == [Stage("layers", 3, (0, 1, 2))]


def test_a_block_that_runs_twice_stays():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
            self.blocks = nn.ModuleList([block, copy.deepcopy(block)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](self.blocks[1](self.blocks[0](x)))

    assert find_stages(Twice().eval(), torch.randn(1, 4, 8)) == [Stage("blocks", 2, (1,))]


def test_a_taylor_score_is_the_mean_over_parameters_of_each_ones_mean():
    model = build("convnext")
    statistic = gradients(model)
    scores = score_blocks(model, find_stages(model, IMAGE), "taylor", statistic=statistic)
    block = model.get_submodule("stages.2.blocks.1")
    means = [(p * statistic[f"stages.2.blocks.1.{name}"]).abs().mean() for name, p in block.named_parameters()]
    assert len(means) == 9 and scores["stages.2.blocks"][1].item() == pytest.approx(torch.stack(means).mean().item())
    assert [len(values) for values in scores.values()] == [1, 2, 4, 2]


@pytest.mark.parametrize("criterion", ["l1", "l2", "random"])
def test_criteria_without_images_score_blocks_too(criterion):
    model = build("deit")
    stages = find_stages(model, IMAGE)
    first, again = (score_blocks(model, stages, criterion, seed=3)["blocks"] for _ in range(2))
    assert torch.equal(first, again) and len(set(first.tolist())) == 4


def test_scores_that_are_not_finite_are_refused():
    model = build("deit")
    statistic = gradients(model)
    statistic["blocks.2.attn.qkv.weight"][0, 0] = torch.nan
    with pytest.raises(UserError, match=r"scores of the blocks of blocks are not finite"):
        score_blocks(model, find_stages(model, IMAGE), "taylor", statistic=statistic)


CHOICE = [Stage("a", 2, (0, 1)), Stage("b", 4, (0, 1, 3)), Stage("c", 4, (0, 1, 2, 3))]
SCORES = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([9.0, 0.3, 0.3]), "c": torch.tensor([0.5, 0.4, 6.0, 7.0])}


@pytest.mark.parametrize(
    ("count", "scope", "kept"),
    [
        (0, "stage", {}),
        (1, "stage", {"b": (0, 2, 3)}),  # the first of the two longest; of equal scores the first
        (3, "stage", {"b": (2,)}),
        (1, "all", {"a": (1,)}),
        (3, "all", {"a": (1,), "b": (0, 2)}),  # the second of "a" is its last
        (7, "all", {"a": (1,), "b": (2,), "c": (3,)}),
    ],
)
def test_the_least_important_blocks_go_and_every_stage_keeps_one(count, scope, kept):
    assert choose_blocks(CHOICE, SCORES, count, scope) == kept


@pytest.mark.parametrize(
    ("stages", "count", "scope", "message"),
    [
        (CHOICE, 4, "stage", "b, the stage with most blocks, can spare 3"),
        (CHOICE, 8, "all", "the model can spare 7"),
        ([], 1, "stage", "the model can spare 0"),
    ],
)
def test_more_blocks_than_there_are(stages, count, scope, message):
    with pytest.raises(UserError, match=message):
        check_spare(stages, count, scope)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("convnext", {"stages.2.blocks": (1, 3), "stages.3.blocks": (1,)}),
        ("resnet", {"layer2": (0, 2), "layer1": (0,)}),
        ("deit", {"blocks": (0, 3)}),
        ("swin", {"layers.1.blocks": (0, 3)}),  # a shifted window and one that is not, in their places
        ("mobilenet", {"features": (0, 1, 2, 4, 5, 7, 11, 12, 14, 17, 18)}),
    ],
)
def test_what_is_left_computes_what_zeroed_blocks_do(name, kept):
    model = build(name)
    short = copy.deepcopy(model)
    names = remove_blocks(short, kept, IMAGE)
    with torch.no_grad():
        for holder, indices in kept.items():
            for index, block in enumerate(model.get_submodule(holder).children()):
                for parameter in block.parameters() if index not in indices else ():
                    parameter.zero_()
        assert torch.allclose(short(IMAGE), model(IMAGE), atol=1e-6)
    left = {holder: len(list(short.get_submodule(holder).children())) for holder in kept}
    assert left == {holder: len(indices) for holder, indices in kept.items()}
    before = dict(model.named_parameters())
    assert all(torch.equal(parameter, before[names[name]]) for name, parameter in short.named_parameters())
    short.train()(IMAGE.repeat(2, 1, 1, 1)).sum().backward()
    assert all(parameter.grad is not None for parameter in short.parameters())


def test_nothing_to_remove_changes_nothing():
    model = build("deit")
    assert remove_blocks(model, {}, IMAGE) == {name: name for name, _ in model.named_parameters()}


class Numbered(nn.Module):
    """Every block is followed by a shift of its own number: the others cannot do without it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x) + number
        return x


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"blocks": (0, 2)}, "depend on how many there are"),
        ({"blocks": (0, 7)}, "not an ascending part of the 3 blocks"),
        ({"blocks": (2, 0)}, "not an ascending part"),
        ({"blocks": (-1,)}, "not an ascending part"),
        ({"layers": (0,)}, "cannot lose these blocks"),
        ({"blocks.0": (0,)}, "not a list of blocks"),
    ],
)
def test_blocks_that_cannot_go(kept, message):
    with pytest.raises(UserError, match=message):
        remove_blocks(Numbered().eval(), kept, torch.randn(1, 4, 8))
