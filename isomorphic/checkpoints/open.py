"""Opening models: by name, of a user's file, from checkpoints and from `.pth` files of others.

Nothing in a file is ever executed. The format of checkpoints is described in `structure.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from isomorphic.checkpoints.dense import check_built, check_dense, fill_dense, parse_dense, unchanged_on_error
from isomorphic.checkpoints.origins import Origin, origin_of, remember_origin
from isomorphic.checkpoints.structure import FORMAT, METADATA_KEY, parameter_names, restore_structure, tensor_shapes
from isomorphic.checkpoints.tensors import load_tensors
from isomorphic.errors import UserError, first_line
from isomorphic.models import (
    LARGEST_ARGUMENT,
    ModelSpec,
    at_most,
    build_model,
    build_skeleton,
    describe_model,
    parse_class_names,
)
from isomorphic.user_file import UserFile, is_user_file

if TYPE_CHECKING:
    from isomorphic.checkpoints.released.legacy import Contents

# How large a dense model a file may ask for: nothing that is cut to a file's size needs more.
MOST_MODULES, NUMBERS_PER_NUMBER, FEW_NUMBERS = 10_000, 1000, 200_000_000


PTH = (".pth", ".pt", ".tar")  # what files of torch.save end in


def load_model(source: str | Path, *, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """Returns the ready model, in eval mode and, unless you built it, on the CPU: the way in for users.

    Args:
        source: a model name of the builder, "path/to/file.py:factory", a checkpoint, or a `.pth` file.
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
    input_size: int | None = None,
    num_classes: int | None = None,
    builder_file: str | Path | None = None,
    name: str | None = None,
    use_ema: bool | None = None,
    trust: bool = False,
    model: nn.Module | None = None,
) -> tuple[nn.Module, ModelSpec]:
    """Opens a model by name, of a user's file or from a checkpoint, with the spec that a later `save_model` needs.

    Args:
        source: a model name, or "path/to/file.py:factory"; a checkpoint, which then decides the rest; or a `.pth` file.
        builder, kwargs: of a name: "timm" or "torchvision", and keyword arguments for it.
        pretrained, num_classes: of a name: load the builder's weights; width of the classifier.
        input_size: side of the input in pixels, of a name or a `.pth` file.
        builder_file: the Python file that makes the dense model of a user's checkpoint, which says with what arguments.
        name: the dense model that a `.pth` file was made from, where it does not tell, with `builder` and `kwargs`.
        use_ema: insist on averaged weights, or on raw ones; None takes the averaged ones where a file has both.
        trust: of a `.pth` file, see `read_pth`.
        model: of a checkpoint: the dense model that it was cut from, built by the caller.

    Raises:
        UserError: an unknown name, weights out of reach, a file that is not what it should be.
    """
    if model is not None:
        if is_pth(source) or not is_checkpoint(source):
            raise UserError(
                f"{source} is no file of pruned.save(), which ends in .safetensors: leave out model=, or load weights "
                "of your own with model.load_state_dict before you prune the model"
            )
        check_built(model)
    if is_pth(source):
        from isomorphic.checkpoints.released.legacy import describe_pth, read_pth  # timm, for these files alone

        contents = read_pth(source, use_ema=use_ema, trust=trust)
        spec = describe_pth(contents, source, builder=builder, name=name, kwargs=kwargs, input_size=input_size)
        return _model_of(contents, spec, source), spec
    _check_averaged(source, use_ema)
    if is_checkpoint(source):
        if kwargs:
            raise UserError(f"{source} is a checkpoint and knows its model: leave out the model's keyword arguments")
        return _load_checkpoint(Path(source), builder_file, model)
    builder = "file" if builder == "timm" and is_user_file(str(source)) else builder
    spec = describe_model(str(source), builder=builder, kwargs=kwargs, input_size=input_size, num_classes=num_classes)
    return build_model(spec, pretrained=pretrained), spec


