"""Compensation: networks of copies are reproduced, what cannot be solved is left alone, two processes are as one."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.linear import Linear as TimmLinear
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn

from isomorphic.processes import distributed
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery import least_squares
from isomorphic.pruning.recovery.attention import find_query_keys
from isomorphic.pruning.recovery.channel_maps import ChannelMap
from isomorphic.pruning.recovery.compensation import CutLayers, Reconstruction, compensate, solvable_layers
from isomorphic.pruning.recovery.least_squares import RIDGES
from tests.processes import Outcome, run_together
from tests.unit.pruning.conftest import BUILDERS, VIT, BatchNormCnn, TiedCnn
from tests.unit.pruning.recovery.test_least_squares import ridge_by_lstsq

Array = NDArray[np.float64]
Plan = Callable[[CoupledGroup], tuple[int, ...]]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SLOW = pytest.mark.slow
IMAGES = random(48, 3, 32, 32, seed=3)
MANY = random(320, 3, 32, 32, seed=3)


def first_half(group: CoupledGroup) -> tuple[int, ...]:
    """The first half of the units; of groups in blocks, all."""
    return tuple(range(group.num_units if group.sections else group.num_units // 2))


@dataclasses.dataclass
class Cut:
    """A dense model, what its cut leaves, and where that comes from."""

    dense: Any
    pruned: Any
    layers: CutLayers

    def compensated(self, images: Tensor, **options: Any) -> tuple[Any, list[Reconstruction]]:
        pruned = copy.deepcopy(self.pruned)
        return pruned, compensate(self.dense, pruned, images, self.layers, **options)


def cut_in(dense: nn.Module, images: Tensor, choose: Plan, graph: ChannelGraph | None = None) -> Cut:
    graph = graph or trace_groups(dense, images[:2])
    plan = PruningPlan({group.name: choose(group) for group in graph.groups})
    layers = CutLayers.of(dense, graph, plan)
    layers = dataclasses.replace(layers, query_keys=find_query_keys(dense, graph, plan, images[:1]))
    pruned = copy.deepcopy(dense)
    cut(pruned, graph, plan)
    return Cut(dense, pruned, layers)


@torch.no_grad()
def copy_units(model: nn.Module, graph: ChannelGraph) -> None:
    """Makes the second half of each plain group's units copies of the first, wherever they are made or normed."""
    for group in graph.groups:
        half = group.num_units // 2
        for member in () if group.sections else group.members:
            if group.nodes[member.node].side != "in":
                tensor: Tensor = getattr(model.get_submodule(member.module), member.tensor).movedim(member.dim, 0)
                tensor[member.index[half : 2 * half].flatten()] = tensor[member.index[:half].flatten()].clone()


@torch.no_grad()
def distance(model: Any, dense: Any, images: Tensor) -> float:
    """E |difference|² of the outputs as a share of their variance."""
    found, expected = model(images), dense(images)
    return ((found - expected).square().sum() / (expected - expected.mean(0)).square().sum()).item()


def randomized(model: nn.Module, size: float = 0.1) -> Any:
    with torch.no_grad():
        for seed, (name, tensor) in enumerate(model.state_dict().items()):
            if tensor.is_floating_point() and not name.endswith("running_var"):
                tensor.add_(size * random(*tensor.shape, seed=seed))
    return model.eval()


# Equations


