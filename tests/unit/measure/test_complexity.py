"""Both MAC counters: golden numbers of the published tables, the libraries' own counts, and good manners."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis
from timm.layers.attention import Attention
from timm.layers.norm import LayerNorm2d
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.std_conv import StdConv2d
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torch_pruning.utils import count_ops_and_params

from isomorphic.measure.complexity import Complexity, count_complexity, format_macs, format_params
from isomorphic.measure.exact_counter import FunctionCounter
from isomorphic.measure.meta_outputs import META_OUTPUTS, call_for_shapes
from tests.versions import IS_NEWEST_TIMM, IS_NEWEST_TORCH


def on_meta(name: str, builder: str = "timm", **kwargs: Any) -> Any:
    """A model without weights: built in no time, counted in milliseconds."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs) if builder == "timm" else torchvision.models.get_model(name, **kwargs)


def image(size: int = 224, device: str = "meta") -> Tensor:
    return torch.randn(1, 3, size, size, device=device)


def products(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FunctionCounter() as counter:
        model.eval()(x)
    return counter.products


# --- golden numbers ---------------------------------------------------------------------------------------

PUBLISHED = [
    ("timm", "deit_base_distilled_patch16_224", 17_686_681_616, 87_338_192, "17.69 G", "87.34 M"),
    ("timm", "deit_small_distilled_patch16_224", 4_639_076_336, 22_436_432, "4.64 G", "22.44 M"),
    ("timm", "deit_tiny_distilled_patch16_224", 1_268_472_800, 5_910_800, "1.27 G", "5.91 M"),
    ("timm", "convnext_base", 15_360_289_896, 88_591_464, "15.36 G", "88.59 M"),
    ("timm", "resnet50", 4_121_925_096, 25_557_032, "4.12 G", "25.56 M"),
    ("timm", "resnet101", 7_849_500_136, 44_549_160, "7.85 G", "44.55 M"),
    ("timm", "resnet152", 11_580_687_848, 60_192_808, "11.58 G", "60.19 M"),
    ("torchvision", "mobilenet_v2", 320_237_288, 3_504_872, "0.32 G", "3.50 M"),
    ("timm", "swin_base_patch4_window7_224", 15_478_922_920, 87_768_224, "15.48 G", "87.77 M"),
]


@pytest.mark.parametrize(("builder", "name", "macs", "params", "giga", "mega"), PUBLISHED)
def test_published_models(builder, name, macs, params, giga, mega):
    counted = count_complexity(on_meta(name, builder), image())
    assert (counted.macs_paper, counted.params) == (macs, params)
    assert (format_macs(counted.macs_paper), format_params(counted.params)) == (giga, mega)


@pytest.mark.parametrize(
    "name", ["deit_base_distilled_patch16_224", "swin_tiny_patch4_window7_224", "resnet50", "vit_b_16"]
)
def test_counters_agree_to_the_unit_on_dense_models(name):
    counted = count_complexity(on_meta(name, "torchvision" if name == "vit_b_16" else "timm"), image())
    assert counted.macs_exact == counted.macs_paper


def test_exact_counts_the_norms_and_activations_that_the_convnext_table_left_out():
    counted = count_complexity(on_meta("convnext_base"), image())
    maps = [128 * 56**2, 256 * 28**2, 512 * 14**2, 1024 * 7**2]  # a stage's elements
    outside_blocks = 2 * (maps[0] + sum(maps[:3]) + 1024)  # stem, downsampling, head
    in_blocks = (2 + 4) * sum(depth * elements for depth, elements in zip((3, 3, 27, 3), maps, strict=True))
    assert counted.macs_exact - counted.macs_paper == outside_blocks + in_blocks


# --- pruned shapes, with the numbers that torch-pruning printed for them in 2024 --------------------------


def cut_attention(attention, heads: int, head_dim: int) -> None:
    """What surgery does to a timm attention block."""
    width = attention.qkv.in_features
    attention.num_heads, attention.head_dim, attention.attn_dim = heads, head_dim, heads * head_dim
    attention.scale = head_dim**-0.5
    attention.qkv = nn.Linear(width, 3 * heads * head_dim, device=attention.qkv.weight.device)
    attention.proj = nn.Linear(heads * head_dim, width, device=attention.qkv.weight.device)


def cut_mlp(mlp, hidden: int) -> None:
    width, device = mlp.fc1.in_features, mlp.fc1.weight.device
    mlp.fc1, mlp.fc2 = nn.Linear(width, hidden, device=device), nn.Linear(hidden, width, device=device)


def cut_blocks(blocks, shapes: list[tuple[int, int, int]]) -> None:
    for block, (heads, head_dim, hidden) in zip(blocks, shapes, strict=True):
        cut_attention(block.attn, heads, head_dim)
        cut_mlp(block.mlp, hidden)


def deit_0_6g() -> Any:
    """The shape of a pruned DeiT-Tiny: heads, head dims and hidden widths differ from block to block."""
    model = on_meta("deit_tiny_distilled_patch16_224", embed_dim=144)
    hidden = [582, 574, 566, 572, 566, 572, 600, 552, 568, 588, 580, 590]
    head_dims = [50, 48, 48, 48, 42, 40, 44, 42, 42, 38, 44, 42]
    cut_blocks(model.blocks, list(zip([2] * 7 + [3, 1, 2, 2, 3], head_dims, hidden, strict=True)))
    return model


def tiny_deit() -> Any:
    kwargs: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 4,
        "num_classes": 10,
    }
    model = on_meta("deit_tiny_distilled_patch16_224", **kwargs)
    cut_blocks(model.blocks, [(2, 6, 132), (3, 8, 138), (3, 10, 130)])
    return model


