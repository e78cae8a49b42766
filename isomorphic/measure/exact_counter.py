"""The exact counter: the torch functions that run are charged by their true shapes (see `complexity.py`).

A rule takes the output and then the arguments of a call, named as PyTorch names them, because some models pass them by
name (a test calls every function of the table both ways). It gives (products, rest): multiplications of convolutions,
linear layers and matrix products, and all else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from isomorphic.measure.layer_hooks import TIMM_ATTENTION, CallArguments, ModuleRule
from isomorphic.measure.meta_outputs import call_for_shapes

Function = Callable[..., Any]
FunctionRule = Callable[..., tuple[int, int]]


class FunctionCounter(TorchFunctionMode):
    """While active, adds up what ``EXACT_RULES`` charges for the torch functions that are called.

    A function that calls others is charged as one; what runs inside it is not seen.

    Attributes:
        products: multiplications of convolutions, linear layers, matrix products and attention.
        rest: biases, norms, activations, softmax, pooling.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.rest = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = call_for_shapes(func, args, kwargs)
        if func in EXACT_RULES:
            products, rest = EXACT_RULES[func](output, *args, **kwargs)
            self.products += products
            self.rest += rest
        return output


def _conv_call(y: Tensor, input: Tensor, weight: Tensor, bias: Any = None, *_: Any, **__: Any) -> tuple[int, int]:
    """Every filter weight for each output position; each output element with a bias."""
    positions = y.numel() // y.shape[1 - weight.dim()]
    return weight.numel() * positions, y.numel() if bias is not None else 0


def _transposed_conv_call(
    y: Tensor, input: Tensor, weight: Tensor, bias: Any = None, *_: Any, **__: Any
) -> tuple[int, int]:
    """Every filter weight for each *input* position; each output element with a bias."""
    positions = input.numel() // input.shape[1 - weight.dim()]
    return weight.numel() * positions, y.numel() if bias is not None else 0


def _linear_call(y: Tensor, input: Tensor, weight: Tensor, bias: Any = None) -> tuple[int, int]:
    """in·out for each token; out once with a bias."""
    return input.numel() * weight.shape[0], weight.shape[0] if bias is not None else 0


def _matmul_call(y: Tensor, input: Tensor, *_: Any, **__: Any) -> tuple[int, int]:
    """(…, m, k) @ (…, k, n): m·n·k for each matrix of the broadcast batch."""
    return y.numel() * input.shape[-1], 0


def _add_matmul_call(y: Tensor, input: Tensor, *factors: Tensor, **named: Any) -> tuple[int, int]:
    """input + left @ right: as the matrix product; adding is free. `left` is called mat1 or, in batches, batch1."""
    left = factors[0] if factors else named["mat1"] if "mat1" in named else named["batch1"]
    return y.numel() * left.shape[-1], 0


def _attention_call(y: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[int, int]:
    """(…, H, L, d) on (…, H, S, d): H·L·S·(d + d_v), masked positions too; H·L·S for the softmax."""
    scores = y.numel() // y.shape[-1] * key.shape[-2]
    return scores * (query.shape[-1] + value.shape[-1]), scores


def _multihead_attention_call(
    y: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    *_: Any,
    **__: Any,
) -> tuple[int, int]:
    """Length first: four projections and 2·L·S·D; scaling q, H·L·S for the softmax, biases for each token."""
    width = embed_dim_to_check
    queries, keys, values = (x.numel() // x.shape[-1] for x in (query, key, value))
    projections = width * (2 * query.numel() + key.numel() + value.numel())
    scores = queries * key.shape[0]
    biases = 2 * queries + keys + values if in_proj_bias is not None else 0
    return projections + 2 * width * scores, width * (queries + biases) + num_heads * scores


def _recurrent_call(y: Any, input: Tensor, *args: Any, params: Any = (), **_: Any) -> tuple[int, int]:
    """All layers' and directions' weights for each step; their biases likewise."""
    given = [arg for arg in args if isinstance(arg, (list, tuple))]  # the state may be one, too
    layers = params or given[-1]
    return _steps_times(input, layers)


def _recurrent_cell_call(y: Any, input: Tensor, *args: Any, hx: Any = None, **weights: Any) -> tuple[int, int]:
    """The weights, which a cell passes one by one after its state `hx`, for each row of the input; biases likewise."""
    return _steps_times(input, [*(args[1:] if hx is None else args), *weights.values()])


def _steps_times(input: Tensor, weights: Sequence[Tensor | None]) -> tuple[int, int]:
    """Matrices and biases once for each (…, features) of the input."""
    weights = [weight for weight in weights if weight is not None]
    steps = input.numel() // input.shape[-1]
    matrices = sum(weight.numel() for weight in weights if weight.dim() == 2)
    return steps * matrices, steps * (sum(weight.numel() for weight in weights) - matrices)


def _as_dispatched(function: Function) -> FunctionRule:
    """Run ``function`` once more under torch's own counter: for rare ones whose products lie inside them."""

    def rule(y: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter:
            function(*args, **kwargs)
        return counter.get_total_flops() // 2, 0

    return rule


def _norm_call(scale_position: int) -> FunctionRule:
    """2 per element with a learned scale (the argument at this position, the input's being 0), else 1."""

    def rule(y: Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        scale = args[scale_position] if len(args) > scale_position else kwargs.get("weight")
        return 0, y.numel() * (2 if scale is not None else 1)

    return rule


def _output_elements(y: Tensor, *_: Any, **__: Any) -> tuple[int, int]:
    """1 per output element: activations, softmax, upsampling."""
    return 0, y.numel()


def _input_elements(y: Any, input: Tensor, *_: Any, **__: Any) -> tuple[int, int]:
    """1 per input element: pooling."""
    return 0, input.numel()


EXACT_RULES: Mapping[Function, FunctionRule] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _conv_call),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed_conv_call),
    F.linear: _linear_call,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), _matmul_call),
    **dict.fromkeys((Tensor.matmul, Tensor.mm, Tensor.bmm), _matmul_call),  # a @ b is Tensor.matmul
    **dict.fromkeys((torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm), _add_matmul_call),
    torch.einsum: _as_dispatched(torch.einsum),
    torch.tensordot: _as_dispatched(torch.tensordot),
    F.scaled_dot_product_attention: _attention_call,
    F.multi_head_attention_forward: _multihead_attention_call,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent_call),
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), _recurrent_cell_call),
    **dict.fromkeys((F.layer_norm, F.group_norm, F.rms_norm), _norm_call(2)),
    **dict.fromkeys((F.batch_norm, F.instance_norm), _norm_call(3)),
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _output_elements),
    **dict.fromkeys((F.relu6, F.hardtanh), _output_elements),  # nn.ReLU6 runs as hardtanh
    **dict.fromkeys((F.leaky_relu, F.prelu, F.elu, F.gelu), _output_elements),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _output_elements),
    F.interpolate: _output_elements,
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), _input_elements),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), _input_elements),
    **dict.fromkeys((F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d), _input_elements),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), _input_elements),
}


def _attention_extras(module: Any, inputs: CallArguments, output: Tensor) -> int:
    """L·A for scaling q, and the biases of both projections for each token instead of once."""
    tokens = inputs[0].numel() // inputs[0].shape[-1]
    biases = sum(layer.out_features for layer in (module.qkv, module.proj) if layer.bias is not None)
    return tokens * (module.qkv.out_features // 3) + (tokens - 1) * biases


BLOCK_EXTRAS: Mapping[str, ModuleRule] = dict.fromkeys(TIMM_ATTENTION, _attention_extras)