def load_weights(
    model: nn.Module, path: str | Path, *, use_ema: bool | None = None, trust: bool = False
) -> Sequence[str]:
    """Loads the tensors of a file into a model that is already built, strictly: every one, with its shape.

    Args:
        model: the model, which keeps its structure and its precision.
        path: a `.safetensors` file, or a `.pth` file that holds a state dict or a whole model.
        use_ema: insist on averaged weights, or on raw ones; None takes the averaged ones where a file has both.
        trust: load a `.pth` file even if it names things that may run code.

    Returns:
        Names of the parameters whose zeros are pruned weights, where the file is a checkpoint that says so.

    Raises:
        UserError: the file cannot be read or is of a newer format, or its tensors are not the model's.
    """
    if is_pth(path):
        from isomorphic.checkpoints.released.legacy import read_pth

        weights = read_pth(path, use_ema=use_ema, trust=trust).weights
        load_tensors(model, weights.state_dict() if isinstance(weights, nn.Module) else weights, path)
        return ()
    _check_averaged(path, use_ema)
    with _open_tensors(Path(path)) as file:
        metadata, masked = file.metadata() or {}, []
        if METADATA_KEY in metadata:
            masked = _parse_masked(Path(path), _parse_header(Path(path), metadata).get("structure"), model)
        load_tensors(model, {name: file.get_tensor(name) for name in file.keys()}, path)  # noqa: SIM118 - no mapping
    return masked


def is_pth(source: str | Path) -> bool:
    """Whether `source` names a file that torch.save wrote: by its ending, or else by its first bytes."""
    path = Path(source)
    if path.suffix in {*PTH, ".safetensors", ".py"} or not path.is_file():
        return path.suffix in PTH
    with open(path, "rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80\x02"))


def is_checkpoint(source: str | Path) -> bool:
    """Whether `source` names a file of weights rather than a model of a library or of a user's code."""
    suffix = Path(source).suffix
    return suffix in {".safetensors", *PTH} or (os.path.isfile(source) and suffix != ".py")


def source_file(source: str) -> Path | None:
    """The file that a model comes from: its checkpoint, or the code in "path/to/file.py:factory"; None for names."""
    if is_checkpoint(source):
        return Path(source)
    return Path(source.rpartition(":")[0]) if is_user_file(source) else None


def read_header(path: str | Path) -> dict[str, Any]:
    """The JSON header of a checkpoint, without its tensors.

    Raises:
        UserError: the file is missing, truncated, not a checkpoint, or of a newer format.
    """
    with _open_tensors(Path(path)) as file:
        return _parse_header(Path(path), file.metadata())


def stored_class_names(path: str | Path) -> tuple[str, ...]:
    """Returns the names of the classes in a file of weights; none in one that does not hold them.

    Raises:
        UserError: as `read_header`, of a file that is a checkpoint.
    """
    if is_pth(path):
        return ()
    with _open_tensors(Path(path)) as file:
        metadata = file.metadata() or {}
    if METADATA_KEY not in metadata:
        return ()
    try:
        return parse_class_names(_parse_header(Path(path), metadata))
    except ValueError as error:
        raise UserError(f"{path} has a damaged header: {error}") from error


def _check_averaged(source: str | Path, use_ema: bool | None) -> None:
    """Whether a checkpoint, or else a model by name, has the kind of weights that is asked for."""
    if use_ema is None:
        return
    averaged = is_checkpoint(source) and Path(source).is_file() and _is_averaged(Path(source))
    if use_ema and not averaged:
        raise UserError(f"{source} holds no averaged weights: leave out --use-ema")
    if averaged and not use_ema:
        raise UserError(f"{source} holds averaged weights only: leave out --no-use-ema")


def _is_averaged(path: Path) -> bool:
    """What the header says; tensors without one, which `load_weights` takes as well, are raw."""
    with _open_tensors(path) as file:
        metadata = file.metadata() or {}
    return METADATA_KEY in metadata and _parse_header(path, metadata).get("averaged") is True


def _model_of(contents: Contents, spec: ModelSpec, path: str | Path) -> nn.Module:
    if isinstance(contents.weights, nn.Module):
        return contents.weights
    model = build_model(spec)
    load_tensors(model, contents.weights, path)
    return model


