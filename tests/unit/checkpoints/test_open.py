"""Opening: damaged or hostile files stop in one line, and nothing of theirs is run."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from isomorphic.checkpoints.open import is_checkpoint, load_model, load_weights, open_model, read_header, source_file
from isomorphic.checkpoints.save import save_model
from isomorphic.checkpoints.structure import METADATA_KEY
from isomorphic.errors import UserError
from isomorphic.models import example_inputs
from isomorphic.provenance import file_sha256
from tests.faults import one_line
from tests.unit.checkpoints.conftest import OWN, TOY, VIT, Bomb, Toy, masked_vit, pruned, rewritten


def test_the_face_of_the_package_loads_a_file_given_as_text(tmp_path: Path):
    import isomorphic

    save_model(tmp_path / "toy.safetensors", Toy(), TOY, provenance={})
    assert isinstance(isomorphic.load_model(str(tmp_path / "toy.safetensors")), Toy)


def test_a_pruned_file_as_the_weights_of_a_dense_model_says_that_it_is_one(tmp_path: Path):
    save_model(tmp_path / "pruned.safetensors", pruned(VIT), VIT, provenance={})
    with pytest.raises(UserError, match="of this project, maybe pruned, and shapes its model itself: give it as --mod"):
        open_model(VIT.name, kwargs=VIT.kwargs, weights=tmp_path / "pruned.safetensors")
    save_file(load_file(tmp_path / "pruned.safetensors"), tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="does not fit the model") as error:
        open_model(VIT.name, kwargs=VIT.kwargs, weights=tmp_path / "bare.safetensors")
    assert "of this project" not in str(error.value)


@pytest.mark.parametrize("trusted_default", [None, True])
def test_averaged_weights_say_so_and_are_found(tmp_path: Path, trusted_default: bool | None):
    path, model = tmp_path / "averaged.safetensors", pruned(VIT)
    save_model(path, model, VIT, provenance={}, averaged=True)
    assert read_header(path)["averaged"] is True
    images = example_inputs(VIT)
    with torch.no_grad():
        expected = model.eval()(images)
        opened, spec = open_model(path, use_ema=trusted_default)
        assert torch.equal(opened(images), expected) and spec == VIT
        other = pruned(VIT)
        nn.init.zeros_(other.norm.weight)  # type: ignore[union-attr, arg-type]
        load_weights(other, path, use_ema=trusted_default)
        assert torch.equal(other.eval()(images), expected)
    message = re.escape(f"{path} holds averaged weights only: leave out --no-use-ema")
    for load in (lambda: open_model(path, use_ema=False), lambda: load_weights(other, path, use_ema=False)):
        with pytest.raises(UserError, match=message) as error:
            load()
        one_line(error)
    save_model(tmp_path / "again.safetensors", opened, spec, provenance={})
    assert "averaged" not in read_header(tmp_path / "again.safetensors")  # whoever saves says what it is


@pytest.mark.parametrize("claim", [False, None, "yes", 1, [True]])
def test_weights_are_raw_unless_the_header_says_averaged(tmp_path: Path, claim: Any):
    path = tmp_path / "raw.safetensors"
    save_model(path, Toy(), TOY, provenance={})
    header = read_header(path)
    assert "averaged" not in header
    save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps(header | {"averaged": claim})})
    open_model(path, use_ema=False)
    load_weights(Toy(), path, use_ema=False)
    message = re.escape(f"{path} holds no averaged weights: leave out --use-ema")
    for load in (lambda: open_model(path, use_ema=True), lambda: load_weights(Toy(), path, use_ema=True)):
        with pytest.raises(UserError, match=message) as error:
            load()
        one_line(error)


def test_tensors_without_a_header_are_raw(tmp_path: Path):
    path = tmp_path / "bare.safetensors"
    save_file({name: tensor.clone() for name, tensor in Toy().state_dict().items()}, path)
    load_weights(Toy(), path, use_ema=False)
    with pytest.raises(UserError, match="holds no averaged weights"):
        load_weights(Toy(), path, use_ema=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_tensors_of_any_precision_are_loaded_in_the_builders(dtype: torch.dtype, tmp_path: Path):
    model = pruned(VIT).to(dtype)
    save_model(tmp_path / "kept.safetensors", model, VIT, provenance={})
    reloaded, images = load_model(tmp_path / "kept.safetensors"), torch.randn(1, 3, 16, 16)
    assert {parameter.dtype for parameter in reloaded.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(reloaded(images), model.float()(images))


# --- masked models ---


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blocks.0.mlp.fc9.weight"], "its masked 'blocks.0.mlp.fc9.weight' is no parameter of the model"),
        (["blocks.0.mlp"], "its masked 'blocks.0.mlp' is no parameter"),
        (["__class__"], "its masked '__class__' is no parameter"),
        (["x" * 10**6], "its masked 'xxx"),
        ("norm.weight", "does not name its masked parameters"),
        ([["norm.weight"]], "does not name its masked parameters"),
        ({"norm.weight": 1}, "does not name its masked parameters"),
        (None, "does not name its masked parameters"),
    ],
)
def test_hostile_masks_are_refused(names: Any, message: str, tmp_path: Path):
    model, spec = masked_vit()
    save_model(tmp_path / "m.safetensors", model, spec, provenance={})
    path = rewritten(tmp_path / "m.safetensors", tmp_path, lambda h: h["structure"].update(masked=names))
    with pytest.raises(UserError, match="has a damaged header: .*" + re.escape(message)) as error:
        open_model(path)
    one_line(error)
    assert len(str(error.value)) < 500


# --- a model of the user's own ---


def saved_own(own: Path, folder: Path) -> Path:
    model, spec = open_model(f"{own}:build", input_size=8)
    save_model(folder / "own.safetensors", model, spec, provenance={})
    return folder / "own.safetensors"


def test_a_checkpoint_alone_imports_nothing(own: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch):
    """Not even where the file lies in the working folder, on the search path, or where the checkpoint says it does."""
    path = saved_own(own, tmp_path)
    own.write_text(f"import os\nos.mkdir({str(marker)!r})\n" + OWN)
    monkeypatch.chdir(own.parent)
    monkeypatch.syspath_prepend(own.parent)
    sha256 = file_sha256(own)
    for name in ("own.py:build", f"{own}:build", "own:build"):
        hostile = rewritten(path, tmp_path, lambda h, name=name: h.update(name=name, sha256=sha256))
        with pytest.raises(UserError, match="and checkpoints hold no code: name that file, --builder-file") as error:
            load_model(hostile)
        one_line(error)


def test_another_file_is_not_run(own: Path, tmp_path: Path, marker: Path):
    path = saved_own(own, tmp_path)
    own.write_text(f"import os\nos.mkdir({str(marker)!r})\n" + OWN)
    with pytest.raises(UserError, match=r"needs own.py as it was .*code/own.py differs \([0-9a-f]{12}…\)") as error:
        load_model(path, builder_file=own)
    one_line(error)
    for missing, message in ((own.parent / "nit.py", "no such file: .*nit.py"), (path, "is not a Python file")):
        with pytest.raises(UserError, match=message):
            load_model(path, builder_file=missing)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own.py:mkdir", "'mkdir' is not a function or class that it defines"),
        ("own.py:nonesuch", "'nonesuch' is not in it"),
        ("own.py:", "'' is not in it"),
        ("own.py", "'own.py' is not in it"),
        ("own.py:width", "returns int, not a torch.nn.Module"),
    ],
)
def test_a_checkpoint_reaches_only_what_the_file_defines(
    name: str, message: str, own: Path, tmp_path: Path, marker: Path
):
    own.write_text(OWN + "from os import mkdir\ndef width(path): return 3\n")
    arguments = {"path": str(marker)}
    path = rewritten(saved_own(own, tmp_path), tmp_path, lambda h: h.update(name=name, kwargs=arguments))
    with pytest.raises(UserError, match=message) as error:
        load_model(path, builder_file=own)
    one_line(error)


def test_a_file_beside_what_needs_none_is_not_looked_at(own: Path, tmp_path: Path):
    save_model(tmp_path / "toy.safetensors", Toy(), TOY, provenance={})
    assert isinstance(load_model(tmp_path / "toy.safetensors", builder_file="nonesuch.py"), Toy)
    assert load_model(f"{own}:build", builder_file="nonesuch.py").width == 4


def test_where_a_model_comes_from(own: Path, tmp_path: Path):
    assert source_file("resnet18") is None and source_file("") is None
    assert source_file(str(tmp_path / "x.safetensors")) == tmp_path / "x.safetensors"
    assert source_file(f"{own}:build") == own
    assert not is_checkpoint(f"{own}:build") and not is_checkpoint(own)


def test_keyword_arguments_beside_a_checkpoint_are_refused(tmp_path: Path):
    save_model(tmp_path / "toy.safetensors", Toy(), TOY, provenance={})
    with pytest.raises(UserError, match="knows its model.*leave out") as error:
        open_model(tmp_path / "toy.safetensors", kwargs={"width": 8})
    one_line(error)


# --- files that are not what they should be ---


HEADER_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "attribute that the builder does not set": (
        lambda h: h["structure"]["attributes"].update({"blocks.0.attn": {"new_heads": 3}}),
        "may not set 'new_heads' of blocks.0.attn",
    ),
    "private attribute": (
        lambda h: h["structure"]["attributes"].update({"": {"_forward_hooks": 3}}),
        "may not set '_forward_hooks' of the model",
    ),
    "method": (lambda h: h["structure"]["attributes"].update({"": {"forward": 3}}), "may not set 'forward'"),
    "text as an attribute": (
        lambda h: h["structure"]["attributes"].update({"blocks.0.attn": {"num_heads": "__import__('os')"}}),
        "may not set 'num_heads'",
    ),
    "mapping as an attribute": (
        lambda h: h["structure"]["attributes"].update({"blocks.0.attn": {"num_heads": {"a": 1}}}),
        "may not set 'num_heads'",
    ),
    "module that does not exist": (lambda h: h["structure"]["attributes"].update({"x.y": {"a": 1}}), "no attribute"),
    "method among the lost": (lambda h: h["structure"].update(lost=["forward"]), "forward is not a tensor"),
    "tensor both lost and there": (lambda h: h["structure"].update(lost=["norm.bias"]), "no place for norm.bias"),
    "lost of another type": (lambda h: h["structure"].update(lost=5), "does not fit"),
    "no structure": (lambda h: h.pop("structure") and None, "does not fit"),
    "structure of another type": (lambda h: h.update(structure=[]), "does not fit"),
    "newer format": (lambda h: h.update(format=2), "checkpoint format 2; this version reads format 1"),
    "no format": (lambda h: h.pop("format") and None, "no model structure"),
    "a list": (lambda h: [1, 2], "no model structure"),
    "no name": (lambda h: h.pop("name") and None, "damaged header"),
    "no preprocessing": (lambda h: h.pop("preprocessing") and None, "damaged header"),
    "preprocessing of another type": (lambda h: h["preprocessing"].update(input_size="wide"), "damaged header"),
    "arguments of another type": (lambda h: h.update(kwargs=[1]), "damaged header"),
    "unknown builder": (lambda h: h.update(builder="pickle"), "unknown model builder 'pickle'"),
    "code without a checksum": (lambda h: h.update(builder="file", name="net.py:build"), "damaged header"),
    "code": (lambda h: h.update(builder="file", name="net.py:build", sha256="0" * 64), "checkpoints hold no code"),
    "hub address": (lambda h: h.update(name="hf-hub:somebody/model"), "unknown timm model"),
    "folder": (lambda h: h.update(name="local-dir:/somewhere"), "unknown timm model"),
    "name of another type": (lambda h: h.update(name=["vit"]), "unknown timm model"),
    "unknown argument": (lambda h: h["kwargs"].update(colour=3), "unexpected keyword argument 'colour'"),
    "weights to download": (lambda h: h["kwargs"].update(pretrained=True), "pretrained"),
    "another model": (lambda h: h.update(name="convnext_atto", kwargs={}), "does not fit convnext_atto"),
    "heads that are no whole number": (
        lambda h: h["structure"]["attributes"]["blocks.0.attn"].update(num_heads=2.5),
        "may not set 'num_heads' of blocks.0.attn to 2.5",
    ),
    "heads that are two numbers": (
        lambda h: h["structure"]["attributes"]["blocks.0.attn"].update(num_heads=[2, 2]),
        "to \\[2, 2\\]",
    ),
    "number for yes": (lambda h: h["structure"]["attributes"].update({"norm": {"elementwise_affine": 1}}), "to 1"),
    "training": (lambda h: h["structure"]["attributes"].update({"": {"training": True}}), "may not set 'training'"),
    "no end of blocks": (lambda h: h.update(kept_blocks={"blocks": [float("inf")]}), "damaged header"),
    "no deviation": (lambda h: h["preprocessing"].update(std=[0, 0, 0]), "damaged header"),
    "two means": (lambda h: h["preprocessing"].update(mean=[0, 0]), "damaged header"),
    "infinite images": (lambda h: h["preprocessing"].update(input_size=float("inf")), "damaged header"),
    "weights of a backbone": (
        lambda h: h.update(builder="torchvision", name="fcn_resnet50", kwargs={}),
        "unknown torchvision model: fcn",
    ),
    "weights of a backbone by an argument": (
        lambda h: h.update(builder="torchvision", name="resnet18", kwargs={"weights_backbone": "DEFAULT"}),
        "weights_backbone is not an argument",
    ),
    "millions of blocks": (lambda h: h["kwargs"].update(depth=10**7), "with depth beyond 100000"),
    "millions of channels": (lambda h: h["kwargs"].update(embed_dim=10**7), "with embed_dim beyond 100000"),
    "many channels": (
        lambda h: h["kwargs"].update(embed_dim=99_999),
        r"^\S+ asks for deit_\S+ with .* or 200,000,000 numbers",
    ),
    "hidden among others": (lambda h: h["kwargs"].update(dims={"a": [1, [10**400]]}), "with dims beyond"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_a_header_that_asks_for_something_else_is_refused(
    fault: str, saved_vit: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_pickles(*_: Any, **__: Any) -> None:
        marker.mkdir()

    monkeypatch.setattr(torch, "load", no_pickles)
    change, message = HEADER_FAULTS[fault]
    path = rewritten(saved_vit, tmp_path, change)
    with pytest.raises(UserError, match=message) as error:
        load_model(path)
    one_line(error)


def test_a_pickle_that_the_arguments_name_is_not_opened(saved_vit: Path, tmp_path: Path, marker: Path):
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb(marker)))
    path = rewritten(saved_vit, tmp_path, lambda h: h["kwargs"].update(checkpoint_path=str(tmp_path / "bomb.pth")))
    with pytest.raises(UserError, match="checkpoint_path is not an argument") as error:
        load_model(path)
    one_line(error)


def test_text_in_the_arguments_is_never_evaluated(saved_vit: Path, tmp_path: Path, marker: Path):
    code = f"__import__('os').mkdir({str(marker)!r})"
    for key in ("norm_layer", "act_layer", "embed_layer", "block_fn", "weight_init", "img_size", "class_token"):
        with contextlib.suppress(UserError):
            load_model(rewritten(saved_vit, tmp_path, lambda h, key=key: h["kwargs"].update({key: code})))
        assert not marker.exists(), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {n: t for n, t in tensors.items() if n != "norm.bias"},
            "changed.safetensors does not fit the model: norm.bias is missing",
        ),
        (lambda tensors: tensors | {"stranger": torch.ones(1)}, "no place for stranger"),
        (lambda tensors: tensors | {"forward": torch.ones(1)}, "does not fit"),
        (lambda tensors: tensors | {"norm.bias": torch.ones(24, dtype=torch.int64)}, "norm.bias is .*int64, not like"),
        (lambda tensors: tensors | {"norm.bias": torch.ones(24, dtype=torch.complex64)}, "norm.bias is .*complex64"),
        (lambda tensors: tensors | {"norm.bias": torch.ones(())}, r"norm.bias is \(\) .*, not like \(24,\)"),
    ],
    ids=["missing", "unknown", "method", "integers", "complex", "scalar"],
)
def test_tensors_must_be_exactly_the_builders(change: Any, message: str, saved_vit: Path, tmp_path: Path):
    path = rewritten(saved_vit, tmp_path, lambda header: header, change(load_file(saved_vit)))
    with pytest.raises(UserError, match=message) as error:
        load_model(path)
    one_line(error)


@pytest.mark.parametrize(
    "metadata",
    [None, {"format": "pt"}, {METADATA_KEY: "{not json"}, {METADATA_KEY: "[" * 100_000}],
    ids=["none", "another", "no JSON", "deep"],
)
def test_tensors_without_a_structure(metadata: dict[str, str] | None, tmp_path: Path):
    save_file({"weight": torch.ones(2)}, tmp_path / "plain.safetensors", metadata=metadata)
    with pytest.raises(UserError, match="no model structure: not a checkpoint of this project") as error:
        load_model(tmp_path / "plain.safetensors")
    one_line(error)


def test_a_file_cut_short_anywhere_is_named_in_one_line(saved_vit: Path, tmp_path: Path):
    whole, path = saved_vit.read_bytes(), tmp_path / "short.safetensors"
    header = 8 + int.from_bytes(whole[:8], "little")
    around_header = range(header - 3, header + 3)
    lengths = {*range(12), *around_header, *range(0, len(whole), len(whole) // 150), len(whole) - 1}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="short.safetensors is not a whole safetensors file") as error:
            load_model(path)
        one_line(error)
    path.write_bytes(whole + b"more")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_model(path)


def test_a_pickle_under_our_ending_is_not_unpickled(tmp_path: Path, marker: Path):
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(UserError, match="not a whole safetensors file") as error:
        load_model(path)
    one_line(error)
    torch.save({"model": Bomb(marker)}, path)
    for trust in (False, True):
        with pytest.raises(UserError, match="not a whole safetensors file"):
            load_model(path, trust=trust)


def test_folders_and_missing_files(tmp_path: Path):
    (tmp_path / "folder.safetensors").mkdir()
    for source in (tmp_path / "folder.safetensors", tmp_path / "missing.safetensors"):
        assert is_checkpoint(source)
        with pytest.raises(UserError, match=f"no such checkpoint: {source}") as error:
            load_model(source)
        one_line(error)
    assert not is_checkpoint(tmp_path) and not is_checkpoint("resnet18") and not is_checkpoint("x" * 5000)
