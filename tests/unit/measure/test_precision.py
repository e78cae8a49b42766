"""Bfloat16 where it pays and says the same: when one batch is compared, and what follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from isomorphic.checkpoints.open import load_model
from isomorphic.checkpoints.save import save_model
from isomorphic.measure import precision
from isomorphic.measure.precision import Agreement, Auto, Autocast, fast_gradients, keep_depthwise_in_fp32
from isomorphic.models import build_model, describe_model

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
DEIT_BASE = Auto(17_600_000_000)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "is_fast_in_bf16", lambda device: True)


class Comparison:
    def __init__(self, good: bool = True) -> None:
        self.good, self.calls = good, 0

    def __call__(self) -> Agreement:
        self.calls += 1
        return Agreement(self.good, "so it is")


def dtypes(wanted: precision.Precision, comparison: Comparison, batches: int, images: int = 64):
    """The dtype of each batch."""
    autocast, found = Autocast(wanted, CPU, "scoring"), []
    for _ in range(batches):
        autocast.before(images, comparison)
        found.append(autocast.dtype)
    return found


def test_the_worked_example():
    """One batch of 1.1 T MACs in full precision, then the comparison, and the rest in bfloat16."""
    comparison = Comparison()
    assert dtypes(DEIT_BASE, comparison, 50) == [None] + 49 * [BF16]
    assert comparison.calls == 1
    assert dtypes(Auto(5_000_000), Comparison(), 16) == 16 * [None], "a thousand digits"


def test_the_first_tera_macs_are_in_full_precision():
    assert dtypes(DEIT_BASE, Comparison(), 8, images=16) == 4 * [None] + 4 * [BF16]
    assert dtypes(DEIT_BASE, Comparison(), 8, images=8) == 8 * [None]


def test_what_disagrees_stays_in_full_precision_and_is_compared_once():
    comparison = Comparison(good=False)
    assert dtypes(DEIT_BASE, comparison, 5) == 5 * [None]
    assert comparison.calls == 1


@pytest.mark.parametrize("wanted", [None, torch.float16, BF16])
def test_a_wish_is_taken_as_it_is(wanted: torch.dtype | None):
    comparison = Comparison()
    assert dtypes(wanted, comparison, 5, images=10**9) == 5 * [wanted]
    assert comparison.calls == 0


def test_nothing_is_compared_where_bf16_is_slow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "is_fast_in_bf16", lambda device: False)
    comparison = Comparison()
    assert dtypes(DEIT_BASE, comparison, 5) == 5 * [None]
    assert comparison.calls == 0


def test_what_fails_in_bf16_stays_in_full_precision(said: list[str]):
    def fail() -> Agreement:
        raise RuntimeError("no kernel for BFloat16\nand a traceback")

    autocast = Autocast(Auto(10**12), CPU, "scoring")
    for _ in range(2):
        autocast.before(1, fail)
    assert autocast.dtype is None
    assert said == ["scoring in fp32: in bf16 it fails (no kernel for BFloat16)"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(precision, "stage", lines.append)
    return lines


def test_the_choice_is_said_with_its_reason(said: list[str]):
    dtypes(DEIT_BASE, Comparison(), 3)
    dtypes(DEIT_BASE, Comparison(good=False), 3)
    assert said == ["scoring in bf16: so it is", "scoring in fp32: so it is"]


def test_both_ways_are_full_and_low_and_the_choice_stays():
    weight = torch.ones(2, 2)
    for wanted in (None, BF16):
        autocast = Autocast(wanted, CPU, "scoring")

        def multiply(autocast: Autocast = autocast) -> torch.dtype:
            with autocast():
                return (weight @ weight).dtype

        assert autocast.both_ways(multiply) == (torch.float32, BF16)
        assert autocast.dtype == wanted
        assert multiply() == (wanted or torch.float32)


def test_a_failure_on_one_way_leaves_the_choice_as_it_was():
    autocast = Autocast(None, CPU, "scoring")

    def fail_when_low() -> None:
        if autocast.dtype is not None:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        autocast.both_ways(fail_when_low)
    assert autocast.dtype is None


@pytest.mark.parametrize(("instructions", "fast"), [([], False), (["_is_amx_tile_supported"], True)])
def test_a_cpu_is_fast_if_it_has_the_instructions(monkeypatch: pytest.MonkeyPatch, instructions: list[str], fast: bool):
    monkeypatch.undo()
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in instructions, raising=False)
    assert precision.is_fast_in_bf16(CPU) is fast
    assert not precision.is_fast_in_bf16(torch.device("meta"))


# --- kernels ---


def test_depthwise_convolutions_are_spared_bf16_on_a_cpu():
    depthwise, grouped, dense = nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3)
    images = torch.randn(2, 8, 9, 9)
    expected = depthwise(images)
    for device in (CUDA, CPU):  # on a GPU nothing changes
        keep_depthwise_in_fp32(nn.ModuleList([depthwise, grouped, dense]), torch.bfloat16, device)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [conv(images) for conv in (depthwise, grouped, dense)]
            assert dense(images).dtype == torch.bfloat16  # autocast goes on afterwards
        spared = device == CPU
        assert [output.dtype == torch.float32 for output in outputs] == [spared, False, False]
    assert torch.equal(outputs[0], expected)


def test_a_model_with_spared_convolutions_is_saved_as_any(tmp_path: Path):
    kwargs = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "num_classes": 3}
    spec = describe_model("convnext_atto", kwargs=kwargs, input_size=32)
    model = build_model(spec)
    keep_depthwise_in_fp32(model, torch.bfloat16, CPU)
    save_model(tmp_path / "net.safetensors", model, spec, provenance={})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_model(tmp_path / "net.safetensors")(images), model.eval()(images))


class Mixer(nn.Module):
    """A dense and a depthwise convolution; notes how its weights lie in memory, and what they compute in."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.seen: list[tuple[bool, bool, torch.dtype]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dense(x)
        y = self.depthwise(x)
        first, second = (t.is_contiguous(memory_format=torch.channels_last) for t in (self.dense.weight, x))
        self.seen.append((first, second, y.dtype))
        return y


@pytest.mark.parametrize(
    ("dtype", "seen"), [(BF16, (True, True, torch.float32)), (None, (False, False, torch.float32))], ids=["low", "full"]
)
def test_convolutions_lie_as_their_kernels_want_for_a_while(dtype: torch.dtype | None, seen: tuple[object, ...]):
    model = Mixer()
    weights = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in model.named_parameters()}
    images = torch.randn(2, 3, 12, 12)
    with fast_gradients(model, dtype, CPU), torch.autocast("cpu", BF16, enabled=dtype is not None):
        model(images).sum().backward()
    model(images)
    with pytest.raises(ZeroDivisionError), fast_gradients(model, dtype, CPU):
        raise ZeroDivisionError
    assert model.seen == [seen, (False, False, torch.float32)]
    assert type(model.depthwise) is nn.Conv2d
    for name, parameter in model.named_parameters():
        address, values = weights[name]
        assert parameter.data_ptr() == address and torch.equal(parameter, values)
        assert parameter.grad is not None and parameter.grad.any()
