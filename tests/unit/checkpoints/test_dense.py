"""The dense model that a user builds: shaped and filled, or refused and left exactly as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import isomorphic as iso
from isomorphic.checkpoints import save
from isomorphic.checkpoints.open import open_model
from isomorphic.checkpoints.save import save_model, save_module
from isomorphic.errors import UserError
from tests.faults import one_line

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


# --- a model that is refused ---


def rewrite(path: Path, change: Any, tensors: Any = None) -> None:
    """Puts a checkpoint through changes of its header and its tensors."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["isomorphic"])
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header)
    stored = tensors(stored) if tensors else stored
    save_file(stored, path, metadata={"isomorphic": json.dumps(header)})


def picture(model: nn.Module) -> dict[str, Any]:
    """All that a model is: which tensors and modules it has, their numbers, attributes and modes."""
    seen: dict[str, Any] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        seen[name] = (id(tensor), tensor.dtype, tensor.requires_grad, tensor.data_ptr(), tensor.tolist())
    for name, module in model.named_modules():
        values = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, tuple))}
        places = [list(module._modules), list(module._parameters), list(module._buffers)]
        seen[f"module {name}"] = (
            id(module),
            module.training,
            values,
            places,
            sorted(module._non_persistent_buffers_set),
        )
    return seen


def save_net(path: Path, **options: Any) -> Any:
    """Saves a `Net` whose blocks, shapes and biases are not the dense one's."""
    pruned = iso.prune(build("net").eval(), X, criterion="l2", ratio=0.5, remove_blocks=1, **options).model
    assert isinstance(pruned, Net)
    pruned.embed.bias, pruned.head.bias = None, nn.Parameter(torch.randn(6))  # type: ignore[assignment]
    dense = build("net")
    save_module(path, pruned, dense, provenance={}, kept_blocks={"blocks": kept_of(pruned, dense)})
    return pruned


def kept_of(pruned: Net, dense: Net) -> tuple[int, ...]:
    return tuple(range(len(dense.blocks)))[-len(pruned.blocks) :]


def without(name: str) -> Any:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def replaced(name: str, tensor: Tensor) -> Any:
    return lambda tensors: tensors | {name: tensor}


def unchanged(header: dict[str, Any]) -> None:
    pass


