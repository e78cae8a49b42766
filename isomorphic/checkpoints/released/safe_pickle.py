"""Reading what `torch.save` wrote without letting the file run anything: tensors, plain values, and listed layers.

A pickle is a program, so a file passes three gates, none of which relies on the one before:

1. Its program is followed on paper (`_Program`), before any of it runs. It may name the classes of `LAYERS`, what
   tensors need and what trainers keep beside them (`beside_weights.py`), and no more; it calls functions of that short
   list only, each with arguments of the right kinds, and fills an object once.
2. torch reads it as weights, with stand-ins for the layers, which can be filled but not constructed, and for values.
3. Everything that came out of it is looked at (`_parts`): layers are as their classes are, with no method, hook or
   class of the file's, lie where layers belong, and tensors are plain ones.
"""

from __future__ import annotations

import argparse
import pickletools
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from timm.layers.format import Format
from torch import Tensor, nn

from isomorphic.checkpoints.released import beside_weights
from isomorphic.checkpoints.released.beside_weights import PATHS, STATES, NumpyArray, NumpyType

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
# Where else a layer keeps something whose name begins with an underscore; one of them is a class of layers.
PRIVATE = {"_fast_norm", "_is_cn", "_model_args", "_norm_layer", "_ref_grid_size", "_ref_window_sizes", "_traits"}
PRIVATE.add("_reversed_padding_repeated_twice")
# What every layer has.
BASICS = set(vars(nn.Module()))

STORAGES = {
    f"torch.{kind}Storage"
    for kind in ["BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short"]
}
DTYPES = {
    f"torch.{kind}"
    for kind in ["bfloat16", "bool", "uint8", "int8", "float64", "float32", "float16", "int32", "int64", "int16"]
}
FORMAT, NAMESPACE = "timm.layers.format.Format", "argparse.Namespace"
# What may be called, with arguments of which kinds, and the kind of what comes of it.
CALLS: Mapping[str, tuple[tuple[tuple[str, ...], ...], str]] = {
    "torch._utils._rebuild_tensor_v2": (
        (("storage", "number", "numbers", "numbers", "flag", "ordered dict"),),
        "tensor",
    ),
    "torch._utils._rebuild_parameter": ((("tensor", "flag", "ordered dict"),), "parameter"),
    "collections.OrderedDict": (((),), "ordered dict"),
    "torch.Size": ((("numbers",),), "plain"),
    "torch.device": ((("text",), ("text", "number")), "plain"),
    "builtins.set": ((("list",),), "set"),
    FORMAT: ((("text",),), "plain"),
    **beside_weights.CALLS,
}
# How pickles of the second protocol write bytes: as text, to be encoded by this codec and no other.
ENCODE, CODEC = "_codecs.encode", "latin1"
# How early versions of Python 3.11 write the members of an enumeration: getattr(Format, "NHWC"), and no other getattr.
GETATTR = "builtins.getattr"
# Of files before torch 1.6, which are five pickles, the first of which is this.
OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class RefusedError(Exception):
    """What a pickle may not do."""


def read_safely(path: Path) -> Any:
    """What a file holds, on the CPU.

    Raises:
        RefusedError: it wants what it may not have.
        Exception: whatever damaged bytes make torch raise.
    """
    stand_ins = _stand_ins()
    check_program(path, stand_ins.keys())
    allowed = [(stand_in, name) for name, stand_in in stand_ins.items()]
    others: list[Any] = [(Format, FORMAT), (_member_of_format, GETATTR), (argparse.Namespace, NAMESPACE)]
    others += [(stand_in, name) for name, stand_in in beside_weights.STAND_INS.items()]
    with torch.serialization.safe_globals([*allowed, *others]):
        stored = torch.load(path, map_location="cpu", weights_only=True)
    check_objects(stored, {stand_in: stand_in.__bases__[0] for stand_in in stand_ins.values()})
    return stored


def _stand_ins() -> dict[str, type]:
    """By the names in pickles, subclasses of the layers that can be made and filled, but not constructed."""

    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        raise RefusedError(f"it wants to construct {type(self).__name__}, not to fill one")

    layers = {f"{home}.{name}": getattr(import_module(home), name) for home in LAYERS for name in LAYERS[home].split()}
    return {name: type(layer.__name__, (layer,), {"__init__": construct}) for name, layer in layers.items()}


