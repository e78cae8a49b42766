"""The exact counter charges a function alike however its arguments are given: by position, by name, or both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isomorphic.measure.complexity import count_complexity
from isomorphic.measure.exact_counter import EXACT_RULES, FunctionCounter

PIXELS, BATCH, STATE = torch.randn(1, 4, 6, 6), torch.randn(2, 3, 4), torch.zeros(1, 2, 5)
LSTM, GRU, RNN = nn.LSTM(4, 5), nn.GRU(4, 5), nn.RNN(4, 5)
LSTM_CELL, GRU_CELL, RNN_CELL = nn.LSTMCell(4, 5), nn.GRUCell(4, 5), nn.RNNCell(4, 5)
SETTINGS = {"has_biases": True, "num_layers": 1, "dropout": 0.0, "train": False, "bidirectional": False}
RECURRENT = {**SETTINGS, "batch_first": False}
IMAGE_NORM = {"running_mean": torch.zeros(4), "running_var": torch.ones(4), "weight": torch.ones(4)}


def over(*rank: int) -> Tensor:
    return torch.randn(1, 4, *rank)


def cell(module: Any) -> dict[str, Tensor]:
    return {"w_ih": module.weight_ih, "w_hh": module.weight_hh, "b_ih": module.bias_ih, "b_hh": module.bias_hh}


MATRICES = {"input": torch.randn(3, 5), "mat1": torch.randn(3, 4), "mat2": torch.randn(4, 5)}
BATCHES = {"input": torch.randn(2, 3, 5), "batch1": BATCH, "batch2": torch.randn(2, 4, 5)}
MULTIHEAD = {
    **{"query": torch.randn(3, 2, 4), "key": torch.randn(5, 2, 4), "value": torch.randn(5, 2, 4)},
    **{"embed_dim_to_check": 4, "num_heads": 2, "in_proj_weight": torch.randn(12, 4), "in_proj_bias": torch.ones(12)},
    **{"bias_k": None, "bias_v": None, "add_zero_attn": False, "dropout_p": 0.0, "out_proj_weight": torch.randn(4, 4)},
    "out_proj_bias": torch.ones(4),
}
# Each function's arguments by the names that torch gives them; those of methods without the tensor itself.
NAMED: dict[Any, dict[str, Any]] = {
    F.conv1d: {"input": over(6), "weight": torch.randn(8, 4, 3), "bias": torch.ones(8)},
    F.conv2d: {"input": over(6, 6), "weight": torch.randn(8, 4, 3, 3), "bias": torch.ones(8)},
    F.conv3d: {"input": over(3, 3, 3), "weight": torch.randn(8, 4, 3, 3, 3), "bias": torch.ones(8)},
    F.conv_transpose1d: {"input": over(6), "weight": torch.randn(4, 8, 3), "bias": torch.ones(8)},
    F.conv_transpose2d: {"input": over(6, 6), "weight": torch.randn(4, 8, 3, 3), "bias": torch.ones(8)},
    F.conv_transpose3d: {"input": over(3, 3, 3), "weight": torch.randn(4, 8, 3, 3, 3), "bias": torch.ones(8)},
    F.linear: {"input": BATCH, "weight": torch.randn(5, 4), "bias": torch.ones(5)},
    torch.matmul: {"input": BATCH, "other": torch.randn(4, 5)},
    torch.mm: {"input": torch.randn(3, 4), "mat2": torch.randn(4, 5)},
    torch.bmm: {"input": BATCH, "mat2": torch.randn(2, 4, 5)},
    Tensor.matmul: {"self": BATCH, "other": torch.randn(4, 5)},
    Tensor.mm: {"self": torch.randn(3, 4), "mat2": torch.randn(4, 5)},
    Tensor.bmm: {"self": BATCH, "mat2": torch.randn(2, 4, 5)},
    torch.addmm: MATRICES,
    torch.baddbmm: BATCHES,
    Tensor.addmm: {"self": MATRICES["input"], "mat1": MATRICES["mat1"], "mat2": MATRICES["mat2"]},
    Tensor.baddbmm: {"self": BATCHES["input"], "batch1": BATCH, "batch2": BATCHES["batch2"]},
    torch.tensordot: {"a": BATCH, "b": torch.randn(4, 5), "dims": 1},
    F.scaled_dot_product_attention: {"query": BATCH, "key": torch.randn(2, 5, 4), "value": torch.randn(2, 5, 6)},
    F.multi_head_attention_forward: MULTIHEAD,
    torch.lstm: {"input": BATCH, "hx": (STATE[:, :1].repeat(1, 3, 1),) * 2, "params": LSTM._flat_weights, **RECURRENT},
    torch.gru: {"input": BATCH, "hx": STATE[:, :1].repeat(1, 3, 1), "params": GRU._flat_weights, **RECURRENT},
    **{
        function: {"input": BATCH, "hx": STATE[:, :1].repeat(1, 3, 1), "params": RNN._flat_weights, **RECURRENT}
        for function in (torch.rnn_tanh, torch.rnn_relu)
    },
    torch.lstm_cell: {"input": BATCH[0], "hx": (torch.zeros(3, 5),) * 2, **cell(LSTM_CELL)},
    torch.gru_cell: {"input": BATCH[0], "hx": torch.zeros(3, 5), **cell(GRU_CELL)},
    torch.rnn_tanh_cell: {"input": BATCH[0], "hx": torch.zeros(3, 5), **cell(RNN_CELL)},
    torch.rnn_relu_cell: {"input": BATCH[0], "hx": torch.zeros(3, 5), **cell(RNN_CELL)},
    F.layer_norm: {"input": BATCH, "normalized_shape": (4,), "weight": torch.ones(4), "bias": torch.ones(4)},
    F.group_norm: {"input": PIXELS, "num_groups": 2, "weight": torch.ones(4), "bias": torch.ones(4)},
    F.rms_norm: {"input": BATCH, "normalized_shape": (4,), "weight": torch.ones(4)},
    F.batch_norm: {"input": PIXELS, **IMAGE_NORM},
    F.instance_norm: {"input": PIXELS, **IMAGE_NORM},
    **{function: {"input": PIXELS} for function in (F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.gelu)},
    **{function: {"input": PIXELS} for function in (torch.relu, torch.relu_)},
    **{function: {"self": PIXELS} for function in (Tensor.relu, Tensor.relu_)},
    F.prelu: {"input": PIXELS, "weight": torch.ones(4)},
    F.softmax: {"input": PIXELS, "dim": 1},
    torch.softmax: {"input": PIXELS, "dim": 1},
    Tensor.softmax: {"self": PIXELS, "dim": 1},
    F.interpolate: {"input": PIXELS, "size": None, "scale_factor": 2.0},
    **{function: {"input": over(6), "kernel_size": 2} for function in (F.max_pool1d, F.avg_pool1d)},
    **{function: {"input": over(6, 6), "kernel_size": 2} for function in (F.max_pool2d, F.avg_pool2d)},
    **{function: {"input": over(4, 4, 4), "kernel_size": 2} for function in (F.max_pool3d, F.avg_pool3d)},
    **{function: {"input": over(6), "output_size": 2} for function in (F.adaptive_max_pool1d, F.adaptive_avg_pool1d)},
    **{f: {"input": over(6, 6), "output_size": 2} for f in (F.adaptive_max_pool2d, F.adaptive_avg_pool2d)},
    **{f: {"input": over(4, 4, 4), "output_size": 2} for f in (F.adaptive_max_pool3d, F.adaptive_avg_pool3d)},
}  # fmt: skip


def charged(function: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
    with torch.no_grad(), FunctionCounter() as counter:
        function(*args, **kwargs)
    return counter.products, counter.rest


@pytest.mark.parametrize("function", NAMED)
def test_named_arguments_cost_what_positional_ones_cost(function: Any):
    named = dict(NAMED[function])
    own = [named.pop("self")] if "self" in named else []
    expected = charged(function, *own, *named.values())
    assert charged(function, *own, **named) == expected != (0, 0)
    first, *others = named or [""]
    if not own and others:
        assert charged(function, named[first], **{name: named[name] for name in others}) == expected


def test_every_function_that_takes_names_is_called_by_name():
    assert {*NAMED, torch.einsum} == set(EXACT_RULES)


def test_a_module_called_by_name_is_charged_like_one_called_by_position():
    query, key, value = torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)

    class Named(nn.Module):
        def __init__(self, by_name: bool) -> None:
            super().__init__()
            self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
            self.by_name = by_name

        def forward(self, x: Tensor) -> Tensor:
            if self.by_name:
                return self.attention(value=value, key=key, query=self.norm(input=x))[0]
            return self.attention(self.norm(x), key, value)[0]

    assert count_complexity(Named(True), query) == count_complexity(Named(False), query)