@pytest.mark.parametrize("ridge", [1e-4, 1e-1])
def test_weights_and_bias_are_those_of_the_textbook(ridge: float):
    torch.manual_seed(0)
    dense: Any = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)).double()
    x = random(400, 6, seed=1).double()
    pruned, report = cut_in(dense, x, lambda group: (0, 3, 4, 7, 9)).compensated(x, ridges=[ridge])
    kept, removed = [0, 3, 4, 7, 9], [1, 2, 5, 6, 8, 10, 11]
    with torch.no_grad():
        h = dense[1](dense[0](x)).numpy()
        y = dense(x).numpy()
        weight, bias = (tensor.numpy() for tensor in dense[2].parameters())
    mean, covariance = h.mean(0), np.cov(h.T, bias=True)
    own = covariance[np.ix_(kept, kept)]
    predictor = covariance[np.ix_(removed, kept)] @ np.linalg.inv(own + ridge * np.diag(own).mean() * np.eye(5))
    expected = weight[:, kept] + weight[:, removed] @ predictor
    shift = weight[:, removed] @ (mean[removed] - predictor @ mean[kept])
    np.testing.assert_allclose(pruned[2].weight.detach().numpy(), expected, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(pruned[2].bias.detach().numpy(), bias + shift, rtol=1e-8, atol=1e-9)
    # and the report is what a ruler would say
    variance = y.var(0).sum()
    plain = ((y - h[:, kept] @ weight[:, kept].T - bias) ** 2).sum(1).mean()
    solved = ((y - h[:, kept] @ expected.T - bias - shift) ** 2).sum(1).mean()
    (found,) = report
    assert (found.layer, found.before, found.after) == (
        "2",
        pytest.approx(plain / variance, rel=1e-8),
        pytest.approx(solved / variance, rel=1e-6),
    )


def test_without_ridges_the_bias_takes_the_mean_of_what_is_gone():
    torch.manual_seed(0)
    dense: Any = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)).double()
    x = random(100, 6, seed=1).double()
    pruned, _ = cut_in(dense, x, first_half).compensated(x, ridges=())
    with torch.no_grad():
        mean = dense[1](dense[0](x)).mean(0)
        expected = dense[2].bias + dense[2].weight[:, 6:] @ mean[6:]
    assert torch.equal(pruned[2].weight, dense[2].weight[:, :6])
    torch.testing.assert_close(pruned[2].bias.detach(), expected)


def test_maps_with_channels_last_and_linears_on_them_are_flattened():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5))
    x = random(10, 4, 3, 6, seed=1)
    found, report = cut_in(dense, x, first_half).compensated(x)
    expected, other = cut_in(dense, x, first_half).compensated(x.flatten(1, 2))
    torch.testing.assert_close(found[2].weight, expected[2].weight)
    assert report[0].after == pytest.approx(other[0].after, rel=1e-4)


def patches_by_hand(x: Array, kernel: int, stride: int, padding: int) -> Array:
    """(images, positions, channels · kernel²) of maps (images, channels, height, width)."""
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))[:, :, ::stride, ::stride]
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(len(x), -1, x.shape[1] * kernel**2)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (2, 2, 0), (1, 1, 0)])
@pytest.mark.parametrize("ridge", [1e-4, 1e-1])
def test_a_convolution_is_solved_for_over_the_patches_that_it_sees(
    kernel: int, stride: int, padding: int, ridge: float
):
    torch.manual_seed(0)
    last = nn.Conv2d(8, 5, kernel, stride, padding)
    dense: Any = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), last).double()
    x = random(40, 3, 9, 8, seed=1).double()
    pruned, report = cut_in(dense, x, first_half).compensated(x, ridges=[ridge])
    with torch.no_grad():
        own = patches_by_hand(F.relu(dense[0](x))[:, :4].numpy(), kernel, stride, padding).reshape(-1, 4 * kernel**2)
        y = dense(x).movedim(1, -1).flatten(0, 2).numpy()
        prior = last.weight[:, :4].flatten(1).numpy()
    expected = ridge_by_lstsq(y - y.mean(0), own - own.mean(0), prior, ridge)
    bias = y.mean(0) - expected @ own.mean(0)
    np.testing.assert_allclose(pruned[2].weight.detach().flatten(1).numpy(), expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(pruned[2].bias.detach().numpy(), bias, rtol=1e-7, atol=1e-9)
    after = ((y - own @ expected.T - bias) ** 2).sum(1).mean() / y.var(0).sum()
    assert report[0].after == pytest.approx(after, rel=1e-6) and report[0].after < report[0].before


@pytest.mark.parametrize(("groups", "outputs"), [(2, 6), (8, 8), (8, 16)])  # grouped, depthwise, two outputs a channel
def test_a_grouped_convolution_is_solved_for_group_by_group(groups: int, outputs: int):
    torch.manual_seed(0)
    grouped = nn.Conv2d(8, outputs, 3, padding=1, groups=groups, bias=False)
    dense: Any = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), grouped).double()
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        pruned[0].weight.add_(0.3 * random(8, 3, 1, 1, seed=5).double())  # what it reads is no more what it was
    x = random(40, 3, 9, 8, seed=1).double()
    kept = CutLayers({"2": torch.arange(outputs)}, {})
    (found,) = compensate(dense, pruned, x, kept, layers=["2"], ridges=[1e-3])
    with torch.no_grad():
        own = patches_by_hand(F.relu(pruned[0](x)).numpy(), 3, 1, 1).reshape(-1, groups, 8 // groups * 9)
        y = dense(x).movedim(1, -1).flatten(0, 2).numpy()
        prior = grouped.weight.flatten(1).numpy()
    left = np.zeros(len(y))
    for group, rows in enumerate(np.arange(outputs).reshape(groups, -1)):
        seen, target = own[:, group], y[:, rows]
        expected = ridge_by_lstsq(target - target.mean(0), seen - seen.mean(0), prior[rows], 1e-3)
        bias = target.mean(0) - expected @ seen.mean(0)
        np.testing.assert_allclose(pruned[2].weight.detach().flatten(1).numpy()[rows], expected, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(pruned[2].bias.detach().numpy()[rows], bias, rtol=1e-7, atol=1e-9)
        left += ((target - seen @ expected.T - bias) ** 2).sum(1)
    assert found.after == pytest.approx(left.mean() / y.var(0).sum(), rel=1e-6) and found.after < found.before


def test_where_only_some_positions_are_looked_at_they_are_those_of_the_patches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(least_squares, "SAMPLES", 0)
    monkeypatch.setattr(least_squares, "SAMPLES_PER_CHANNEL", 8)
    torch.manual_seed(0)
    dense: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, stride=2)).eval()
    graph = trace_groups(dense, IMAGES[:2])
    copy_units(dense, graph)
    pruned, _ = cut_in(dense, IMAGES, first_half, graph).compensated(IMAGES)  # 6 of 225 positions of each image
    assert distance(pruned, dense, IMAGES) < 1e-8


