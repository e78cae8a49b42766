"""Memoised functions and tables of tensors: a trace finds the same whatever they hold, and leaves nothing there."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.inputs import named_tensors
from isomorphic.pruning.grouping import exact
from isomorphic.pruning.grouping.integers import TracedInt
from isomorphic.pruning.grouping.memory import remembering_nothing, without_memory
from tests.unit.pruning.grouping.halves import FOLLOWS, OUTPUT, found, half, stays, units

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
MEMOISED = type(functools.lru_cache(len))
TABLE: dict[Any, Tensor] = {}
WIDTHS = {"a.weight:0": 48, "b.weight:0": 16}


def _as_tokens(b: int, c: int, n: int) -> tuple[int, int, int]:
    return b, c, n


@functools.lru_cache
def _tokens(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape[0], shape[1], shape[2] * shape[3]


@functools.cache
def _half(width: int) -> int:
    return width // 2


@functools.cache
def _places(count: int, device: torch.device | None = None) -> Tensor:
    return torch.arange(count, device=device) % 9


@functools.lru_cache
def _sines(count: int, device: torch.device) -> Tensor:
    angles = torch.linspace(0, 6, count, device=device)
    return torch.stack([angles.sin(), angles.cos()], -1)


@functools.lru_cache
def _grids(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.meshgrid(rows.float(), columns.float(), indexing="ij")  # type: ignore[return-value]


def _closed_over() -> Callable[[int, int, int], Any]:
    memoised = functools.lru_cache(_as_tokens)
    return lambda b, c, n: memoised(b, c, n)


class Net(nn.Module):
    """A map of 48 channels as tokens, in a shape that a memoised function says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 48, 1), nn.Linear(48, 16), nn.Linear(16, 4)
        self.bias, self.grid = nn.Embedding(9, 16), nn.Linear(2, 16)

    def shape(self, b: int, c: int, n: int) -> Any:
        """(B, C, H · W)."""
        return b, c, n

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        b, c, h, w = x.shape
        return self.c(self.more(self.b(x.reshape(self.shape(b, c, h * w)).transpose(1, 2)), h, w))

    def more(self, x: Tensor, height: int, width: int) -> Tensor:
        """Something added to the tokens (B, H · W, 16)."""
        return x


class OfModule(Net):
    def shape(self, b: int, c: int, n: int) -> Any:
        return _tokens((b, c, n, 1))


class InClass(Net):
    @functools.lru_cache(8)  # noqa: B019
    def shape(self, b: int, c: int, n: int) -> Any:
        return b, c, n


class OfInstance(Net):
    def __init__(self) -> None:
        super().__init__()
        self.memoised = functools.lru_cache(maxsize=32)(self._shape)

    def _shape(self, b: int, c: int, n: int) -> Any:
        return b, c, n

    def shape(self, b: int, c: int, n: int) -> Any:
        return self.memoised(b, c, n)


class InClosure(Net):
    known = staticmethod(_closed_over())

    def shape(self, b: int, c: int, n: int) -> Any:
        return self.known(b, c, n)


class InDict(Net):
    known: Any = {"shape": functools.lru_cache(_as_tokens)}  # noqa: RUF012

    def shape(self, b: int, c: int, n: int) -> Any:
        return self.known["shape"](b, c, n)


class ByOtherName(Net):
    """The file knows the function by its name, and the forward code by another one."""

    known: Any = {"tokens": _tokens}  # noqa: RUF012

    def shape(self, b: int, c: int, n: int) -> Any:
        return self.known["tokens"]((b, c, n, 1))


class OfHelper(Net):
    class Helper:
        @functools.lru_cache  # noqa: B019
        def shape(self, b: int, c: int, n: int) -> Any:
            return b, c, n

    def __init__(self) -> None:
        super().__init__()
        self.helper = self.Helper()

    def shape(self, b: int, c: int, n: int) -> Any:
        return self.helper.shape(b, c, n)


class Places(Net):
    """An embedding of places."""

    def more(self, x: Tensor, height: int, width: int) -> Tensor:
        return x + self.bias(_places(x.shape[1]))


class PlacesOnDevice(Net):
    def more(self, x: Tensor, height: int, width: int) -> Tensor:
        return x + self.bias(_places(x.shape[1], x.device))


class PlacesInDict(Net):
    def more(self, x: Tensor, height: int, width: int) -> Tensor:
        if height * width not in TABLE:
            TABLE[height * width] = torch.arange(height * width, device=x.device) % 9
        return x + self.bias(TABLE[height * width])


