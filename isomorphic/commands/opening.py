"""Opens the model, the images and the transform that the shared flags ask for."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from isomorphic import progress
from isomorphic.checkpoints.heads import new_head
from isomorphic.checkpoints.hub import is_hub_folder, is_on_hub, source_name
from isomorphic.checkpoints.open import is_checkpoint, open_model
from isomorphic.commands import entry
from isomorphic.commands.images import tell
from isomorphic.data.classes import first_difference
from isomorphic.data.sources import (
    DataSource,
    LabelledImages,
    Split,
    build_dataset,
    check_classes,
    class_count,
    class_names,
)
from isomorphic.data.transforms import PairTransform, Transform, eval_transform
from isomorphic.errors import UserError, first_line
from isomorphic.inputs import Inputs, move_to
from isomorphic.measure.complexity import count_complexity
from isomorphic.measure.first_image import one_item
from isomorphic.measure.precision import Auto, Precision
from isomorphic.models import RESIZE_OVER_CROP, ModelSpec, check_input_size, check_logits, example_inputs, num_classes
from isomorphic.processes import distributed
from isomorphic.pruning.gradients import Loss, own_answer_loss
from isomorphic.user_file import is_user_file


def data_source(args: argparse.Namespace, spec: ModelSpec | None = None) -> DataSource:
    """Returns the flags of `add_data_arguments` as a `DataSource`, with a model's class names if they count."""
    names = () if spec is None or args.ignore_class_names else spec.class_names
    return DataSource(args.dataset, args.data_path, args.synthetic_size, args.seed, args.class_map, names)


@dataclass(frozen=True)
class Task:
    """The inputs, loss and data of a model.

    Attributes:
        inputs: one item as the model's forward takes it: an image, or the first item of the user's batches.
        classes: width of the classifier; None if the model is not a classifier.
        loss: (model, batch) -> scalar, from the user's file or of images without labels; None means cross entropy.
        batches: (split) -> batches, from the user's file; None means the images of --dataset.
    """

    inputs: Inputs
    classes: int | None
    loss: Loss | None = None
    batches: Callable[[str], Iterable[Any]] | None = None


def open_model_from(
    args: argparse.Namespace, *, needs_images: bool = True, labelled: bool = True
) -> tuple[nn.Module, ModelSpec]:
    """Returns the classifier `--model` and its spec, with the flags of the evaluation transform in the spec.

    Args:
        args: flags of the command.
        needs_images: if False, the folder of images may be missing; the number of classes is then not checked.
        labelled: if False, the images are others than those of `--dataset`, and have no classes to check.

    Raises:
        UserError: as `open_model`; a classifier that does not match the data; an input size that the model refuses.
    """
    model, spec = _open(args, labelled=labelled)
    answer = _answer_to_one_image(args, model, spec)
    classes = num_classes(model, spec)
    _check_classifier(args, spec, classes, answer, needs_images=needs_images, labelled=labelled)
    return model, _with_transform_of(args, spec)


def open_any_model_from(
    args: argparse.Namespace, device: torch.device, *, needs_images: bool
) -> tuple[nn.Module, ModelSpec, Task]:
    """Returns `--model`, its spec and its task; a model from a user's file need not be a classifier.

    The user's file may define `loss(model, batch)`, and `batches(split)` for a model that does not take images from
    folders; the model's inputs are then those of the first batch.

    Args:
        args: flags of prune.py.
        device: device of the inputs.
        needs_images: the run cannot do without images.

    Raises:
        UserError: as `open_model_from`; or the criterion needs a loss, the model returns no logits, and the user's file
            defines no loss.
    """
    labelled = not args.unlabelled
    model, spec = _open(args, labelled=labelled)
    file = spec.factory.file if spec.factory else None
    loss, batches = (file.function(name) if file else None for name in ("loss", "batches"))
    if batches is not None:
        inputs = move_to(one_item(model, first_inputs(batches)), device)
        return model, spec, Task(inputs, None, loss, batches)
    answer = _answer_to_one_image(args, model, spec)
    spec = _with_transform_of(args, spec)
    inputs = example_inputs(spec, device)
    if file is not None and not _gives_logits(model, answer):
        if needs_images and loss is None:
            told = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise UserError(
                f"{args.model} is no classifier (for one image it returns {told}), and {args.pruning_type} scores need "
                f"a loss: define loss(model, batch) in {file.path.name}, or take --pruning-type l1, l2, dimap or random"
            )
        return model, spec, Task(inputs, None, loss)
    classes = num_classes(model, spec)
    _check_classifier(args, spec, classes, answer, needs_images=needs_images and labelled, labelled=labelled)
    return model, spec, Task(inputs, classes, loss if labelled or loss else own_answer_loss)


def own_batches(task: Task, split: str, count: int) -> Iterable[Any]:
    """Returns this process's share of the first `count` batches of the user's file."""
    assert task.batches is not None
    batches = _checked_batches(task.batches, split)
    return itertools.islice(batches, distributed.rank(), count, distributed.world_size())


