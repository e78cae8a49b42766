"""Batch norms fold into layers and come out again without a change of function; new statistics are those of data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn

from isomorphic.processes import distributed
from isomorphic.pruning.recovery.batch_norm import absorb_biases, fold, follow, recalibrate, unfold
from tests.processes import Outcome, run_together_once

CPU = torch.device("cpu")
IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def statistics(norm: Any) -> tuple[Tensor, Tensor]:
    return norm.running_mean, norm.running_var


def settle(model: Any, smallest_variance: float = 0.3) -> Any:
    """Statistics and affine maps as after a training, some γ negative and one zero; in eval mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                shape = (module.num_features,)
                statistics(module)[0].copy_(torch.randn(shape, generator=generator))
                statistics(module)[1].copy_(smallest_variance * (1 + torch.rand(shape, generator=generator)))
                if module.affine:
                    module.weight.copy_(0.5 + torch.randn(shape, generator=generator))
                    module.weight[0] = 0.0
                    module.bias.copy_(torch.randn(shape, generator=generator))
    return model.eval()


def cnn(bias: bool, **options: Any) -> nn.Sequential:
    """Dense, grouped, depthwise, one-dimensional: all kinds of layers that a batch norm may follow."""
    torch.manual_seed(2)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8, **options), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=8, bias=bias), BatchNormAct2d(8, **options)),
        *(nn.Conv2d(8, 12, 3, groups=4, bias=bias), nn.BatchNorm2d(12, **options), nn.ReLU(inplace=True)),
        *(nn.Conv2d(12, 6, 1, bias=bias), nn.BatchNorm2d(6, affine=False, **options), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(6 * 36, 10, bias=bias), nn.BatchNorm1d(10, **options), nn.ReLU(), nn.Linear(10, 5)),
    )


ALL_PAIRS = {"0": "1", "3": "4", "5": "6", "8": "9", "12": "13"}


def difference(model: nn.Module, expected: Tensor, images: Tensor = IMAGES) -> float:
    """The largest, as a share of the outputs' spread."""
    with torch.no_grad():
        return ((model(images) - expected).abs().max() / expected.std()).item()


class PreActivation(nn.Module):
    """The stem's output is normalised, and also added: to fold would change what is added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.conv(F.relu(self.norm(x)))


class Returned(nn.Module):
    """What the batch norm reads is an output, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        return self.norm(x), x


