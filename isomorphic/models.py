"""Builds models by name, or from a user's own file, and describes them as data that a checkpoint can store."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration

from isomorphic.data.transforms import Preprocessing
from isomorphic.errors import UserError, first_line
from isomorphic.kinds import library
from isomorphic.user_file import UserFactory, load_factory

BUILDERS = ("timm", "torchvision", "file")
# Parameters by which a user's factory takes the side of its input in pixels.
SIZE_ARGUMENTS = ("img_size", "input_size")
# The first ImageNet weights that torchvision published for a model, which the paper prunes.
TORCHVISION_WEIGHTS = "IMAGENET1K_V1"
# Arguments that make a builder open a file (timm loads the first, even as a pickle) or download one (torchvision's two
# others). A spec is data from a checkpoint and must do neither.
REFUSED_KWARGS = ("checkpoint_path", "weights", "weights_backbone")
# Upper limits of the integers that a checkpoint may pass to a library's builder, and of its image size in pixels.
LARGEST_ARGUMENT, LARGEST_IMAGE = 100_000, 8192
# Errors that builders raise for invalid arguments, and forward code for inputs or a depth that it does not support.
REFUSALS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, AssertionError)
# The paper evaluates every model at 224 pixels after resizing the shorter side to 256.
RESIZE_OVER_CROP = 256 / 224


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build the dense model again and to prepare its images.

    Attributes:
        builder: the library that has the model, "timm" or "torchvision"; or "file" for a user's own file.
        name: the model's name in that library, with its pretrained tag ("convnext_base.fb_in1k"); or "file.py:factory".
        kwargs: keyword arguments of the builder (JSON values).
        preprocessing: the evaluation transform.
        kept_blocks: indices of the dense model's blocks that remain, by the name of the module that holds them; modules
            that kept all of their blocks are left out.
        sha256: hash of the user's file; None for libraries.
        masked: names, in the pruned model, of the parameters whose zeros are pruned weights; checkpoints store them,
            building the model does not need them.
        class_names: names of the classes that the logits stand for, in their order; none where nobody knows them.
        factory: the imported function that builds a user's model; never stored.
    """

    builder: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    kept_blocks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sha256: str | None = None
    masked: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    factory: UserFactory | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns the spec as JSON values."""
        stored = {"builder": self.builder, "name": self.name, "kwargs": self.kwargs}
        stored["preprocessing"] = dataclasses.asdict(self.preprocessing)
        if self.kept_blocks:
            stored["kept_blocks"] = {name: list(kept) for name, kept in self.kept_blocks.items()}
        if self.class_names:
            stored["class_names"] = list(self.class_names)
        return stored | ({"sha256": self.sha256} if self.sha256 else {})

    def keeping(self, kept: Mapping[str, Sequence[int]]) -> ModelSpec:
        """Returns the spec after `keep_blocks(model, kept)`, with names and indices of this spec's model in `kept`.

        Raises:
            UserError: a masked parameter is in a block that is not named by a number, so it is not clear if it remains.
        """
        after = dict(self.kept_blocks)
        for name, indices in kept.items():
            dense = self.dense_name(name)
            before = self.kept_blocks.get(dense)
            after[dense] = tuple(before[index] if before else index for index in indices)
        masked = [left for name in self.masked if (left := _name_left(name, kept))]
        return dataclasses.replace(self, kept_blocks=after, masked=tuple(masked))

    def masking(self, names: Iterable[str]) -> ModelSpec:
        """Returns the spec with these parameters added to the masked ones."""
        return dataclasses.replace(self, masked=tuple(dict.fromkeys((*self.masked, *names))))

    def dense_name(self, name: str) -> str:
        """Returns the dense model's name of a module or parameter: indices change in lists that lost blocks."""
        path: list[str] = []
        for part in filter(None, name.split(".")):
            kept = self.kept_blocks.get(".".join(path))
            path.append(str(kept[int(part)]) if kept and part.isdecimal() else part)
        return ".".join(path)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> ModelSpec:
        """Returns the spec that `to_dict` stored, also if JSON turned its tuples into lists.

        A "file" spec has no factory: stored data must not cause an import.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: `stored` is not a spec.
        """
        p = stored["preprocessing"]
        mean, std = (tuple(float(value) for value in p[key]) for key in ("mean", "std"))
        preprocessing = Preprocessing(int(p["input_size"]), int(p["resize_size"]), str(p["interpolation"]), mean, std)
        check_preprocessing(preprocessing)
        sha256 = str(stored["sha256"]) if stored["builder"] == "file" else None
        blocks = {str(name): tuple(map(int, kept)) for name, kept in stored.get("kept_blocks", {}).items()}
        names = parse_class_names(stored)
        builder, name, kwargs = str(stored["builder"]), str(stored["name"]), dict(stored["kwargs"])
        return cls(builder, name, kwargs, preprocessing, blocks, sha256, class_names=names)


