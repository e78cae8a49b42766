"""Pickles that were written by hand, or from objects that were tampered with: nothing of theirs runs or stays."""

from __future__ import annotations

import re
import struct
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from isomorphic.checkpoints.open import load_model, load_weights
from isomorphic.checkpoints.released.safe_pickle import LAYERS, OLD_MAGIC, RefusedError, check_objects, check_program
from isomorphic.errors import UserError
from tests.faults import one_line

# --- a pickle assembler ---

NONE, TRUE, FALSE, EMPTY = b"N", b"\x88", b"\x89", b")"


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def whole(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def several(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def table(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + several(*arguments) + b"R"


def filled(kind: bytes, state: bytes) -> bytes:
    return kind + EMPTY + b"\x81" + state + b"b"


IDENTITY = named("torch.nn.modules.linear", "Identity")
NAMESPACE = named("argparse", "Namespace")
ORDERED = called(named("collections", "OrderedDict"))
SET = called(named("builtins", "set"), b"]")
REBUILD = named("torch._utils", "_rebuild_tensor_v2")
PARAMETER = named("torch._utils", "_rebuild_parameter")
STORAGE = several(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu"), whole(2)) + b"Q"
TENSOR = called(REBUILD, STORAGE, whole(0), several(whole(2)), several(whole(1)), FALSE, ORDERED)


def layer(**attributes: bytes) -> bytes:
    """An Identity."""
    hooks = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks"]
    state = {name: table() for name in ("_parameters", "_buffers", "_modules", *hooks)}
    return filled(IDENTITY, table(training=FALSE, _non_persistent_buffers_set=SET, **(state | attributes)))


def archive(path: Path, program: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02" + program + b".")
        file.writestr("a/byteorder", "little")
        file.writestr("a/data/0", bytes(8))
        file.writestr("a/version", "3\n")
    return path


def load(path: Path) -> Any:
    return load_weights(nn.BatchNorm1d(2, track_running_stats=False), path)


def patched(target: bytes, name: str, value: bytes) -> bytes:
    """torch sets attributes of whatever this makes `target` come back as."""
    self_returning = filled(NAMESPACE, table(as_subclass=layer()))
    rebuild = named("torch._tensor", "_rebuild_from_type_v2")
    return called(rebuild, layer(), target, several(self_returning), table(**{name: value}))


def test_the_assembler_writes_what_is_loaded(tmp_path: Path):
    weights = table(weight=TENSOR, bias=called(PARAMETER, TENSOR, FALSE, ORDERED))
    load(archive(tmp_path / "good.pth", weights))
    assert isinstance(load_model(archive(tmp_path / "good.pth", table(model=layer()))), nn.Identity)


PROGRAMS: dict[str, tuple[bytes, str]] = {
    "attribute of torch.Tensor": (
        patched(named("torch", "Tensor"), "evil", layer()), r"it wants torch\._tensor\._rebuild_from_type_v2",
    ),
    "method of all parameters": (
        patched(named("torch.nn.parameter", "Parameter"), "numel", named("collections", "OrderedDict")), "type_v2",
    ),
    "defaults of a function": (patched(REBUILD, "__defaults__", several(whole(5))), "_from_type_v2"),
    "import of a codec": (
        called(named("_codecs", "encode"), text("x"), text("punycode")), "it wants _codecs.encode, which models",
    ),
    "tensor class": (named("torch", "Tensor"), "it wants torch.Tensor"),
    "parameter with attributes": (named("torch._utils", "_rebuild_parameter_with_state"), "it wants torch._utils"),
    "wrapper": (named("torch._utils", "_rebuild_wrapper_subclass"), "it wants torch._utils"),
    "array": (named("torch._utils", "_rebuild_device_tensor_from_numpy"), "it wants torch._utils"),
    "complex storage": (named("torch", "ComplexFloatStorage"), "it wants torch.ComplexFloatStorage"),
    "name of strings": (b"\x8c\x02os\x8c\x06system\x93", "the instruction SHORT_BINUNICODE"),
    "name of strings, long ones": (text("os") + text("system") + b"\x93", "the instruction STACK_GLOBAL"),
    "extension": (b"\x82\x01", "the instruction EXT1|not a whole file"),
    "instance": (b"(ios\nsystem\n", "the instruction INST"),
    "call of a layer": (called(layer(), text("x")), "it wants to call what it made itself"),
    "call of a namespace": (called(NAMESPACE), "it wants to construct Namespace, not to fill one"),
    "constructed layer": (called(IDENTITY), "it wants to construct Identity"),
    "layer with arguments": (IDENTITY + several(text("x")) + b"\x81", "to make .*Identity, which is not made empty"),
    "new set": (named("builtins", "set") + EMPTY + b"\x81", "it wants to make builtins.set"),
    "parameter of a namespace": (
        called(PARAMETER, filled(NAMESPACE, table(detach=layer())), FALSE, ORDERED), "with something else than",
    ),
    "tensor of a layer": (
        called(REBUILD, layer(), whole(0), several(whole(2)), several(whole(1)), FALSE, ORDERED), "something else than",
    ),
    "tensor with too much": (
        called(REBUILD, STORAGE, whole(0), several(whole(2)), several(whole(1)), FALSE, ORDERED, table()), "else than",
    ),
    "dict of a layer": (called(named("collections", "OrderedDict"), layer()), "with something else than"),
    "storage of a class": (
        several(text("storage"), IDENTITY, text("0"), text("cpu"), whole(2)) + b"Q", "Identity for a storage",
    ),
    "storage of a namespace": (
        several(text("storage"), filled(NAMESPACE, table()), text("0"), text("cpu"), whole(2)) + b"Q", "no storage",
    ),
    "twice filled": (layer() + table(__setstate__=layer()) + b"b", "fill what is not an empty layer"),
    "filled tensor": (TENSOR + table(x=NONE) + b"b", "fill what is not an empty layer"),
    "filled with a tuple": (IDENTITY + EMPTY + b"\x81" + several(NONE, table()) + b"b", "fill what is not an empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROGRAMS)
def test_a_program_is_refused_before_it_runs(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program, message = PROGRAMS[case]
    path = archive(tmp_path / "bomb.pth", table(model=program))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(UserError, match=message) as error:
        load_model(path)
    one_line(error)
    assert not hasattr(torch.Tensor, "evil") and nn.Parameter(torch.ones(3)).numel() == 3
    assert "encodings.punycode" not in sys.modules


def test_all_programs_of_an_old_file_are_followed(tmp_path: Path):
    path = tmp_path / "old.pth"
    weights = {"weight": torch.ones(2), "bias": torch.zeros(2)}
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    load(path)
    bomb = b"\x80\x02" + named("os", "system") + b"."
    good = path.read_bytes()
    rest = good[len(OLD_MAGIC) :]
    path.write_bytes(OLD_MAGIC + bomb + rest)
    for content in (OLD_MAGIC + bomb, OLD_MAGIC + b"\x80\x02K\x01.\x80\x02}." + bomb):
        path.write_bytes(content)
        with pytest.raises(RefusedError, match=r"it wants os\.system"):
            check_program(path, set())
    path.write_bytes(b"\x80\x02" + named("os", "system") + b".")
    with pytest.raises(ValueError, match="none of torch's archives"):
        check_program(path, set())


# --- objects that were tampered with ---


def resnet() -> nn.Module:
    return timm.create_model("resnet18", num_classes=10, channels=(4, 4, 8, 8)).eval()


def evil() -> nn.Module:
    module = nn.Linear(8, 10)
    module.__dict__["forward"] = nn.Identity()
    return module


def in_place_of_a_layer(model: Any) -> None:
    del model._modules["fc"]
    model.__dict__["fc"] = evil()


def with_own_values(**items: Any) -> OrderedDict[str, Any]:
    made = OrderedDict(items)
    made.__dict__["values"] = OrderedDict
    return made


TAMPERINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "layer as an attribute": (in_place_of_a_layer, "it holds one Linear where none belongs"),
    "layer in a list": (lambda m: m.__dict__.update(extra=[{"a": (evil(),)}]), "one Linear where none belongs"),
    "layer that is both": (lambda m: m.__dict__.update(extra=m.fc), "one Linear where none belongs"),
    "layer as a buffer": (lambda m: m._buffers.update(fc=evil()), "a ResNet has one Linear as fc"),
    "layer as a parameter": (lambda m: m._parameters.update(fc=evil()), "a ResNet has one Linear as fc"),
    "tensor as a parameter": (lambda m: m._parameters.update(x=torch.ones(1)), "a ResNet has one Tensor as x"),
    "tensor as a layer": (lambda m: m._modules.update(x=torch.ones(1)), "a ResNet has one Tensor as x"),
    "layer with a method": (lambda m: m._modules.update(fc=evil()), "its Linear comes with forward of its own"),
    "layers with a method": (lambda m: m.__dict__.update(_modules=with_own_values(a=evil())), "one OrderedDict for a"),
    "no dict of layers": (lambda m: m.__dict__.update(_modules=[]), "one list for a dict"),
    "compiled call": (lambda m: m.__dict__.update(_compiled_call_impl=nn.Identity()), "_compiled_call_impl of its own"),
    "private name": (lambda m: m.__dict__.update(_call=3), "its ResNet comes with _call of its own"),
    "name of no text": (lambda m: m.__dict__.update({3: 3}), "its ResNet comes with 3 of its own"),
    "training": (lambda m: m.__dict__.update(training=3), "neither in training nor"),
    "no training": (lambda m: m.__dict__.pop("training"), "a ResNet has no training"),
    "hook of a kind": (lambda m: m._forward_hooks_with_kwargs.update({0: True}), "_forward_hooks_with_kwargs of its"),
    "hooks that are none": (lambda m: m.__dict__.update(_forward_hooks=nn.Identity()), "_forward_hooks of its own"),
    "class as an attribute": (lambda m: m.__dict__.update(norm_layer=nn.BatchNorm2d), "the class BatchNorm2d"),
    "wrong normalisation": (lambda m: m.__dict__.update(_norm_layer=OrderedDict), "_norm_layer of its own"),
    "function": (lambda m: m.__dict__.update(act=one_line), "one function where none belongs"),
    "namespace": (lambda m: m.__dict__.update(pos_embed=Namespace(shape=3)), "one Namespace where none belongs"),
    "tensor with an attribute": (lambda m: setattr(m.fc.weight, "numel", 3), "a tensor of it comes with attributes"),
    "tensor with a hook": (
        lambda m: setattr(m.fc.weight, "_backward_hooks", OrderedDict(a=3)), "a tensor of it comes with attributes",
    ),
    "tensor without numbers": (
        lambda m: setattr(m.fc, "weight", nn.Parameter(torch.zeros(1).expand(10**10, 8))), "has fewer numbers",
    ),
    "key of a dict": (lambda m: m.__dict__.update(cfg={torch.ones(1): 3}), "keys are no plain values"),
    "buffers without names": (lambda m: m._non_persistent_buffers_set.add(3), "a wrong _non_persistent_buffers_set"),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERINGS)
def test_what_could_act_in_a_layers_place_is_found_wherever_it_lies(case: str):
    change, message = TAMPERINGS[case]
    model = resnet()
    change(model)
    kinds = (nn.Identity, *{type(module) for module in resnet().modules()})
    for stored in (model, {"args": Namespace(a=[{"b": (model,)}])}, with_own_values(model=model)):
        with pytest.raises((RefusedError, ValueError), match=f"{message}|values of its own"):
            check_objects(stored, {kind: kind for kind in kinds})


def test_a_dict_with_methods_of_its_own_is_refused():
    with pytest.raises(RefusedError, match="an OrderedDict of it comes with values of its own"):
        check_objects(with_own_values(model=3), {})
    check_objects(resnet().state_dict(), {})  # these have _metadata


def test_the_list_holds_layers_only():
    for home, names in LAYERS.items():
        assert re.fullmatch(r"(torch\.nn\.modules|timm\.(layers|models)|torchvision\.(models|ops))\.\w+", home)
        module = __import__(home, fromlist=["_"])
        assert all(issubclass(getattr(module, name), nn.Module) for name in names.split())