class Grids(Net):
    def more(self, x: Tensor, height: int, width: int) -> Tensor:
        return x + self.grid(torch.stack(_grids(height, width, x.device), -1).flatten(0, 1))


FUNCTIONS = [OfModule, InClass, OfInstance, InClosure, InDict, ByOtherName, OfHelper]
TABLES = [Places, PlacesOnDevice, PlacesInDict, Grids]


def _ours() -> list[Any]:
    """The memoised functions of this file."""
    return [one for one in gc.get_objects() if type(one) is MEMOISED and one.__module__ == __name__]


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    """Tables and functions of this file are empty before each test."""
    TABLE.clear()
    for one in _ours():
        one.cache_clear()


def _check_nothing_left(functions: list[Any]) -> None:
    """No entry, in tables or functions, is or holds a traced integer or a tensor of the trace."""
    left, level = [], [TABLE, *functions]
    for _ in range(4):
        level = gc.get_referents(*level)
        level = [one for one in level if isinstance(one, (dict, tuple, list, Tensor, int)) or "_lru_" in str(type(one))]
        level = [one for one in level if not (isinstance(one, dict) and "__name__" in one)]
        left += level
    assert not any(isinstance(one, Tensor) and (one.is_meta or one.is_inference()) for one in left)
    assert not any(isinstance(one, TracedInt) for one in left)


CASES = [(kind, False) for kind in (*FUNCTIONS, *TABLES)] + [(InClass, True), (PlacesInDict, True)]


@pytest.mark.parametrize(("kind", "warm"), CASES, ids=lambda one: getattr(one, "__name__", "warm" if one else "cold"))
def test_a_trace_finds_the_same_at_any_time(kind: type[Net], warm: bool):
    model = kind().eval()
    functions = _ours()
    expected = kind().eval()(X) if warm else None
    if warm:
        model(X)
    for look in (found, lambda *a: units(iso.trace(*a)), found, lambda *a: units(iso.trace(*a))):
        assert look(model, X) == WIDTHS
        _check_nothing_left(functions)
        outputs = model.eval()(X)
        assert expected is None or torch.equal(outputs, expected)
        expected = outputs
        model.train()(X).sum().backward()
        model.eval()


def test_functions_are_found_wherever_they_are():
    model = Grids().eval()
    model(X)
    assert found(model, X) == WIDTHS
    _check_nothing_left(_ours())
    model.train()(X).sum().backward()


class InClosureOfInstance(Net):
    def __init__(self) -> None:
        super().__init__()
        self.known = [_closed_over()]

    def shape(self, b: int, c: int, n: int) -> Any:
        return self.known[0](b, c, n)


@pytest.mark.parametrize("kind", [OfInstance, InClosureOfInstance], ids=lambda kind: kind.__name__)
def test_functions_of_another_instance_are_found(kind: type[Net]):
    for _ in range(3):
        model = kind().eval()
        model(X)
        assert found(model, X) == WIDTHS


def test_a_function_that_took_the_place_of_another_is_found(monkeypatch: pytest.MonkeyPatch):
    model = OfModule().eval()
    assert found(model, X) == WIDTHS
    new = functools.lru_cache(_tokens.__wrapped__)
    monkeypatch.setitem(globals(), "_tokens", new)
    model(X)
    assert found(model, X) == WIDTHS and new.cache_info().currsize == 0


class Careful(Places):
    """Looks at values, which a trace without data ends with, and catches an error."""

    def more(self, x: Tensor, height: int, width: int) -> Tensor:
        TABLE["first"] = x * 2
        try:
            x = x.reshape(-1, 7)
        except RuntimeError:
            x = super().more(x, height, width)
        return x if TABLE["first"].sum().isfinite() else -x


AT_ONCE = [Net, OfModule, InClass, InClosure, *TABLES, Careful]


@pytest.mark.parametrize("kind", AT_ONCE, ids=lambda kind: kind.__name__)
def test_all_objects_of_the_process_are_looked_at_once(kind: type[Net], monkeypatch: pytest.MonkeyPatch):
    looks: list[int] = []
    referrers = gc.get_referrers

    def watched(*objects: Any) -> list[Any]:
        looks.append(len(objects))
        return referrers(*objects)

    for attempt in range(3):
        model = kind().eval()
        model(X)
        monkeypatch.setattr(gc, "get_referrers", watched if attempt else referrers)
        assert found(model, X) == WIDTHS
        monkeypatch.undo()
        _check_nothing_left(_ours())
        model.train()(X).sum().backward()
    assert looks == ([1] * 2 if kind is InClosure else [])  # where its name is unknown: where it is


