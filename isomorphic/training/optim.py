"""Parameter groups, optimizer and learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer

from isomorphic.errors import UserError
from isomorphic.processes import distributed
from isomorphic.training.recipe import OptimizerRecipe, ScheduleRecipe

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, _InstanceNorm, nn.RMSNorm)
# Names of learned tokens and position tables in timm's and torchvision's transformers.
EMBEDDINGS = (
    "cls_token",
    "dist_token",
    "reg_token",
    "pos_embed",
    "class_token",
    "position_embedding",
    "pos_embedding",
    "relative_position_bias_table",
)


def build_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> Optimizer:
    """Returns the recipe's optimizer over `parameter_groups`; its learning rate is set at the start of each epoch.

    Other constants are the reference trainer's: betas (0.9, 0.999) and eps 1e-8 of AdamW, alpha 0.9 and eps 0.0316 of
    RMSprop.
    """
    groups = parameter_groups(model, recipe)
    if recipe.opt == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    if recipe.opt == "rmsprop":
        return torch.optim.RMSprop(groups, lr=0.0, momentum=recipe.momentum, alpha=0.9, eps=0.0316)
    nesterov = recipe.opt == "sgd_nesterov"
    fused = not distributed.fsdp_modules(model)  # torch's fused SGD does not support sharded tensors
    return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum, nesterov=nesterov, fused=fused)


def parameter_groups(model: nn.Module, recipe: OptimizerRecipe) -> list[dict[str, Any]]:
    """Returns the trainable parameters, grouped by weight decay and, with `layer_decay`, by learning-rate scale.

    The recipe may set separate decays for biases (including those of norms), transformer embeddings, norms and vectors;
    a parameter gets the first one, in this order, that is set and applies to it, else `weight_decay`. With
    `layer_decay`, each group has an `lr_scale`, by which `set_learning_rate` multiplies its learning rate.

    Raises:
        UserError: with `layer_decay`, the model does not define its layers.
    """
    scales = None if recipe.layer_decay is None else layer_scales(model, recipe.layer_decay)
    groups: dict[tuple[float, float | None], list[nn.Parameter]] = {}
    seen: set[int] = set()  # a shared parameter is stepped once
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                scale = scales[id(parameter)] if scales else None
                key = _weight_decay(module, name, parameter, recipe), scale
                groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay} | ({} if scale is None else {"lr_scale": scale})
        for (decay, scale), parameters in groups.items()
    ]


def layer_scales(model: nn.Module, layer_decay: float) -> dict[int, float]:
    """Returns the learning-rate scale of each trainable parameter, by the parameter's id.

    The scale is `layer_decay` to the power of the number of layers between the parameter and the head. The layers are
    those that timm defines for the model: a stem or embedding, blocks, and the head, whose scale is 1. Removed blocks
    do not count.

    Raises:
        UserError: the model does not define its layers.
    """
    if not hasattr(model, "group_matcher"):
        raise UserError(
            f"--layer-decay {layer_decay}: {type(model).__name__} does not say what its layers are, "
            "as most of timm's models do: leave it out"
        )
    groups = param_groups_layer_decay(model, layer_decay=layer_decay)
    return {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}


def learning_rate(recipe: ScheduleRecipe, epoch: int) -> float:
    """Returns the learning rate of `epoch`, counted from 0; it is constant within an epoch.

    Warm-up is either constant at `lr_warmup_decay` · lr, or linear from there to lr. After it, the schedule starts:
    cosine down to `lr_min` over the remaining epochs, × gamma every `lr_step_size` epochs, or × gamma every epoch.
    Milestones, each of which is another × gamma, are epochs of the run, warm-up included.
    """
    warmup = recipe.lr_warmup_epochs
    if epoch < warmup:
        progress = epoch / warmup if recipe.lr_warmup_method == "linear" else 0.0
        return recipe.lr * (recipe.lr_warmup_decay + (1 - recipe.lr_warmup_decay) * progress)
    if recipe.lr_scheduler == "multisteplr":
        return recipe.lr * recipe.lr_gamma ** sum(epoch >= milestone for milestone in recipe.lr_milestones)
    epoch -= warmup
    if recipe.lr_scheduler == "cosineannealinglr":
        progress = epoch / (recipe.epochs - warmup)
        return recipe.lr_min + (recipe.lr - recipe.lr_min) * (1 + math.cos(math.pi * progress)) / 2
    drops = epoch // recipe.lr_step_size if recipe.lr_scheduler == "steplr" else epoch
    return recipe.lr * recipe.lr_gamma**drops


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group to `lr`, times the group's `lr_scale` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def _weight_decay(module: nn.Module, name: str, parameter: nn.Parameter, recipe: OptimizerRecipe) -> float:
    if name == "bias" and recipe.bias_weight_decay is not None:
        return recipe.bias_weight_decay
    if name in EMBEDDINGS and recipe.transformer_embedding_decay is not None:
        return recipe.transformer_embedding_decay
    if isinstance(module, NORMS) and recipe.norm_weight_decay is not None:
        return recipe.norm_weight_decay
    if parameter.ndim <= 1 and recipe.vector_weight_decay is not None:
        return recipe.vector_weight_decay
    return recipe.weight_decay