def open_dense_from(args: argparse.Namespace, model: nn.Module, spec: ModelSpec) -> tuple[nn.Module, ModelSpec]:
    """Returns the dense model `--against` and its spec, which keeps the preprocessing that is its own.

    By name, it is built as the checkpoint `--model` says that its own dense model was, if that is the one; without
    pretrained weights, it has the classes of `--model`.

    Args:
        args: flags of the command.
        model, spec: `--model`, which it is held against.

    Raises:
        UserError: as `open_model`; it is no classifier of the same classes.
    """
    builder, kwargs = "torchvision" if args.is_torchvision else "timm", {}
    if args.against == spec.name and not is_checkpoint(args.against):
        builder = spec.builder
        kwargs = {key: value for key, value in spec.kwargs.items() if args.no_pretrained or key != "num_classes"}
    classes = num_classes(model, spec)
    dense, dense_spec = open_model(
        args.against,
        builder=builder,
        kwargs=kwargs,
        pretrained=not args.no_pretrained,
        num_classes=classes if args.no_pretrained and not is_checkpoint(args.against) else None,
        fresh_head=False,
        builder_file=args.builder_file,
        trust=args.trust_checkpoint,
        tell=entry.say,
    )
    dense_classes = num_classes(dense, dense_spec)
    if dense_classes != classes:
        raise UserError(
            f"{args.against} has {dense_classes} classes and {args.model} has {classes}: "
            "--against takes a model of the same classes"
        )
    difference = first_difference(spec.class_names, dense_spec.class_names, "of --model", "of --against")
    if spec.class_names and dense_spec.class_names and difference and not args.ignore_class_names:
        raise UserError(
            f"{args.against} was made for other classes: {difference}; --against takes a model of the same classes, or "
            "--ignore-class-names to go by their order alone"
        )
    return dense, dense_spec


def _open(args: argparse.Namespace, *, labelled: bool) -> tuple[nn.Module, ModelSpec]:
    """Opens `--model`, with the weights of `--checkpoint` if given, without checking it against the data."""
    source = data_source(args)
    if source.name.lower().startswith("hfds/"):
        progress.stage(f"opening {source.name}, from the hub where it is not here (HF_HUB_OFFLINE=1: here alone)")
    pretrained = not (args.no_pretrained or args.checkpoint)
    classes = args.num_classes
    if classes == "auto" or (classes is None and labelled and _takes_classes_of_data(args, source)):
        classes = class_count(source)
    model, spec = open_model(
        args.model,
        builder="torchvision" if args.is_torchvision else "timm",
        kwargs=dict(args.model_kwargs),
        pretrained=pretrained,
        weights=args.checkpoint,
        input_size=args.input_size,
        num_classes=classes,
        fresh_head=args.num_classes is not None,
        builder_file=args.builder_file,
        use_ema=args.use_ema,
        trust=args.trust_checkpoint,
        tell=entry.say,
    )
    return model, _with_head_for_names(args, model, spec)


def _with_head_for_names(args: argparse.Namespace, model: nn.Module, spec: ModelSpec) -> ModelSpec:
    """Gives the model a new head if `--num-classes auto` meets data with as many classes of other names."""
    if args.num_classes != "auto" or not spec.class_names or args.class_map or args.ignore_class_names:
        return spec
    names = class_names(data_source(args, spec))
    if not names or names == spec.class_names:
        return spec
    entry.say(f"New head for {len(names)} classes of other names than the model's: {spec.name} keeps its other weights")
    return new_head(model, spec, len(names))


def _takes_classes_of_data(args: argparse.Namespace, source: DataSource) -> bool:
    """Returns True for a model that is built with as many classes as the data have, unless a flag says otherwise.

    Weights that have a name, or lie in a file, say how many they have. A user's own model may need no images; if it
    does need them, their absence is reported later.
    """
    if is_checkpoint(args.model):
        return False
    if is_user_file(args.model):
        return bool(args.no_pretrained or args.checkpoint) and _is_there(source)
    return args.no_pretrained and not args.checkpoint


def _answer_to_one_image(args: argparse.Namespace, model: nn.Module, spec: ModelSpec) -> Any:
    """Returns the model's output for one image; None for a library's model as it comes, which is not run.

    Raises:
        UserError: the model refuses the image.
    """
    library_s_own = spec.builder != "file" and not (is_checkpoint(args.model) or args.checkpoint)
    if library_s_own and not (args.input_size or args.model_kwargs or args.num_classes):
        return None
    hint = " (without --input-size)" if spec.builder == "file" and not args.input_size else ""
    return check_input_size(model, args.input_size or spec.preprocessing.input_size, args.model + hint)


def _check_classifier(
    args: argparse.Namespace, spec: ModelSpec, classes: int, answer: Any, *, needs_images: bool, labelled: bool = True
) -> None:
    """Raises a UserError if the model is not a classifier of `classes` classes, or the data have other classes."""
    if classes < 1:
        raise UserError(
            f"{args.model} has no classifier with num_classes={classes}: give at least 1, or --num-classes auto"
        )
    if answer is not None:
        check_logits(answer, classes, args.model)
    source = data_source(args, spec)
    if labelled and (needs_images or _is_there(source)):
        check_classes(classes, source)