@pytest.mark.parametrize("kind", [OfInstance, Places, Grids], ids=lambda kind: kind.__name__)
def test_half_of_it_is_cut(kind: type[Net]):
    model = kind()
    cut = half(model, X)
    assert (cut.a.out_channels, cut.b.in_features, cut.b.out_features, cut.c.in_features) == (24, 24, 8, 8)
    assert model(X).shape == cut(X).shape == (2, 36, 4)


@pytest.mark.parametrize("kind", [PlacesOnDevice, Grids], ids=lambda kind: kind.__name__)
def test_a_plan_leaves_nothing_either(kind: type[Net]):
    model = kind().eval()
    functions = _ours()
    iso.plan(model, X, ratio=0.5, criterion="l2")
    _check_nothing_left(functions)


class Sines(Net):
    def more(self, x: Tensor, height: int, width: int) -> Tensor:
        return x + self.grid(_sines(x.shape[1], x.device))


def test_the_self_check_leaves_no_doubles():
    model = Sines().eval()
    assert units(iso.trace(model, X)) == WIDTHS
    _sines.cache_clear()
    iso.prune(model, X, ratio=0.5, criterion="l2", self_check=True)
    model(X)


def test_functions_are_memoised_again():
    before = [_tokens, vars(InClass)["shape"], InDict.known["shape"]]
    for kind in FUNCTIONS:
        model: Any = kind().eval()
        found(model, X)
        model(X)
        if isinstance(model, OfInstance):
            assert type(model.memoised) is MEMOISED and model.memoised.cache_info().currsize == 1
    after = [_tokens, vars(InClass)["shape"], InDict.known["shape"]]
    assert all(one is other and type(one) is MEMOISED for one, other in zip(before, after, strict=True))
    _tokens.cache_clear()
    OfModule().eval()(X)
    OfModule().eval()(X)
    assert _tokens.cache_info()[:2] == (1, 1)


