"""One safe file for a pruned model: tensors, and the structure that they no longer share with its builder.

A checkpoint is a `.safetensors` file. Its metadata holds one JSON string, under the key `isomorphic`:

    format          1
    builder, name, kwargs, preprocessing    the `ModelSpec` that builds the dense model
    kept_blocks     the blocks of it that are still there, where some are not: {module: [index, ...]}
    sha256          of the user's file, where builder is "file"
    structure       what differs from the dense model:
        attributes  {module: {attribute: value}}    ints, floats, bools, and lists of them, that a forward reads
        gained      tensors that the builder leaves as None (a bias that recovery added)
        lost        tensors of the builder that are gone
        masked      parameters whose zeros are pruned weights and stay zero in training; left out where there are none
    averaged        true where the weights are a moving average over training; left out where they are not
    provenance      command, arguments, versions, commit, hardware, parent checksum, measured MACs and params

Loading builds the dense model by name, resizes each layer to its tensors' shapes, restores the attributes and
loads strictly. Nothing in a file is ever executed. The code of a model of the user's own is not in there: whoever
loads it names the Python file again, and its checksum must be the one that the checkpoint was written with.

The `.pth` files of others are read, too (see `released/legacy.py`), but never written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from isomorphic.checkpoints.released.legacy import Contents, describe_pth, read_pth
from isomorphic.errors import UserError, first_line
from isomorphic.files import atomic_write
from isomorphic.models import (
    LARGEST_ARGUMENT,
    ModelSpec,
    at_most,
    build_model,
    build_skeleton,
    describe_model,
    example_inputs,
)
from isomorphic.user_file import UserFile, is_user_file

FORMAT = 1
# How large a dense model a file may ask for: nothing that is cut to a file's size needs more.
MOST_MODULES, NUMBERS_PER_NUMBER, FEW_NUMBERS = 10_000, 1000, 200_000_000
METADATA_KEY = "isomorphic"
PTH = (".pth", ".pt", ".tar")  # what files of torch.save end in
_SCALARS = (bool, int, float)


def load_model(source: str | Path, **options: Any) -> nn.Module:
    """The ready model, in eval mode on the CPU: the way in for users.

    Args:
        source: a model name of the builder, "path/to/file.py:factory", a checkpoint, or a `.pth` file.
        **options: see `open_model`.
    """
    return open_model(source, **options)[0]


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

    Raises:
        UserError: an unknown name, weights out of reach, a file that is not what it should be.
    """
    if is_pth(source):
        contents = read_pth(source, use_ema=use_ema, trust=trust)
        spec = describe_pth(contents, source, builder=builder, name=name, kwargs=kwargs, input_size=input_size)
        return _model_of(contents, spec, source), spec
    _check_averaged(source, use_ema)
    if is_checkpoint(source):
        if kwargs:
            raise UserError(f"{source} is a checkpoint and knows its model: leave out the model's keyword arguments")
        return _load_checkpoint(Path(source), builder_file)
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


