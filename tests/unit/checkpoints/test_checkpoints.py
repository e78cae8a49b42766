"""Checkpoints: what goes in comes out bit by bit, damaged or hostile files stop in one line, writes are atomic."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isomorphic.checkpoints.open import (
    is_checkpoint,
    load_model,
    load_tensors,
    load_weights,
    open_model,
    read_header,
    source_file,
)
from isomorphic.checkpoints.save import save_model
from isomorphic.checkpoints.structure import METADATA_KEY
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, build_model, describe_model, example_inputs
from isomorphic.provenance import file_sha256
from isomorphic.pruning.blocks.depth import remove_blocks
from isomorphic.pruning.cutting.cut import cut, kept_positions
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.ranking.ranker import Ranker, RankingRules, Ratios
from isomorphic.pruning.weights.dimap import mask
from isomorphic.pruning.weights.layer_roles import assign_roles
from tests.faults import contents, file_size_limit, one_line

VIT = describe_model(
    "deit_tiny_distilled_patch16_224",
    kwargs={"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10},
)
CONVNEXT = describe_model(
    "convnext_atto", kwargs={"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32], "num_classes": 10}, input_size=32
)
TOY = ModelSpec("torchvision", "toy")


class Toy(nn.Module):
    """What timm's models seldom have: tied weights, empty places for tensors, a buffer outside the state dict."""

    table: Tensor

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.width, self.pair, self.title, self._secret = width, (width, 2.5), "toy", 1
        self.register_buffer("table", torch.arange(float(width)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.table


def make_toy(weights: None = None, **kwargs: Any) -> Toy:
    return Toy(**kwargs)


@pytest.fixture(autouse=True)
def known_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_toy, "__module__", "torchvision.models.toy")  # which makes it a classifier
    monkeypatch.setitem(torchvision.models._api.BUILTIN_MODELS, "toy", make_toy)


def pruned(spec: ModelSpec) -> nn.Module:
    """The spec's model with random weights, cut to half of its widths, heads and head dims by random scores."""
    torch.manual_seed(0)
    model = build_model(spec)
    graph = trace_groups(model, example_inputs(spec))
    scores = {group.name: torch.rand(group.num_units) for group in graph.groups}
    ranker = Ranker(graph, scores, dict.fromkeys(scores, 0), RankingRules())
    cut(model, graph, ranker.plan(Ratios(0.5, heads=0.34, head_dims=0.25)))
    return model


def plain_attributes(model: nn.Module) -> dict[str, Any]:
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, tuple, list))
    }


# --- round trips ---


@pytest.mark.parametrize("spec", [VIT, CONVNEXT], ids=lambda spec: spec.name)
def test_a_cut_model_comes_back_bit_by_bit(spec: ModelSpec, tmp_path: Path):
    model, path = pruned(spec), tmp_path / "new" / "pruned.safetensors"
    save_model(path, model, spec, provenance={"command": "prune.py"})
    reloaded, same_spec = open_model(path)

    dense = build_model(spec)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in dense.parameters())
    images = torch.randn(3, 3, spec.preprocessing.input_size, spec.preprocessing.input_size)
    with torch.no_grad():
        assert torch.equal(reloaded(images), model(images))
    assert same_spec == spec
    assert plain_attributes(reloaded) == plain_attributes(model) != plain_attributes(dense)
    state, reloaded_state = model.state_dict(), reloaded.state_dict()
    assert list(state) == list(reloaded_state)
    assert all(torch.equal(tensor, reloaded_state[name]) for name, tensor in state.items())
    assert not reloaded.training and all(parameter.requires_grad for parameter in reloaded.parameters())


def test_the_face_of_the_package_loads_a_file_given_as_text(tmp_path: Path):
    import isomorphic

    save_model(tmp_path / "toy.safetensors", Toy(), TOY, provenance={})
    assert isinstance(isomorphic.load_model(str(tmp_path / "toy.safetensors")), Toy)


def test_the_header_says_how_to_build_the_model_and_where_it_comes_from(tmp_path: Path):
    path = tmp_path / "vit.safetensors"
    save_model(path, pruned(VIT), VIT, provenance={"command": "prune.py", "parent": None})
    header = read_header(path)
    assert header["format"] == 1 and header["provenance"] == {"command": "prune.py", "parent": None}
    assert ModelSpec.from_dict(header) == VIT
    attention = header["structure"]["attributes"]["blocks.0.attn"]
    assert (attention["num_heads"], attention["head_dim"], attention["attn_dim"]) == (2, 6, 12)
    assert attention["scale"] == pytest.approx(6**-0.5)


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


def test_a_dense_model_differs_in_nothing(tmp_path: Path):
    save_model(tmp_path / "toy.safetensors", Toy(), TOY, provenance={})
    assert read_header(tmp_path / "toy.safetensors")["structure"] == {"attributes": {}, "gained": [], "lost": []}


