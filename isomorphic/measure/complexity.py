"""Multiply-accumulates (MACs) and parameters of a model, for one image.

There are two counters, because the number that everybody quotes and the number that is true drift apart as
soon as a model is pruned.

**paper** answers "which row of the published tables is this?". It looks at *modules*: each layer type in
``PAPER_RULES`` is charged by a formula, everything else is free. The formulas are those of torch-pruning,
which printed the tables, habits included: a linear layer's bias counts once per call, a timm attention block
is charged as a whole with a square output projection (right before pruning, off after it), attention written
with bare functions is not seen. Types match by ``isinstance``: a subclass counts as its parent. Where the
tables themselves left something out, ``UNCOUNTED_INSIDE`` says so.

**exact** answers "what does this model compute?". It looks at the *functions* that run, whichever class calls
them, and charges their true shapes by ``EXACT_RULES``: the products of convolutions, linear layers, matrix
products and attention (half of what ``torch.utils.flop_counter`` reports), and in the paper's units the small
rest: biases, 2 per element of an affine norm, 1 per activation, softmax or pooled element. ``BLOCK_EXTRAS``
adds what the paper's attention formula charges beyond these. So both counters agree to the unit on an
unpruned DeiT, Swin or ResNet, and a difference means something.

Residual additions, LayerScale, dropout, GRN and other plain arithmetic are free in both.

To teach a counter a new layer, add one line to its table: a module type (paper) or a function (exact), and
the rule that charges it. Counts are exact integers, the same on the CPU, on a GPU and on the meta device,
where counting takes milliseconds and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

Inputs = tuple[Any, ...]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Complexity:
    """What one image costs: MACs by the paper's and by the exact counter, and the number of parameters."""

    macs_paper: int
    macs_exact: int
    params: int


def count_complexity(model: nn.Module, example_inputs: Tensor | Inputs) -> Complexity:
    """Count the MACs of ``model`` for one image, and its parameters (shared ones once).

    One forward pass in eval mode without gradients. Training flags are restored and hooks removed, also when
    the forward fails; whatever it raises is passed on.

    Args:
        model: any module on any device. For a large model, count a copy on the meta device.
        example_inputs: what ``model.forward`` takes, on the model's device: one tensor, or a tuple that
            starts with one. Dim 0 is the batch; a batch is cut to its first image.
    """
    inputs = _first_image(example_inputs)
    with ExitStack() as stack:
        stack.enter_context(_eval_mode(model))
        paper = stack.enter_context(_counting(dict(_paper_layers(model))))
        extras = stack.enter_context(_counting(dict(_layers_in(model, BLOCK_EXTRAS))))
        stack.enter_context(torch.no_grad())
        functions = stack.enter_context(FunctionCounter())
        model(*inputs)
    exact = functions.products + functions.rest + sum(extras)
    return Complexity(sum(paper), exact, sum(parameter.numel() for parameter in model.parameters()))


def format_macs(macs: float, digits: int = 2) -> str:
    """``17_690_000_000`` → ``'17.69 G'``, as the tables print MACs; ``'4.61 M'`` for what would vanish in G."""
    return _scaled(macs, "GMK", digits)


def format_params(params: float, digits: int = 2) -> str:
    """``87_338_192`` → ``'87.34 M'``, as the tables print parameters; ``'29.52 K'`` for what would vanish in M."""
    return _scaled(params, "MK", digits)


def _scaled(value: float, units: str, digits: int) -> str:
    """In the first unit of which there is at least a tenth, else in the last."""
    sizes = {"G": 1e9, "M": 1e6, "K": 1e3}
    unit = next((unit for unit in units if value >= 0.1 * sizes[unit]), units[-1])
    return f"{value / sizes[unit]:.{digits}f} {unit}"


# --- paper: rule(module, inputs, output) -> MACs of this call ---------------------------------------------

ModuleRule = Callable[[Any, Inputs, Any], int]


def _conv(module: Any, inputs: Inputs, output: Tensor) -> int:
    """k·k·C_in/groups·C_out for each output position, + C_out each with a bias (transposed ones alike)."""
    positions = output.numel() // output.shape[1 - module.weight.dim()]
    return module.weight.numel() * positions + (output.numel() if module.bias is not None else 0)


def _linear(module: Any, inputs: Inputs, output: Tensor) -> int:
    """in·out for each token, + out once with a bias."""
    out_features = output.shape[-1]
    return inputs[0].numel() * out_features + (out_features if module.bias is not None else 0)


def _norm(module: Any, inputs: Inputs, output: Tensor) -> int:
    """2 per element with a learned scale, else 1."""
    affine = module.elementwise_affine if isinstance(module, nn.LayerNorm) else module.affine
    return inputs[0].numel() * (2 if affine else 1)


def _per_output(module: Any, inputs: Inputs, output: Tensor) -> int:
    """1 per output element: activations, upsampling."""
    return output.numel()


def _per_input(module: Any, inputs: Inputs, output: Any) -> int:
    """1 per input element: pooling."""
    return inputs[0].numel()


