"""Building a model by name: what a checkpoint stores instead of code."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from isomorphic.data import Preprocessing
from isomorphic.errors import UserError

BUILDERS = ("timm", "torchvision")
# The library's first ImageNet weights: the ones that the paper prunes.
TORCHVISION_WEIGHTS = "IMAGENET1K_V1"
# A spec is data: its arguments may not make a builder open a file (timm loads this one, as a pickle if need be).
REFUSED_KWARGS = ("checkpoint_path",)
# What builders raise for arguments that they cannot use.
REFUSALS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, AssertionError)
# The paper evaluates every model at 224 pixels after resizing the shorter side to 256.
RESIZE_OVER_CROP = 256 / 224


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build the dense model again, and how an image reaches it.

    Attributes:
        builder: the library that knows `name`: "timm" or "torchvision".
        name: the model's name there, a pretrained tag included ("convnext_base.fb_in1k").
        kwargs: keyword arguments of the builder (JSON values).
        preprocessing: the evaluation transform.
    """

    builder: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`, also after a trip through JSON (where tuples became lists).

        Raises:
            KeyError, TypeError, ValueError: what is stored is no spec.
        """
        p = stored["preprocessing"]
        mean, std = (tuple(float(value) for value in p[key]) for key in ("mean", "std"))
        preprocessing = Preprocessing(int(p["input_size"]), int(p["resize_size"]), str(p["interpolation"]), mean, std)
        return cls(str(stored["builder"]), str(stored["name"]), dict(stored["kwargs"]), preprocessing)


def describe_model(
    name: str,
    *,
    builder: str = "timm",
    kwargs: dict[str, Any] | None = None,
    input_size: int | None = None,
    num_classes: int | None = None,
) -> ModelSpec:
    """Completes a model's name to a `ModelSpec` without building it.

    Args:
        name: a timm or torchvision model name.
        builder: "timm" or "torchvision".
        kwargs: keyword arguments for the builder; they win over the two below.
        input_size: side of the input in pixels; passed on as `img_size` to the builders that fix it.
        num_classes: width of the classifier.

    Raises:
        UserError: the library does not know the name, or its input is not square.
    """
    kwargs = dict(kwargs or {})
    if num_classes is not None:
        kwargs.setdefault("num_classes", num_classes)
    _check_name(builder, name)
    if builder == "torchvision":
        size = input_size or 224
        preprocessing = Preprocessing(size, round(size * RESIZE_OVER_CROP), "bilinear")
        return ModelSpec(builder, name, kwargs, preprocessing)
    config = timm.get_pretrained_cfg(name)
    native = config.input_size[-1] if config else 224
    size = input_size or kwargs.get("img_size") or native
    _require(isinstance(size, int), f"img_size={size}: give one whole number, the side of a square image")
    if config and config.fixed_input_size and size != native:
        kwargs.setdefault("img_size", size)
    preprocessing = Preprocessing(input_size=size, resize_size=round(size * RESIZE_OVER_CROP))
    if config:
        preprocessing = dataclasses.replace(
            preprocessing, interpolation=config.interpolation, mean=tuple(config.mean), std=tuple(config.std)
        )
    return ModelSpec(builder, name, kwargs, preprocessing)


def build_model(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """Builds the dense model of a spec, in eval mode, on the current default device.

    Raises:
        UserError: the builder refuses the name or the keyword arguments, or the weights cannot be reached.
    """
    _check_name(spec.builder, spec.name)
    refused = [key for key in REFUSED_KWARGS if key in spec.kwargs]
    _require(not refused, f"{spec.name}: {', '.join(refused)} is not an argument that a model may be built with")
    try:
        with _quiet_hub():
            model = _call_builder(spec, pretrained)
    except OSError as error:  # the hub's and urllib's errors are all OSErrors
        raise UserError(
            f"cannot get the pretrained weights of {spec.name} ({type(error).__name__}): "
            "check the connection, or pass --no-pretrained for random weights"
        ) from error
    except REFUSALS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot build {spec.name} with {spec.kwargs or 'its defaults'}: {reason}") from error
    return model.eval()


def num_classes(model: nn.Module, spec: ModelSpec) -> int:
    """Width of the classifier: the model's own word, else the spec's, else ImageNet's 1000."""
    return int(getattr(model, "num_classes", spec.kwargs.get("num_classes", 1000)))


def check_input_size(model: nn.Module, size: int, who: str) -> None:
    """Runs one black image of `size` × `size` pixels through `model`, which `who` names.

    Raises:
        UserError: the model does not take it.
    """
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(next(model.parameters()).new_zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{who} does not take images of {size}×{size} pixels: {reason}") from error
    finally:
        model.train(was_training)


def example_inputs(spec: ModelSpec, device: torch.device | str = "cpu") -> torch.Tensor:
    """One random image of the spec's input size, shape (1, 3, H, W)."""
    size = spec.preprocessing.input_size
    if torch.device(device).type == "meta":
        return torch.empty(1, 3, size, size, device=device)
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)


def _check_name(builder: str, name: str) -> None:
    """Names outside the library's own list (timm would also take hub addresses and folders) go no further."""
    _require(builder in BUILDERS, f"unknown model builder {builder!r}: one of {', '.join(BUILDERS)}")
    if builder == "torchvision":
        _require(name in torchvision.models.list_models(), f"unknown torchvision model: {name}")
        return
    _require(timm.is_model(name), f"unknown timm model: {name} (timm.list_models('*part*') finds names)")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"unknown timm model: {name} (timm.list_pretrained('*part*') finds tags)") from error


def _call_builder(spec: ModelSpec, pretrained: bool) -> nn.Module:
    if spec.builder == "torchvision":
        weights = TORCHVISION_WEIGHTS if pretrained else None
        return torchvision.models.get_model(spec.name, weights=weights, **spec.kwargs)
    return timm.create_model(spec.name, pretrained=pretrained, **spec.kwargs)


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Holds back the hub client's retry chatter: what matters is said once, in the error."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