def test_what_a_layer_should_make_may_be_a_map_from_the_dense_outputs():
    torch.manual_seed(0)
    dense: Any = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)).double()
    pruned = copy.deepcopy(dense)
    kept = torch.tensor([0, 3, 4, 7, 9])
    pruned[0], pruned[2] = nn.Linear(6, 5).double(), nn.Linear(5, 3).double()
    x, factor, offset = random(400, 6, seed=1).double(), random(3, 5, seed=2).double(), random(3, seed=3).double()
    with torch.no_grad():
        pruned[0].weight.copy_(dense[0].weight[kept])
        pruned[0].bias.copy_(dense[0].bias[kept])
        prior, own = pruned[2].weight.numpy().copy(), F.relu(pruned[0](x)).numpy()
        target = (dense(x) @ factor.T + offset).numpy()
    layers = CutLayers({"0": kept, "2": ChannelMap(factor, offset)}, {"2": kept})
    compensate(dense, pruned, x, layers, ridges=[1e-3])
    expected = ridge_by_lstsq(target - target.mean(0), own - own.mean(0), prior, 1e-3)
    np.testing.assert_allclose(pruned[2].weight.detach().numpy(), expected, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(pruned[2].bias.detach().numpy(), target.mean(0) - expected @ own.mean(0), atol=1e-8)


# Exactness


class ConvToLinear(nn.Module):
    """Convolutions with padding and stride, a flattened map, no norms; the activation is as given."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu, bias: bool = True) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 12, 3, padding=1, bias=bias)
        self.two = nn.Conv2d(12, 8, 3, stride=2, padding=1, bias=bias)
        self.fc, self.head = nn.Linear(8 * 16, 14, bias=bias), nn.Linear(14, 10, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.two(self.act(self.one(x))))
        return self.head(self.act(self.fc(F.adaptive_avg_pool2d(x, 4).flatten(1))))


COPIES: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 20), nn.GELU(), nn.Linear(20, 10)),
    "convolutions": ConvToLinear,
    "convolutions without biases": lambda: ConvToLinear(bias=False),
    "batch norms": BatchNormCnn,
    "resnet": BUILDERS["resnet"],
    "deit": BUILDERS["deit"],
    "convnext": BUILDERS["convnext"],
    "swin": BUILDERS["swin"],
}


@pytest.mark.parametrize("name", [pytest.param(key, marks=SLOW if key in ("swin", "resnet") else ()) for key in COPIES])
def test_a_network_whose_removed_units_are_copies_is_reproduced(name: str):
    torch.manual_seed(0)
    dense = randomized(COPIES[name]())
    graph = trace_groups(dense, IMAGES[:2])
    copy_units(dense, graph)
    subject = cut_in(dense, IMAGES, first_half, graph)
    assert distance(subject.pruned, dense, IMAGES) > 0.05
    convolutional = ("convolutions", "convolutions without biases", "batch norms", "convnext")
    images = MANY if name in convolutional else IMAGES  # more patches than the layer with most has weights
    pruned, report = subject.compensated(images)
    assert report and all(0 <= found.after < 1e-4 for found in report)
    assert distance(pruned, dense, images) < 1e-4
    assert distance(pruned, dense, random(32, 3, 32, 32, seed=9)) < 1e-3


@pytest.mark.parametrize("name", ["perceptron", "convolutions"])
def test_a_network_whose_removed_units_are_linear_in_kept_ones_is_reproduced(name: str):
    torch.manual_seed(0)
    dense: Any = (
        nn.Sequential(nn.Flatten(), nn.Linear(3072, 20), nn.Identity(), nn.Linear(20, 10))
        if name == "perceptron"
        else ConvToLinear(lambda x: x, bias=False)
    )
    with torch.no_grad():
        for seed, layer in enumerate([dense[1]] if name == "perceptron" else [dense.one, dense.two, dense.fc]):
            half = len(layer.weight) // 2
            layer.weight[half:] = torch.einsum("ij,j...->i...", random(half, half, seed=seed), layer.weight[:half])
    pruned, _ = cut_in(dense, IMAGES, first_half).compensated(MANY)
    assert distance(pruned, dense, MANY) < 1e-4


def dims_without_effect(model: Any) -> None:
    """Zeros in the second half of each head's queries, keys and values; copies in the stream."""
    with torch.no_grad():
        for block in model.blocks:
            for tensor in block.attn.qkv.parameters():
                tensor.view(3, 4, 12, -1)[:, :, 6:] = 0


def half_of_everything(group: CoupledGroup) -> tuple[int, ...]:
    half = group.section_size // 2
    return tuple(u for u in range(group.num_units) if u % group.section_size < half)


def attention_subject() -> Cut:
    torch.manual_seed(0)
    dense: Any = randomized(timm.create_model("vit_tiny_patch16_224", **VIT), 0.2)
    graph = trace_groups(dense, IMAGES[:2])
    dims_without_effect(dense)
    copy_units(dense, graph)
    return cut_in(dense, IMAGES, half_of_everything, graph)


def test_head_dims_that_say_nothing_and_a_stream_of_copies_are_reproduced():
    subject = attention_subject()
    assert len(subject.layers.query_keys) == 2
    pruned, _ = subject.compensated(IMAGES)
    assert distance(pruned, subject.dense, IMAGES) < 1e-4


@pytest.mark.parametrize("ridges", [(), RIDGES], ids=["mean shift", "least squares"])
def test_the_queries_keep_the_scale_that_the_cut_gave_them(ridges: tuple[float, ...]):
    """12 → 6 head dims multiply q by √½, in its mean as well as in its deviation; keys then need no correction."""
    subject = attention_subject()
    pruned, _ = subject.compensated(IMAGES, ridges=ridges)
    made: dict[str, Tensor] = {}
    for key, model in (("dense", subject.dense), ("pruned", pruned)):
        model.blocks[0].attn.qkv.register_forward_hook(lambda m, x, y, key=key: made.update({key: y.detach()}))
        model(IMAGES)
    rows = subject.layers.query_keys["blocks.0.attn.qkv"]
    kept = subject.layers.outputs["blocks.0.attn.qkv"]
    assert isinstance(kept, Tensor)
    dense = made["dense"][..., kept[rows.kept_query.flatten()]].mean((0, 1))
    found = made["pruned"][..., rows.kept_query.flatten()].mean((0, 1))
    torch.testing.assert_close(found, dense * math.sqrt(0.5), rtol=2e-2, atol=2e-2)


# Biases


def test_a_layer_without_a_bias_gains_one_unless_a_batch_norm_takes_it():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 6, 3, bias=False)
    tail = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False))
    dense: Any = randomized(nn.Sequential(first, nn.ReLU(), second, nn.BatchNorm2d(6), *tail), 0.3)
    x = random(60, 3, 12, 12, seed=1)
    subject = cut_in(dense, x, first_half)
    pruned, report = subject.compensated(x)
    assert [found.layer for found in report] == ["2", "5"]
    assert pruned[0].bias is None and pruned[2].bias is None
    # the norm's mean goes down by what the bias would add: E[y − W' x̃]
    with torch.no_grad():
        shift = (dense[:3](x)[:, :3] - pruned[:3](x)).mean((0, 2, 3))
        torch.testing.assert_close(pruned[3].running_mean, dense[3].running_mean[:3] - shift, rtol=1e-4, atol=1e-5)
        assert torch.equal(pruned[3].running_var, dense[3].running_var[:3]) and shift.abs().max() > 0.01
        torch.testing.assert_close(pruned(x).mean((0, 2, 3)), dense(x).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert pruned[5].bias.shape == (4,)  # there is none after it


# Never worse


@pytest.mark.parametrize("seed", range(8))
def test_a_linear_consumer_is_never_worse_off_than_with_the_mean_shift(seed: int):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 24, (4,), generator=generator).tolist()
    images = int(torch.randint(1, 60, (), generator=generator))
    torch.manual_seed(seed)
    dense = nn.Sequential(nn.Linear(sizes[0], 2 * sizes[1]), nn.ReLU(), nn.Linear(2 * sizes[1], sizes[3]))
    x = 5 * random(images, sizes[0], seed=seed)
    subject = cut_in(dense, x, first_half)
    solved, _ = subject.compensated(x)
    shifted, _ = subject.compensated(x, ridges=())
    errors = [(model(x) - dense(x)).square().mean().item() for model in (solved, shifted, subject.pruned)]
    assert all(math.isfinite(error) for error in errors)
    assert errors[0] <= errors[1] * (1 + 1e-4) + 1e-9 and errors[1] <= errors[2] * (1 + 1e-4) + 1e-9


