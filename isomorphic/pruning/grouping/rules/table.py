"""The table of operations: one line an operation, or a family of them.

A rule takes a `Call` and returns the axes of its result, or a list of them where it has several. To teach the tracer an
operation, add its aten name (without a trailing underscore: in-place forms share the rule) to the line of the rule that
fits. Element-wise operations that torch tags as such need no line, and composite operations without a line are taken
apart into what they are made of. What has no rule freezes what it touches and is named.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from isomorphic.pruning.grouping.call import Rule
from isomorphic.pruning.grouping.rules import contraction, elementwise, layers, movement, picking

_NAMES: dict[Rule, str] = {
    elementwise.pointwise: (
        "hardswish hardsigmoid hardtanh relu6 celu selu elu gelu silu mish dropout feature_dropout "
        "alpha_dropout native_dropout bernoulli clone contiguous to _to_copy alias detach lift_fresh "
        "lift masked_fill copy leaky_relu softplus threshold requires_grad "
        "log_sigmoid rrelu float_power rsub floor_divide complex polar"
    ),
    elementwise.like: (
        "uniform fill zero random exponential nan_to_num zeros_like ones_like empty_like full_like "
        "rand_like randn_like randint_like softmax _softmax _safe_softmax log_softmax _log_softmax cumsum"
    ),
    elementwise.where: "where",
    elementwise.cast: "type_as",
    elementwise.normal: "normal",
    elementwise.factory: "zeros ones empty full rand randn new_zeros new_ones new_empty new_full scalar_tensor",
    elementwise.fixed: "arange linspace eye randint randperm tril_indices triu_indices",
    movement.view: "view reshape _unsafe_view _reshape_alias view_as reshape_as",
    movement.permute: "permute",
    movement.transpose: "transpose t mT numpy_T swapaxes swapdims",
    movement.expand: "expand broadcast_to expand_as",
    movement.repeat: "repeat",
    movement.repeat_interleave: "repeat_interleave",
    movement.take_slice: "slice",
    movement.narrow: "narrow",
    movement.select: "select",
    movement.unbind: "unbind",
    movement.split: "split split_with_sizes unsafe_split unsafe_split_with_sizes",
    movement.chunk: "chunk unsafe_chunk",
    movement.insert: "unsqueeze",
    movement.squeeze: "squeeze",
    movement.flip: "flip",
    movement.roll: "roll",
    movement.cat: "cat concat concatenate",
    movement.stack: "stack",
    movement.pad: "pad constant_pad_nd",
    movement.pixel_shuffle: "pixel_shuffle",
    movement.pixel_unshuffle: "pixel_unshuffle",
    movement.channel_shuffle: "channel_shuffle native_channel_shuffle",
    movement.im2col: "im2col",
    movement.col2im: "col2im",
    movement.unfold: "unfold",
    movement.as_complex: "view_as_complex",
    movement.as_real: "view_as_real",
    movement.fourier: "_fft_r2c _fft_c2r _fft_c2c",
    picking.index: "index",
    picking.index_select: "index_select",
    picking.index_put: "index_put",
    picking.index_fill: "index_fill",
    picking.masked_scatter: "masked_scatter",
    picking.gather: "gather",
    picking.ordered: "topk sort argsort cumprod logcumsumexp cummax cummin",
    picking.scatter: "index_add index_copy index_reduce scatter scatter_add scatter_reduce",
    picking.pack_sequence: "_pack_padded_sequence",
    picking.embedding: "embedding",
    picking.embedding_bag: "_embedding_bag",
    picking.weight_norm: "_weight_norm_interface",
    elementwise.reduction: (
        "sum mean nansum amax amin prod all any logsumexp max min median var std var_mean std_mean norm "
        "linalg_vector_norm argmax argmin count_nonzero"
    ),
    elementwise.loss: "mse_loss smooth_l1_loss huber_loss binary_cross_entropy",
    contraction.matmul: "matmul mm bmm mv dot vdot",
    contraction.add_matmul: "addmm baddbmm _sparse_addmm",
    contraction.einsum: "einsum",
    contraction.linear: "linear",
    contraction.attention: "scaled_dot_product_attention",
    contraction.grouped_matmul: "_grouped_mm",
    contraction.cdist: "cdist _cdist_forward",
    contraction.glu: "glu",
    layers.convolution: (
        "conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d"
    ),
    layers.batch_norm: "batch_norm instance_norm native_batch_norm",
    layers.layer_norm: "layer_norm native_layer_norm rms_norm _fused_rms_norm",
    layers.group_norm: "group_norm",
    layers.prelu: "prelu _prelu_kernel",
    layers.pixels: (
        "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices "
        "avg_pool1d avg_pool2d avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool3d "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
        "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d reflection_pad3d "
        "replication_pad1d replication_pad2d replication_pad3d"
    ),
    layers.regions: "roi_align roi_pool",
    layers.position_sensitive_regions: "ps_roi_align ps_roi_pool",
    layers.deformable_convolution: "deform_conv2d",
    layers.grid_sample: "grid_sampler grid_sampler_2d grid_sampler_3d",
    picking.triangle: "tril triu",
    picking.diagonal: "diagonal diag",
}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}


@functools.cache
def find_rule(func: Any) -> Rule | None:
    """The rule of an aten overload: its line in `RULES`, or that of element-wise operations where torch tags it so.

    Torch tags some in-place forms less carefully than the operation itself.
    """
    name = func._schema.name.partition("::")[2]
    rule = RULES.get(name) or RULES.get(name.rstrip("_"))
    if rule is not None:
        return rule
    plain = getattr(torch.ops.aten, name.rstrip("_"), None) if name.endswith("_") else None
    forms = [func, *(getattr(plain, overload) for overload in plain.overloads())] if plain else [func]
    return elementwise.pointwise if any(torch.Tag.pointwise in form.tags for form in forms) else None