def named_by_data(args: argparse.Namespace, spec: ModelSpec, classes: int) -> ModelSpec:
    """Returns the spec with the names of the data's classes; with none if the data does not name all of them.

    For what is saved: a model that does not know its classes learns them from the data that it is used with, if there
    are any.
    """
    source = data_source(args)
    if not _is_there(source):
        return spec
    names = class_names(source)
    return dataclasses.replace(spec, class_names=names if len(names) == classes else ())


def _is_there(source: DataSource) -> bool:
    """Returns True if the source is a named dataset, or a folder that exists."""
    return bool(source.name) or Path(source.root).is_dir()


def _gives_logits(model: nn.Module, answer: Any) -> bool:
    """Returns True if the model has a `num_classes`, or its output for one image has two dims, as logits do."""
    return isinstance(getattr(model, "num_classes", None), int) or (isinstance(answer, Tensor) and answer.ndim == 2)


def first_inputs(batches: Callable[[str], Iterable[Any]]) -> Inputs:
    """Returns the model's inputs in the first training batch of the user's file: its first part, or all of it.

    Raises:
        UserError: there is none, or the function fails.
    """
    batch = next(_checked_batches(batches, "train"), None)
    if batch is None:
        raise UserError("batches('train') gives no batch")
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inputs, (Tensor, tuple, Mapping)):
        raise UserError(
            f"the first batch of batches('train') holds {type(inputs).__name__} where the model's inputs should be: "
            "give (inputs, …), with inputs a tensor, a tuple of positional or a mapping of keyword arguments"
        )
    return inputs


def _checked_batches(batches: Callable[[str], Iterable[Any]], split: str) -> Iterator[Any]:
    """Yields the batches of the user's function; reports its errors as a UserError of one line."""
    try:
        yield from batches(split)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"batches({split!r}) fails with {type(error).__name__}: {first_line(error)}") from error


def _with_transform_of(args: argparse.Namespace, spec: ModelSpec) -> ModelSpec:
    """Returns the spec with the flags of the evaluation transform applied."""
    changes: dict[str, Any] = {
        "input_size": args.input_size,
        "resize_size": args.val_resize_size,
        "interpolation": args.interpolation,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.input_size and not args.val_resize_size:
        changes["resize_size"] = round(args.input_size * RESIZE_OVER_CROP)
    if args.no_imagenet_mean_std:
        changes |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return dataclasses.replace(spec, preprocessing=dataclasses.replace(spec.preprocessing, **changes))


def weights_source(args: argparse.Namespace) -> str | None:
    """Returns the file or folder that the model's weights are from; None for those that a name stands for."""
    return args.checkpoint or (args.model if is_checkpoint(args.model) else None)


def output_stem(model: str) -> str:
    """Returns the default stem of files made from `--model`: net_build for `net.py:build`."""
    if is_on_hub(model) or is_hub_folder(model):
        return source_name(model)
    if is_checkpoint(model):
        return Path(model).stem
    return Path(model).name.replace(".py:", "_") if is_user_file(model) else model


def evaluation_images(
    args: argparse.Namespace,
    split: Split,
    model: nn.Module,
    spec: ModelSpec,
    *,
    classifier: bool = True,
    dense_spec: ModelSpec | None = None,
) -> Dataset[tuple[Tensor, int]]:
    """Returns one split of `--dataset` under the evaluation transform of the spec, and says what is left out of it.

    With the spec of `--against`, each image is a pair: as `--model` takes it, and as the dense model does.
    """
    own = spec.preprocessing
    transform: Any = PairTransform(own, dense_spec.preprocessing) if dense_spec else eval_transform(own)
    return labelled_images(
        args,
        split,
        spec,
        transform,
        num_classes=num_classes(model, spec) if classifier else None,
        image_size=spec.preprocessing.input_size,
    )


def labelled_images(
    args: argparse.Namespace,
    split: Split,
    spec: ModelSpec,
    transform: Transform,
    *,
    num_classes: int | None,
    image_size: int,
) -> LabelledImages:
    """Returns one split of `--dataset` under a transform, and says what is left out of it."""
    source = data_source(args, spec)
    images = build_dataset(source, split, transform, num_classes=num_classes, image_size=image_size)
    for note in images.notes:
        tell(note)
    return images


def amp_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """Returns the autocast dtype that `--amp` means in commands without `--amp-dtype`: bfloat16."""
    return torch.bfloat16 if args.amp else None


def precision(args: argparse.Namespace, model: nn.Module, spec: ModelSpec) -> Precision:
    """Returns what an evaluation runs in: with neither `--amp` nor `--no-amp`, bfloat16 where it pays and agrees."""
    if args.amp is not None:
        return amp_dtype(args)
    return Auto(count_complexity(model, example_inputs(spec, next(model.parameters()).device)).macs_paper)
