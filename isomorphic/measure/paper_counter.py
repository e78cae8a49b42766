"""The paper's counter: modules are charged by formula (see `complexity.py` for what that is good for)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from isomorphic.kinds import kind_names
from isomorphic.measure.layer_hooks import TIMM_ATTENTION, CallArguments, ModuleRule, entry_of

# The classes of the models in the paper's tables.
PAPER_MODELS = frozenset({
    *("timm.models.vision_transformer.VisionTransformer", "timm.models.swin_transformer.SwinTransformer"),
    *("timm.models.convnext.ConvNeXt", "timm.models.resnet.ResNet"),
    *("torchvision.models.resnet.ResNet", "torchvision.models.mobilenetv2.MobileNetV2"),
})  # fmt: skip


def is_paper_model(model: nn.Module) -> bool:
    """Whether a model is of a family that the paper prunes, of any size."""
    return not PAPER_MODELS.isdisjoint(kind_names(type(model)))


def paper_layers(module: nn.Module, uncounted: tuple[type, ...] = ()) -> Iterator[tuple[nn.Module, ModuleRule]]:
    """The modules that the paper's counter charges; ``uncounted`` comes from the modules above."""
    rule = entry_of(module, PAPER_RULES)
    if rule is not None and not isinstance(module, uncounted):
        yield module, rule
    for child in module.children():
        yield from paper_layers(child, uncounted + (entry_of(module, UNCOUNTED_INSIDE) or ()))


def _conv(module: Any, inputs: CallArguments, output: Tensor) -> int:
    """k·k·C_in/groups·C_out for each output position, + C_out each with a bias (transposed ones alike)."""
    positions = output.numel() // output.shape[1 - module.weight.dim()]
    return module.weight.numel() * positions + (output.numel() if module.bias is not None else 0)


def _linear(module: Any, inputs: CallArguments, output: Tensor) -> int:
    """in·out for each token, + out once with a bias."""
    out_features = output.shape[-1]
    return inputs[0].numel() * out_features + (out_features if module.bias is not None else 0)


def _norm(module: Any, inputs: CallArguments, output: Tensor) -> int:
    """2 per element with a learned scale, else 1."""
    affine = module.elementwise_affine if isinstance(module, nn.LayerNorm) else module.affine
    return inputs[0].numel() * (2 if affine else 1)


def _per_output(module: Any, inputs: CallArguments, output: Tensor) -> int:
    """1 per output element: activations, upsampling."""
    return output.numel()


def _per_input(module: Any, inputs: CallArguments, output: Any) -> int:
    """1 per input element: pooling."""
    return inputs[0].numel()


def _timm_attention(module: Any, inputs: CallArguments, output: Tensor) -> int:
    """L·A + 3·L·D·A (+ 3·L·A with a qkv bias) + 2·L²·A + H·L² + L·A·(A + 1), for each sequence or window.

    L tokens of width D, H heads, A = qkv.out_features / 3. The terms: scaling q, the projections to q, k
    and v, q·kᵀ with attention·v, the softmax, and the output projection, which is taken to be A × A.
    """
    sequences, length, width = inputs[0].shape
    inner = module.qkv.out_features // 3
    project_in = 3 * length * inner * (width + (module.qkv.bias is not None))
    attend = length * inner + 2 * length**2 * inner + module.num_heads * length**2
    return sequences * (project_in + attend + length * inner * (inner + 1))


def _multihead_attention(module: nn.MultiheadAttention, inputs: CallArguments, output: Any) -> int:
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


def _recurrent(module: nn.RNNBase, inputs: CallArguments, output: Any) -> int:
    """All layers' steps, twice if bidirectional, for each element of the first sample.

    The last factor is the library's: it reads the first sample's (length, features) as (batch, length).
    """
    layers = sum(_recurrent_step(module, f"_l{layer}") for layer in range(module.num_layers))
    return layers * inputs[0][0].numel() * (2 if module.bidirectional else 1)


def _recurrent_cell(module: nn.RNNCellBase, inputs: CallArguments, output: Any) -> int:
    """One step for each row of the input."""
    return _recurrent_step(module, "") * (inputs[0].numel() // inputs[0].shape[-1])


def _recurrent_step(module: Any, suffix: str) -> int:
    """Both weight matrices and biases once, and the gates' 1, 7 or 10 operations for each hidden unit."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if module.bias else ("weight_ih", "weight_hh")
    weights = sum(getattr(module, kind + suffix).numel() for kind in kinds)
    return weights + entry_of(module, RECURRENT_GATES) * module.hidden_size


RECURRENT_GATES = {nn.RNN: 1, nn.RNNCell: 1, nn.GRU: 7, nn.GRUCell: 7, nn.LSTM: 10, nn.LSTMCell: 10}

PAPER_RULES: Mapping[type[nn.Module] | str, ModuleRule] = {
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
    **dict.fromkeys(TIMM_ATTENTION, _timm_attention),
}

# Inside a module of the type on the left, modules of the types on the right are not counted. Attention blocks
# are charged as a whole. The published ConvNeXt figures hold no norm: they were of timm's own classes, which the
# library did not know (nor timm's GELU, which is no nn.GELU, here neither). The DeiT figures beside them do hold
# the norms, so it takes the model to tell, not the norm.
UNCOUNTED_INSIDE: Mapping[type[nn.Module] | str, tuple[type[nn.Module], ...]] = {
    nn.MultiheadAttention: (nn.Module,),
    **dict.fromkeys(TIMM_ATTENTION, (nn.Module,)),
    "timm.models.convnext.ConvNeXt": (nn.LayerNorm,),
}