def in_structure(**values: Any) -> Any:
    return lambda header: header["structure"].update(values)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "no dense model": (lambda h: h.pop("dense"), None, "does not say which dense model it was cut from"),
    "dense of another type": (lambda h: h.update(dense=[1]), None, "does not say which dense model"),
    "text for a size": (lambda h: h["dense"].update({"embed.weight": ["a"]}), None, "no shape for the dense .*'embed"),
    "text for a shape": (lambda h: h["dense"].update({"embed.weight": "12"}), None, "no shape for"),
    "a fraction": (lambda h: h["dense"].update({"embed.weight": [12.0, 6]}), None, "no shape for"),
    "no number": (lambda h: h["dense"].update({"embed.weight": [float("nan"), 6]}), None, "no shape for"),
    "yes for a size": (lambda h: h["dense"].update({"embed.weight": [True, 6]}), None, "no shape for"),
    "a negative size": (lambda h: h["dense"].update({"embed.weight": [-12, 6]}), None, "no shape for"),
    "a huge size": (lambda h: h["dense"].update({"embed.weight": [10**400, 6]}), None, "no shape for"),
    "a large size": (lambda h: h["dense"].update({"embed.weight": [2**40, 6]}), None, r"is \(12, 6\), not \(1099511"),
    "many dims": (lambda h: h["dense"].update({"embed.weight": [1] * 10**6}), None, "no shape for"),
    "no shape": (lambda h: h["dense"].update({"embed.weight": None}), None, "no shape for"),
    "a long name": (lambda h: h["dense"].update({"x" * 10**6: [1]}), None, "it has no xxx"),
    "a name missing": (lambda h: h["dense"].pop("embed.weight"), None, "it has embed.weight, which"),
    "no structure": (lambda h: h.pop("structure"), None, "its header has no structure"),
    "structure of another type": (lambda h: h.update(structure=[]), None, "its header has no structure"),
    "no list of the lost": (lambda h: h["structure"].pop("lost"), None, "no list of names for 'lost'"),
    "lost of another type": (in_structure(lost=5), None, "no list of names for 'lost'"),
    "gained of another type": (in_structure(gained=[1]), None, "no list of names for 'gained'"),
    "attributes of another type": (in_structure(attributes=[1]), None, "no attributes by module"),
    "attributes of a module of another type": (in_structure(attributes={"": 1}), None, "no attributes by module"),
    "masks of another type": (in_structure(masked=5), None, "does not name its masked parameters"),
    "masks of no parameter": (in_structure(masked=["embed.bias"]), None, "'embed.bias' is no parameter"),
    "a method": (in_structure(attributes={"": {"forward": 1}}), None, "may not set 'forward' of the model"),
    "a value of another type": (in_structure(attributes={"": {"shape": "12"}}), None, "may not set 'shape'"),
    "a module that is not there": (in_structure(attributes={"x.y": {"a": 1}}), None, "no attribute"),
    "a method that is lost": (in_structure(lost=["forward"]), None, "forward is not a tensor that could be left out"),
    "lost and there": (in_structure(lost=["embed.weight"]), None, "no place for embed.weight"),
    "no block": (lambda h: h.update(kept_blocks={"blocks": [7]}), None, "is not an ascending part of the 3 blocks"),
    "blocks of no list": (lambda h: h.update(kept_blocks={"embed": [0]}), None, "embed is not a list of blocks"),
    "a tensor missing": (unchanged, without("embed.weight"), "embed.weight is missing|embed.weight is .*, not"),
    "a gained tensor missing": (unchanged, without("head.bias"), "head.bias is missing"),
    "a tensor more": (unchanged, replaced("more", torch.ones(1)), "no place for more"),
    "a method as a tensor": (unchanged, replaced("forward", torch.ones(1)), "no place for forward"),
    "whole numbers": (unchanged, replaced("embed.weight", torch.ones(12, 6).int()), "int32, not like"),
    "a scalar": (unchanged, replaced("embed.weight", torch.ones(())), r"embed.weight is \(\)"),
    "another tensor": (unchanged, replaced("count", torch.ones(2).int()), r"count is \(2,\)"),
    "tied tensors that differ": (
        unchanged,
        lambda t: t | {"twin.weight": t["head.weight"] + 1},
        "twin.weight is not head",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_model_that_is_refused_is_left_as_it_was(fault: str, tmp_path: Path):
    change, tensors, message = REFUSED[fault]
    save_net(tmp_path / "net.safetensors")
    rewrite(tmp_path / "net.safetensors", change, tensors)
    model = build("net", seed=1)
    model.blocks[1].eval()
    model.embed.weight.requires_grad_(False)
    before = picture(model)
    with pytest.raises(UserError, match=message) as error:
        iso.load_model(tmp_path / "net.safetensors", model=model)
    one_line(error)
    assert picture(model) == before


def test_what_these_faults_are_in_loads_without_them(tmp_path: Path):
    pruned = save_net(tmp_path / "net.safetensors")
    model = build("net", seed=1)
    assert len(pruned.blocks) == 2 and pruned.embed.weight.shape != model.embed.weight.shape
    assert torch.equal(iso.load_model(tmp_path / "net.safetensors", model=model)(X), pruned(X))


def test_a_layer_that_refuses_to_load_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Late in the work, when most of the model is filled; a GRU keeps further references to its weights."""
    iso.prune(build("gru").eval(), X, criterion="l2", ratio=0.5).save(tmp_path / "gru.safetensors")
    model = build("gru", seed=1)
    before, answer = picture(model), model(X)

    def refuse(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.out, "_load_from_state_dict", refuse)
    with pytest.raises(KeyboardInterrupt):
        iso.load_model(tmp_path / "gru.safetensors", model=model)
    assert picture(model) == before and torch.equal(model(X), answer)


@pytest.mark.parametrize(("model", "message"), [
    (Net, "model= is a class, Net: give the dense model itself"),
    (build, "model= is a function, not a torch.nn.Module"),
    ({"embed.weight": X}, "model= is a dict, not a torch.nn.Module"),
    (nn.Sequential(nn.LazyLinear(3)), "0.weight of model= is lazy and has no shape yet"),
])  # fmt: skip
def test_what_is_no_built_model_is_refused(model: Any, message: str, tmp_path: Path):
    save_net(tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=message) as error:
        iso.load_model(tmp_path / "net.safetensors", model=model)
    one_line(error)


# --- precision and places ---


@pytest.mark.parametrize("built", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_numbers_get_the_files_precision(stored: torch.dtype, built: torch.dtype, tmp_path: Path):
    pruned = save_net(tmp_path / "net.safetensors").to(stored)
    save_module(tmp_path / "net.safetensors", pruned, build("net"), provenance={}, kept_blocks={"blocks": (1, 2)})
    model = iso.load_model(tmp_path / "net.safetensors", model=build("net", seed=1).to(built))
    floats = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {stored}
    assert model.get_buffer("count").dtype == torch.int64
    assert all(torch.equal(tensor, pruned.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_model_of_several_precisions_keeps_them(tmp_path: Path):
    dense = build("net")
    pruned = copy.deepcopy(dense)
    pruned.blocks[0].half()
    save_module(tmp_path / "net.safetensors", pruned, dense, provenance={})
    model = iso.load_model(tmp_path / "net.safetensors", model=build("net", seed=1))
    assert {name: t.dtype for name, t in model.named_parameters()} == {n: t.dtype for n, t in pruned.named_parameters()}


def test_parameters_keep_their_gradient_switch_and_whole_ones_stay_themselves(tmp_path: Path):
    iso.prune(plain(), X, criterion="l2", ratio=0.5).save(tmp_path / "net.safetensors")
    model = plain()
    cut, whole = model[0].get_parameter("weight").requires_grad_(False), model[4].bias
    iso.load_model(tmp_path / "net.safetensors", model=model)
    assert model[0].get_parameter("weight").shape[0] < 16 and model[0].weight is not cut
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad
    assert model[4].bias is whole


def test_a_model_without_data_gets_the_files(tmp_path: Path):
    pruned = save_net(tmp_path / "net.safetensors")
    with torch.device("meta"):
        model = build("net", seed=1)
    loaded = iso.load_model(tmp_path / "net.safetensors", model=model)
    assert {tensor.device.type for tensor in [*loaded.parameters(), *loaded.buffers()]} == {"cpu"}
    assert loaded.get_parameter("twin.weight") is loaded.get_parameter("head.weight")
    assert torch.equal(loaded(X), pruned(X))


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.factor = nn.Linear(6, 16), nn.Linear(16, 3), torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu()) * self.factor


def test_plain_tensors_need_no_data(tmp_path: Path):
    pruned = iso.prune(Constant(), X, criterion="l2", ratio=0.5)
    pruned.save(tmp_path / "net.safetensors")
    with torch.device("meta"):
        model = Constant()
    loaded: Any = iso.load_model(tmp_path / "net.safetensors", model=model)
    assert torch.equal(loaded.factor, torch.ones(())) and torch.equal(loaded(X), pruned.model(X))


class Anchors(nn.Module):
    """What a forward pass leaves: plain tensors, one of them in a place that was empty, and sizes in such places."""

    grid = None

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.anchors = nn.Linear(6, 16), nn.Linear(16, 3), torch.empty(0)
        self.shape, self.widths = None, []

    def forward(self, x: Tensor) -> Tensor:
        self.anchors, self.perplexity = torch.ones(2, len(x)), torch.ones(())
        x = self.one(x).relu()
        self.shape, self.widths = x.shape, [x.shape[-1]]
        self.grid = x.shape
        return self.two(x) * self.anchors[0, 0]


def test_what_a_forward_pass_leaves_needs_no_place(tmp_path: Path):
    model = Anchors()
    model(X)
    pruned = iso.prune(model, X, criterion="l2", ratio=0.5)
    pruned.save(tmp_path / "net.safetensors")
    loaded = iso.load_model(tmp_path / "net.safetensors", model=Anchors())
    assert torch.equal(loaded(X), pruned.model(X)) and loaded.widths == [8]


def test_what_an_older_file_does_not_hold_needs_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(save, "plain_to_save", lambda model, dense, all_of_them: {})
    iso.prune(Constant(), X, criterion="l2", ratio=0.5).save(tmp_path / "net.safetensors")
    with torch.device("meta"):
        model = Constant()
    with pytest.raises(
        UserError, match="does not hold factor, which model= has on the meta device: build it with data"
    ):
        iso.load_model(tmp_path / "net.safetensors", model=model)
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to stay on")
def test_a_model_on_a_gpu_stays_there(tmp_path: Path):
    pruned = save_net(tmp_path / "net.safetensors")
    model = iso.load_model(tmp_path / "net.safetensors", model=build("net", seed=1).cuda())
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cuda"}
    assert all(torch.equal(tensor.cpu(), pruned.state_dict()[name]) for name, tensor in model.state_dict().items())


# --- what models are made of ---


class Cached(Constant):
    """A buffer that the first forward pass fills, and one that is only there in some models."""

    cache: Tensor | None
    shift: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", None, persistent=False)
        self.register_buffer("shift", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.arange(3.0)
        answer = super().forward(x) + self.cache
        return answer if self.shift is None else answer + self.shift


def test_caches_and_gained_buffers_come_along(tmp_path: Path):
    pruned = iso.prune(Cached(), X, criterion="l2", ratio=0.5)
    pruned.model.shift = torch.ones(3)
    pruned.save(tmp_path / "net.safetensors")
    model = iso.load_model(tmp_path / "net.safetensors", model=Cached())
    assert torch.equal(model(X), pruned.model(X))
    assert "shift" in model.state_dict() and "cache" not in model.state_dict()


class Collections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"first": nn.Linear(6, 16), "last": nn.Linear(16, 3)})
        self.scales = nn.ParameterDict({"b": torch.randn(16), "a": torch.randn(16)})
        self.shifts = nn.ParameterList([torch.randn(16), torch.randn(16)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers["first"](x) * self.scales["b"] + self.shifts[0]
        return self.layers["last"]((x * self.scales["a"] + self.shifts[1]).relu())


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def normed() -> nn.Sequential:
    model = plain()
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[2])
    return model


@pytest.mark.parametrize("make", [Collections, normed])
def test_dicts_lists_and_parametrizations_come_along(make: Any, tmp_path: Path):
    pruned = iso.prune(make().eval(), X, criterion="l2", ratio=0.5)
    assert pruned.after.params < pruned.before.params
    pruned.save(tmp_path / "net.safetensors")
    assert torch.equal(iso.load_model(tmp_path / "net.safetensors", model=make())(X), pruned.model(X))


class Hiding(nn.Module):
    def __init__(self, hidden: Any, known: bool = False) -> None:
        super().__init__()
        self.net, self.hidden = plain(), hidden
        self.known = hidden[0] if known else None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    "hidden", [[nn.Linear(3, 3)], (nn.Linear(3, 3),), {"a": nn.Linear(3, 3)}], ids=["list", "tuple", "dict"]
)
def test_modules_that_the_model_does_not_know_of_are_not_lost_silently(hidden: Any, tmp_path: Path):
    pruned = iso.prune(Hiding(hidden), X, criterion="l2", ratio=0.5)
    with pytest.raises(
        UserError, match=r"cannot save the modules in hidden, a plain list or dict.*nn\.ModuleList"
    ) as error:
        pruned.save(tmp_path / "net.safetensors")
    one_line(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [lambda: Hiding([nn.Linear(3, 3)], known=True), lambda: Hiding([nn.ReLU()])])
def test_lists_of_modules_that_lose_nothing_are_let_through(make: Any, tmp_path: Path):
    pruned = iso.prune(make(), X, criterion="l2", ratio=0.5)
    pruned.save(tmp_path / "net.safetensors")
    assert torch.equal(iso.load_model(tmp_path / "net.safetensors", model=make())(X), pruned.model(X))


# --- checkpoints that have a builder ---


def test_the_dense_model_takes_the_place_of_a_library(tmp_path: Path):
    def dense() -> Any:
        return torchvision.models.resnet18(num_classes=10)

    images = torch.randn(1, 3, 64, 64)
    pruned = iso.prune(dense().eval(), images, criterion="l2", ratio=0.5, remove_blocks=1)
    path = tmp_path / "net.safetensors"
    pruned.save(path, name="resnet18", builder="torchvision", kwargs={"num_classes": 10})
    assert torch.equal(iso.load_model(path, model=dense())(images), pruned.model(images))
    model = torchvision.models.resnet18()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UserError, match=r"is not the dense model .*: fc.weight is \(1000, 512\), not \(10, 512\)"
    ) as error:
        iso.load_model(path, model=model)
    one_line(error)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    rewrite(path, lambda header: header["kwargs"].update(num_classes=10**9))
    with pytest.raises(UserError, match="num_classes beyond 100000"):
        iso.load_model(path, model=dense())


def test_the_dense_model_takes_the_place_of_a_users_file(own: Path, tmp_path: Path):
    model, spec = open_model(f"{own}:build", kwargs={"width": 6}, input_size=8)
    path, images = tmp_path / "own.safetensors", torch.randn(2, 3, 8, 8)
    model.norm = nn.BatchNorm2d(12).eval()
    save_model(path, model, spec, provenance={})
    dense = [open_model(f"{own}:build", kwargs={"width": width}, input_size=8)[0] for width in (6, 8)]
    own.unlink()
    assert torch.equal(iso.load_model(path, model=dense[0])(images), model(images))
    with pytest.raises(
        UserError, match=r"is not the dense model .*: stem.weight is \(16, 3, 3, 3\), not \(12, 3, 3, 3\)"
    ) as error:
        iso.load_model(path, model=dense[1])
    one_line(error)


def test_files_of_users_models_without_the_dense_shapes_still_load(own: Path, tmp_path: Path):
    model, spec = open_model(f"{own}:build", input_size=8)
    path, images = tmp_path / "own.safetensors", torch.randn(2, 3, 8, 8)
    save_model(path, model, spec, provenance={})
    rewrite(path, lambda header: header.pop("dense"))
    dense = open_model(f"{own}:build", input_size=8)[0]
    assert torch.equal(iso.load_model(path, model=dense)(images), model(images))
    assert torch.equal(iso.load_model(path, builder_file=own)(images), model(images))