def _member_of_format(kind: Any, name: Any) -> Format:
    """What stands in for `getattr`."""
    if kind is not Format:
        raise RefusedError("it wants an attribute of something else than Format")
    return Format[name]


# --- the program, before it runs ---


def check_program(path: Path, layers: Any) -> None:
    """Follows all pickles of a file without running them; `layers` are the names of classes that they may make.

    Raises:
        RefusedError: something in there is not what models and weights need.
        Exception: the file is damaged.
    """
    with open(path, "rb") as file:
        start = file.read(len(OLD_MAGIC))
        file.seek(0)
        if start[:4] == b"PK\x03\x04":
            _Program(layers).follow(_main_record(file))
        elif start != OLD_MAGIC or tarfile.is_tarfile(path):
            raise ValueError("it is none of torch's archives")
        else:
            for _ in range(5):  # magic number, version, platform, content, storages
                _Program(layers).follow(file)


def _main_record(file: BinaryIO) -> bytes:
    """The pickle of an archive, found as torch finds it: there is more than one way to read a damaged archive."""
    reader = torch._C.PyTorchFileReader(file)
    if "constants.pkl" in reader.get_all_records():
        raise ValueError("it is a TorchScript archive")
    return reader.get_record("data.pkl")


class _Name(str):
    """A class or function that the program named."""


class _Object:
    """Something that the program made empty, and may fill once."""

    def __init__(self, kind: str) -> None:
        self.kind, self.filled = kind, False


