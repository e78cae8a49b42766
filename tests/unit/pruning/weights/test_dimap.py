"""DIMAP: the score against the paper's equation and an independent LAMP, exact counts, and what it is for."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isomorphic.data.sources import DIGITS_FILE
from isomorphic.errors import UserError
from isomorphic.measure.sparsity import count_sparsity
from isomorphic.pruning.weights.dimap import Pruned, lamp_scores, mask, surviving_share
from isomorphic.pruning.weights.layer_roles import AUX, assign_roles

TINY: dict[str, Any] = {"img_size": 8, "patch_size": 2, "window_size": 2, "embed_dim": 16, "depths": (2, 2),
                        "num_heads": (2, 4), "num_classes": 10}  # fmt: skip
IMAGE = torch.zeros(1, 3, 8, 8)
# Of the paper's tables: Swin's size, its weights in modules, and what 55% of those are of all params, in percent.
SWINS = {"tiny": (25_878_528, 50.3), "small": (47_112_192, 52.2), "base": (83_755_008, 52.5)}


def tiny_swin(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("swin_tiny_patch4_window7_224", **TINY)


def lamp(weight: Tensor) -> Tensor:
    """The score as its authors define it, one weight at a time: over all weights that are not smaller."""
    squares = weight.double().square().flatten()
    return torch.stack([square / squares[squares >= square].sum() for square in squares]).view(weight.shape)


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter == 0 for name, parameter in model.named_parameters()}


def sum_of_zeros(model: nn.Module) -> int:
    return sum(int(zeros.sum()) for zeros in zeros_of(model).values())


def masked(model: nn.Module, ratio: float, roles: dict[str, str] | None = None) -> nn.Module:
    mask(model, roles or assign_roles(model, IMAGE), ratio)
    return model


# --- the score ---


def test_the_score_of_the_specification():
    scores = lamp_scores(torch.tensor([2.0, -1.0, 3.0]))
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, torch.tensor([4 / 13, 1 / 14, 1.0], dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("shape", [(1,), (300,), (17, 23), (4, 3, 5, 5)])
def test_scores_are_those_of_lamp(shape: tuple[int, ...]):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    torch.testing.assert_close(lamp_scores(weight), lamp(weight), rtol=1e-12, atol=0)


def test_scores_grow_with_magnitude_up_to_1():
    weight = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    ordered = lamp_scores(weight)[weight.abs().argsort()]
    assert (ordered.diff() > 0).all() and ordered[-1] == 1 and ordered[0] > 0


def test_of_equal_weights_the_first_scores_highest_and_zeros_score_zero():
    assert lamp_scores(torch.tensor([0.0, 1.0, -1.0, 0.0, 1.0])).tolist() == [0, 1, 1 / 2, 0, 1 / 3]
    assert lamp_scores(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]
    assert surviving_share(torch.tensor([])).tolist() == []


def test_small_and_large_weights_lose_no_precision():
    weight = torch.tensor([1e-30, 1e-30, 3e19, 3e19])  # whose squares are neither zero nor infinite
    assert lamp_scores(weight)[2:].tolist() == [1, 0.5] and (lamp_scores(weight)[:2] > 0).all()


# --- masks ---


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 0.7, 1.0])
def test_every_module_loses_its_share_to_the_weight_and_nothing_else_changes(ratio: float):
    model = tiny_swin()
    before, roles = copy.deepcopy(model), assign_roles(model, IMAGE)
    masking = mask(model, roles, ratio)
    assert set(masking.modules) == {"QKV", "PRJ", "MLP"}
    for role, (total, pruned) in masking.modules.items():
        names = [name for name in roles if roles[name] == role]
        assert total == sum(model.get_parameter(name).numel() for name in names)
        assert pruned == round(ratio * total) == sum(int(zeros_of(model)[name].sum()) for name in names)
        scores = torch.cat([lamp_scores(before.get_parameter(name)).flatten() for name in names])
        gone = torch.cat([zeros_of(model)[name].flatten() for name in names])
        if 0 < ratio < 1:
            assert scores[gone].max() <= scores[~gone].min()  # one threshold
    for name, parameter in model.named_parameters():
        old, gone = before.get_parameter(name), zeros_of(model)[name]
        if roles[name] == AUX:
            assert torch.equal(parameter, old) and name not in masking.parameters
        else:
            assert torch.equal(parameter, torch.where(gone, 0, old))
            assert masking.parameters[name] == (parameter.numel(), int(gone.sum()))
    assert set(masking.names) == {name for name, (_, pruned) in masking.parameters.items() if pruned}
    assert (masking.names == ()) == (ratio == 0)


@pytest.mark.parametrize(
    "layer", ["layers.0.blocks.0.attn.qkv", "layers.1.blocks.1.mlp.fc2", "layers.1.blocks.0.attn.proj"]
)
def test_the_scale_of_a_layer_does_not_matter(layer: str):
    plain, scaled = tiny_swin(), tiny_swin()
    with torch.no_grad():
        scaled.get_parameter(f"{layer}.weight").mul_(16)  # which rounds nothing
    by_magnitude = [magnitude_masks(model, 0.5, together=True) for model in (plain, scaled)]
    assert not all(torch.equal(by_magnitude[0][name], by_magnitude[1][name]) for name in by_magnitude[0])
    ours = [zeros_of(masked(model, 0.5)) for model in (plain, scaled)]
    assert all(torch.equal(ours[0][name], ours[1][name]) for name in ours[0])


def test_ten_times_a_layer_does_not_matter_either():
    plain, scaled = tiny_swin(), tiny_swin()
    with torch.no_grad():
        scaled.get_parameter("layers.0.blocks.1.mlp.fc1.weight").mul_(10)
    ours = [zeros_of(masked(model, 0.55)) for model in (plain, scaled)]
    assert all(torch.equal(ours[0][name], ours[1][name]) for name in ours[0])


def test_a_module_of_one_layer_is_pruned_by_magnitude():
    model = tiny_swin()
    expected = magnitude_masks(model, 0.4, together=False)
    masked(model, 0.4, {name: name for name in expected})  # every layer alone
    assert all(torch.equal(zeros_of(model)[name], gone) for name, gone in expected.items())


def test_of_equal_weights_the_first_ones_go():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), ([0.0, 2, 0, 0], [0.0, 1, 0, 1]), strict=True):
            parameter.copy_(torch.tensor([values]))
    masking = mask(model, {"0.weight": "MLP", "1.weight": "MLP"}, 0.75)
    assert [parameter.tolist() for parameter in model.parameters()] == [[[0, 2, 0, 0]], [[0, 1, 0, 0]]]
    assert masking.modules == {"MLP": Pruned(8, 6)}
    assert masking.parameters == {"0.weight": Pruned(4, 3), "1.weight": Pruned(4, 3)}
    assert str(masking) == "MLP: 6 of 8 weights pruned"


def test_zeros_that_are_there_already_count():
    twice, once = masked(masked(tiny_swin(), 0.3), 0.5), masked(tiny_swin(), 0.5)
    assert sum_of_zeros(twice) == sum_of_zeros(once)
    assert sum_of_zeros(masked(twice, 0.2)) == sum_of_zeros(once)  # no weight more


def test_what_cannot_be_masked_is_said_in_one_line():
    model = tiny_swin()
    roles = assign_roles(model, IMAGE)
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="is not between 0 and 1"):
            mask(model, roles, ratio)
    with pytest.raises(UserError, match="no layer of an attention or MLP"):
        mask(model, dict.fromkeys(roles, AUX), 0.5)
    before = zeros_of(model)
    with torch.no_grad():
        model.get_parameter("layers.1.blocks.1.mlp.fc2.weight")[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"the weights of layers\.1\.blocks\.1\.mlp\.fc2\.weight are not finite"):
        mask(model, roles, 0.5)
    assert all(torch.equal(gone, before[name]) for name, gone in zeros_of(model).items())


# --- the paper's figures ---


@pytest.mark.parametrize("size", SWINS)
def test_the_papers_params_follow_from_shapes(size: str):
    prunable, reduction = SWINS[size]
    with torch.device("meta"):
        model = timm.create_model(f"swin_{size}_patch4_window7_224")
    roles = assign_roles(model, torch.empty(1, 3, 224, 224, device="meta"))
    modules = {role: 0 for role in roles.values() if role != AUX}
    for name, parameter in model.named_parameters():
        if roles[name] != AUX:
            modules[roles[name]] += parameter.numel()
    assert sum(modules.values()) == prunable
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 100 * sum(round(0.55 * n) for n in modules.values()) / total == pytest.approx(reduction, abs=0.1)


@pytest.mark.slow
def test_a_masked_swin_tiny_has_the_papers_size():
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224")
    image = torch.zeros(1, 3, 224, 224)
    masking = mask(model, assign_roles(model, image), 0.55)
    sparsity = count_sparsity(model, image, masking.names)
    assert sparsity.dense.params - sparsity.nonzero.params == sum(pruned for _, pruned in masking.modules.values())
    assert 100 * (1 - sparsity.nonzero.params / sparsity.dense.params) == pytest.approx(50.3, abs=0.1)
    assert 1 - sparsity.nonzero.macs_paper / sparsity.dense.macs_paper == pytest.approx(0.346, abs=0.01)


# --- what it is for ---


def magnitude_masks(model: nn.Module, ratio: float, *, together: bool) -> dict[str, Tensor]:
    """What plain magnitude pruning removes: the same share of each layer, or of all of them together."""
    names = [name for name, role in assign_roles(model, IMAGE).items() if role != AUX]
    sizes = {name: model.get_parameter(name).detach().abs() for name in names}
    everything = torch.cat([size.flatten() for size in sizes.values()]).sort().values
    found = {}
    for name, size in sizes.items():
        ordered = everything if together else size.flatten().sort().values
        found[name] = size < ordered[round(ratio * len(ordered))]
    return found


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """All images (1797, 3, 8, 8), grey levels in [-1, 1], and their labels."""
    with np.load(DIGITS_FILE) as arrays:
        pixels = torch.from_numpy(arrays["images"]).float()[:, None] / 8 - 1
        return pixels.expand(-1, 3, -1, -1), torch.from_numpy(arrays["labels"]).long()


def trained(seed: int, images: Tensor, labels: Tensor, epochs: int = 60) -> nn.Module:
    """A two-stage Swin that has learnt these digits."""
    model = tiny_swin(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps_an_epoch = len(images) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * steps_an_epoch)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64)[:steps_an_epoch]:
            F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


@torch.no_grad()
def with_zeros(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    for name, gone in masks.items():
        model.get_parameter(name).masked_fill_(gone, 0)
    return model


@pytest.mark.slow
def test_digits_survive_dimap_better_than_magnitude_pruning_of_each_layer(digits: tuple[Tensor, Tensor]):
    """Top-1 in percent at 70% of the weights removed, without finetuning, as a mean of three seeds.

    The Swin is as small as the one of the specification, whose uniformly pruned accuracy is 93.0. One of twice the
    width loses nothing at 70%, by any method. It is no law of nature: with windows of the whole image (window_size 4)
    DIMAP came out 1.3 points below uniform, and global magnitude is ahead of both here.
    """
    images, labels = digits
    rows = []
    for seed in range(3):
        model = trained(seed, images[:1437], labels[:1437])
        candidates = {
            "dense": model,
            "uniform": with_zeros(model, magnitude_masks(model, 0.7, together=False)),
            "global": with_zeros(model, magnitude_masks(model, 0.7, together=True)),
            "dimap": masked(copy.deepcopy(model), 0.7),
        }
        with torch.no_grad():
            rows.append(
                {
                    name: 100 * (one(images[1437:]).argmax(1) == labels[1437:]).float().mean().item()
                    for name, one in candidates.items()
                }
            )
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    assert means["dense"] > 95, rows
    assert means["dimap"] >= means["uniform"] + 1, rows
