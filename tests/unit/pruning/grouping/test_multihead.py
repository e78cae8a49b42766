"""Multi-head attention in the open computes what the library's does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.pruning.grouping.multihead import multi_head_attention

BATCH, TO, FROM, WIDTH, HEADS = 2, 5, 7, 12, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(**options: Any) -> nn.MultiheadAttention:
    """One with generic weights: the biases begin at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options).eval()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return layer


def both(monkeypatch, layer: nn.Module, *inputs: Any, **named: Any) -> tuple[Any, Any]:
    """The library's results and ours."""
    with torch.no_grad():
        expected = layer(*inputs, **named)
        monkeypatch.setattr(F, "multi_head_attention_forward", multi_head_attention)
        return expected, layer(*inputs, **named)


X, Y, Z = random(TO, BATCH, WIDTH), random(FROM, BATCH, WIDTH, seed=1), random(FROM, BATCH, WIDTH, seed=2)
CAUSAL = torch.ones(TO, TO, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * FROM, [False] * 4 + [True] * 3])
MODES: dict[str, tuple[dict[str, Any], tuple[Tensor, ...], dict[str, Any]]] = {
    "self": ({}, (X, X, X), {}),
    "without biases": ({"bias": False}, (X, X, X), {}),
    "batch first": ({"batch_first": True}, (X.transpose(0, 1),) * 3, {}),
    "without a batch": ({}, (X[:, 0],) * 3, {}),
    "cross": ({}, (X, Y, Y), {}),
    "key and value differ": ({}, (X, Y, Z), {}),
    "query is key": ({}, (X, X, X + 1), {}),
    "widths of their own": ({"kdim": 5, "vdim": 4}, (X, Y[..., :5], Z[..., :4]), {}),
    "equal widths of their own": ({"kdim": 5, "vdim": 5}, (X, Y[..., :5], Y[..., :5]), {}),
    "added mask": ({}, (X, Y, Z), {"attn_mask": random(TO, FROM)}),
    "boolean mask": ({}, (X, X, X), {"attn_mask": CAUSAL}),
    "causal": ({}, (X, X, X), {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "mask for each head": ({}, (X, Y, Z), {"attn_mask": random(BATCH * HEADS, TO, FROM)}),
    "padding": ({}, (X, Y, Z), {"key_padding_mask": PADDING}),
    "padding without a batch": ({}, (X[:, 0], Y[:, 0], Z[:, 0]), {"key_padding_mask": PADDING[1]}),
    "mask and padding": ({}, (X, Y, Z), {"attn_mask": torch.eye(TO, FROM) > 0, "key_padding_mask": PADDING}),
}


@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_those_of_the_library(monkeypatch, mode):
    options, inputs, named = MODES[mode]
    (expected, _), (found, _) = both(monkeypatch, attention(**options), *inputs, **named)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask", [CAUSAL, random(TO, TO), random(BATCH * HEADS, TO, TO) > 1])
@pytest.mark.parametrize("padding", [None, PADDING[:, :TO]])
def test_masks_of_the_function_itself(mask, padding):
    """Booleans forbid there, and are no floats as those that the layer passes on."""
    layer = attention()
    arguments = (X, X, X, WIDTH, HEADS, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0)
    arguments = (*arguments, layer.out_proj.weight, layer.out_proj.bias, False)
    masks: Any = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": False}
    if mask.dtype == torch.bool or padding is None:  # else the library warns of two kinds
        expected, _ = F.multi_head_attention_forward(*arguments, **masks)
        torch.testing.assert_close(multi_head_attention(*arguments, **masks)[0], expected)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("named", [{}, {"average_attn_weights": False}, {"need_weights": False}])
def test_weights_are_shaped_as_the_librarys(monkeypatch, batch, named):
    inputs = (X, Y, Z) if batch else (X[:, 0], Y[:, 0], Z[:, 0])
    (_, expected), (_, found) = both(monkeypatch, attention(), *inputs, **named)
    assert (expected is None) == (found is None) == ("need_weights" in named)
    assert expected is None or found.shape == expected.shape


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_added_keys_are_refused(monkeypatch, options):
    with pytest.raises(UserError, match="add_bias_kv"):
        both(monkeypatch, attention(**options), X, X, X)


@pytest.mark.parametrize("name", ["static_k", "static_v"])
def test_given_keys_and_values_are_refused(name):
    layer = attention()
    arguments = (X, X, X, WIDTH, HEADS, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0)
    given: Any = {name: X}
    with pytest.raises(UserError, match="static_k"):
        multi_head_attention(*arguments, layer.out_proj.weight, layer.out_proj.bias, False, **given)
