"""Opening models: by name, of a user's file, from checkpoints, and from files and folders of others.

Nothing in a file is ever executed. The format of checkpoints is described in `structure.py`; what files of others may
look like, in `fitting.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from isomorphic.checkpoints.dense import check_built
from isomorphic.checkpoints.folders import describe_folder
from isomorphic.checkpoints.headers import has_header, read_header, stored_class_names
from isomorphic.checkpoints.heads import new_head
from isomorphic.checkpoints.hub import CHECKPOINT, fetch, is_hub_folder, is_on_hub
from isomorphic.checkpoints.input_size import with_input_size
from isomorphic.checkpoints.load import check_extent, load_checkpoint
from isomorphic.checkpoints.origins import remember_class_names
from isomorphic.checkpoints.sources import CONFIG, PTH, folder_of, is_checkpoint, is_folder, is_pth, source_file
from isomorphic.checkpoints.weights import Tell, Weights, check_averaged, fill, load_weights, read_weights
from isomorphic.errors import UserError
from isomorphic.models import (
    RESIZE_OVER_CROP,
    ModelSpec,
    build_model,
    describe_model,
    published_classes,
    torchvision_classifiers,
)
from isomorphic.models import num_classes as classes_of
from isomorphic.user_file import is_user_file

__all__ = [
    "PTH",
    "is_checkpoint",
    "is_pth",
    "load_model",
    "load_weights",
    "open_model",
    "read_header",
    "source_file",
    "stored_class_names",
]

# Tensors that tell with which arguments a model was built: MAE finetunes on the mean of all patches.
TOLD_BY = {"fc_norm.weight": {"global_pool": "avg"}}


def load_model(source: str | Path, *, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """Returns the ready model, in eval mode and, unless you built it, on the CPU: the way in for users.

    Args:
        source: a model name of the builder, "path/to/file.py:factory", a checkpoint or its folder, "hf-hub:USER/NAME",
            a repository of the Hugging Face hub, or a file or folder of others.
        model: the dense model that a checkpoint was cut from, built by you: it is shaped and filled, in place, on its
            device, and in the precision of the file (by name, models get their builder's). One that is refused is
            left as it was.
        **options: see `open_model`.

    Raises:
        UserError: as `open_model`; the dense model is not the one that the checkpoint was cut from.
    """
    return open_model(source, model=model, **options)[0]


def open_model(
    source: str | Path,
    *,
    builder: str = "timm",
    kwargs: dict[str, Any] | None = None,
    pretrained: bool = True,
    weights: str | Path | None = None,
    input_size: int | None = None,
    num_classes: int | None = None,
    fresh_head: bool = True,
    builder_file: str | Path | None = None,
    name: str | None = None,
    use_ema: bool | None = None,
    trust: bool = False,
    model: nn.Module | None = None,
    tell: Tell = lambda line: None,
) -> tuple[nn.Module, ModelSpec]:
    """Opens a model by name, of a user's file or from a checkpoint, with the spec that a later `save_model` needs.

    Args:
        source: a model name, or "path/to/file.py:factory"; a checkpoint, which then decides the rest, its folder, or
            "hf-hub:USER/NAME"; a file of weights of others, or a folder with one and timm's `config.json`.
        builder, kwargs: of a name: "timm" or "torchvision", and keyword arguments for it.
        pretrained: of a name: load the builder's weights.
        weights: a file or folder whose weights are put into what `source` names, in place of the builder's.
        input_size: side of the input in pixels; tables of positions are resampled to it where the library can.
        num_classes: width of the classifier; where the weights have another, or none, the model gets a new head.
        fresh_head: if False, it gets none: `num_classes` is only what a model without weights is built with.
        builder_file: the Python file that makes the dense model of a user's checkpoint, which says with what arguments.
        name: the dense model that a file of others was made from, where it does not tell, with `builder` and `kwargs`.
        use_ema: insist on averaged weights, or on raw ones; None takes the averaged ones where a file has both.
        trust: load a file of torch.save even if it names things that may run code.
        model: of a checkpoint: the dense model that it was cut from, built by the caller.
        tell: is called with each line about what was not simply taken as it is: a new head, resampled positions,
            tensors that were left out.

    Raises:
        UserError: an unknown name, weights out of reach, a file that is not what it should be.
    """
    if model is not None:
        _check_only_model(source, model, weights, num_classes, input_size)
    asked = _Asked(builder, dict(kwargs or {}), pretrained, input_size, num_classes, fresh_head, use_ema, trust, tell)
    source = _on_disk(source)
    if weights is not None:
        filling = read_weights(weights, use_ema=use_ema, trust=trust)
        opened, spec = _open_with_weights(source, filling, asked, builder_file)
    elif is_folder(source):
        opened, spec = _open_folder(source, read_weights(source, use_ema=use_ema, trust=trust), asked)
    elif is_checkpoint(source):
        opened, spec = _open_file(Path(source), asked, name, builder_file, model)
    else:
        opened, spec = _open_named(str(source), asked)
    spec = _with_head(opened, spec, asked)
    remember_class_names(opened, spec.class_names)
    return opened, spec


def _on_disk(source: str | Path) -> str | Path:
    """Returns the checkpoint in a repository of the hub or in a folder, or a folder that others fill; else `source`.

    A repository without a checkpoint of this project is one of timm's, whose config.json says what its weights are of.
    """
    if is_on_hub(source):
        file = fetch(str(source), CHECKPOINT)
        return file if has_header(file) else fetch(str(source), CONFIG).parent
    if is_folder(source) or is_hub_folder(source):
        file = folder_of(source) / CHECKPOINT
        if file.is_file() and (has_header(file) or not is_folder(source)):
            return file
    return source


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What `open_model` is asked for, beside the source."""

    builder: str
    kwargs: dict[str, Any]
    pretrained: bool
    input_size: int | None
    num_classes: int | None
    fresh_head: bool
    use_ema: bool | None
    trust: bool
    tell: Tell

    @property
    def wants_head(self) -> bool:
        return self.fresh_head and self.num_classes is not None


def _check_only_model(source: str | Path, model: nn.Module, *others: Any) -> None:
    """Raises a UserError for a `model=` that cannot be filled from a source, or that other arguments would change."""
    if is_pth(source) or not is_checkpoint(source):
        raise UserError(
            f"{source} is no file of pruned.save(), which ends in .safetensors: leave out model=, or load weights "
            "of your own with model.load_state_dict before you prune the model"
        )
    if any(other is not None for other in others):
        raise UserError("model= is filled as the checkpoint says: leave out weights=, num_classes= and input_size=")
    check_built(model)


def _open_named(source: str, asked: _Asked) -> tuple[nn.Module, ModelSpec]:
    """Builds a model by its name, or by a user's file, with the builder's weights where they are asked for."""
    check_averaged(source, asked.use_ema)
    spec = _describe(source, asked)
    published = published_classes(spec) if asked.pretrained else None
    classes = spec.kwargs.get("num_classes", published)
    if published is None or classes == published:
        return build_model(spec, pretrained=asked.pretrained), spec
    if spec.builder == "timm":  # which leaves out the head of its weights by itself
        model = build_model(spec, pretrained=True)
        asked.tell(_new_head_line(spec, classes, published))
        return model, spec
    spec = dataclasses.replace(spec, kwargs={key: spec.kwargs[key] for key in spec.kwargs if key != "num_classes"})
    model = build_model(spec, pretrained=True)
    asked.tell(_new_head_line(spec, classes, published))
    return model, new_head(model, spec, classes)


def _open_with_weights(
    source: str | Path, weights: Weights, asked: _Asked, builder_file: str | Path | None
) -> tuple[nn.Module, ModelSpec]:
    """Opens what `source` names and fills it with the weights of another file."""
    if not is_checkpoint(source):
        return _build_and_fill(_describe(str(source), asked), weights, asked)
    if is_folder(source):
        return _open_folder(source, weights, asked)
    own = dataclasses.replace(asked, use_ema=None)
    model, spec = _open_file(Path(source), own, None, builder_file, None)
    head = f"those of {source}" if asked.wants_head else ""
    return model, fill(model, spec, weights, other_head=head, use_ema=asked.use_ema, tell=asked.tell)


def _open_folder(source: str | Path, weights: Weights, asked: _Asked) -> tuple[nn.Module, ModelSpec]:
    """Builds the model that a folder describes and fills it."""
    if asked.builder != "timm":
        raise UserError(f"{source} says itself which model of timm it holds: leave out the name of another library")
    spec = describe_folder(source, kwargs=asked.kwargs, input_size=asked.input_size)
    check_extent(weights.path, spec, weights.tensors)
    return _build_and_fill(spec, weights, asked)


def _open_file(
    path: Path, asked: _Asked, name: str | None, builder_file: str | Path | None, model: nn.Module | None
) -> tuple[nn.Module, ModelSpec]:
    """Opens a checkpoint, a file of torch.save, or the tensors of a model that `name` names."""
    if is_pth(path):
        from isomorphic.checkpoints.released.legacy import describe_pth, read_pth  # timm, for these files alone

        contents = read_pth(path, use_ema=asked.use_ema, trust=asked.trust)
        options = {"builder": asked.builder, "name": name, "kwargs": asked.kwargs, "input_size": asked.input_size}
        spec = describe_pth(contents, path, **options)
        if isinstance(contents.weights, nn.Module):
            return contents.weights, spec
        return _build_and_fill(spec, Weights(path, contents.weights), asked)
    check_averaged(path, asked.use_ema)
    if name is not None and not has_header(path):
        return _build_and_fill(_describe(name, asked), read_weights(path), asked)
    if asked.kwargs.keys() - {"num_classes"}:
        raise UserError(f"{path} is a checkpoint and knows its model: leave out the model's keyword arguments")
    opened, spec = load_checkpoint(path, builder_file, model)
    if "num_classes" in asked.kwargs:
        spec = _with_head(opened, spec, dataclasses.replace(asked, fresh_head=True, **asked.kwargs))
    return _with_input_size(opened, spec, asked, path)


def _with_input_size(model: nn.Module, spec: ModelSpec, asked: _Asked, path: Path) -> tuple[nn.Module, ModelSpec]:
    """Returns a checkpoint's model for the input size that is asked for, and its spec."""
    size = asked.input_size
    if size is None or size == spec.preprocessing.input_size:
        return model, spec
    model, spec, notes = with_input_size(model, spec, size, path)
    for note in notes:
        asked.tell(f"{path}: {note}")
    own = dataclasses.replace(spec.preprocessing, input_size=size, resize_size=round(size * RESIZE_OVER_CROP))
    return model, dataclasses.replace(spec, preprocessing=own)


def _build_and_fill(spec: ModelSpec, weights: Weights, asked: _Asked) -> tuple[nn.Module, ModelSpec]:
    """Builds the dense model of a spec, or of another one that its name may stand for, and fills it with weights.

    Raises:
        UserError: the weights are not those of this model; the message is about the spec itself.
    """
    refused = []
    for candidate in _candidates(spec, weights, asked):
        try:
            model = build_model(candidate)
            filled = fill(
                model,
                candidate,
                weights,
                other_head="random" if asked.wants_head else "",
                keep_classes="num_classes" in asked.kwargs,
                use_ema=asked.use_ema,
                tell=asked.tell,
            )
        except UserError as error:
            refused.append(error)
            continue
        if candidate is not spec:
            more = [f"{key}={value}" for key, value in candidate.kwargs.items() if key not in spec.kwargs]
            built = " with ".join((f"{candidate.builder}'s {candidate.name}", *more))
            asked.tell(f"{weights.path} is of {built}, which is what is built")
        return model, filled
    raise refused[0]


def _candidates(spec: ModelSpec, weights: Weights, asked: _Asked) -> Iterator[ModelSpec]:
    """Yields the spec, and what else weights may be of that people call by its name."""
    yield spec
    if spec.builder != "timm":
        return
    for name, told in TOLD_BY.items():
        if any(other.endswith(name) for other in weights.tensors) and not told.keys() & spec.kwargs.keys():
            yield dataclasses.replace(spec, kwargs={**spec.kwargs, **told})
    bare = spec.name.partition(".")[0]
    if bare in torchvision_classifiers():
        yield describe_model(bare, builder="torchvision", kwargs=asked.kwargs, input_size=asked.input_size)


def _describe(source: str, asked: _Asked) -> ModelSpec:
    builder = "file" if asked.builder == "timm" and is_user_file(source) else asked.builder
    options = {"kwargs": asked.kwargs, "input_size": asked.input_size, "num_classes": asked.num_classes}
    return describe_model(source, builder=builder, **options)


def _with_head(model: nn.Module, spec: ModelSpec, asked: _Asked) -> ModelSpec:
    """Gives the model a new head if it has not the classes that are asked for, and returns its spec."""
    if asked.num_classes is None or not asked.fresh_head:
        return spec
    classes = classes_of(model, spec)
    if classes == asked.num_classes:
        return spec
    asked.tell(_new_head_line(spec, asked.num_classes, classes))
    return new_head(model, spec, asked.num_classes)


def _new_head_line(spec: ModelSpec, classes: int, before: int) -> str:
    return f"New head for {classes} classes in place of {before}: {spec.name} keeps its other weights, these are random"