def tiny_swin() -> Any:
    kwargs: dict[str, Any] = {"img_size": 56, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10}
    model = on_meta("swin_tiny_patch4_window7_224", embed_dim=10, **kwargs)
    wider = on_meta("swin_tiny_patch4_window7_224", embed_dim=11, **kwargs)  # whose second stage has width 22
    model.layers[1], model.norm, model.head = wider.layers[1], wider.norm, wider.head
    merging = model.layers[1].downsample
    merging.norm = nn.LayerNorm(40, device="meta")
    merging.reduction = nn.Linear(40, 22, bias=False, device="meta")
    cut_blocks(model.layers[0].blocks, [(2, 4, 40), (2, 4, 38)])
    cut_blocks(model.layers[1].blocks, [(4, 6, 92), (4, 4, 96)])
    return model


def tiny_convnext() -> nn.Module:
    with torch.device("meta"):
        model: Any = ConvNeXt(depths=(1, 1, 2, 1), dims=(12, 18, 24, 36), num_classes=10)
    blocks = [block for stage in model.stages for block in stage.blocks]
    for block, hidden in zip(blocks, [44, 66, 94, 96, 154], strict=True):
        cut_mlp(block.mlp, hidden)
    return model


@pytest.mark.parametrize(
    ("build", "size", "expected"),
    [
        (deit_0_6g, 224, Complexity(621_875_178, 632_341_062, 3_072_924)),
        (tiny_deit, 32, Complexity(770_544, 779_940, 42_762)),
        (tiny_swin, 56, Complexity(1_781_416, 1_791_020, 18_582)),
        (tiny_convnext, 64, Complexity(1_119_530, 1_164_378, 37_538)),
    ],
)
def test_pruned_models(build, size, expected):
    assert count_complexity(build(), image(size)) == expected


def test_a_cut_attention_block_is_charged_a_square_projection_on_paper_and_the_true_one_exactly():
    length, width, heads, head_dim = 17, 48, 3, 5
    attention = Attention(width, num_heads=4, qkv_bias=True)
    cut_attention(attention, heads, head_dim)
    counted = count_complexity(attention, torch.randn(1, length, width))
    inner = heads * head_dim
    inside = length * inner + 3 * length * inner * (width + 1) + 2 * length**2 * inner + heads * length**2
    assert counted.macs_paper == inside + length * inner * (inner + 1)
    assert counted.macs_exact == inside + length * width * (inner + 1)