def parse_class_names(stored: dict[str, Any]) -> tuple[str, ...]:
    """Returns the class names in stored data; none if there are none, as in files that are older than the field.

    Raises:
        ValueError: they are no list of texts.
    """
    names = stored.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its class names are no list of texts")
    return tuple(names)


class _TooLargeError(UserError):
    """The model exceeds a limit of `at_most`; never reported as a builder that refuses its arguments."""


def check_preprocessing(preprocessing: Preprocessing) -> None:
    """Checks mean, standard deviation and sizes.

    Raises:
        ValueError: images cannot be prepared with these values.
    """
    p = preprocessing
    if not (len(p.mean) == len(p.std) == 3 and all(map(math.isfinite, p.mean + p.std)) and min(p.std) > 0):
        raise ValueError("its mean and standard deviation are not three numbers each")
    if not all(1 <= size <= LARGEST_IMAGE for size in (p.input_size, p.resize_size)):
        raise ValueError(f"its images are not of 1 to {LARGEST_IMAGE} pixels a side")


def describe_model(
    name: str,
    *,
    builder: str = "timm",
    kwargs: dict[str, Any] | None = None,
    input_size: int | None = None,
    num_classes: int | None = None,
) -> ModelSpec:
    """Returns the `ModelSpec` of a model's name without building the model; a user's file is imported.

    Args:
        name: a timm or torchvision model name, or "path/to/file.py:factory".
        builder: "timm", "torchvision" or "file".
        kwargs: keyword arguments for the builder; they take precedence over the two arguments below.
        input_size: side of the input in pixels; passed as `img_size` to timm models of a fixed input size, and to a
            user's factory that takes `img_size` or `input_size`.
        num_classes: width of the classifier; passed to a user's factory only if that takes `num_classes`.

    Raises:
        UserError: the library does not know the name, its input is not square, or the file cannot be imported.
    """
    kwargs = dict(kwargs or {})
    if builder == "file":
        return _describe_user_model(load_factory(name), kwargs, input_size, num_classes)
    if num_classes is not None:
        kwargs.setdefault("num_classes", num_classes)
    _check_name(builder, name)
    if builder == "torchvision":
        return ModelSpec(builder, name, kwargs, plain_preprocessing(input_size or 224))
    config = library("timm").get_pretrained_cfg(name)
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
    """Returns the dense model of a spec without its removed blocks, in eval mode, on the current default device.

    Raises:
        UserError: the builder refuses the name or the keyword arguments, the weights cannot be loaded, or the model
            does not have the blocks that the spec keeps.
    """
    model = _build_dense(spec, pretrained)
    try:
        keep_blocks(model, spec.kept_blocks)
    except (AttributeError, TypeError, IndexError) as error:
        raise UserError(f"{spec.name} does not have the blocks that are to be kept: {error}") from error
    return model.eval()


def build_skeleton(spec: ModelSpec) -> nn.Module:
    """Returns the dense model without weights, on the meta device if its builder supports that.

    A builder that loads weights warns that they have no effect there, which is intended.
    """
    if spec.builder in ("timm", "torchvision"):
        library(spec.builder)  # imported here: what it computes meanwhile is no skeleton's
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build_model(spec)
    except _TooLargeError:
        raise
    except (UserError, NotImplementedError):
        with torch.random.fork_rng(devices=[]):  # saving a model must not change training's random numbers
            return build_model(spec)


