"""Modules that only their user can build: saved without a builder, loaded into the dense model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.checkpoints.save import save_module
from isomorphic.errors import UserError

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    """Tied weights, a table that is no part of the state, numbers that a forward reads, a list of blocks."""

    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__()
        self.shape = (width // 2, 2)
        self.embed = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.register_buffer("table", torch.randn(width), persistent=False)
        self.register_buffer("count", torch.tensor(3))
        self.head = nn.Linear(width, 6, bias=False)
        self.twin = nn.Linear(width, 6, bias=False)
        self.twin.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * self.table
        for block in self.blocks:
            x = block(x)
        x = x.unflatten(-1, self.shape).flatten(-2)
        return self.head(x) + self.twin(x) * self.count


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.mid, self.out = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mid(self.gru(x)[0]).tanh())


def build(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if kind == "gru":
        return Recurrent()
    model = Net()
    return model.bfloat16() if kind == "bf16" else model


@pytest.mark.parametrize(("kind", "options"), [
    ("net", {"ratio": 0.5}),
    ("net", {"ratio": 0.25, "remove_blocks": 1}),
    ("net", {"ratio": 0.5, "steps": 3}),
    ("gru", {"ratio": 0.5}),
    ("bf16", {"ratio": 0.5}),
])  # fmt: skip
def test_what_is_loaded_computes_what_was_saved(kind: str, options: dict[str, Any], tmp_path: Path):
    x = X.bfloat16() if kind == "bf16" else X
    pruned = iso.prune(build(kind).eval(), x, criterion="l2", **options)
    assert pruned.after.params < 0.8 * pruned.before.params
    pruned.save(tmp_path / "net.safetensors")
    dense = build("net" if kind == "bf16" else kind, seed=1)  # of another precision, in training mode
    loaded = iso.load_model(tmp_path / "net.safetensors", model=dense)
    assert loaded is dense and not loaded.training
    assert torch.equal(loaded(x), pruned.model(x))
    if kind == "net":
        assert loaded.get_parameter("twin.weight") is loaded.get_parameter("head.weight")
        assert loaded.shape == pruned.model.shape and isinstance(loaded.shape, tuple)


def test_gained_and_lost_biases_come_along(tmp_path: Path):
    dense = build("net").eval()
    model = copy.deepcopy(dense)
    model.head.bias, model.embed.bias = nn.Parameter(torch.randn(6)), None
    save_module(tmp_path / "net.safetensors", model, dense, provenance={})
    loaded = iso.load_model(tmp_path / "net.safetensors", model=build("net", seed=1))
    assert torch.equal(loaded(X), model(X))


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


@pytest.mark.parametrize(("other", "message"), [
    (lambda: Net(depth=2), r"it has no blocks\.2\.norm\.weight \(and 5 more\)"),
    (lambda: Net(depth=4), r"it has blocks\.3\.norm\.weight, which the checkpoint's has not"),
    (Wider, r"it has more\.weight, which"),
    (lambda: build("gru"), r"it has no embed\.weight"),
    (lambda: nn.Sequential(nn.Linear(6, 12)), "it has no embed"),
])  # fmt: skip
def test_another_dense_model_is_refused_by_name(other: Any, message: str, tmp_path: Path):
    path = tmp_path / "net.safetensors"
    iso.prune(build("net").eval(), X, criterion="l2", ratio=0.5).save(path)
    model = other()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=f"is not the dense model that .* was cut from: {message}"):
        iso.load_model(path, model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_width_is_refused_by_its_shapes(tmp_path: Path):
    path = tmp_path / "net.safetensors"
    mlp = [nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)) for width in (16, 12)]
    iso.prune(mlp[0], X, criterion="l2", ratio=0.5).save(path)
    with pytest.raises(UserError, match=r"0\.weight is \(12, 6\), not \(16, 6\) \(and 2 more\)"):
        iso.load_model(path, model=mlp[1])


def test_without_the_dense_model_it_says_what_to_do(tmp_path: Path):
    path = tmp_path / "net.safetensors"
    pruned = iso.prune(build("net").eval(), X, criterion="l2", ratio=0.5)
    pruned.save(path)
    with pytest.raises(
        UserError, match=r"only its user can build: .*load_model\(\"net.safetensors\", model=build\(\)\)"
    ):
        iso.load_model(path)
    with pytest.raises(UserError, match="leave out model="):
        iso.load_model("resnet18", model=build("net"), pretrained=False)
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        pruned.save(tmp_path / "net.pt")


@pytest.mark.parametrize("damage", [
    lambda header: header.pop("dense"),
    lambda header: header.update(dense=[1]),
    lambda header: header["dense"].update({"embed.weight": ["a"]}),
    lambda header: header["structure"]["attributes"].update({"": {"forward": 1}}),
    lambda header: header.pop("structure"),
])  # fmt: skip
def test_damaged_headers_are_one_line(damage: Any, tmp_path: Path):
    path = tmp_path / "net.safetensors"
    iso.prune(build("net").eval(), X, criterion="l2", ratio=0.5).save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["isomorphic"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    damage(header)
    save_file(tensors, path, metadata={"isomorphic": json.dumps(header)})
    with pytest.raises(UserError, match=r"damaged header|does not fit|is not the dense model"):
        iso.load_model(path, model=build("net"))
