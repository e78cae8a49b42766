"""Checkpoints: what goes in comes out bit by bit, damaged or hostile files stop in one line, writes are atomic."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isomorphic.checkpoint import METADATA_KEY, is_checkpoint, load_model, open_model, read_header, save_model
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, build_model, describe_model, example_inputs
from isomorphic.pruning.graph import trace_groups
from isomorphic.pruning.ranking import Ranker, RankingRules, Ratios
from isomorphic.pruning.surgery import cut
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


@pytest.fixture(autouse=True)
def known_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torchvision.models._api.BUILTIN_MODELS, "toy", lambda weights=None, **kwargs: Toy(**kwargs))


def pruned(spec: ModelSpec) -> nn.Module:
    """The spec's model with random weights, cut to half of its widths, heads and head dims by random scores."""
    torch.manual_seed(0)
    model = build_model(spec)
    groups = trace_groups(model, example_inputs(spec)).groups
    scores = {group.name: torch.rand(group.num_units) for group in groups}
    ranker = Ranker(groups, scores, dict.fromkeys(scores, 0), RankingRules())
    cut(model, groups, ranker.plan(Ratios(0.5, heads=0.34, head_dims=0.25)))
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


def test_the_file_decides_the_precision_of_every_tensor(tmp_path: Path):
    model = pruned(VIT).to(torch.bfloat16)
    save_model(tmp_path / "half.safetensors", model, VIT, provenance={})
    reloaded = load_model(tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in reloaded.parameters()} == {torch.bfloat16}
    images = torch.randn(1, 3, 16, 16, dtype=torch.bfloat16)
    assert torch.equal(reloaded(images), model(images))


# --- what no checkpoint can hold is refused before anything is written ---


def replace_layer(model: Toy) -> None:
    model.second = nn.Identity()  # type: ignore[assignment]


def add_layer(model: Toy) -> None:
    model.third = nn.Linear(4, 4)


def add_tensor(model: Toy) -> None:
    model.first.register_parameter("scale", nn.Parameter(torch.ones(4)))


@pytest.mark.parametrize("change", [replace_layer, add_layer, add_tensor], ids=lambda change: change.__name__)
def test_models_that_could_not_be_loaded_again_are_not_saved(change: Callable[[Toy], None], tmp_path: Path):
    model = Toy()
    change(model)
    with pytest.raises(UserError, match="cannot save .*(second|third|scale)") as error:
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
    "unknown builder": (lambda h: h.update(builder="file"), "unknown model builder 'file'"),
    "hub address": (lambda h: h.update(name="hf-hub:somebody/model"), "unknown timm model"),
    "folder": (lambda h: h.update(name="local-dir:/somewhere"), "unknown timm model"),
    "name of another type": (lambda h: h.update(name=["vit"]), "unknown timm model"),
    "unknown argument": (lambda h: h["kwargs"].update(colour=3), "unexpected keyword argument 'colour'"),
    "weights to download": (lambda h: h["kwargs"].update(pretrained=True), "pretrained"),
    "another model": (lambda h: h.update(name="convnext_atto", kwargs={}), "does not fit convnext_atto"),
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
            "1 of its tensors are missing, such as norm.bias",
        ),
        (lambda tensors: tensors | {"stranger": torch.ones(1)}, "no attribute 'stranger'"),
        (lambda tensors: tensors | {"forward": torch.ones(1)}, "does not fit"),
        (lambda tensors: tensors | {"norm.bias": torch.ones(24, dtype=torch.int64)}, "does not fit"),
    ],
    ids=["missing", "unknown", "method", "integers"],
)
def test_tensors_must_be_exactly_the_builders(change: Any, message: str, saved_vit: Path, tmp_path: Path):
    path = rewritten(saved_vit, tmp_path, lambda header: header, change(load_file(saved_vit)))
    with pytest.raises(UserError, match=message) as error:
        load_model(path)
    one_line(error)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {METADATA_KEY: "{not json"}], ids=str)
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
    refusals = {"safetensors": "not a whole safetensors file", "pth": "is a pickle, which may run code"}
    for ending, refusal in refusals.items():
        path = tmp_path / f"bomb.{ending}"
        path.write_bytes(pickle.dumps(Bomb(marker)))
        with pytest.raises(UserError, match=refusal) as error:
            load_model(path)
        one_line(error)
        torch.save({"model": Bomb(marker)}, path)
        with pytest.raises(UserError, match=refusal):
            load_model(path)


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