@contextlib.contextmanager
def at_most(modules: int, numbers: int, what: str) -> Iterator[None]:
    """Returns a context in which building stops once models have more modules, or more numbers, than allowed.

    Numbers are those of all parameters and buffers.

    Raises:
        UserError: a limit is exceeded; the message begins with `what`.
    """
    left = {"modules": modules, "numbers": numbers}

    def take(kind: str, count: int) -> None:
        left[kind] -= count
        if left[kind] < 0:
            raise _TooLargeError(f"{what}: its dense model has more than {modules:,} modules or {numbers:,} numbers")

    def count_tensor(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        take("numbers", 0 if tensor is None else tensor.numel())

    hooks = (
        registration.register_module_module_registration_hook(lambda *_: take("modules", 1)),
        registration.register_module_parameter_registration_hook(count_tensor),
        registration.register_module_buffer_registration_hook(count_tensor),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def keep_blocks(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Removes, in place, the children whose indices are not `kept` from each named Sequential or ModuleList.

    The remaining children are numbered anew if they were named by numbers; others keep their names.

    Raises:
        AttributeError, TypeError, IndexError: no such module, not a list of modules, or indices that are not ascending
            or out of range.
    """
    holders: dict[str, Any] = {name: model.get_submodule(name) for name in kept}  # before any name changes
    for name, indices in kept.items():
        if not isinstance(holders[name], (nn.Sequential, nn.ModuleList)):
            raise TypeError(f"{name} is not a list of blocks")
        if list(indices) != sorted(set(indices) & set(range(len(holders[name])))):
            raise IndexError(f"{list(indices)} is not an ascending part of the {len(holders[name])} blocks of {name}")
    for name, indices in kept.items():
        children = list(holders[name]._modules.items())
        holders[name]._modules.clear()
        for position, (child_name, child) in enumerate(children[index] for index in indices):
            holders[name]._modules[str(position) if child_name.isdecimal() else child_name] = child


def _name_left(name: str, kept: Mapping[str, Sequence[int]]) -> str | None:
    """Returns a parameter's name after `keep_blocks`; None if its block was removed."""
    path: list[str] = []
    left: list[str] = []
    for part in name.split("."):
        indices = kept.get(".".join(path))
        path.append(part)
        if indices is not None:
            if not part.isdecimal():
                raise UserError(f"cannot remove blocks around {name}, which is masked: they are not named by numbers")
            if int(part) not in indices:
                return None
            part = str(list(indices).index(int(part)))
        left.append(part)
    return ".".join(left)


def _build_dense(spec: ModelSpec, pretrained: bool) -> nn.Module:
    if spec.builder != "file":
        _check_name(spec.builder, spec.name)
    refused = [key for key in REFUSED_KWARGS if key in spec.kwargs]
    _require(not refused, f"{spec.name}: {', '.join(refused)} is not an argument that a model may be built with")
    if spec.builder == "file":
        return _build_user_model(spec, pretrained)
    if pretrained:
        from isomorphic.pretrained import check_within_reach  # the network is no matter of those who load a checkpoint

        check_within_reach(spec.builder, spec.name, TORCHVISION_WEIGHTS)
    try:
        with quiet_hub():
            return _call_builder(spec, pretrained)
    except OSError as error:  # the hub's and urllib's errors are all OSErrors
        raise UserError(
            f"cannot get the pretrained weights of {spec.name} ({type(error).__name__}): "
            "check the connection, or pass --no-pretrained for random weights"
        ) from error
    except _TooLargeError:
        raise
    except REFUSALS as error:
        arguments = spec.kwargs or "its defaults"
        raise UserError(f"cannot build {spec.name} with {arguments}: {first_line(error)}") from error


def num_classes(model: nn.Module, spec: ModelSpec) -> int:
    """Returns the width of the classifier: the model's `num_classes`, else the spec's, else ImageNet's 1000.

    A user's own model without `num_classes` is run on one black image.

    Raises:
        UserError: that model does not take the image, or does not return logits.
    """
    if spec.builder == "file" and not isinstance(getattr(model, "num_classes", None), int):
        logits = check_input_size(model, spec.preprocessing.input_size, spec.name)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
            shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise UserError(f"{spec.name} is no classifier: for one image it returns {shape}, not logits (1, classes)")
        return logits.shape[1]
    return int(getattr(model, "num_classes", spec.kwargs.get("num_classes", 1000)))


def with_classes(spec: ModelSpec, classes: int) -> ModelSpec:
    """Returns the spec of the same model with another number of classes, which have no names yet.

    Raises:
        UserError: the model is its user's, and what builds it takes no `num_classes`.
    """
    if spec.builder == "file" and spec.factory and "num_classes" not in spec.factory.parameters:
        raise UserError(f"{spec.name} takes no num_classes: give it that argument, so that it can have another head")
    if spec.builder not in BUILDERS:
        raise UserError(f"{spec.name} is built by its user, who gives it its head, too")
    return dataclasses.replace(spec, kwargs={**spec.kwargs, "num_classes": classes}, class_names=())


def published_classes(spec: ModelSpec) -> int | None:
    """Returns the number of classes of the weights that a library has for a model; None for a user's own."""
    if spec.builder == "torchvision":
        return 1000
    config = library("timm").get_pretrained_cfg(spec.name) if spec.builder == "timm" else None
    return config.num_classes if config else None


def check_input_size(model: nn.Module, size: int, who: str) -> Any:
    """Runs `model` on one black image of `size` × `size` pixels and returns its output.

    Raises:
        UserError: the model does not take the image; the message names the model by `who`.
    """
    was_training = model.training
    try:
        example = next(model.parameters(), torch.empty(0))  # some models have none
        with torch.no_grad():
            return model.eval()(example.new_zeros(1, 3, size, size))
    except REFUSALS as error:
        raise UserError(
            f"{who} does not take images of {size}×{size} pixels: {first_line(error)} "
            "(its forward must take one batch of them)"
        ) from error
    finally:
        model.train(was_training)


def check_logits(answer: Any, classes: int, who: str) -> None:
    """Checks that the output for one image is logits of shape (1, classes).

    Raises:
        UserError: it is not; the message names the model by `who`.
    """
    if not isinstance(answer, torch.Tensor) or answer.shape != (1, classes):
        told = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise UserError(f"{who} is no classifier of {classes} classes: for one image it returns {told}, not logits")


def example_inputs(spec: ModelSpec, device: torch.device | str = "cpu") -> torch.Tensor:
    """Returns one random image of the spec's input size, shape (1, 3, H, W)."""
    size = spec.preprocessing.input_size
    if torch.device(device).type == "meta":
        return torch.empty(1, 3, size, size, device=device)
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)


def plain_preprocessing(size: int) -> Preprocessing:
    """Returns the preprocessing of torchvision's weights, also used for models that do not define their own."""
    return Preprocessing(size, round(size * RESIZE_OVER_CROP), "bilinear")


def _describe_user_model(
    factory: UserFactory, kwargs: dict[str, Any], input_size: int | None, num_classes: int | None
) -> ModelSpec:
    """Passes the factory only the arguments that it names; without `input_size` its own default applies."""
    taken = factory.parameters
    if num_classes is not None and "num_classes" in taken:
        kwargs.setdefault("num_classes", num_classes)
    size = input_size or 224
    argument = next((name for name in SIZE_ARGUMENTS if name in taken), None)
    if argument:
        if input_size:
            kwargs.setdefault(argument, input_size)
        default = taken[argument].default
        size = input_size or kwargs.get(argument) or (default if isinstance(default, int) else 224)
        _require(isinstance(size, int), f"{argument}={size}: give one whole number, the side of a square image")
    preprocessing = plain_preprocessing(size)
    return ModelSpec("file", str(factory), kwargs, preprocessing, sha256=factory.file.sha256, factory=factory)


def _build_user_model(spec: ModelSpec, pretrained: bool) -> nn.Module:
    """Calls the user's factory, with `pretrained` if it takes that argument."""
    if spec.factory is None:
        raise UserError(f"{spec.name} is code of its user's, who has to name the file")
    if "pretrained" not in spec.factory.parameters:
        return spec.factory.build(spec.kwargs)
    _require("pretrained" not in spec.kwargs, f"{spec.name}: pretrained is no argument to give (see --no-pretrained)")
    return spec.factory.build({**spec.kwargs, "pretrained": pretrained})


def _check_name(builder: str, name: str) -> None:
    """Raises a UserError for a name that is not in the library's own list: timm would also take hub addresses."""
    _require(builder in BUILDERS, f"unknown model builder {builder!r}: one of {', '.join(BUILDERS)}")
    if builder == "torchvision":
        known = name in torchvision_classifiers()
        _require(known, f"unknown torchvision model: {name} (only classifiers of images are known)")
        return
    timm = library("timm")
    if not timm.is_model(name):
        hint = "timm.list_models('*part*') finds names"
        if name in torchvision_classifiers():
            hint = 'torchvision has it: --is-torchvision, in Python builder="torchvision"'
        raise UserError(f"unknown timm model: {name} ({hint})")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"unknown timm model: {name} (timm.list_pretrained('*part*') finds tags)") from error


def torchvision_classifiers() -> list[str]:
    """Returns the names of torchvision's classifiers of images."""
    models = library("torchvision").models
    return models.list_models(module=models)  # others fetch their backbone's weights


def _call_builder(spec: ModelSpec, pretrained: bool) -> nn.Module:
    if spec.builder == "torchvision":
        weights = TORCHVISION_WEIGHTS if pretrained else None
        return library("torchvision").models.get_model(spec.name, weights=weights, **spec.kwargs)
    return library("timm").create_model(spec.name, pretrained=pretrained, **spec.kwargs)


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Silences the hub client's messages about retries: the error at the end says what failed."""
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
