"""What each layer does: part of an attention, of an MLP, a convolution, or none that may lose single weights.

DIMAP's modules (ICLR 2024, section 3): QKV, PRJ and MLP are the layers of those kinds in all blocks of all stages, AUX
is never pruned. For other networks than Swin there are dense convolutions, by kernel size: "CONV 3×3".

Names tell what structure alone cannot: the parts of an attention by what libraries call them, which layers make the
first tokens, lead from stage to stage, or compute position tables. Everything else is seen from the layer itself and
from one run: the layer that reads the image, the classifier, and whether a weight is used as it stands. One that is
standardised or normalised before use is AUX, because its zeros would not be zeros in the product.

AUX are also depthwise convolutions: a filter of k·k weights is all that mixes a channel's positions, and all of them
together are a few percent of a network. Shortcut convolutions that are named a downsample, as patch merging is, carry
the stream from stage to stage and stay likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call, no_fast_path, tensors_in
from isomorphic.measure.exact_counter import EXACT_RULES
from isomorphic.observe import FunctionCalls, eval_mode

QKV, PRJ, MLP, AUX = "QKV", "PRJ", "MLP", "AUX"

_QKV_NAMES = frozenset((
    "qkv", "q", "k", "v", "kv", "qk", "query", "key", "value", "to_qkv", "to_q", "to_k", "to_v", "to_kv",
    "q_proj", "k_proj", "v_proj", "qkv_proj", "kv_proj", "in_proj", "wq", "wk", "wv", "wqkv",
))  # fmt: skip
_PRJ_NAMES = frozenset((
    "proj", "out_proj", "attn_out_proj", "proj_out", "to_out", "o_proj", "out", "wo", "merge", "dense",
))  # fmt: skip
# Only where a layer is a 1×1 convolution, or lies inside an attention, must its name say that it is an MLP's.
_MLP_NAMES = frozenset((
    "mlp", "ffn", "fc1", "fc2", "fc1_g", "fc1_x", "w1", "w2", "w3", "w12", "mlp_out_proj", "conv_reduce", "conv_expand",
))  # fmt: skip
_AUX_NAMES = frozenset((
    "stem", "conv_stem", "patch_embed", "patch_embeds", "pos_embed", "cpb_mlp",
    "downsample", "downsample_layers", "patch_merging", "reduction",
))  # fmt: skip
_MULTIHEAD_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_Conv = nn.modules.conv._ConvNd


def assign_roles(model: nn.Module, inputs: Inputs) -> dict[str, str]:
    """The role of every parameter, by name: "QKV", "PRJ", "MLP", "CONV 3×3" and other kernels, or "AUX".

    Args:
        model: any model, on the device of `inputs`; runs once.
        inputs: a batch, or a tuple of positional arguments.
    """
    used, ends = _run(model, inputs)
    attentions = {name for name, module in model.named_modules() if _is_attention(module)}
    roles = {name: AUX for name, _ in model.named_parameters()}
    for name, module in model.named_modules():
        for parameter, role in _roles_in(name, module, attentions).items():
            full_name = f"{name}.{parameter}" if name else parameter
            weight = getattr(module, parameter)
            if full_name in roles and id(weight) in used - ends:
                roles[full_name] = role
    return roles


def _roles_in(name: str, module: nn.Module, attentions: set[str]) -> dict[str, str]:
    """The roles of a module's own weights; none of a module that is no layer."""
    if isinstance(module, nn.MultiheadAttention):
        return {weight: QKV for weight in _MULTIHEAD_WEIGHTS if getattr(module, weight) is not None}
    if not isinstance(module, (nn.Linear, _Conv)):
        return {}
    parts = name.split(".")
    if not _AUX_NAMES.isdisjoint(parts):
        return {"weight": AUX}
    inside = [depth for depth in range(len(parts)) if ".".join(parts[:depth]) in attentions]
    if inside:
        return {"weight": _role_in_attention(parts[inside[-1] :])}
    return {"weight": MLP if isinstance(module, nn.Linear) else _role_of_conv(module, parts)}


def _role_in_attention(parts: Sequence[str]) -> str:
    """By the layer's way down from its attention: what makes position biases or mixes heads stays."""
    if parts[0] in _QKV_NAMES:
        return QKV
    if parts[0] in _PRJ_NAMES:
        return PRJ
    return AUX if _MLP_NAMES.isdisjoint(parts) else MLP


def _role_of_conv(conv: _Conv, parts: Sequence[str]) -> str:
    kernel = conv.kernel_size
    depthwise = conv.groups > 1 and conv.groups == conv.in_channels
    patches = max(kernel) > 1 and tuple(conv.stride) == tuple(kernel)  # as patch embedding and patch merging have it
    if depthwise or patches:
        return AUX
    if max(kernel) == 1 and not _MLP_NAMES.isdisjoint(parts):
        return MLP
    return f"CONV {'×'.join(map(str, kernel))}"


def _is_attention(module: nn.Module) -> bool:
    """Whether a module holds layers by the names of queries, keys and values."""
    named = (child for name, child in module.named_children() if name in _QKV_NAMES)
    return isinstance(module, nn.MultiheadAttention) or any(
        parameter.dim() > 1 for child in named for parameter in child.parameters()
    )


@torch.no_grad()
def _run(model: nn.Module, inputs: Inputs) -> tuple[set[int], set[int]]:
    """The ids of the parameters that are used as they stand, and of those at both ends: the first, the classifiers."""
    uses: list[tuple[int, tuple[int, ...] | None]] = []  # of a parameter by a layer's function, and the result's shape

    def note(func: Any, arguments: Sequence[Any], output: Any) -> None:
        if func in EXACT_RULES:
            shape = tuple(output.shape) if isinstance(output, Tensor) else None
            uses.extend((id(p), shape) for p in arguments if isinstance(p, nn.Parameter) and p.dim() > 1)

    with eval_mode(model), no_fast_path(), FunctionCalls(after=note):
        outputs = tensors_in(call(model, inputs))
    ends = {parameter for parameter, _ in uses[:1]}
    ends |= {parameter for parameter, shape in uses[-1:] if shape in [tuple(out.shape) for out in outputs]}
    ends |= {id(layer.weight) for layer in _classifiers(model)}
    return {parameter for parameter, _ in uses}, ends


def _classifiers(model: Any) -> list[Any]:
    """timm's own word for them: one, or two of a distilled model."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()
    heads = found if isinstance(found, (tuple, list)) else (found,)
    return [head for head in heads if isinstance(head, (nn.Linear, _Conv))]