def test_keyword_arguments_and_plain_attributes_return_with_their_types(tmp_path: Path):
    model = Toy(6)
    model.pair, model.width = (3, 0.5), 5
    model.title, model._secret = "renamed", 2  # neither text nor private attributes are structure
    save_model(tmp_path / "toy.safetensors", model, ModelSpec("torchvision", "toy", {"width": 6}), provenance={})
    assert read_header(tmp_path / "toy.safetensors")["structure"]["attributes"] == {"": {"pair": [3, 0.5], "width": 5}}
    reloaded = load_model(tmp_path / "toy.safetensors")
    assert isinstance(reloaded, Toy)
    assert (reloaded.pair, reloaded.width, reloaded.title, reloaded._secret) == ((3, 0.5), 5, "toy", 1)


def test_tied_parameters_stay_tied(tmp_path: Path):
    model = Toy()
    model.first.weight = model.second.weight = nn.Parameter(torch.randn(3, 3))
    model.second.bias, model.table = nn.Parameter(torch.randn(3)), torch.randn(3)
    save_model(tmp_path / "toy.safetensors", model, TOY, provenance={})
    reloaded = load_model(tmp_path / "toy.safetensors")
    assert reloaded.get_parameter("first.weight") is reloaded.get_parameter("second.weight")
    assert torch.equal(reloaded.get_parameter("first.weight"), model.first.weight)


def test_tensors_that_a_layer_gained_or_lost(tmp_path: Path):
    model = Toy()
    model.first.bias, model.second.bias = nn.Parameter(torch.randn(4)), None  # type: ignore[assignment]
    save_model(tmp_path / "toy.safetensors", model, TOY, provenance={})
    structure = read_header(tmp_path / "toy.safetensors")["structure"]
    assert structure == {"attributes": {}, "gained": ["first.bias"], "lost": ["second.bias"]}
    reloaded, x = load_model(tmp_path / "toy.safetensors"), torch.randn(2, 4)
    assert torch.equal(reloaded(x), model(x))
    assert isinstance(reloaded.get_submodule("first").bias, nn.Parameter)
    assert "second.bias" not in reloaded.state_dict()