class Differences(nn.Module):
    """The removed channel is the same all over an image; the kept one has noise; the filter takes differences."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.filter = nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 1, (1, 2), bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, 0.0]])[:, :, None, None])
            self.filter.weight.copy_(torch.tensor([[[[0.1, 0.1]], [[1.0, -1.0]]]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.filter(self.mix(x))


def test_a_convolution_is_never_worse_off_than_with_the_mean_shift():
    dense, x = Differences().eval(), random(64, 2, 12, 12)
    x[:, 0] = random(64, 1, 1, seed=1)
    subject = cut_in(dense, x, first_half)
    solved, shifted = (subject.compensated(x, **options)[0] for options in ({}, {"ridges": ()}))
    errors = [(model(x) - dense(x)).square().mean().item() for model in (solved, shifted)]
    assert errors[0] <= errors[1] * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_random_convolutional_nets_come_nearer(seed: int):
    torch.manual_seed(seed)
    dense = nn.Sequential(
        *(
            nn.Conv2d(3, 10, 3, padding=seed % 2),
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.Conv2d(10, 8, 3, stride=1 + seed % 2),
        ),
        *(
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 6, 1, bias=False),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 5),
        ),
    )
    x = random(60, 3, 12, 12, seed=seed)
    subject = cut_in(dense.eval(), x, first_half)
    solved, report = subject.compensated(x)
    assert all(0 <= found.after <= found.before for found in report) and len(report) == 3
    assert distance(solved, dense, x) < distance(subject.pruned, dense, x)


@pytest.mark.parametrize("images", [1, 2, 10])
@pytest.mark.parametrize("name", ["deit", "cnn"])
def test_few_images_break_nothing(name: str, images: int):
    torch.manual_seed(0)
    dense = randomized(BUILDERS[name]())
    subject = cut_in(dense, IMAGES, first_half)
    pruned, report = subject.compensated(IMAGES[:images])
    assert all(tensor.isfinite().all() for tensor in pruned.state_dict().values())
    if images > 1:
        assert all(-1e-6 <= found.after <= found.before * (1 + 1e-6) for found in report)


def test_dead_layers_break_nothing():
    dense: Any = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        dense[0].weight.zero_()  # constants from here on
        dense[2].bias.fill_(3.3)
    x = random(40, 4)
    pruned, _ = cut_in(dense, x, first_half).compensated(x)
    torch.testing.assert_close(pruned(x), dense(x))


def test_the_error_of_outputs_that_do_not_vary_is_a_share_all_the_same():
    torch.manual_seed(0)
    subject = cut_in(randomized(BUILDERS["deit"]()), IMAGES, first_half)
    _, report = subject.compensated(IMAGES[:1])  # of which the classifier sees one vector
    assert all(found.before >= 0 and 0 <= found.after < 1 for found in report)
    assert report[-1].layer == "head_dist" and report[-1].after < 1e-6  # the bias makes up for all of it


def test_what_differs_from_outputs_that_do_not_vary_is_a_share_of_their_size():
    """Units and their copies cancel out; what is left of them varies, until it is solved for."""
    torch.manual_seed(0)
    dense: Any = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    graph = trace_groups(dense, IMAGES[:2, 0, 0, :6])
    copy_units(dense, graph)
    with torch.no_grad():
        dense[2].weight[:, 4:] = -dense[2].weight[:, :4]
        dense[2].bias.fill_(3.0)
    x = random(400, 6)
    (found,) = cut_in(dense, x, first_half, graph).compensated(x)[1]
    with torch.no_grad():
        gone = F.linear(dense[1](dense[0](x))[:, 4:], dense[2].weight[:, 4:]).square().sum(1).mean().item()
    size = 3 * 3.0**2
    assert found.before == pytest.approx(gone / (1e-10 * size), rel=1e-3)
    assert 0 <= found.after < 1e-7 * found.before  # the products are float32


# What is left alone


class PartlySolvable(nn.Module):
    """A grouped convolution, one that runs twice, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.again, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.stem(x))))
        return self.last(self.again(F.relu(self.again(x)))).mean((2, 3))