def test_nothing_inside_an_attention_block_is_counted_on_paper():
    plain = Attention(48, num_heads=4)
    gate = {"gated": True} if IS_NEWEST_TIMM else {}
    normed = Attention(48, num_heads=4, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm, **gate)
    x = torch.randn(1, 17, 48)
    assert count_complexity(plain, x).macs_paper == count_complexity(normed, x).macs_paper
    inside = 3 * 2 * 17 * 48 + (17 * 48 * 48 if gate else 0)  # the norms of q, k and the output, and the gate
    assert count_complexity(normed, x).macs_exact - count_complexity(plain, x).macs_exact == inside


def test_window_attention_is_charged_once_per_window():
    window = on_meta("swin_tiny_patch4_window7_224").layers[0].blocks[0].attn
    one = count_complexity(window, torch.randn(1, 49, 96, device="meta"))
    two = FunctionCounter()
    with torch.no_grad(), two:
        window(torch.randn(2, 49, 96, device="meta"))
    formula = 49 * 96 + 3 * 49 * 96 * 97 + 2 * 49**2 * 96 + 3 * 49**2 + 49 * 96 * 97
    assert one.macs_paper == one.macs_exact == formula
    assert two.products == 2 * products(window, torch.randn(1, 49, 96, device="meta"))


# --- the paper's counter against torch-pruning's ----------------------------------------------------------

VECTOR, PLANE, VOLUME = (1, 6, 16), (1, 6, 8, 8), (1, 6, 4, 4, 4)
SAME_AS_THE_LIBRARY = [
    (nn.Conv1d(6, 8, 3, stride=2), VECTOR),
    (nn.Conv2d(6, 9, 3, padding=1, groups=3), PLANE),
    (nn.Conv2d(6, 9, (1, 5), bias=False), PLANE),
    (nn.Conv3d(6, 4, 2), VOLUME),
    (nn.ConvTranspose1d(6, 4, 3), VECTOR),
    (nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), PLANE),
    (nn.ConvTranspose3d(6, 4, 2, bias=False), VOLUME),
    (nn.Linear(16, 5), VECTOR),
    (nn.Linear(8, 5, bias=False), PLANE),
    (nn.BatchNorm1d(6), VECTOR),
    (nn.BatchNorm2d(6, affine=False), PLANE),
    (nn.BatchNorm3d(6), VOLUME),
    (nn.InstanceNorm1d(6), VECTOR),
    (nn.InstanceNorm2d(6, affine=True), PLANE),
    (nn.GroupNorm(2, 6), PLANE),
    (nn.LayerNorm(16), VECTOR),
    (nn.LayerNorm(16, elementwise_affine=False), VECTOR),
    (nn.ReLU(), PLANE),
    (nn.ReLU6(), PLANE),
    (nn.LeakyReLU(), PLANE),
    (nn.PReLU(), PLANE),
    (nn.ELU(), PLANE),
    (nn.GELU(), PLANE),
    (nn.Upsample(scale_factor=2), PLANE),
    (nn.MaxPool1d(2), VECTOR),
    (nn.MaxPool2d(2), PLANE),
    (nn.AvgPool2d(2), PLANE),
    (nn.AvgPool3d(2), VOLUME),
    (nn.AdaptiveAvgPool2d(1), PLANE),
    (nn.AdaptiveMaxPool2d(2), PLANE),
    (nn.RNN(16, 5, batch_first=True), VECTOR),
    (nn.GRU(16, 5, num_layers=2, bias=False, batch_first=True), VECTOR),
    (nn.LSTM(16, 5, num_layers=2, bidirectional=True, batch_first=True), VECTOR),
    (nn.RNNCell(16, 5), (1, 16)),
    (nn.GRUCell(16, 5), (1, 16)),
    (nn.LSTMCell(16, 5, bias=False), (1, 16)),
    (nn.Sequential(nn.SiLU(), nn.Softmax(-1), nn.Dropout(), nn.Identity(), nn.Sigmoid()), VECTOR),
]


