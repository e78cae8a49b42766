"""Reading `.pth` files safely: whole models and weights as `torch.save` wrote them, with timm 0.9.2 or newer.

A pickle is a program. Here it may name the layer classes of `LAYERS` and what torch needs for tensors, and no more:
what else it names is found before any of it runs. Layers are made without their constructors, get their attributes,
and must be as their classes are: a pickle sets no method and no hook. What today's timm expects of modules is then
added to those of older versions.
"""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from timm.layers.drop import DropPath
from timm.layers.format import Format
from torch import Tensor, nn
from torchvision.models import MobileNetV2

from isomorphic.data import Preprocessing
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, build_skeleton, describe_model, plain_preprocessing
from isomorphic.older_timm import bring_up_to_date

# What holds weights in the dicts that trainers write, averaged ones (EMA) and raw ones.
AVERAGED, RAW = ("state_dict_ema", "model_ema"), ("model", "state_dict")

# Classes that a pickle may make, by the modules that it names them under: those of today, and of older versions.
LAYERS: Mapping[str, str] = {
    "torch.nn.modules.activation": "GELU Hardsigmoid Hardswish LeakyReLU ReLU ReLU6 SiLU Sigmoid Softmax",
    "torch.nn.modules.batchnorm": "BatchNorm2d",
    "torch.nn.modules.container": "ModuleList Sequential",
    "torch.nn.modules.conv": "Conv2d",
    "torch.nn.modules.dropout": "Dropout",
    "torch.nn.modules.flatten": "Flatten",
    "torch.nn.modules.linear": "Identity Linear",
    "torch.nn.modules.normalization": "GroupNorm LayerNorm",
    "torch.nn.modules.pooling": "AdaptiveAvgPool2d AvgPool2d MaxPool2d",
    "timm.layers.activations": "GELU Sigmoid",
    "timm.layers.adaptive_avgmax_pool": "FastAdaptiveAvgPool SelectAdaptivePool2d",
    "timm.layers.attention": "Attention",
    "timm.layers.classifier": "ClassifierHead NormMlpClassifierHead",
    "timm.layers.conv_bn_act": "ConvNormAct",
    "timm.layers.drop": "DropPath",
    "timm.layers.layer_scale": "LayerScale",
    "timm.layers.mlp": "Mlp",
    "timm.layers.norm": "LayerNorm LayerNorm2d",
    "timm.layers.norm_act": "BatchNormAct2d",
    "timm.layers.patch_embed": "PatchEmbed",
    "timm.layers.squeeze_excite": "SEModule",
    "timm.models.convnext": "ConvNeXt ConvNeXtBlock ConvNeXtStage",
    "timm.models.deit": "VisionTransformerDistilled",
    "timm.models.regnet": "Bottleneck RegNet RegStage",
    "timm.models.resnet": "BasicBlock Bottleneck ResNet",
    "timm.models.swin_transformer": (
        "PatchMerging SwinTransformer SwinTransformerBlock SwinTransformerStage WindowAttention"
    ),
    "timm.models.vision_transformer": "Attention Block LayerScale VisionTransformer",
    "torchvision.models.mobilenetv2": "InvertedResidual MobileNetV2",
    "torchvision.models.resnet": "BasicBlock Bottleneck ResNet",
    "torchvision.ops.misc": "Conv2dNormActivation",
}


@dataclass(frozen=True)
class Contents:
    """What a `.pth` file holds.

    Attributes:
        weights: a whole model, brought up to date and in eval mode, or a state dict.
        architecture: the name that the file gives its model, if it does: a timm model's, or "mobilenet_v2".
        builder: the library that knows that name.
    """

    weights: nn.Module | dict[str, Tensor]
    architecture: str | None = None
    builder: str = "timm"


def read_pth(path: str | Path, *, use_ema: bool | None = None, trust: bool = False) -> Contents:
    """The model or the weights of a `.pth` file, on the CPU.

    Args:
        path: a whole model, a state dict, or a dict that holds either under the keys that trainers use.
        use_ema: take the averaged weights, or the raw ones; None takes the averaged ones where there are some.
        trust: load the file even if it names things that may run code.

    Raises:
        UserError: the file is damaged, wants to run something, or does not hold such weights.
    """
    path = Path(path)
    stored = read_pickle(path, trust=trust)
    weights = _choose(stored, use_ema, path)
    told = stored.get("arch") if isinstance(stored, dict) else None
    if not isinstance(weights, nn.Module):
        return Contents(_plain_state_dict(weights, path), _known(told))
    try:
        bring_up_to_date(weights)
        weights.eval()
        config = pretrained_config(weights)
    except Exception as error:  # its attributes are whatever the file says
        raise UserError(_damaged(path, error)) from error
    if isinstance(weights, MobileNetV2):
        return Contents(weights, "mobilenet_v2", "torchvision")
    names = (f"{config.get('architecture')}.{config.get('tag')}", config.get("architecture"), told)
    return Contents(weights, next((name for name in names if _known(name)), None))