class _Program:
    """A machine for pickles that works with the kinds of values in place of values: nothing is made or called."""

    CONSTANTS: Mapping[str, Any] = {
        "NONE": "flag", "NEWTRUE": "flag", "NEWFALSE": "flag", "BINFLOAT": "plain",
        "BININT": "number", "BININT1": "number", "BININT2": "number", "LONG1": "number",
        "EMPTY_TUPLE": (), "EMPTY_LIST": "list", "EMPTY_DICT": "dict",
    }  # fmt: skip
    # How many values an instruction takes off the stack, and whether these become a tuple.
    TUPLES: Mapping[str, int] = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
    TAKEN: Mapping[str, int] = {"APPEND": 1, "SETITEM": 2}

    def __init__(self, layers: Any) -> None:
        self.classes = {*layers, NAMESPACE}
        self.names = {*self.classes, *CALLS, *STORAGES, *DTYPES, *beside_weights.STAND_INS, ENCODE, GETATTR}
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.steps: Mapping[str, Callable[[], Any]] = {
            "BINPERSID": self._storage,
            "NEWOBJ": self._make,
            "REDUCE": self._call,
            "BUILD": self._fill,
            "TUPLE": lambda: tuple(self._since_mark()),
        }

    def follow(self, pickle: bytes | BinaryIO) -> None:
        """One pickle, up to its end."""
        for operation, argument, _ in pickletools.genops(pickle):
            name = operation.name
            if name in self.CONSTANTS:
                self.stack.append(self.CONSTANTS[name])
            elif name == "BINUNICODE":
                self.stack.append("codec" if argument == CODEC else "text")
            elif name in self.steps:
                made = self.steps[name]()  # which may change what the stack is
                self.stack.append(made)
            elif name in self.TUPLES:
                self.stack.append(tuple(self._take(self.TUPLES[name])))
            elif name == "GLOBAL":
                self.stack.append(self._named(str(argument)))
            else:
                self._rearrange(name, argument)

    def _rearrange(self, name: str, argument: Any) -> None:
        """The instructions that make nothing."""
        if name == "MARK":
            self.outer.append(self.stack)
            self.stack = []
        elif name in self.TAKEN:
            self._take(self.TAKEN[name])
        elif name in ("APPENDS", "SETITEMS"):
            self._since_mark()
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name not in ("PROTO", "STOP"):
            raise RefusedError(f"its pickle has the instruction {name}, which torch.save does not write")

    def _take(self, count: int) -> list[Any]:
        taken = self.stack[-count:]
        if len(taken) < count:
            raise ValueError("its pickle is damaged")
        del self.stack[-count:]
        return taken

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _named(self, argument: str) -> _Name:
        name = argument.replace(" ", ".", 1)
        name = "builtins." + name.removeprefix("__builtin__.") if name.startswith("__builtin__.") else name
        if name not in self.names:
            raise RefusedError(f"it wants {name[:120]}, which models and weights do not need")
        return _Name(name)

    def _storage(self) -> str:
        (told,) = self._take(1)
        kinds = [_kind(value) for value in told] if isinstance(told, tuple) else []
        # "storage", its class, key, device, length; before torch 1.6 also None, of what is no view
        if kinds[:5] != ["text", "name", "text", "text", "number"] or kinds[5:] not in ([], ["flag"]):
            raise RefusedError("it refers to something that is no storage of a tensor")
        if told[1] not in STORAGES:
            raise RefusedError(f"it wants {told[1]} for a storage")
        return "storage"

    def _make(self) -> _Object:
        kind, arguments = self._take(2)
        if not isinstance(kind, _Name) or kind not in self.classes or arguments != ():
            what = kind if isinstance(kind, _Name) else _kind(kind)
            raise RefusedError(f"it wants to make {what}, which is not made empty and then filled")
        return _Object("object")

    def _call(self) -> Any:
        function, arguments = self._take(2)
        if isinstance(function, _Name) and function in self.classes:
            raise RefusedError(f"it wants to construct {function.rpartition('.')[2]}, not to fill one")
        if function == GETATTR and isinstance(function, _Name) and arguments == (FORMAT, "text"):
            return "plain"
        if function == ENCODE and isinstance(function, _Name):
            if not _fits(arguments, ("text", "codec")):
                raise RefusedError(f"it wants {ENCODE}, which models and weights need for bytes alone")
            return "bytes"
        if function in PATHS and isinstance(function, _Name) and isinstance(arguments, tuple):
            if not all(_fits((part,), ("text",)) for part in arguments):
                raise RefusedError(f"it wants to call {function} with something else than that takes")
            return "text"
        if not isinstance(function, _Name) or function not in CALLS:
            raise RefusedError(f"it wants to call {function if isinstance(function, _Name) else 'what it made itself'}")
        signatures, result = CALLS[function]
        if not any(_fits(arguments, signature) for signature in signatures):
            raise RefusedError(f"it wants to call {function} with something else than that takes")
        return _Object(result) if result in ("ordered dict", *STATES) else result

    def _fill(self) -> _Object:
        target, state = self._take(2)
        fits = isinstance(target, _Object) and not target.filled
        if fits and target.kind in STATES:
            fits = _fits(state, STATES[target.kind])
        elif _kind(state) != "dict":
            fits = False
        if not fits:
            raise RefusedError("it wants to fill what is not an empty layer")
        target.filled = True
        return target


def _kind(value: Any) -> str:
    """Of a value on the stack: a class or function, a tuple (of numbers), an object, or what its name says."""
    if isinstance(value, _Name):
        return "name"
    if isinstance(value, tuple):
        return "numbers" if all(isinstance(item, str) and item == "number" for item in value) else "tuple"
    return value.kind if isinstance(value, _Object) else value


def _fits(arguments: Any, signature: tuple[str, ...]) -> bool:
    if not isinstance(arguments, tuple):
        return False
    kinds = tuple(_kind(argument) for argument in arguments)
    return signature in (kinds, tuple("text" if kind == "codec" else kind for kind in kinds))


# --- what came out of it ---

PLAIN = {type(None), bool, int, float, str, torch.Size, torch.device, torch.dtype, Format, NumpyArray, NumpyType}


def check_objects(stored: Any, layers: Mapping[type, type]) -> None:
    """Looks at everything that `stored` leads to, and makes the stand-ins among it the `layers` that they stand for.

    Containers are read as plain ones, never by methods that they may have got from the file.

    Raises:
        RefusedError: something could act in place of a layer's own code.
        ValueError: something is not where it belongs.
    """
    pending, seen = [(stored, False)], set()
    while pending:
        value, inside = pending.pop()
        if (id(value), inside) not in seen:  # what is shared comes by more than once
            seen.add((id(value), inside))
            pending += _parts(value, inside, layers)