@pytest.mark.parametrize(("layer", "shape"), SAME_AS_THE_LIBRARY, ids=lambda value: type(value).__name__)
def test_layers_count_as_the_library_counts_them(layer, shape):
    x = torch.randn(shape)
    macs, params, *_ = count_ops_and_params(layer, x)
    counted = count_complexity(layer, x)
    assert (counted.macs_paper, counted.params) == (macs, params)
    assert type(counted.macs_paper) is type(counted.macs_exact) is int


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"kdim": 12, "vdim": 6}])
def test_multihead_attention_counts_as_the_library_counts_it(batch_first, kwargs):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **kwargs)
    query, key, value = ((1, 5, 8), (1, 7, attention.kdim), (1, 7, attention.vdim))
    inputs = tuple(torch.randn(shape if batch_first else (shape[1], 1, shape[2])) for shape in (query, key, value))
    # the library divides by the first input's length along dim 0, whatever that dim is
    expected = count_ops_and_params(attention, inputs)[0] * len(inputs[0])
    assert count_complexity(Wrapped(attention), (torch.empty(1), *inputs)).macs_paper == expected


class Wrapped(nn.Module):
    """Passes all but the first input on: a batch of one, whatever the others' dim 0 means."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Tensor, *inputs: Tensor):
        return self.inner(*inputs)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (LayerNorm2d(6), 2 * 6 * 64),
        (BatchNormAct2d(6), 2 * 6 * 64 + 6 * 64),  # the norm and its ReLU
        (StdConv2d(6, 4, 3, padding=1, bias=False), 6 * 4 * 9 * 64),
    ],
    ids=lambda value: type(value).__name__,
)
def test_subclasses_count_as_their_parents(layer, expected):
    assert count_ops_and_params(layer, torch.randn(PLANE))[0] != expected  # the library goes by the exact type
    assert count_complexity(layer, torch.randn(PLANE)).macs_paper == expected


# --- the exact counter against PyTorch's and fvcore's -----------------------------------------------------


@pytest.fixture
def no_fast_path() -> Iterator[None]:
    """nn.MultiheadAttention's fused inference path hides its products from PyTorch's own counter."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    ("builder", "name"),
    [
        ("timm", "vit_tiny_patch16_224"),
        ("timm", "beit_base_patch16_224"),  # F.scaled_dot_product_attention with a bias
        ("timm", "swin_tiny_patch4_window7_224"),
        ("timm", "convnext_atto"),
        ("timm", "mobilevit_xxs"),
        ("torchvision", "swin_t"),  # attention written with bare functions
        ("torchvision", "vit_b_16"),  # nn.MultiheadAttention
    ],
)
def test_products_are_half_of_what_torch_counts(builder, name, no_fast_path):
    model, x = on_meta(name, builder).eval(), image(256 if name == "mobilevit_xxs" else 224)
    with torch.no_grad(), FlopCounterMode(display=False) as torch_counter:
        model(x)
    assert 2 * products(model, x) == torch_counter.get_total_flops() > 0


def test_pruned_products_are_half_of_what_torch_counts():
    model = deit_0_6g().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as torch_counter:
        model(image())
    assert 2 * products(model, image()) == torch_counter.get_total_flops() > 0


class Functional(nn.Module):
    """Products by every spelling, (1, 4, 6) with itself."""

    def forward(self, x: Tensor):
        y = x.mT
        square = x.new_zeros(1, 4, 4)
        return (
            (x @ y, torch.matmul(x, y), x.matmul(y), torch.bmm(x, y), x.bmm(y), torch.mm(x[0], y[0]), x[0].mm(y[0])),
            (torch.addmm(square[0], x[0], y[0]), square[0].addmm(x[0], y[0]), torch.baddbmm(square, x, y)),
            (torch.einsum("bij,bkj->bik", x, x), torch.tensordot(x[0], y[0], dims=1)),
            (F.linear(x, x[0]), F.linear(input=x, weight=x[0])),
        )