def _load_checkpoint(
    path: Path, builder_file: str | Path | None, model: nn.Module | None
) -> tuple[nn.Module, ModelSpec]:
    with _open_tensors(path) as file:
        header = _parse_header(path, file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    spec = _parse_spec(path, header)
    if model is None and spec.builder == "none":
        raise UserError(
            f"{path} is a model of {spec.name:.80}, which only its user can build: load it in Python with the dense "
            f'model, isomorphic.load_model("{path.name}", model=build())'
        )
    if model is not None:
        _check_is_dense(model, spec, header, tensors, path)
        dense = origin_of(model).dense
        with unchanged_on_error(model):
            fill_dense(model, spec.kept_blocks, header.get("structure"), tensors, path)
            spec = spec.masking(_parse_masked(path, header["structure"], model))
        remember_origin(model, Origin(dense, spec.kept_blocks))
        return model, spec
    if spec.builder == "file":
        spec = _find_factory(path, spec, builder_file)
    else:
        _check_extent(path, spec, tensors)
    model = rebuild(spec, header.get("structure"), tensors, path)
    return model, spec.masking(_parse_masked(path, header["structure"], model))


def _check_is_dense(
    model: nn.Module, spec: ModelSpec, header: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path
) -> None:
    """Raises a UserError unless a model is the dense one of a checkpoint, as far as its builder or its header tell."""
    if spec.builder in ("none", "file"):
        if spec.builder == "none" or "dense" in header:  # which models of users' files did not have at first
            check_dense(model, parse_dense(header, path), path)
        return
    dense = dataclasses.replace(spec, kept_blocks={})
    _check_extent(path, dense, tensors)
    check_dense(model, tensor_shapes(build_skeleton(dense)), path)


def rebuild(spec: ModelSpec, structure: Any, tensors: dict[str, torch.Tensor], path: str | Path) -> nn.Module:
    """The dense model with another structure and its tensors, which come from `path`, in eval mode."""
    model = build_model(spec)
    try:
        restore_structure(model, structure, tensors)
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not fit {spec.name} as this library builds it: {first_line(error)}") from error
    load_tensors(model, tensors, path)
    return model.eval()


@contextlib.contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error


def _parse_header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    try:
        header = json.loads((metadata or {})[METADATA_KEY])
        version = header["format"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} holds tensors but no model structure: not a checkpoint of this project") from error
    if version != FORMAT:
        raise UserError(f"{path} is of checkpoint format {version}; this version reads format {FORMAT}")
    return header


def _parse_spec(path: Path, header: dict[str, Any]) -> ModelSpec:
    try:
        return ModelSpec.from_dict(header)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} has a damaged header: it does not say how to build its model") from error


def _parse_masked(path: Path, structure: Any, model: nn.Module) -> list[str]:
    names = structure.get("masked", []) if isinstance(structure, dict) else None
    known = parameter_names(model)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} has a damaged header: it does not name its masked parameters")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{path} has a damaged header: its masked {unknown[0]!r:.80} is no parameter of the model")
    return names


def _check_extent(path: Path, spec: ModelSpec, tensors: dict[str, torch.Tensor]) -> None:
    """A header may ask for millions of layers as easily as for ten: they are counted before they are made.

    Raises:
        UserError: the dense model is out of proportion.
    """
    large = [key for key, value in spec.kwargs.items() if any(abs(n) > LARGEST_ARGUMENT for n in _whole_numbers(value))]
    if large:
        raise UserError(
            f"{path} asks for {spec.name} with {large[0]} beyond {LARGEST_ARGUMENT}: no checkpoint needs that"
        )
    numbers = max(FEW_NUMBERS, NUMBERS_PER_NUMBER * sum(tensor.numel() for tensor in tensors.values()))
    with at_most(MOST_MODULES, numbers, f"{path} asks for {spec.name} with {spec.kwargs}"):
        build_skeleton(spec)


def _whole_numbers(value: Any) -> list[int]:
    """All that are in a JSON value."""
    if isinstance(value, (list, dict)):
        return [n for item in (value.values() if isinstance(value, dict) else value) for n in _whole_numbers(item)]
    return [value] if isinstance(value, int) else []


def _find_factory(path: Path, spec: ModelSpec, builder_file: str | Path | None) -> ModelSpec:
    """The spec with the factory of the file that the user names, if it is the one that the checkpoint was written with.

    Nothing of the file runs before its checksum is compared.
    """
    file_name, _, factory = spec.name.rpartition(":")
    if builder_file is None:
        raise UserError(
            f"{path} is a model of {file_name}, and checkpoints hold no code: name that file, "
            f"--builder-file path/to/{file_name} (in Python, builder_file=)"
        )
    file = UserFile.read(builder_file)
    if file.sha256 != spec.sha256:
        raise UserError(
            f"{path} needs {file_name} as it was when the checkpoint was written (SHA-256 {spec.sha256}); "
            f"{builder_file} differs ({file.sha256[:12]}…): name that version of the file"
        )
    return dataclasses.replace(spec, factory=file.load(factory))