def half_of_each_block(group: CoupledGroup) -> tuple[int, ...]:
    return tuple(u for u in range(group.num_units) if u % group.section_size < max(group.section_size // 2, 1))


def test_layers_that_run_twice_are_left_alone():
    torch.manual_seed(0)
    dense, x = PartlySolvable().eval(), IMAGES[:, :, :8, :8]
    subject = cut_in(dense, x, half_of_each_block)
    assert {"grouped", "again", "last"} <= {*subject.layers.outputs, *subject.layers.columns}
    assert solvable_layers(subject.pruned, x, subject.layers) == ["grouped", "last"]
    pruned, report = subject.compensated(x)
    assert [found.layer for found in report] == ["grouped", "last"]
    for name in ("stem", "again"):
        for tensor, plain in zip(
            pruned.get_submodule(name).parameters(), subject.pruned.get_submodule(name).parameters(), strict=True
        ):
            assert torch.equal(tensor, plain)
    assert not torch.equal(pruned.last.weight, subject.pruned.last.weight)


class Doubled(nn.Linear):
    """Makes something of its own of the weight that it stores."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


class Attends(nn.Module):
    """torch's attention reads the weight of its projection, and does not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))


ALONE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "conv1d": (lambda: nn.Conv1d(6, 6, 3), (6, 9), ""),
    "conv3d": (lambda: nn.Conv3d(6, 6, 3), (6, 5, 5, 5), ""),
    "transposed": (lambda: nn.ConvTranspose2d(6, 6, 3), (6, 5, 5), ""),
    "standardised": (lambda: StdConv2d(6, 6, 3), (6, 5, 5), ""),
    "parametrised": (normed, (6,), ""),
    "a forward of its own": (lambda: Doubled(6, 6), (6,), ""),
    "not called": (Attends, (5, 6), ".attention.out_proj"),
}
SOLVED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 6), (5, 6)),
    "timm's linear": (lambda: TimmLinear(6, 6), (6,)),
    "conv2d": (lambda: nn.Conv2d(6, 6, 3), (6, 5, 5)),
    "conv2d as TensorFlow pads": (lambda: Conv2dSame(6, 6, 3), (6, 5, 5)),
    "grouped": (lambda: nn.Conv2d(6, 6, 3, groups=2), (6, 5, 5)),
}