def test_every_spelling_of_a_product_is_counted():
    counted = count_complexity(Functional(), torch.randn(1, 4, 6))
    assert (counted.macs_paper, counted.macs_exact) == (0, 14 * 4 * 4 * 6)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_fused_and_written_out_attention_cost_the_same(name):
    def counted(fused: bool) -> Complexity:
        model = on_meta(name)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        return count_complexity(model, image())

    assert counted(True) == counted(False)


def test_recurrent_layers_charge_every_weight_once_per_step():
    lstm = nn.LSTM(16, 5, num_layers=2, bidirectional=True, batch_first=True)
    weights = sum(parameter.numel() for parameter in lstm.parameters())
    assert count_complexity(lstm, torch.randn(1, 7, 16)).macs_exact == 7 * weights
    cell = nn.GRUCell(16, 5, bias=False)
    assert count_complexity(cell, torch.randn(1, 16)).macs_exact == sum(p.numel() for p in cell.parameters())


def test_transposed_convolution_counts_input_positions():
    layer = nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False)
    counted = count_complexity(layer, torch.randn(PLANE))
    assert (counted.macs_exact, counted.macs_paper) == (64 * 6 * 4 * 4, 256 * 6 * 4 * 4)


def attention_macs(inputs, outputs) -> int:
    (batch, heads, length, head_dim), (_, _, keys, _) = (value.type().sizes() for value in inputs[:2])
    return 2 * batch * heads * length * keys * head_dim