def describe_pth(
    contents: Contents,
    path: str | Path,
    *,
    builder: str = "timm",
    name: str | None = None,
    kwargs: dict[str, Any] | None = None,
    input_size: int | None = None,
) -> ModelSpec:
    """How to build the dense model of what `read_pth` found in a file, as far as that can be told.

    Args:
        contents: a model, or weights.
        path: the file.
        builder, name, kwargs: the dense model, as in `describe_model`; without `name`, what the file says.
        input_size: side of the input in pixels; None leaves it to the model.

    Raises:
        UserError: the library refuses the name, or the file holds weights and does not name their model.
    """
    if name is None:
        name, builder = contents.architecture, contents.builder
    model = contents.weights
    if not isinstance(model, nn.Module):
        if name is None:
            raise UserError(f"{path} holds weights without their model: give the model's name (convert.py --name NAME)")
        return describe_model(name, builder=builder, kwargs=kwargs, input_size=input_size)
    classes = _width_of_classifier(model)
    kwargs = ({} if classes in (1000, None) else {"num_classes": classes}) | (kwargs or {})
    size = input_size or _own_input_size(model)
    if name is None:
        size = size or pretrained_config(model).get("input_size", (224,))[-1]
        spec = ModelSpec(builder, type(model).__name__, kwargs, plain_preprocessing(size))
    else:
        spec = describe_model(name, builder=builder, kwargs=kwargs, input_size=size)
    spec = dataclasses.replace(spec, preprocessing=_own_preprocessing(model, spec.preprocessing))
    try:
        return _compare(model, build_skeleton(spec), spec)
    except UserError:  # no such model: it can be used, but not saved
        return spec


