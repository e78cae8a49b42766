"""The format: what differs from the dense model goes in and comes out bit by bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from isomorphic.checkpoints.open import load_model, load_weights, open_model, read_header
from isomorphic.checkpoints.save import save_model
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, build_model, example_inputs
from isomorphic.pruning.blocks.depth import remove_blocks
from isomorphic.pruning.cutting.cut import cut, kept_positions
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.ranking.ranker import Ranker, RankingRules, Ratios
from tests.faults import one_line
from tests.unit.checkpoints.conftest import CONVNEXT, TOY, VIT, Toy, masked_vit, pruned


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


# --- masked models ---


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


# --- a model of the user's own ---


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
