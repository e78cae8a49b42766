"""What `.pth` files hold: whole models and weights as `torch.save` wrote them, with timm 0.9.2 or newer.

They are read without running anything of theirs (`safe_pickle.py`). What today's timm expects of modules is then added
to those of older versions (`older_timm.py`), and what the file tells of its model becomes the spec that a checkpoint
of it needs.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torchvision.models import MobileNetV2

from isomorphic.checkpoints.released.older_timm import bring_up_to_date
from isomorphic.checkpoints.released.safe_pickle import RefusedError, read_safely
from isomorphic.checkpoints.released.weight_sets import choose_weights, told_names
from isomorphic.data.transforms import Preprocessing
from isomorphic.errors import UserError
from isomorphic.models import (
    LARGEST_ARGUMENT,
    ModelSpec,
    build_skeleton,
    check_preprocessing,
    describe_model,
    plain_preprocessing,
    torchvision_classifiers,
)


@dataclass(frozen=True)
class Contents:
    """What a `.pth` file holds.

    Attributes:
        weights: a whole model, brought up to date, in float32 and in eval mode, or a state dict as it was stored.
        architecture: the name that the file gives its model, if it does: a timm model's, else a torchvision model's.
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
    weights = choose_weights(stored, use_ema, path)
    told = [*told_names(stored)]
    if not isinstance(weights, nn.Module):
        return Contents(weights, *_first_known(told))
    try:
        bring_up_to_date(weights)
        weights.float().eval()  # images are float32, whatever the precision that the file was kept in
        config = pretrained_config(weights)
    except Exception as error:  # its attributes are whatever the file says
        raise UserError(_damaged(path, error)) from error
    if isinstance(weights, MobileNetV2):
        return Contents(weights, "mobilenet_v2", "torchvision")
    names = (f"{config.get('architecture')}.{config.get('tag')}", config.get("architecture"), *told)
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
        UserError: the library refuses the name; the file holds weights and does not name their model, or a model that
            the arguments of a builder without a name cannot change, or one that contradicts itself.
    """
    model = contents.weights
    if isinstance(model, nn.Module) and name is None and (kwargs or builder != "timm"):
        raise UserError(
            f"{path} holds a whole model, which is as it is: leave out the model's keyword arguments and its library "
            f"(or name the dense model that it was made from: convert.py --name NAME)"
        )
    if name is None:
        name, builder = contents.architecture, contents.builder
    if not isinstance(model, nn.Module):
        if name is None:
            raise UserError(
                f"{path} holds weights without their model: give the model's name, --model NAME --checkpoint {path} "
                "(convert.py --name NAME)"
            )
        return describe_model(name, builder=builder, kwargs=kwargs, input_size=input_size)
    try:
        return _describe_whole(model, name, builder, kwargs or {}, input_size)
    except UserError:
        raise
    except Exception as error:  # its attributes are whatever the file says
        raise UserError(_damaged(Path(path), error)) from error


def read_pickle(path: str | Path, *, trust: bool = False) -> Any:
    """What `torch.save` wrote, if it is made of tensors, plain values, `argparse.Namespace` and listed layers.

    Raises:
        UserError: the file is no such file, is damaged, or wants something else and is not trusted.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what no file of torch.save holds: that becomes an error anyway
            return read_safely(path)
    except RefusedError as error:
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


def _damaged(path: Path, error: Exception) -> str:
    text = str(error).strip()
    if "torchscript" in text.lower():
        return f"{path} is a TorchScript archive, which is a program: only models and weights are read"
    text = text.rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    reason = text.splitlines()[0][:120]
    return f"{path} is not a whole file that torch.save wrote of a model or of weights ({reason})"


# --- what a file holds ---


def _first_known(names: list[str]) -> tuple[str | None, str]:
    """Returns the first name that timm knows, else the first that torchvision knows, and whose it is."""
    for builder, known in (("timm", _known), ("torchvision", lambda name: name in torchvision_classifiers())):
        for name in names:
            if known(name):
                return name, builder
    return None, "timm"


def _known(name: Any) -> str | None:
    """The name, if timm knows it, tag included."""
    try:
        return name if isinstance(name, str) and timm.is_model(name) and timm.get_pretrained_cfg(name) else None
    except RuntimeError:  # an unknown tag
        return None


# --- how its model was built ---


def _describe_whole(
    model: nn.Module, name: str | None, builder: str, kwargs: dict[str, Any], input_size: int | None
) -> ModelSpec:
    """The spec of a whole model, for `describe_pth`."""
    classes = _width_of_classifier(model)
    kwargs = ({} if classes in (1000, None) else {"num_classes": classes}) | kwargs
    size = input_size or _own_input_size(model)
    if name is None:
        size = size or pretrained_config(model).get("input_size", (224,))[-1]
        spec = ModelSpec(builder, type(model).__name__, kwargs, plain_preprocessing(size))
    else:
        spec = describe_model(name, builder=builder, kwargs=kwargs, input_size=size)
    spec = dataclasses.replace(spec, preprocessing=_own_preprocessing(model, spec.preprocessing))
    _drop_path_rate(model)  # which has to be one, even if it cannot be compared
    try:
        return _compare(model, build_skeleton(spec), spec)
    except UserError:  # no such model: it can be used, but not saved
        return spec


def _width_of_classifier(model: nn.Module) -> int | None:
    """The model's own word, else the width of its last linear layer."""
    classes = getattr(model, "num_classes", None)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    classes = classes if isinstance(classes, int) else layers[-1].out_features if layers else None
    if classes is not None and not (type(classes) is int and 0 <= classes <= LARGEST_ARGUMENT):
        raise ValueError("its number of classes is none")
    return classes


def _own_input_size(model: nn.Module) -> int | None:
    """The side of the images that a model splits into patches, if it is fixed."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size[0] if isinstance(size, tuple) and size and isinstance(size[0], int) else None


def _own_preprocessing(model: nn.Module, default: Preprocessing) -> Preprocessing:
    """The mean, the standard deviation and the interpolation that the model was published with."""
    config = pretrained_config(model)
    try:
        mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
        own = dataclasses.replace(default, mean=mean, std=std, interpolation=str(config["interpolation"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return default
    check_preprocessing(own)
    return own


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
    rates = [round(module.drop_prob, 4) for module in model.modules() if isinstance(module, DropPath)]
    if not all(0 <= rate < 1 for rate in rates):
        raise ValueError("a rate of drop path is not in [0, 1)")
    return max(rates, default=0.0)