def load_tensors(model: nn.Module, tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Puts tensors, which come from `path`, into a model: all of its state dict, and buffers that it does not store.

    Raises:
        UserError: some are missing, unknown, of another shape, or no plain numbers.
    """
    state = model.state_dict()
    places = dict(model.named_buffers()) | state
    faults = [f"{name} is missing" for name in state if name not in tensors]
    faults += [f"{name} is none of its tensors" for name in tensors if name not in places]
    faults += [
        f"{name} is {tuple(tensor.shape)}, not {tuple(places[name].shape)}"
        for name, tensor in tensors.items()
        if name in places and tensor.shape != places[name].shape
    ]
    faults += [
        f"{name} is no plain tensor of real numbers" for name, tensor in tensors.items() if not _is_dense(tensor)
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(f"{path} does not fit the model: {faults[0]}{more}")
    try:
        for name in tensors.keys() - state.keys():
            places[name].copy_(tensors[name])
        state.update({name: tensors[name] for name in state})  # it knows the versions that some modules look for
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path} does not fit the model: {reason}") from error


def check_savable(source: str | Path, model: nn.Module, spec: ModelSpec) -> None:
    """Finds out early that what is made of a `.pth` file's model can be saved: what it saves loads as the same model.

    Models from elsewhere are what their spec builds, and pass.

    Raises:
        UserError: the spec builds another model, so the file has to be converted with the right one.
    """
    if not is_pth(source):
        return
    try:
        skeleton = build_skeleton(spec)
        structure = json.loads(json.dumps(describe_structure(model, skeleton)))
        twin = _rebuild(spec, structure, _tensors_to_save(model, skeleton), source)
        agree = same_logits(model, twin, spec)
    except UserError as error:
        agree, reason = False, str(error)
    else:
        reason = f"{spec.name} with {spec.kwargs} is another model"
    if not agree:
        raise UserError(
            f"what is made of {source} could not be saved ({reason}): convert it first with the builder's name and "
            f"arguments, python tools/convert.py {source} OUT.safetensors --name NAME --model-kwargs KEY=VALUE …"
        )


def same_logits(model: nn.Module, other: nn.Module, spec: ModelSpec) -> bool:
    """Whether two models, in eval mode on the CPU, answer alike to one image of random noise."""
    image = example_inputs(spec)
    with torch.no_grad():
        ours, theirs = model(image), other(image)
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


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


def save_model(
    path: str | Path, model: nn.Module, spec: ModelSpec, *, provenance: dict[str, Any], averaged: bool = False
) -> None:
    """Writes `model`, which was cut or trained from `build_model(spec)`, atomically.

    Args:
        path: file to write; its folder is made.
        model: any modules of the spec's model, with other tensor shapes and attributes.
        spec: how to build the dense model.
        provenance: JSON values that say where the model comes from.
        averaged: the weights are a moving average (`--use-ema` asks for those).

    Raises:
        UserError: the file cannot be written, the model differs from its builder's beyond what a checkpoint holds, or
            it has not the parameters that the spec says are masked.
    """
    dense = build_skeleton(spec)
    tensors = _tensors_to_save(model, dense)
    header = {
        "format": FORMAT,
        **spec.to_dict(),
        "structure": describe_structure(model, dense) | _masked_names(model, spec),
        **({"averaged": True} if averaged else {}),
        "provenance": provenance,
    }
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(header)})
        except SafetensorError as error:  # how a full disk is reported
            raise UserError(f"cannot write {path}: {error}") from error


def read_header(path: str | Path) -> dict[str, Any]:
    """The JSON header of a checkpoint, without its tensors.

    Raises:
        UserError: the file is missing, truncated, not a checkpoint, or of a newer format.
    """
    with _open_tensors(Path(path)) as file:
        return _parse_header(Path(path), file.metadata())


def describe_structure(model: nn.Module, dense: nn.Module) -> dict[str, Any]:
    """What `model` has that its freshly built twin `dense` has not (see the module's docstring).

    Raises:
        UserError: modules or tensors that loading could not put into, or leave out of, what the builder makes.
    """
    twins = dict(dense.named_modules())
    strangers = [name for name, _ in model.named_modules() if name not in twins]
    if strangers:
        raise UserError(f"cannot save modules that the builder does not make: {', '.join(strangers[:3])}")
    attributes = {
        name: changed for name, module in model.named_modules() if (changed := _changed_attributes(module, twins[name]))
    }
    strange = [
        f"{key!r} of {name or 'the model'}"
        for name, changed in attributes.items()
        for key, value in changed.items()
        if not _is_alike(getattr(twins[name], key), value)
    ]
    if strange:
        raise UserError(f"cannot save attributes of another kind than the builder's: {', '.join(strange[:3])}")
    ours, theirs = set(_named_tensors(model)), set(_named_tensors(dense))
    gained, lost = sorted((ours - theirs) & model.state_dict().keys()), sorted(theirs - ours)
    misfits = [name for name in gained if not _is_vacant(dense, name)] + [n for n in lost if not _is_vacant(model, n)]
    if misfits:
        raise UserError(f"cannot save layers that are not the builder's any more: see {', '.join(misfits[:3])}")
    return {"attributes": attributes, "gained": gained, "lost": lost}


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


def _load_checkpoint(path: Path, builder_file: str | Path | None) -> tuple[nn.Module, ModelSpec]:
    with _open_tensors(path) as file:
        header = _parse_header(path, file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    spec = _parse_spec(path, header)
    if spec.builder == "file":
        spec = _find_factory(path, spec, builder_file)
    else:
        _check_extent(path, spec, tensors)
    model = _rebuild(spec, header.get("structure"), tensors, path)
    return model, spec.masking(_parse_masked(path, header["structure"], model))


def _rebuild(spec: ModelSpec, structure: Any, tensors: dict[str, torch.Tensor], path: str | Path) -> nn.Module:
    """The dense model with another structure and its tensors, which come from `path`, in eval mode."""
    model = build_model(spec)
    try:
        _restore_structure(model, structure, tensors)
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
    known = _parameter_names(model)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} has a damaged header: it does not name its masked parameters")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{path} has a damaged header: its masked {unknown[0]!r:.80} is no parameter of the model")
    return names


def _masked_names(model: nn.Module, spec: ModelSpec) -> dict[str, list[str]]:
    """What the structure of a checkpoint says of masks."""
    unknown = [name for name in spec.masked if name not in _parameter_names(model)]
    if unknown:
        raise UserError(f"cannot save the masks of parameters that the model has not: {', '.join(unknown[:3])}")
    return {"masked": list(spec.masked)} if spec.masked else {}


def _parameter_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


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


def _restore_structure(model: nn.Module, structure: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in structure["lost"]:
        module, leaf = _locate(model, name)
        if leaf not in {*module._parameters, *module._buffers}:
            raise ValueError(f"{name} is not a tensor that could be left out")
        setattr(module, leaf, None)
    resized: dict[int, torch.Tensor] = {}  # a tied parameter stays tied
    for name, tensor in tensors.items():
        module, leaf = _locate(model, name)
        current = getattr(module, leaf)
        if current is None:
            if name not in structure["gained"]:
                raise ValueError(f"its layers have no place for {name}")
            module.register_parameter(leaf, nn.Parameter(torch.empty(tensor.shape)))
            continue
        if current.ndim != tensor.ndim or current.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not like {tuple(current.shape)}")
        if current.shape != tensor.shape:
            resized[id(current)] = resized.get(id(current), _empty_like(current, tensor))
            setattr(module, leaf, resized[id(current)])
    for name, attributes in structure["attributes"].items():
        module = model.get_submodule(name)
        for attribute, value in attributes.items():
            current = module.__dict__.get(attribute)
            if attribute.startswith("_") or attribute == "training" or not _is_plain(current):
                raise ValueError(f"a checkpoint may not set {attribute!r} of {name or 'the model'}")
            if not _is_alike(current, value):
                raise ValueError(f"a checkpoint may not set {attribute!r} of {name or 'the model'} to {value!r:.80}")
            setattr(module, attribute, _like(current, value))


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor has all its numbers in memory, and real ones."""
    plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_complex()
    return plain and tensor.device.type == "cpu"


def _tensors_to_save(model: nn.Module, dense: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers, and the non-persistent buffers that were cut; each with storage of its own."""
    dense_buffers = dict(dense.named_buffers())
    cut = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in dense_buffers and buffer.shape != dense_buffers[name].shape
    }
    tensors = cut | model.state_dict()
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _changed_attributes(module: nn.Module, twin: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in module.__dict__.items()
        if not name.startswith("_")
        and name != "training"
        and name in twin.__dict__
        and _is_plain(value)
        and _is_plain(twin.__dict__[name])
        and value != twin.__dict__[name]
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _SCALARS)


def _is_alike(current: Any, value: Any) -> bool:
    """Whether a value is of the type and length of another; whole numbers may stand for fractions, not vice versa."""
    if isinstance(current, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(current) == len(value) and all(map(_is_alike, current, value))
    return type(value) is type(current) or (type(current) is float and type(value) is int)


def _like(current: Any, value: Any) -> Any:
    """A value from JSON, which has no tuples, with tuples where the builder sets them."""
    if not isinstance(value, list):
        return value
    items = [_like(example, item) for example, item in zip(current, value, strict=True)]
    return tuple(items) if isinstance(current, tuple) else items


def _named_tensors(model: nn.Module) -> list[str]:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return names + [name for name, _ in model.named_buffers(remove_duplicate=False)]


def _locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, leaf = name.rpartition(".")
    return model.get_submodule(prefix), leaf


def _is_vacant(model: nn.Module, name: str) -> bool:
    """Whether a module of `model` has a place for this tensor and nothing in it."""
    prefix, _, leaf = name.rpartition(".")
    module = dict(model.named_modules()).get(prefix)
    return module is not None and leaf in {**module._parameters, **module._buffers} and getattr(module, leaf) is None


def _empty_like(current: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=current.dtype)
    if isinstance(current, nn.Parameter):
        return nn.Parameter(empty, requires_grad=current.requires_grad)
    return empty
