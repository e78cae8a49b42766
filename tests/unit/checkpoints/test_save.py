"""Saving: what a file says of its model, what cannot be saved, and writes that are atomic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from isomorphic.checkpoints.open import load_model, open_model, read_header
from isomorphic.checkpoints.save import save_model
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, build_model
from tests.faults import contents, file_size_limit, one_line
from tests.unit.checkpoints.conftest import OWN, TOY, VIT, Toy, pruned


def test_the_header_says_how_to_build_the_model_and_where_it_comes_from(tmp_path: Path):
    path = tmp_path / "vit.safetensors"
    save_model(path, pruned(VIT), VIT, provenance={"command": "prune.py", "parent": None})
    header = read_header(path)
    assert header["format"] == 1 and header["provenance"] == {"command": "prune.py", "parent": None}
    assert ModelSpec.from_dict(header) == VIT
    attention = header["structure"]["attributes"]["blocks.0.attn"]
    assert (attention["num_heads"], attention["head_dim"], attention["attn_dim"]) == (2, 6, 12)
    assert attention["scale"] == pytest.approx(6**-0.5)


def test_a_buffer_outside_the_state_dict_is_stored_only_where_it_was_cut(tmp_path: Path):
    model = Toy()
    save_model(tmp_path / "dense.safetensors", model, TOY, provenance={})
    assert "table" not in load_file(tmp_path / "dense.safetensors")
    model.table = model.table[[1, 3]]
    save_model(tmp_path / "cut.safetensors", model, TOY, provenance={})
    reloaded = load_model(tmp_path / "cut.safetensors")
    assert reloaded.get_buffer("table").tolist() == [1.0, 3.0] and "table" not in reloaded.state_dict()


def test_masks_of_parameters_that_are_not_there_are_not_saved(tmp_path: Path):
    message = "cannot save the masks of parameters that the model has not: blocks.7.mlp.fc1.weight"
    with pytest.raises(UserError, match=message) as error:
        save_model(
            tmp_path / "m.safetensors", build_model(VIT), VIT.masking(["blocks.7.mlp.fc1.weight"]), provenance={}
        )
    one_line(error)
    assert not list(tmp_path.iterdir())


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


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(saved_vit: Path, tmp_path: Path):
    path = tmp_path / "vit.safetensors"
    path.write_bytes(saved_vit.read_bytes())
    model = load_model(path)
    for size in (0, 100, 20_000):
        with pytest.raises(UserError, match="cannot write .*vit.safetensors") as error, file_size_limit(size):
            save_model(path, model, VIT, provenance={"try": size})
        one_line(error)
    assert contents(tmp_path) == {"vit.safetensors": saved_vit.read_bytes()}


def test_users_models_say_what_they_were_cut_from(own: Path, tmp_path: Path):
    """In full, whatever blocks are gone; those of libraries need not."""
    own.write_text("from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))\n")
    model, spec = open_model(f"{own}:build")
    save_model(tmp_path / "own.safetensors", model[:1], spec.keeping({"": (0,)}), provenance={})  # type: ignore[index]
    dense = {"0.weight": [3, 2], "0.bias": [3], "1.weight": [2, 3], "1.bias": [2]}
    assert read_header(tmp_path / "own.safetensors")["dense"] == dense
    save_model(tmp_path / "toy.safetensors", Toy(), TOY, provenance={})
    assert "dense" not in read_header(tmp_path / "toy.safetensors")


def untie(model: Toy) -> None:
    model.second.weight = nn.Parameter(model.second.weight + 1)


def make_complex(model: Toy) -> None:
    model.second.bias = nn.Parameter(torch.zeros(4, dtype=torch.complex64))


def empty(model: Toy) -> None:
    model.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (untie, "cannot save first.weight and second.weight, which differ, while the dense model ties them"),
        (make_complex, "cannot save what is no plain tensor of real numbers: second.bias"),
        (empty, "cannot save a model without data: .*first.weight.* on the meta device"),
    ],
)
def test_tensors_that_could_not_be_loaded_again_are_not_saved(
    change: Callable[[Toy], None], message: str, tmp_path: Path
):
    model = Toy()
    change(model)
    with pytest.raises(UserError, match=message) as error:
        save_model(tmp_path / "toy.safetensors", model, TOY, provenance={})
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_tied_parameters_that_became_two_of_equal_numbers_are_saved(tmp_path: Path):
    model = Toy()
    model.second.weight = nn.Parameter(
        model.second.weight.detach().clone().index_fill_(0, torch.tensor([0]), torch.nan)
    )
    model.first.weight = nn.Parameter(model.second.weight.detach().clone())
    save_model(tmp_path / "toy.safetensors", model, TOY, provenance={})
    reloaded = load_model(tmp_path / "toy.safetensors")
    assert torch.equal(reloaded.get_parameter("first.weight")[1:], model.first.weight[1:])