def test_a_buffer_outside_the_state_dict_is_stored_only_where_it_was_cut(tmp_path: Path):
    model = Toy()
    save_model(tmp_path / "dense.safetensors", model, TOY, provenance={})
    assert "table" not in load_file(tmp_path / "dense.safetensors")
    model.table = model.table[[1, 3]]
    save_model(tmp_path / "cut.safetensors", model, TOY, provenance={})
    reloaded = load_model(tmp_path / "cut.safetensors")
    assert reloaded.get_buffer("table").tolist() == [1.0, 3.0] and "table" not in reloaded.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_tensors_of_any_precision_are_loaded_in_the_builders(dtype: torch.dtype, tmp_path: Path):
    model = pruned(VIT).to(dtype)
    save_model(tmp_path / "kept.safetensors", model, VIT, provenance={})
    reloaded, images = load_model(tmp_path / "kept.safetensors"), torch.randn(1, 3, 16, 16)
    assert {parameter.dtype for parameter in reloaded.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(reloaded(images), model.float()(images))


# --- masked models ---


def masked_vit() -> tuple[nn.Module, ModelSpec]:
    torch.manual_seed(0)
    model = build_model(VIT)
    masking = mask(model, assign_roles(model, example_inputs(VIT)), 0.6)
    return model, VIT.masking(masking.names)


def zeros(model: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    return {name: model.get_parameter(name) == 0 for name in spec.masked}


def test_masks_are_the_zeros_of_the_parameters_that_a_checkpoint_names(tmp_path: Path):
    model, spec = masked_vit()
    save_model(tmp_path / "m.safetensors", model, spec, provenance={})
    header = read_header(tmp_path / "m.safetensors")
    assert header["structure"].pop("masked") == list(spec.masked)
    assert header["structure"] == {"attributes": {}, "gained": [], "lost": []} and "masked" not in header
    assert load_file(tmp_path / "m.safetensors").keys() == model.state_dict().keys()  # no second array
    reloaded, same_spec = open_model(tmp_path / "m.safetensors")
    assert same_spec == spec and len(spec.masked) == 8
    assert all(torch.equal(model.get_parameter(n), reloaded.get_parameter(n)) for n in model.state_dict())
    weights = build_model(VIT)
    assert tuple(load_weights(weights, tmp_path / "m.safetensors")) == spec.masked
    assert 0.5 < torch.cat([gone.flatten() for gone in zeros(reloaded, spec).values()]).float().mean() < 0.7


def test_a_structural_cut_keeps_masks(tmp_path: Path):
    """Dense, masked, saved, blocks removed, cut, saved: what stays of the masked weights is as it was."""
    model, spec = masked_vit()
    save_model(tmp_path / "masked.safetensors", model, spec, provenance={})
    model, spec = open_model(tmp_path / "masked.safetensors")
    spec = spec.keeping({"blocks": (1,)})
    old_names = remove_blocks(model, {"blocks": (1,)}, example_inputs(spec))
    assert [old_names[name] for name in spec.masked] == [f"blocks.1.{name[9:]}" for name in spec.masked]
    graph = trace_groups(model, example_inputs(spec))
    whole = copy.deepcopy(model)
    scores = {group.name: torch.rand(group.num_units) for group in graph.groups}
    plan = Ranker(graph, scores, dict.fromkeys(scores, 0), RankingRules()).plan(Ratios(0.5))
    kept = kept_positions(whole, graph, plan)
    cut(model, graph, plan)
    save_model(tmp_path / "cut.safetensors", model, spec, provenance={})
    again, same_spec = open_model(tmp_path / "cut.safetensors")
    assert same_spec == spec and spec.masked == tuple(n for n in masked_vit()[1].masked if n.startswith("blocks.0"))
    for name, gone in zeros(again, spec).items():
        expected = whole.get_parameter(name) == 0
        for dim, positions in kept[tuple(name.rsplit(".", 1))].items():  # type: ignore[index]
            expected = expected.index_select(dim, positions)
        assert torch.equal(gone, expected), name


def test_masks_of_parameters_that_are_not_there_are_not_saved(tmp_path: Path):
    message = "cannot save the masks of parameters that the model has not: blocks.7.mlp.fc1.weight"
    with pytest.raises(UserError, match=message) as error:
        save_model(
            tmp_path / "m.safetensors", build_model(VIT), VIT.masking(["blocks.7.mlp.fc1.weight"]), provenance={}
        )
    one_line(error)
    assert not list(tmp_path.iterdir())


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

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.width, self.halves, self.nested = width, [width, width], ((width, [width]), 1.5)
        self.stem = nn.Conv2d(3, 2 * width, 3)
        self.norm = nn.BatchNorm2d(2 * width)
        self.side = nn.Linear(width, width)
        self.cell = nn.LSTM(width, 3, batch_first=True)
        self.head = nn.Linear(3 + width, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).flatten(2).mT  # (N, H·W, 2 · width)
        left, right = x.split(self.halves, dim=2)
        right = right.reshape(len(right), -1, self.nested[0][1][0])
        return self.head(torch.cat((self.side(right).mean(1), self.cell(left)[0][:, -1]), dim=1))

def build(width=4):
    return Net(width)

def stubborn(width=4):  # cannot be built without data
    net = Net(width)
    net.width = round(torch.full((), float(width)).item())
    return net
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "code" / "own.py"
    path.parent.mkdir()
    path.write_text(OWN)
    return path


def shrink(net: Any) -> None:
    """Cuts a `Net` by hand to 3 and 2 channels in its halves, as surgery would."""
    net.width, net.halves, net.nested = 2, [3, 2], ((2, [2]), 1.5)
    net.stem = nn.Conv2d(3, 5, 3)
    net.norm = nn.BatchNorm2d(5)
    net.side = nn.Linear(2, 2)
    net.cell = nn.LSTM(3, 3, batch_first=True)
    net.head = nn.Linear(3 + 2, 5)
    net.eval()


@pytest.mark.parametrize("factory", ["build", "stubborn", "Net"])
def test_a_cut_model_of_ones_own_comes_back_with_its_file(factory: str, own: Path, tmp_path: Path):
    model, spec = open_model(f"{own}:{factory}", kwargs={"width": 6}, input_size=8)
    shrink(model)
    random_state = torch.get_rng_state()
    save_model(tmp_path / "own.safetensors", model, spec, provenance={})
    assert torch.equal(torch.get_rng_state(), random_state)
    header = read_header(tmp_path / "own.safetensors")
    assert (header["builder"], header["name"], header["kwargs"]) == ("file", f"own.py:{factory}", {"width": 6})
    assert header["structure"]["attributes"][""] == {"width": 2, "halves": [3, 2], "nested": [[2, [2]], 1.5]}
    assert header["structure"]["attributes"]["cell"] == {"input_size": 3}
    assert str(own.parent) not in json.dumps(header)

    own.rename(tmp_path / "moved.py")  # neither the place nor the name of the file matters
    reloaded, same_spec = open_model(tmp_path / "own.safetensors", builder_file=tmp_path / "moved.py")
    assert same_spec == spec and not reloaded.training
    assert (reloaded.width, reloaded.halves, reloaded.nested) == (2, [3, 2], ((2, [2]), 1.5))
    assert (reloaded.cell.input_size, reloaded.norm.num_features) == (3, 5)  # type: ignore[union-attr]
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(reloaded(images), model(images))
    save_model(tmp_path / "again.safetensors", reloaded, same_spec, provenance={})
    assert read_header(tmp_path / "again.safetensors") == header


def test_an_edit_while_a_model_is_in_use_does_not_keep_it_from_being_saved(own: Path, tmp_path: Path):
    model, spec = open_model(f"{own}:build", input_size=8)
    own.write_text("raise SystemExit")
    save_model(tmp_path / "own.safetensors", model, spec, provenance={})
    own.write_text(OWN)
    assert torch.equal(load_model(tmp_path / "own.safetensors", builder_file=own).stem.weight, model.stem.weight)  # type: ignore[union-attr]


def test_builders_that_load_weights_are_asked_for_shapes_without_a_warning(
    own: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    model, _ = open_model(f"{own}:build", input_size=8)
    torch.save(model.state_dict(), own.parent / "weights.pt")
    own.write_text(OWN + f"""
def pretrained():
    net = Net()
    net.load_state_dict(torch.load({str(own.parent / "weights.pt")!r}))
    return net
""")  # fmt: skip
    model, spec = open_model(f"{own}:pretrained", input_size=8)
    save_model(tmp_path / "own.safetensors", model, spec, provenance={})
    assert not recwarn.list


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


# --- what no checkpoint can hold is refused before anything is written ---


def replace_layer(model: Toy) -> None:
    model.second = nn.Identity()  # type: ignore[assignment]


def add_layer(model: Toy) -> None:
    model.third = nn.Linear(4, 4)


def add_tensor(model: Toy) -> None:
    model.first.register_parameter("scale", nn.Parameter(torch.ones(4)))


def change_a_type(model: Toy) -> None:
    model.width = 2.5  # type: ignore[assignment]


CHANGES = [replace_layer, add_layer, add_tensor, change_a_type]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_models_that_could_not_be_loaded_again_are_not_saved(change: Callable[[Toy], None], tmp_path: Path):
    model = Toy()
    change(model)
    with pytest.raises(UserError, match="cannot save .*(second|third|scale|width)") as error:
        save_model(tmp_path / "toy.safetensors", model, TOY, provenance={})
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_keyword_arguments_beside_a_checkpoint_are_refused(tmp_path: Path):
    save_model(tmp_path / "toy.safetensors", Toy(), TOY, provenance={})
    with pytest.raises(UserError, match="knows its model.*leave out") as error:
        open_model(tmp_path / "toy.safetensors", kwargs={"width": 8})
    one_line(error)


# --- files that are not what they should be ---


class Bomb:
    """Makes the file `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A path that exists at the end if any code in a file was run."""
    path = tmp_path / "code was run"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def saved_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "vit.safetensors"
    save_model(path, pruned(VIT), VIT, provenance={})
    return path


def rewritten(
    saved: Path, folder: Path, change: Callable[[dict[str, Any]], Any], tensors: dict[str, Tensor] | None = None
) -> Path:
    """A copy of a checkpoint whose header went through `change`."""
    with safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
    changed = change(header) or header
    path = folder / "changed.safetensors"
    save_file(tensors or load_file(saved), path, metadata={METADATA_KEY: json.dumps(changed)})
    return path


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
        (lambda tensors: tensors | {"stranger": torch.ones(1)}, "no attribute 'stranger'"),
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


@pytest.mark.parametrize(
    "bias",
    [torch.zeros(4).to_sparse(), torch.zeros(4, device="meta"), torch.zeros(4, dtype=torch.complex64)],
    ids=["sparse", "nowhere", "complex"],
)
def test_tensors_that_are_not_plain_numbers(bias: Tensor):
    model = Toy()
    tensors = model.state_dict() | {"second.bias": bias}
    with pytest.raises(UserError, match="x.pth does not fit the model: second.bias is no plain tensor") as error:
        load_tensors(model, tensors, "x.pth")
    one_line(error)


def test_folders_and_missing_files(tmp_path: Path):
    (tmp_path / "folder.safetensors").mkdir()
    for source in (tmp_path / "folder.safetensors", tmp_path / "missing.safetensors"):
        assert is_checkpoint(source)
        with pytest.raises(UserError, match=f"no such checkpoint: {source}") as error:
            load_model(source)
        one_line(error)
    assert not is_checkpoint(tmp_path) and not is_checkpoint("resnet18") and not is_checkpoint("x" * 5000)


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(saved_vit: Path, tmp_path: Path):
    path = tmp_path / "vit.safetensors"
    path.write_bytes(saved_vit.read_bytes())
    model = load_model(path)
    for size in (0, 100, 20_000):
        with pytest.raises(UserError, match="cannot write .*vit.safetensors") as error, file_size_limit(size):
            save_model(path, model, VIT, provenance={"try": size})
        one_line(error)
    assert contents(tmp_path) == {"vit.safetensors": saved_vit.read_bytes()}