def test_fvcore_agrees_on_deit_base():
    model = on_meta("deit_base_distilled_patch16_224").eval().to_empty(device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: Python numbers in timm's shape checks
        analysis = FlopCountAnalysis(model, image(device="cpu")).unsupported_ops_warnings(False)
        assert format_macs(analysis.total()) == "16.95 G"  # no fused attention
        analysis.set_op_handle("aten::scaled_dot_product_attention", attention_macs)
        assert format_macs(analysis.total()) == "17.68 G"
        by_operator = analysis.by_operator()
    layer_norm = by_operator.pop("layer_norm")
    assert sum(by_operator.values()) == products(on_meta("deit_base_distilled_patch16_224"), image())
    assert layer_norm == 5 * 25 * 198 * 768  # fvcore's price for a norm


# --- manners ----------------------------------------------------------------------------------------------

SMALL = [
    ("timm", "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}),
    ("timm", "swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}),
    ("timm", "convnext_atto", {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}),
    ("timm", "convnextv2_atto", {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48)}),
    ("timm", "resnet18", {}),
    ("torchvision", "mobilenet_v2", {"width_mult": 0.25}),
]


def small(builder: str, name: str, kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs) if builder == "timm" else torchvision.models.get_model(name, **kwargs)
    return model, image(kwargs.get("img_size", 64), "cpu")


@pytest.mark.parametrize(("builder", "name", "kwargs"), SMALL, ids=[name for _, name, _ in SMALL])
def test_meta_and_cpu_count_the_same(builder, name, kwargs):
    model, x = small(builder, name, kwargs)
    assert count_complexity(model, x) == count_complexity(copy.deepcopy(model).to("meta"), x.to("meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_cpu_count_the_same():
    for model, x in (small(*case) for case in SMALL):
        assert count_complexity(model, x) == count_complexity(copy.deepcopy(model).cuda(), x.cuda())


@pytest.mark.parametrize(("builder", "name", "kwargs"), SMALL, ids=[name for _, name, _ in SMALL])
def test_a_batch_counts_as_one_image(builder, name, kwargs):
    model, x = small(builder, name, kwargs)
    assert count_complexity(model, x.repeat(3, 1, 1, 1)) == count_complexity(model, (x,))


def test_counting_leaves_the_model_as_it_was():
    model, x = small(*SMALL[4])
    model.train()
    model.layer1.eval()  # frozen, as a finetuning script may have it
    training = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    count_complexity(model, x)
    assert {name: module.training for name, module in model.named_modules()} == training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_go_and_flags_return_when_the_forward_fails():
    model, _ = small(*SMALL[4])
    with pytest.raises(RuntimeError, match="expected input"):
        count_complexity(model, torch.randn(1, 5, 64, 64))
    assert model.training and model.layer1.training
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.overrides._get_current_function_mode_stack() == []


class Twice(nn.Module):
    """One linear layer called twice, its weight shared with a second layer; inputs by position and keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor, times: int, y: Tensor):
        for _ in range(times):
            x = self.first(input=x)
        return self.tied(x + y)


def test_each_call_counts_and_shared_parameters_count_once():
    counted = count_complexity(Twice(), (torch.randn(2, 4), 2, torch.randn(2, 4)))
    assert counted == Complexity(3 * (16 + 4), 3 * (16 + 4), 16 + 4 + 4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(16, 4), (1, 6)), (nn.LayerNorm(16), (1, 6)), (nn.BatchNorm2d(16), (1, 6, 8, 8))],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_that_does_not_fit_its_input_fails_on_every_device(layer, shape, device):
    with pytest.raises(RuntimeError):
        count_complexity(copy.deepcopy(layer).to(device), torch.randn(shape, device=device))


def strided(*shape: int) -> Tensor:
    """Channels last in memory, as timm's permutes leave a feature map."""
    return torch.randn(*shape).to(memory_format=torch.channels_last)


ONES = torch.ones(6)
aten = torch.ops.aten
MAPS = [torch.randn(2, 6, 4, 5), strided(2, 6, 4, 5), torch.randn(2, 6, 5, 4).transpose(2, 3)]
ACTIVATIONS = ["relu", "hardtanh", "elu", "leaky_relu", "celu", "selu", "hardswish", "hardsigmoid", "mish", "softplus"]
IN_PLACE = ["hardtanh", "elu", "leaky_relu", "celu", "selu", "hardswish", "hardsigmoid", "mish", "sigmoid"]
META_CALLS = [
    (aten.linear.default, (torch.randn(2, 6), torch.randn(3, 6)), {}),
    (aten.layer_norm.default, (torch.randn(2, 4, 6), [6], ONES, ONES, 1e-5, True), {}),
    (aten.batch_norm.default, (strided(2, 6, 4, 5), ONES, ONES, ONES, ONES, False, 0.1, 1e-5, True), {}),
    (aten.batch_norm.default, (strided(2, 6, 4, 5), None, None, None, None, True, 0.1, 1e-5, True), {}),
    (aten.gelu.default, (strided(2, 6, 4, 5),), {}),
    *((aten.group_norm.default, (x, 3, *affine), {}) for x in MAPS for affine in ((), (ONES, ONES), (ONES, None))),
    *((getattr(aten, name).default, (x,), {}) for name in ACTIVATIONS for x in MAPS),
    *((getattr(aten, f"{name}_").default, (x.clone(),), {}) for name in IN_PLACE for x in MAPS),
    (aten.hardtanh.default, (strided(2, 6, 4, 5), 0, 6), {}),
    (aten.hardtanh_.default, (torch.arange(6), 2, 4), {}),
    (aten.roll.default, (torch.randn(2, 6), [1], [0]), {}),
    (aten.add.Tensor, (torch.randn(2, 5), torch.randn(5)), {}),
    (aten.mul.Tensor, (torch.randn(2, 5), 0.5), {}),
    (aten.scaled_dot_product_attention.default, (torch.randn(2, 3, 4, 6),) * 3, {"scale": 0.5}),
    (F.linear, (strided(2, 6, 4, 5).permute(0, 2, 3, 1), torch.randn(3, 6), torch.randn(3)), {}),
    (F.layer_norm, (torch.randn(2, 6, 4, 5).permute(0, 2, 3, 1), (6,), ONES, ONES), {}),
    (F.layer_norm, (torch.randn(2, 4, 6), [4, 6]), {}),
    (F.batch_norm, (strided(2, 6, 4, 5), ONES, ONES, ONES, ONES), {}),
    (F.gelu, (strided(2, 6, 4, 5),), {"approximate": "tanh"}),
    (F.hardtanh, (strided(2, 6, 4, 5), 0.0, 6.0, True), {}),
    (torch.roll, (torch.randn(2, 6, 4, 5).permute(0, 2, 3, 1),), {"shifts": (1, 2), "dims": (1, 2)}),
    (torch.roll, (torch.randn(2, 6, 4, 5), 1), {}),
    (Tensor.add, (strided(2, 6, 4, 5), strided(2, 6, 4, 5)), {}),
    (Tensor.add, (torch.randn(1, 1, 5), torch.randn(2, 4, 1)), {}),
    (Tensor.add, (torch.randn(2, 5), torch.randn(3, 2, 5)), {"alpha": 2}),
    (Tensor.mul, (strided(2, 6, 4, 5), torch.randn(1, 6, 1, 1)), {}),
    (Tensor.mul, (torch.randn(2, 5), torch.ones(5, dtype=torch.float64)), {}),
    (Tensor.mul, (torch.arange(3), 0.5), {}),
    (Tensor.mul, (torch.randn(2, 3, 4).transpose(1, 2), 0.5), {}),
    (Tensor.mul, (torch.randn(2, 3), 2j), {}),
    (F.scaled_dot_product_attention, (torch.randn(2, 3, 4, 6), torch.randn(2, 3, 5, 6), torch.randn(2, 3, 5, 7)), {}),
    (F.scaled_dot_product_attention, (torch.randn(2, 3, 4, 6),) * 3, {"attn_mask": torch.randn(4, 4)}),
    (F.grid_sample, (torch.randn(2, 3, 4, 5), torch.rand(2, 6, 7, 2)), {"align_corners": False}),
    *(
        (aten.grid_sampler.default, (torch.randn(2, 3, *size), torch.rand(2, *size, len(size)), 0, 0, False), {})
        for size in ((4, 5), (2, 4, 5))
    ),
    (aten.grid_sampler_2d.default, (strided(2, 6, 4, 5), torch.rand(2, 6, 7, 2), 0, 0, True), {}),
    (aten.grid_sampler_3d.default, (torch.randn(2, 3, 2, 4, 5), torch.rand(2, 1, 6, 7, 3), 0, 0, True), {}),
]


@pytest.mark.parametrize(("function", "args", "kwargs"), META_CALLS)
def test_outputs_made_from_shapes_are_those_of_pytorch(function, args, kwargs):
    def to_meta(value):
        return value.to("meta") if isinstance(value, Tensor) else value

    made = call_for_shapes(function, [*map(to_meta, args)], {name: to_meta(value) for name, value in kwargs.items()})
    real = function(*args, **kwargs)
    assert function in META_OUTPUTS and made.is_meta
    assert (made.shape, made.dtype) == (real.shape, real.dtype)
    layout_depends_on_kernel = function in (
        F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default
    )  # fmt: skip
    if IS_NEWEST_TORCH and not layout_depends_on_kernel:
        assert made.stride() == real.stride()


def test_every_function_with_a_meta_output_is_checked():
    assert {function for function, _, _ in META_CALLS} == set(META_OUTPUTS)


# --- printing ---------------------------------------------------------------------------------------------


def test_printed_as_the_papers_users_know_it():
    assert f"MACs: {format_macs(17_690_000_000)} => {format_macs(4_166_400_000)}" == "MACs: 17.69 G => 4.17 G"
    assert f"Params: {format_params(87_338_192)} => {format_params(20_720_000)}" == "Params: 87.34 M => 20.72 M"
    assert format_macs(4_162_600_000, digits=4) == "4.1626 G"
    assert format_params(20_694_300, digits=4) == "20.6943 M"
    assert (format_macs(153_000_000), format_macs(4_608_000), format_macs(950)) == ("0.15 G", "4.61 M", "0.95 K")
    assert (format_params(3_500_000), format_params(29_521)) == ("3.50 M", "29.52 K")