def _parts(value: Any, inside: bool, layers: Mapping[type, type]) -> list[tuple[Any, bool]]:
    """What a value consists of, and whether that lies in an attribute of a layer (`inside`), where no layer may be."""
    kind = type(value)
    if kind in PLAIN:
        return []
    if kind in (list, tuple, set):
        return [(item, inside) for item in value]
    if kind in (dict, OrderedDict, Counter):
        return [(item, inside) for item in _parts_of_dict(value)]
    if kind in (Tensor, nn.Parameter):
        _check_tensor(value)
        return []
    if kind is argparse.Namespace and not inside:
        return [(item, False) for item in vars(value).values()]
    if kind in layers and not inside:
        return _parts_of_layer(value, layers)
    raise RefusedError(f"it holds {_describe(value)} where none belongs")


def _parts_of_dict(value: dict[Any, Any]) -> list[Any]:
    if not all(type(key) in (str, int, float, bool, type(None)) for key in dict.keys(value)):
        raise RefusedError("it has a dict whose keys are no plain values")
    attributes = vars(value) if isinstance(value, OrderedDict) else {}
    if attributes.keys() - {"_metadata"}:  # which state dicts have
        raise RefusedError(f"an OrderedDict of it comes with {next(iter(attributes))} of its own")
    return [*dict.values(value), *attributes.values()]


def _check_tensor(tensor: Tensor) -> None:
    if vars(tensor) or tensor._backward_hooks:
        raise RefusedError("a tensor of it comes with attributes of its own")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has fewer numbers than that")


def _parts_of_layer(layer: nn.Module, layers: Mapping[type, type]) -> list[tuple[Any, bool]]:
    """Unmasks a layer."""
    layer.__class__ = layers[type(layer)]
    state, kind = vars(layer), type(layer).__name__
    if missing := {"_modules", "_parameters", "_buffers", "training"} - state.keys():
        raise ValueError(f"a {kind} has no {min(missing)}")
    for name, value in state.items():
        _check_attribute(type(layer), name, value)
    known = (*layers, *layers.values())
    for place, kinds in (("_modules", known), ("_parameters", (nn.Parameter,)), ("_buffers", (Tensor,))):
        _check_members(kind, state[place], kinds)
    if norm := state.get("_norm_layer"):
        if not isinstance(norm, type) or norm not in layers:
            raise RefusedError(f"its {kind} comes with _norm_layer of its own")
        state["_norm_layer"] = layers[norm]
    children = [(child, False) for child in dict.values(state["_modules"]) if type(child) in layers]
    return children + [(value, True) for name, value in state.items() if name not in ("_modules", "_norm_layer")]


def _check_attribute(kind: type, name: Any, value: Any) -> None:
    """An attribute has a name that is free in its class, and where torch relies on its type, that type."""
    if not isinstance(name, str) or hasattr(kind, name) or (name[:1] == "_" and name not in BASICS | PRIVATE):
        raise RefusedError(f"its {kind.__name__} comes with {str(name)[:80]} of its own")
    if "hooks" in name and (type(value) not in (dict, OrderedDict) or len(value)):
        raise RefusedError(f"its {kind.__name__} comes with {name[:80]} of its own")
    if name == "training" and type(value) is not bool:
        raise ValueError(f"a {kind.__name__} is neither in training nor in evaluation")
    if name == "_non_persistent_buffers_set" and not (type(value) is set and all(type(item) is str for item in value)):
        raise ValueError(f"a {kind.__name__} has a wrong {name}")


def _check_members(kind: str, members: Any, kinds: tuple[type, ...]) -> None:
    """What torch keeps of a layer: by name, its layers, its parameters, or its buffers."""
    if type(members) not in (dict, OrderedDict) or (isinstance(members, OrderedDict) and vars(members)):
        raise ValueError(f"a {kind} has {_describe(members)} for a dict")
    for name, member in dict.items(members):
        if type(name) is not str or not (member is None or type(member) in kinds):
            raise ValueError(f"a {kind} has {_describe(member)} as {str(name)[:80]}")


def _describe(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"one {type(value).__name__}"
