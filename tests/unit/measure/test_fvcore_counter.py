"""fvcore as an independent witness: products by hand, gaps by name, and a model that is left as it was."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isomorphic.errors import UserError
from isomorphic.measure.complexity import count_complexity
from isomorphic.measure.exact_counter import FunctionCounter
from isomorphic.measure.fvcore_counter import FvcoreCount, count_fvcore


def products(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FunctionCounter() as counter:
        model.eval()(x)
    return counter.products


def test_a_plain_cnn_costs_its_products():
    """Of 8×8 pixels: 3·6·9·64 + (6·4·9 / 2 groups)·16 positions + (4·16)·5."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    images = torch.randn(3, 3, 8, 8)  # a batch: one image counts
    by_hand = 3 * 6 * 9 * 64 + 6 * 4 * 9 // 2 * 16 + 64 * 5
    assert count_fvcore(model, images) == FvcoreCount(by_hand, {})
    rest = 6 * 64 + 6 * 64 + 4 * 16 + 5  # bias and ReLU of the first layer, biases of the others
    assert count_complexity(model, images).macs_exact == by_hand + rest


def test_a_plain_mlp_costs_its_products():
    model = nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 3))
    assert count_fvcore(model, torch.randn(4, 7)) == FvcoreCount(7 * 11 + 11 * 3, {"gelu": 1})
    assert count_complexity(model, torch.randn(4, 7)).macs_exact == 7 * 11 + 11 + 11 + 11 * 3 + 3


def test_norms_have_prices_of_fvcores_own():
    """A batch norm at two an element, as the exact counter has it; a layer norm at five."""
    batch_norm = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6))
    assert count_fvcore(batch_norm, torch.randn(1, 3, 4, 4)).macs == (3 * 6 + 2 * 6) * 16
    assert count_fvcore(nn.LayerNorm(6), torch.randn(1, 4, 6)).macs == 5 * 4 * 6


def test_the_gaps_of_a_vit_are_named():
    kwargs: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", **kwargs)
    images = torch.randn(1, 3, 32, 32)
    count = count_fvcore(model, images)
    assert count.uncounted == {"add": 7, "gelu": 3, "scaled_dot_product_attention": 3}
    assert list(count.uncounted.values()) == [7, 3, 3]  # most calls first
    attention = 3 * 2 * 17 * 17 * 48  # blocks · (q·k and a·v) · tokens² · dims
    layer_norms = 5 * (2 * 3 + 1) * 17 * 48
    assert count.macs + attention - layer_norms == products(model, images)


class Keywords(nn.Module):
    """Keyword arguments, one of them no tensor, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, *, x: Tensor, scale: float, mask: Tensor) -> dict[str, Any]:
        return {"logits": (F.relu(self.layer(x)) * scale, None), "mask": mask}


def test_keyword_arguments_and_dicts_of_outputs():
    inputs = {"scale": 2.0, "x": torch.randn(5, 2, 4), "mask": torch.ones(5, 2)}
    assert count_fvcore(Keywords(), inputs) == FvcoreCount(2 * 4 * 3, {"mul": 1})


def test_torchs_own_transformer_layer_is_not_hidden_by_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    count = count_fvcore(layer, torch.randn(2, 5, 8))
    linear = 5 * 8 * (3 * 8 + 8 + 12 + 12)
    assert count.macs == linear + 2 * 5 * 5 * 8
    assert count.uncounted["scaled_dot_product_attention"] == 1


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if torch._C._get_tracing_state() is not None:
            raise ValueError("not while\nI am watched")
        return self.layer(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [Untraceable, lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))])
def test_the_model_is_left_as_it_was_also_by_a_failure(kind: Any, training: bool):
    model: nn.Module = kind().train(training)
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    handle = model.register_forward_hook(lambda *_: None)
    if isinstance(model, Untraceable):
        message = r"the fvcore counter cannot trace this model \(not while\): take the paper's or the exact counter"
        with pytest.raises(UserError, match=message):
            count_fvcore(model, torch.randn(2, 4, generator=torch.Generator()))
    else:
        count_fvcore(model, torch.randn(2, 4, generator=torch.Generator()))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert list(model._forward_hooks) == [handle.id]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in model.children())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_nothing_is_said(recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture, capfd: Any):
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    model.unused = nn.Linear(2, 2)  # type: ignore[assignment]
    model.forward = lambda x: model[1](model[0](x)) if int(x.shape[0]) else x  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_fvcore(model, torch.randn(1, 4)).uncounted == {"softmax": 1}
    assert not recwarn.list and not caplog.records
    assert capfd.readouterr() == ("", "")


def test_fvcore_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    with pytest.raises(UserError, match="fvcore is not installed: pip install fvcore, or take the paper's or the"):
        count_fvcore(nn.Linear(4, 3), torch.randn(1, 4))