@pytest.mark.parametrize("name", [*ALONE, *SOLVED])
def test_only_linears_and_convolutions_that_use_what_they_store_are_solved_for(name: str):
    build, shape, *inner = {**ALONE, **SOLVED}[name]
    model = nn.Sequential(build())
    layer = "".join(["0", *inner])
    cut_layers = CutLayers({}, {layer: torch.arange(6)})
    assert solvable_layers(model, random(2, *shape), cut_layers) == ([layer] if name in SOLVED else [])
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_layers_between_convolutions_of_other_dims_are_solved_for():
    torch.manual_seed(0)
    dense: Any = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)
    )
    x = random(300, 3, 12)
    subject = cut_in(dense.eval(), x, first_half)
    pruned, report = subject.compensated(x)
    assert [found.layer for found in report] == ["5"] and report[0].after < report[0].before
    assert all(torch.equal(pruned[n].weight, subject.pruned[n].weight) for n in (0, 2))
    assert all(torch.equal(pruned[n].bias, subject.pruned[n].bias) for n in (0, 2))


def test_a_weight_that_two_layers_share_is_left_alone():
    torch.manual_seed(0)
    dense, x = TiedCnn().eval(), IMAGES[:, :, :8, :8]
    subject = cut_in(dense, x, first_half)
    pruned, _ = subject.compensated(x)
    assert torch.equal(pruned.one.weight, subject.pruned.one.weight)