def read_pickle(path: str | Path, *, trust: bool = False) -> Any:
    """What `torch.save` wrote, if it is made of tensors, plain values, `argparse.Namespace` and the layers of `LAYERS`.

    Raises:
        UserError: the file is no such file, is damaged, or wants something else and is not trusted.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        return _read_safely(path)
    except _RefusedError as error:
        if not trust:
            raise UserError(
                f"{path} is refused: {error}; if you trust where the file comes from, --trust-checkpoint "
                "(in Python, trust=True) loads it all the same, and runs what it wants to run"
            ) from error
    except Exception as error:  # damaged bytes can raise anything
        raise UserError(_damaged(path, error)) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # so can the code of a trusted file
        raise UserError(_damaged(path, error)) from error


def pretrained_config(model: nn.Module) -> dict[str, Any]:
    """What a timm model says of its weights: architecture, tag, input size, mean, std …; empty for others."""
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


# --- the safe way in ---


class _RefusedError(Exception):
    """What a pickle may not do."""


def _read_safely(path: Path) -> Any:
    stand_ins = _stand_ins()
    allowed = [(stand_in, name) for name, stand_in in stand_ins.items()]
    others = [(Format, "timm.layers.format.Format"), (argparse.Namespace, "argparse.Namespace")]
    with torch.serialization.safe_globals([*allowed, *others]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what no file of torch.save holds: that becomes an error anyway
        if names := _unknown_names(path):
            raise _RefusedError(f"it wants {', '.join(names[:3])}{' …' if len(names) > 3 else ''}, which is no layer")
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if wanted := re.search(r"GLOBAL (\S+)", str(error)):
                raise _RefusedError(f"it wants {wanted[1]}, which is no layer") from error
            raise
    layers = {stand_in: stand_in.__bases__[0] for stand_in in stand_ins.values()}
    for value in stored.values() if isinstance(stored, dict) else (stored,):
        if isinstance(value, nn.Module):
            _unmask(value, layers)
    return stored


def _stand_ins() -> dict[str, type]:
    """By the names in pickles, subclasses of the layers that can be made and filled, but not constructed."""

    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        raise _RefusedError(f"it wants to construct {type(self).__name__}, not to fill one")

    layers = {f"{home}.{name}": getattr(import_module(home), name) for home in LAYERS for name in LAYERS[home].split()}
    return {name: type(layer.__name__, (layer,), {"__init__": construct}) for name, layer in layers.items()}


def _unknown_names(path: Path) -> list[str]:
    """The classes and functions that a pickle names and may not have, before any of it runs.

    Files of torch before 1.6 are no archives, and are left to torch, which stops at the first such name.
    """
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))) if is_archive else []


def _unmask(model: nn.Module, layers: Mapping[type, type]) -> None:
    """Makes the stand-ins in a model the layers that they stand for, which must be as their classes are."""
    pending, seen = [model], set()
    while pending:  # not by model.modules(), which may be its own
        module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        pending += [child for child in vars(module)["_modules"].values() if isinstance(child, nn.Module)]
        module.__class__ = layers.get(type(module), type(module))  # models that share modules come by more than once
        for name, value in vars(module).items():
            if callable(getattr(type(module), name, None)) or (name.endswith("hooks") and value):
                raise _RefusedError(f"its {type(module).__name__} comes with {name} of its own")
            if isinstance(value, type) and value in layers:
                module.__dict__[name] = layers[value]


def _damaged(path: Path, error: Exception) -> str:
    text = str(error).strip()
    if "torchscript" in text.lower():
        return f"{path} is a TorchScript archive, which is a program: only models and weights are read"
    text = text.rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    reason = text.splitlines()[0][:120]
    return f"{path} is not a whole file that torch.save wrote of a model or of weights ({reason})"


# --- what a file holds ---


def _choose(stored: Any, use_ema: bool | None, path: Path) -> Any:
    """The model or state dict among what was stored."""
    if isinstance(stored, nn.Module) or not isinstance(stored, dict):
        stored = {"model": stored}
    averaged, raw = (next((stored[key] for key in keys if stored.get(key)), None) for keys in (AVERAGED, RAW))
    if raw is None and averaged is None:
        raw = stored
    if use_ema and averaged is None:
        raise UserError(f"{path} holds no averaged weights (of {' or '.join(AVERAGED)}): leave out --use-ema")
    if use_ema is False and raw is None:
        raise UserError(f"{path} holds averaged weights only: leave out --no-use-ema")
    return raw if averaged is None or use_ema is False else averaged


def _plain_state_dict(weights: Any, path: Path) -> dict[str, Tensor]:
    """Tensors by name, without what wrappers for several processes or for averaging put around a model."""
    tensors = dict(weights) if isinstance(weights, dict) else {}
    tensors.pop("n_averaged", None)
    if not tensors or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()):
        raise UserError(f"{path} holds neither a model nor weights (under {', '.join(AVERAGED + RAW)}, or bare)")
    wrapped = all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in tensors.items()}


def _known(name: Any) -> str | None:
    """The name, if timm knows it, tag included."""
    try:
        return name if isinstance(name, str) and timm.is_model(name) and timm.get_pretrained_cfg(name) else None
    except RuntimeError:  # an unknown tag
        return None


# --- how its model was built ---


def _width_of_classifier(model: nn.Module) -> int | None:
    """The model's own word, else the width of its last linear layer."""
    classes = getattr(model, "num_classes", None)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return classes if isinstance(classes, int) else layers[-1].out_features if layers else None


def _own_input_size(model: nn.Module) -> int | None:
    """The side of the images that a model splits into patches, if it is fixed."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size[0] if isinstance(size, tuple) and size and isinstance(size[0], int) else None


def _own_preprocessing(model: nn.Module, default: Preprocessing) -> Preprocessing:
    """The mean, the standard deviation and the interpolation that the model was published with."""
    config = pretrained_config(model)
    try:
        mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
        return dataclasses.replace(default, mean=mean, std=std, interpolation=str(config["interpolation"]))
    except (KeyError, TypeError, ValueError):
        return default


def _compare(model: nn.Module, dense: nn.Module, spec: ModelSpec) -> ModelSpec:
    """The spec with the drop path rate of `model`, and with the blocks that are left of the dense model's.

    Lists of modules that are shorter than the dense model's have its first ones, whichever they were.
    """
    rate, lists, twins = _drop_path_rate(model), (nn.Sequential, nn.ModuleList), dict(dense.named_modules())
    kwargs = spec.kwargs if rate == _drop_path_rate(dense) else {"drop_path_rate": rate} | spec.kwargs
    kept = {
        name: tuple(range(len(module)))
        for name, module in model.named_modules()
        if isinstance(module, lists) and isinstance(twin := twins.get(name), lists) and 0 < len(module) < len(twin)
    }
    return dataclasses.replace(spec, kwargs=kwargs, kept_blocks=kept)


def _drop_path_rate(model: nn.Module) -> float:
    """That of the last block, which is the highest."""
    return max((round(module.drop_prob, 4) for module in model.modules() if isinstance(module, DropPath)), default=0.0)