def _timm_attention(module: Any, inputs: Inputs, output: Tensor) -> int:
    """L·A + 3·L·D·A (+ 3·L·A with a qkv bias) + 2·L²·A + H·L² + L·A·(A + 1), for each sequence or window.

    L tokens of width D, H heads, A = qkv.out_features / 3. The terms: scaling q, the projections to q, k
    and v, q·kᵀ with attention·v, the softmax, and the output projection, which is taken to be A × A.
    """
    sequences, length, width = inputs[0].shape
    inner = module.qkv.out_features // 3
    project_in = 3 * length * inner * (width + (module.qkv.bias is not None))
    attend = length * inner + 2 * length**2 * inner + module.num_heads * length**2
    return sequences * (project_in + attend + length * inner * (inner + 1))


def _multihead_attention(module: nn.MultiheadAttention, inputs: Inputs, output: Any) -> int:
    """As a timm attention block, where keys and values may have lengths L_k, L_v and widths D_k, D_v.

    L·D + L·D² + L_k·D_k² + L_v·D_v² (+ (L + L_k + L_v)·D with biases)
    + L·L_k·(D + D_v) + H·L·L_k + L·D_v·(D_v + 1), for each sequence.
    """
    sequences = inputs[0].shape[0 if module.batch_first else 1] if inputs[0].dim() == 3 else 1
    d, d_k, d_v = (x.shape[-1] for x in inputs[:3])
    length, length_k, length_v = (x.numel() // x.shape[-1] // sequences for x in inputs[:3])
    project_in = length * d**2 + length_k * d_k**2 + length_v * d_v**2
    biases = (length + length_k + length_v) * d if module.in_proj_bias is not None else 0
    attend = length * d + length * length_k * (d + d_v + module.num_heads)
    return sequences * (project_in + biases + attend + length * d_v * (d_v + 1))


def _recurrent(module: nn.RNNBase, inputs: Inputs, output: Any) -> int:
    """All layers' steps, twice if bidirectional, for each element of the first sample.

    The last factor is the library's: it reads the first sample's (length, features) as (batch, length).
    """
    layers = sum(_recurrent_step(module, f"_l{layer}") for layer in range(module.num_layers))
    return layers * inputs[0][0].numel() * (2 if module.bidirectional else 1)


def _recurrent_cell(module: nn.RNNCellBase, inputs: Inputs, output: Any) -> int:
    """One step for each row of the input."""
    return _recurrent_step(module, "") * (inputs[0].numel() // inputs[0].shape[-1])


def _recurrent_step(module: Any, suffix: str) -> int:
    """Both weight matrices and biases once, and the gates' 1, 7 or 10 operations for each hidden unit."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if module.bias else ("weight_ih", "weight_hh")
    weights = sum(getattr(module, kind + suffix).numel() for kind in kinds)
    return weights + _entry(module, RECURRENT_GATES) * module.hidden_size


RECURRENT_GATES = {nn.RNN: 1, nn.RNNCell: 1, nn.GRU: 7, nn.GRUCell: 7, nn.LSTM: 10, nn.LSTMCell: 10}

PAPER_RULES: Mapping[type[nn.Module], ModuleRule] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _conv),
    nn.Linear: _linear,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _norm),
    nn.GroupNorm: _norm,
    nn.LayerNorm: _norm,
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU), _per_output),
    nn.Upsample: _per_output,
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _per_input),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _per_input),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), _per_input),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _per_input),
    **dict.fromkeys((nn.RNN, nn.GRU, nn.LSTM), _recurrent),
    **dict.fromkeys((nn.RNNCell, nn.GRUCell, nn.LSTMCell), _recurrent_cell),
    nn.MultiheadAttention: _multihead_attention,
    Attention: _timm_attention,
    WindowAttention: _timm_attention,
}

# Inside a module of the type on the left, modules of the types on the right are not counted. Attention blocks
# are charged as a whole. The published ConvNeXt figures hold no norm: they were of timm's own classes, which the
# library did not know (nor timm's GELU, which is no nn.GELU, here neither). The DeiT figures beside them do hold
# the norms, so it takes the model to tell, not the norm.
UNCOUNTED_INSIDE: Mapping[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.MultiheadAttention: (nn.Module,),
    Attention: (nn.Module,),
    WindowAttention: (nn.Module,),
    ConvNeXt: (nn.LayerNorm,),
}


# --- exact: rule(output, *arguments of the function) -> (products, rest) of this call ---------------------
# Arguments are named as PyTorch names them, because some models pass them by name.

FunctionRule = Callable[..., tuple[int, int]]


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


def _add_matmul_call(y: Tensor, input: Tensor, left: Tensor, *_: Any, **__: Any) -> tuple[int, int]:
    """input + left @ right: as the matrix product; adding is free."""
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


def _recurrent_call(y: Any, input: Tensor, *args: Any, **_: Any) -> tuple[int, int]:
    """All layers' and directions' weights for each step; their biases likewise."""
    layers = next((arg for arg in args if isinstance(arg, list)), args[1:])  # a cell passes them one by one
    weights = [weight for weight in layers if weight is not None]
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
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), _recurrent_call),
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


def _attention_extras(module: Any, inputs: Inputs, output: Tensor) -> int:
    """L·A for scaling q, and the biases of both projections for each token instead of once."""
    tokens = inputs[0].numel() // inputs[0].shape[-1]
    biases = sum(layer.out_features for layer in (module.qkv, module.proj) if layer.bias is not None)
    return tokens * (module.qkv.out_features // 3) + (tokens - 1) * biases


BLOCK_EXTRAS: Mapping[type[nn.Module], ModuleRule] = {Attention: _attention_extras, WindowAttention: _attention_extras}


# --- outputs on the meta device: output(*arguments of the function), None where PyTorch should decide -----
# PyTorch works out these functions' meta outputs in Python, which is nearly all the time of a forward pass
# there. Arguments that do not fit are left to PyTorch, for its error.


def _like_first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(x.shape) if x.is_contiguous() else torch.empty_like(x)  # new_empty is much the faster


def _elementwise_output(x: Tensor, other: Any, **kwargs: Any) -> Tensor | None:
    """For a sum or product that has the first operand's shape."""
    if kwargs or not x.is_floating_point():
        return None
    if isinstance(other, Tensor):
        sizes = zip(reversed(other.shape), reversed(x.shape), strict=False)
        fits = other.dtype == x.dtype and other.dim() <= x.dim() and all(n in (1, m) for n, m in sizes)
    else:
        fits = isinstance(other, (int, float))
    return _like_first(x) if fits else None


def _linear_output(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    fits = x.shape[-1] == weight.shape[-1] and (bias is None or bias.shape == weight.shape[:1])
    return x.new_empty((*x.shape[:-1], weight.shape[0])) if fits else None


def _layer_norm_output(x: Tensor, normalized_shape: Any, weight: Any = None, *_: Any, **__: Any) -> Tensor | None:
    shape = tuple(normalized_shape)
    fits = x.shape[-len(shape) :] == shape and (weight is None or weight.shape == shape)
    return x.new_empty(x.shape) if fits else None


def _batch_norm_output(x: Tensor, running_mean: Tensor | None, *_: Any, **__: Any) -> Tensor | None:
    fits = running_mean is not None and running_mean.shape == x.shape[1:2]
    return _like_first(x) if fits else None


def _attention_output(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **__: Any
) -> Tensor | None:
    same_batch = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    fits = same_batch and query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]
    return query.new_empty((*query.shape[:-1], value.shape[-1])) if fits and attn_mask is None else None


META_OUTPUTS: Mapping[Function, Callable[..., Tensor | None]] = {
    F.linear: _linear_output,
    F.layer_norm: _layer_norm_output,
    F.batch_norm: _batch_norm_output,
    F.scaled_dot_product_attention: _attention_output,
    **dict.fromkeys((F.gelu, F.hardtanh), _like_first),
    torch.roll: lambda x, *_, **__: x.new_empty(x.shape) if x.is_contiguous() else None,
    **dict.fromkeys((Tensor.add, Tensor.mul), _elementwise_output),
}


# --- machinery --------------------------------------------------------------------------------------------


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
        output = None
        if func in META_OUTPUTS and args and args[0].is_meta:
            output = META_OUTPUTS[func](*args, **kwargs)
        if output is None:
            output = func(*args, **kwargs)
        if func in EXACT_RULES:
            products, rest = EXACT_RULES[func](output, *args, **kwargs)
            self.products += products
            self.rest += rest
        return output


def _entry(module: nn.Module, table: Mapping[Any, Any]) -> Any:
    """The entry of the module's class or its nearest parent in the table (as ``isinstance``), or None."""
    return next((table[kind] for kind in type(module).__mro__ if kind in table), None)


def _layers_in(model: nn.Module, rules: Mapping[Any, ModuleRule]) -> Iterator[tuple[nn.Module, ModuleRule]]:
    for module in model.modules():
        rule = _entry(module, rules)
        if rule is not None:
            yield module, rule


def _paper_layers(module: nn.Module, uncounted: tuple[type, ...] = ()) -> Iterator[tuple[nn.Module, ModuleRule]]:
    """The modules that the paper's counter charges; ``uncounted`` comes from the modules above."""
    rule = _entry(module, PAPER_RULES)
    if rule is not None and not isinstance(module, uncounted):
        yield module, rule
    for child in module.children():
        yield from _paper_layers(child, uncounted + (_entry(module, UNCOUNTED_INSIDE) or ()))


@contextmanager
def _counting(rules: Mapping[nn.Module, ModuleRule]) -> Iterator[list[int]]:
    """Hook each module with its rule; the list fills with one count for each call."""
    counts: list[int] = []

    def hook(module: nn.Module, args: Inputs, kwargs: dict[str, Any], output: Any) -> None:
        counts.append(rules[module](module, (*args, *kwargs.values()), output))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in rules]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while, then each module as it was."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


def _first_image(example_inputs: Tensor | Inputs) -> Inputs:
    """The inputs as a tuple; every tensor with the first one's batch size is cut to its first item."""
    inputs: Inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    batch_size = inputs[0].shape[:1]
    return tuple(x[:1] if isinstance(x, Tensor) and x.shape[:1] == batch_size else x for x in inputs)