def test_a_convolution_that_standardises_its_weight_is_left_alone():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), StdConv2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    x = IMAGES[:, :, :8, :8]
    subject = cut_in(dense.eval(), x, lambda g: first_half(g) if g.name.startswith("0") else tuple(range(g.num_units)))
    pruned, _ = subject.compensated(x)
    assert torch.equal(pruned[2].weight, subject.pruned[2].weight) and subject.pruned[2].weight.shape == (8, 8, 3, 3)


def test_the_dense_model_and_the_modes_are_untouched_and_runs_repeat():
    torch.manual_seed(0)
    subject = cut_in(randomized(BUILDERS["deit"]()), IMAGES, half_of_everything)
    before = copy.deepcopy(subject.dense.state_dict())
    subject.dense.train()
    subject.pruned.train()
    first, report = subject.compensated(IMAGES[:16])
    second, again = subject.compensated(IMAGES[:16])
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.dense.state_dict().items())
    assert subject.dense.training and first.training and report == again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not [m for m in (*subject.dense.modules(), *first.modules()) if m._forward_hooks or m._forward_pre_hooks]


# Two processes: the halves of each one's images are a half of the halves of all


def solved_by(images: Tensor) -> list[float]:
    """Sums and a few values of each weight of a model that was compensated with these images."""
    torch.manual_seed(0)
    subject = cut_in(randomized(BUILDERS["deit"](), 0.2), IMAGES, half_of_everything)
    pruned, report = subject.compensated(images)
    values = [value for parameter in pruned.parameters() for value in parameter.detach().flatten()[:50].tolist()]
    return values + [number for found in report for number in (found.before, found.after)]


def one_process() -> list[float]:
    return solved_by(IMAGES)


def its_share() -> list[float]:
    """Unequal shares: 28 images and 20."""
    distributed.init("cpu")
    mine = [[*range(14), *range(24, 38)], [*range(14, 24), *range(38, 48)]][distributed.rank()]
    values = solved_by(IMAGES[mine])
    distributed.shutdown()
    return values


@pytest.mark.slow
def test_two_processes_find_what_one_finds():
    outcomes = run_together(__name__, {"one_process": 1, "its_share": 2})
    found: list[Outcome] = [*outcomes["one_process"], *outcomes["its_share"]]
    assert [outcome.status for outcome in found] == [0, 0, 0], [outcome.err for outcome in found]
    one, left, right = (torch.tensor(outcome.value, dtype=torch.float64) for outcome in found)
    assert torch.equal(left, right)
    torch.testing.assert_close(left, one, rtol=1e-5, atol=1e-5)