class Twice(nn.Module):
    """One layer with two batch norms, and one batch norm behind two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.left, self.right, self.shared = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.again(self.one(self.again(x))))
        return self.shared(self.left(x)) + self.shared(self.right(x))


def tied() -> nn.Module:
    one, two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    two.weight = one.weight
    return nn.Sequential(one, nn.BatchNorm2d(3), two, nn.BatchNorm2d(3))


@pytest.mark.parametrize("bias", [False, True])
def test_batch_norms_of_all_kinds_of_layers_are_found(bias: bool):
    assert follow(cnn(bias), IMAGES) == ALL_PAIRS


@pytest.mark.parametrize(
    "model",
    [
        PreActivation(),
        Returned(),
        Twice(),
        tied(),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(4)),  # the same tensor, not its values
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        nn.Sequential(nn.ConvTranspose2d(3, 4, 1), nn.BatchNorm2d(4)),
        nn.Sequential(StdConv2d(3, 4, 1), nn.BatchNorm2d(4)),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Flatten(2), nn.Linear(144, 7), nn.BatchNorm1d(3)),  # normalises positions, not features
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_what_would_not_fold_exactly_is_left_out(model: nn.Module):
    assert follow(model, IMAGES) == {}


def test_following_leaves_the_model_as_it_was():
    model = cnn(bias=True).train()
    model[4].eval()
    before = copy.deepcopy(model.state_dict())
    follow(model, IMAGES)
    assert [module.training for module in model[:6]] == [True, True, True, True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model[0]._forward_hooks and not model[1]._forward_pre_hooks


def test_a_published_network_pairs_every_batch_norm():
    model = timm.create_model("resnet18").eval()
    pairs = follow(model, torch.randn(1, 3, 64, 64))
    assert len(pairs) == 20 and pairs["layer2.0.downsample.0"] == "layer2.0.downsample.1"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smallest_variance", [0.3, 1e-7])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_a_fold_keeps_the_function(bias: bool, smallest_variance: float, eps: float):
    model = settle(cnn(bias, eps=eps), smallest_variance)
    expected = model(IMAGES).detach()
    fold(model, ALL_PAIRS)
    assert difference(model, expected) < 5e-6
    weights = [module.weight for name, module in model.named_children() if name in ALL_PAIRS]
    assert all(model.get_submodule(name).bias is not None for name in ALL_PAIRS)
    bypassed = copy.deepcopy(model)
    bypassed[1] = bypassed[6] = bypassed[9] = bypassed[13] = nn.Identity()  # what they are now
    assert difference(bypassed, expected) < 5e-6 and all(weight.isfinite().all() for weight in weights)


def test_a_fold_is_the_published_equation():
    model = settle(nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)))
    conv, norm = model
    with torch.no_grad():
        norm.weight[0] = -1.5
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight, bias = conv.weight * scale[:, None, None, None], (conv.bias - norm.running_mean) * scale + norm.bias
    fold(model, {"0": "1"})
    torch.testing.assert_close(conv.weight, weight)
    torch.testing.assert_close(conv.bias, bias)
    assert norm.running_mean.tolist() == norm.bias.tolist() == [0, 0] and norm.weight.tolist() == [1, 1]
    torch.testing.assert_close(norm.running_var + norm.eps, torch.ones(2))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_folded_comes_out_again(bias: bool, dtype: torch.dtype):
    model = settle(cnn(bias)).to(dtype)
    dense, expected = copy.deepcopy(model), model(IMAGES.to(dtype)).detach()
    unfold(model, ALL_PAIRS, fold(model, ALL_PAIRS))
    tolerance = 5e-6 if dtype == torch.float32 else 1e-13
    assert difference(model, expected, IMAGES.to(dtype)) < tolerance
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in dense.named_parameters()}
    for name, norm in ALL_PAIRS.items():
        old, new = dense.get_submodule(name), model.get_submodule(name)
        alive = slice(0 if name == "8" else 1, None)  # unit 0 had γ = 0, which takes its weights along
        torch.testing.assert_close(new.weight[alive], old.weight[alive])
        torch.testing.assert_close(
            model.get_submodule(norm).running_mean[alive], dense.get_submodule(norm).running_mean[alive]
        )
        torch.testing.assert_close(model.get_submodule(norm).running_var, dense.get_submodule(norm).running_var)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_recalibrating_what_came_out_on_the_data_of_its_statistics_changes_nothing():
    model, batches = settle(cnn(bias=False)), [(IMAGES, torch.zeros(4))]
    with torch.no_grad():
        model[1].weight[0] = model[4].weight[0] = model[6].weight[0] = model[13].weight[0] = 0.5
    recalibrate(model, batches, CPU)
    expected = model(IMAGES).detach()
    unfold(model, ALL_PAIRS, fold(model, ALL_PAIRS))
    recalibrate(model, batches, CPU)
    assert difference(model, expected) < 1e-4


def test_gained_biases_move_into_the_batch_norm():
    model = settle(cnn(bias=False))
    for name in ("0", "12", "15"):
        layer = model.get_submodule(name)
        layer.bias = nn.Parameter(torch.randn(len(layer.weight)))
    expected = model(IMAGES).detach()
    assert absorb_biases(model, ALL_PAIRS, ["0", "12", "15"]) == ["0", "12"]
    assert model[0].bias is None and model[12].bias is None and model[15].bias is not None
    assert difference(model, expected) < 5e-6


def test_recalibration_is_torchs_cumulative_average():
    model = settle(cnn(bias=True)).train()
    model[2].eval()
    batches = [(IMAGES + shift, torch.zeros(4)) for shift in range(3)]
    expected = copy.deepcopy(model).eval()
    for module in expected.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train().reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for images, _ in batches:
            expected(images)
    assert recalibrate(model, batches, CPU) == 5
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)
    assert [module.training for module in model[:4]] == [True, True, False, True]
    assert {module.momentum for module in model.modules() if hasattr(module, "momentum")} == {0.1}


def test_dropout_stays_off_while_recalibrating():
    norm: Any = BatchNormAct2d(3, drop_layer=nn.Dropout)
    norm.drop.p, last = 1.0, nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.Dropout(1.0), last)
    recalibrate(model.train(), [(IMAGES, torch.zeros(4))], CPU)
    assert statistics(last)[0].min() > 0.1  # what ReLU gives of the first batch norm's output


def test_batches_without_a_variance_are_passed_over():
    model = settle(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(576, 2), nn.BatchNorm1d(2))
    )
    one, four = (IMAGES[:1], torch.zeros(1)), (IMAGES, torch.zeros(4))
    other = copy.deepcopy(model)
    assert recalibrate(model, [one, four, one], CPU) == recalibrate(other, [four], CPU) == 2
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize("batches", [[], [(IMAGES[:1], torch.zeros(1))]])
def test_without_a_usable_batch_nothing_changes(batches: list):
    model = settle(cnn(bias=False))
    before = copy.deepcopy(model.state_dict())
    assert recalibrate(model, batches, CPU) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert recalibrate(nn.Linear(3, 3), [(torch.zeros(2, 3), torch.zeros(2))], CPU) == 0


def everything_of(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    count = recalibrate(model, batches, CPU)
    return {"count": [count], **{name: buffer.flatten().tolist() for name, buffer in model.named_buffers()}}


def three_batches() -> list[tuple[Tensor, Tensor]]:
    return [(IMAGES * scale + scale**2, torch.zeros(4)) for scale in range(1, 4)]


def shared_batches() -> dict[str, list[float]]:
    """The first process has two batches and one without a variance, the second has one."""
    distributed.init("cpu")
    mine = (
        [three_batches()[1]]
        if distributed.rank()
        else [three_batches()[0], (IMAGES[:1], torch.zeros(1)), three_batches()[2]]
    )
    return everything_of(settle(cnn(bias=False)), mine)


def one_without_batches() -> dict[str, list[float]]:
    distributed.init("cpu")
    return everything_of(settle(cnn(bias=False)), [] if distributed.rank() else three_batches())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Of both scenarios, in two processes each."""
    scenarios = {"shared_batches": 2, "one_without_batches": 2}
    return run_together_once(tmp_path_factory, "tests.unit.pruning.recovery.test_batch_norm", scenarios)


@pytest.mark.parametrize("scenario", ["shared_batches", "one_without_batches"])
def test_two_processes_average_over_all_batches(scenario: str, outcomes: dict[str, list[Outcome]]):
    alone = everything_of(settle(cnn(bias=False)), three_batches())
    for outcome in outcomes[scenario]:
        assert outcome.status == 0, outcome.err
        assert outcome.value == {name: pytest.approx(values, rel=1e-5, abs=1e-6) for name, values in alone.items()}