class Halves(Net):
    """The two halves of the channels change places."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        half = _half(x.shape[1])
        return self.c(self.b(torch.cat([x[:, half:], x[:, :half]], 1).flatten(2).transpose(1, 2)))


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_memoised_half_is_one(warm: bool):
    model = Halves().eval()
    if warm:
        assert _half(48) == 24
    expected = {"a.weight:0:0": 24, "a.weight:0:24": 24, "b.weight:0": 16}
    assert [found(model, X), found(model, X)] == [expected] * 2
    assert half(model, X).a.out_channels == 24


class Constant(Net):
    """The memoised function spells the width out."""

    @functools.lru_cache  # noqa: B019
    def shape(self, b: int, c: int, n: int) -> Any:
        return b, 48, n


class ByName(Net):
    """What a memoised function knows by a name does not follow a width."""

    @staticmethod
    @functools.lru_cache
    def _width(name: str) -> int:
        return {"base": 48}[name]

    def shape(self, b: int, c: int, n: int) -> Any:
        return b, self._width("base"), n


@pytest.mark.parametrize("kind", [Constant, ByName], ids=lambda kind: kind.__name__)
def test_a_memoised_constant_keeps_the_width(kind: type[Net]):
    model = kind().eval()
    for _ in range(2):
        assert stays(model, X) == {"a.weight:0": FOLLOWS, "c.weight:0": OUTPUT}
        assert found(model, X) == {"b.weight:0": 16}
        model(X)
    assert half(model, X).a.out_channels == 48


def test_what_a_run_leaves_is_taken_out_and_the_rest_stays():
    own = torch.zeros(2)
    TABLE["own"] = own
    model = nn.Linear(2, 2)
    kept: dict[str, Any] = {"other": 1}
    with remembering_nothing(model) as run:
        TABLE["made"] = torch.ones(2)
        kept["made"] = torch.ones(3)
        model.extra = torch.ones(4)  # type: ignore[assignment]
        run.outputs = TABLE["output"] = torch.ones(5)
    assert set(TABLE) == {"own", "output"} and TABLE["own"] is own
    assert kept == {"other": 1} and len(model.extra) == 4  # type: ignore[arg-type]
    TABLE.clear()


def test_a_memory_is_put_back_after_an_error():
    function = _half
    with pytest.raises(ZeroDivisionError), without_memory([function]):
        assert type(_half) is not MEMOISED and _half(6) == 3
        raise ZeroDivisionError
    assert _half is function


def test_a_copy_is_traced_alike():
    model = OfInstance().eval()
    model(X)
    assert found(copy.deepcopy(model), X) == found(model, X) == WIDTHS


class Cast(Net):
    """Inputs by name, and calls that hand them on as they are."""

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x = super().forward(images.to(torch.float32).contiguous())
        return x if mask is None else x * mask.to(x.dtype).unsqueeze(-1)


class CastInBatch(Net):
    """A batch of one mapping, whose entries are cast, replaced and added to."""

    def forward(self, batch: dict[str, Any]) -> Tensor:  # type: ignore[override]
        batch["images"] = batch["images"].float()
        batch["features"] = batch["images"] * 2
        batch["images"] = batch["features"] + torch.atleast_2d([batch["more"]["shift"]])[0]
        return super().forward(batch["images"])


MAPPED: list[tuple[type[Net], Any]] = [
    (Cast, {"images": X}),
    (Cast, {"images": X, "mask": torch.ones(2, 36)}),
    (CastInBatch, ({"images": X, "more": {"shift": torch.ones(1, 6)}},)),
]


@pytest.mark.parametrize(("kind", "inputs"), MAPPED, ids=["images", "mask", "batch"])
def test_inputs_are_nothing_that_a_run_leaves(kind: type[Net], inputs: Any):
    model = kind().eval()
    names = [name for name, _ in named_tensors(inputs, "")]
    assert [units(iso.trace(model, inputs)) for _ in range(2)] == [WIDTHS] * 2
    assert half(model, inputs).a.out_channels == 24
    assert [name for name, _ in named_tensors(inputs, "")] == names


SAME = [Tensor.contiguous, torch.atleast_1d, lambda one: torch.atleast_1d([one])[0], lambda one: one.to("cpu")]


@pytest.mark.parametrize("same", [*SAME, lambda one: one.add_(1)])
def test_what_was_there_before_a_run_stays(same: Callable[[Tensor], Tensor]):
    TABLE["own"] = own = torch.ones(2)
    with remembering_nothing(nn.Linear(2, 2)):
        assert same(TABLE["own"]) is own
        TABLE["made"] = same(own * 2)
    assert list(TABLE) == ["own"]


# Memoised functions that are known by no name.


class Static(Net):
    @staticmethod
    @functools.lru_cache
    def shape(b: int, c: int, n: int) -> Any:  # type: ignore[override]
        return b, c, n


class OfClass(Net):
    @classmethod
    @functools.lru_cache
    def shape(cls, b: int, c: int, n: int) -> Any:
        return b, c, n


class Partial(Net):
    def __init__(self) -> None:
        super().__init__()
        self.known = functools.partial(functools.lru_cache(_as_tokens), n=36)

    def shape(self, b: int, c: int, n: int) -> Any:
        return self.known(b, c)


class InTuple(Net):
    def __init__(self) -> None:
        super().__init__()
        self.known = (functools.lru_cache(_as_tokens),)

    def shape(self, b: int, c: int, n: int) -> Any:
        return self.known[0](b, c, n)


class BoundMethod(Net):
    def __init__(self) -> None:
        super().__init__()
        self.known = OfHelper.Helper().shape

    def shape(self, b: int, c: int, n: int) -> Any:
        return self.known(b, c, n)


class Default(Net):
    def shape(self, b: int, c: int, n: int, known: Any = functools.lru_cache(_as_tokens)) -> Any:  # noqa: B008
        return known(b, c, n)


@pytest.mark.parametrize(
    "kind", [Static, OfClass, Partial, InTuple, BoundMethod, Default], ids=lambda kind: kind.__name__
)
def test_a_memoised_function_that_cannot_be_replaced_ends_the_trace(kind: type[Net], monkeypatch: pytest.MonkeyPatch):
    model = kind()
    attempts = iter(range(3))  # with its memory, without it where its name is known, and as it is
    trace = exact._trace_without_data

    def three_times_at_most(*arguments: Any, **named: Any) -> Any:
        if next(attempts, None) is None:
            raise RecursionError("the trace begins anew for ever")
        return trace(*arguments, **named)

    monkeypatch.setattr(exact, "_trace_without_data", three_times_at_most)
    assert found(model, X) == WIDTHS
