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
from isomorphic.models import ModelSpec
from isomorphic.pruning.blocks.depth import check_spare, choose_blocks, remove_blocks, score_blocks
from isomorphic.pruning.blocks.residual import Stage, find_stages

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
    "vgg": lambda: nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)), nn.Flatten(), nn.Linear(12288, 5)),
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
            for block in (*self.blocks, self.blocks[0]):
                x = block(x)
            return x

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


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).tanh()


class Shrinking(Residual):
    """Another class with the same effect."""


class Blocks(nn.Module):
    """Three residual blocks and a head that answers with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(Residual() for _ in range(3))
        self.head = nn.Linear(8, 5)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Numbered(Blocks):
    """Every block is followed by a factor of its own number: the others cannot do without it."""

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x) * (1 + number)
        return self.head(x)


class Supervised(Blocks):
    """Every block has an output."""

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return outputs[1:]


class TrainedByNumber(Blocks):
    """In training, the third block's output is looked up."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return self.head(outputs[3] if self.training else outputs[-1])


FEATURES = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("build", "message"),
    [(Numbered, "depend on how many there are"), (Supervised, "zip"), (TrainedByNumber, "list index out of range")],
)
def test_a_model_that_counts_its_blocks_keeps_them(build, message):
    model = build().eval()
    with pytest.raises(UserError, match=f"the model cannot lose these blocks: .*{message}"):
        remove_blocks(model, {"blocks": (0, 2)}, FEATURES)
    assert len(model.blocks) == 3 and not any(module.training for module in model.modules())
    remove_blocks(Blocks().eval(), {"blocks": (0, 2)}, FEATURES)
    assert [stage.name for stage in find_stages(model, FEATURES)] == (["blocks"] if build is TrainedByNumber else [])


def test_tied_blocks_are_scored_and_may_part():
    model = Blocks().eval()
    model.blocks[2].layer.weight, model.blocks[2].layer.bias = model.blocks[1].layer.weight, model.blocks[1].layer.bias
    scores = score_blocks(model, find_stages(model, FEATURES), "l1")["blocks"]
    assert scores[1] == scores[2] != scores[0]
    with torch.no_grad():
        expected = model.head(model.blocks[2](model.blocks[0](FEATURES)))
    remove_blocks(model, {"blocks": (0, 2)}, FEATURES)
    assert torch.equal(model(FEATURES), expected)


def test_lists_in_lists_are_stages_where_they_hold_one_kind_and_blocks_where_they_do_not():
    stage, block = nn.Sequential(Residual(), Residual(), Residual()), nn.Sequential(Residual(), Shrinking())
    model = nn.Sequential(Residual(), stage, Residual(), block, Residual()).eval()
    assert find_stages(model, FEATURES) == [Stage("", 5, (0, 2, 3, 4)), Stage("1", 3, (0, 1, 2))]
    kept = {"": (1, 2, 3), "1": (0, 2)}
    with torch.no_grad():
        expected = block(model[2](stage[2](stage[0](FEATURES))))
    spec = ModelSpec("torchvision", "toy").keeping(kept)
    assert spec.keeping({"0": (1,)}).kept_blocks == {"": (1, 2, 3), "1": (2,)}  # by the dense model's names
    names = remove_blocks(model, kept, FEATURES)
    assert torch.allclose(model(FEATURES), expected) and names["0.1.layer.weight"] == "1.2.layer.weight"


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"blocks": (0, 7)}, "not an ascending part of the 3 blocks"),
        ({"blocks": (2, 0)}, "not an ascending part"),
        ({"blocks": (-1,)}, "not an ascending part"),
        ({"layers": (0,)}, "cannot lose these blocks"),
        ({"blocks.0": (0,)}, "not a list of blocks"),
    ],
)
def test_blocks_that_cannot_go(kept, message):
    with pytest.raises(UserError, match=message):
        remove_blocks(Blocks().eval(), kept, FEATURES)
