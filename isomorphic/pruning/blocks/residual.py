"""Which blocks a model can do without.

A block is residual if it is the identity once all of its parameters are zero, as x + f(x) is: with it goes nothing but
its own work. Blocks that change the shape of what they are given, or that normalise the sum, are not. Whether the rest
of the model knows how many blocks there are is tried: without some it must compute what it does with their parameters
at zero. All of that is done with random parameters, for a fresh model may answer with zeros whatever happens in it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from isomorphic.errors import UserError, first_line
from isomorphic.inputs import Inputs, arguments, call, tensors_in
from isomorphic.models import REFUSALS, keep_blocks
from isomorphic.observe import modes_kept, module_calls

TOLERANCE = 1e-4  # of the largest output: far above rounding

KeptBlocks = Mapping[str, Sequence[int]]  # the indices that stay, by the name of the module that holds the blocks
_Values = Mapping[int, Tensor]  # random values by the id of their parameter


@dataclass(frozen=True)
class Stage:
    """A Sequential or ModuleList of blocks.

    Attributes:
        name: of the module in the model.
        num_blocks: its children, in the order in which they run.
        removable: indices of the residual ones.
    """

    name: str
    num_blocks: int
    removable: tuple[int, ...]

    @property
    def spare(self) -> int:
        """How many blocks can go: one always stays."""
        return min(len(self.removable), self.num_blocks - 1)


@torch.no_grad()
def find_stages(model: nn.Module, inputs: Inputs) -> list[Stage]:
    """All modules that hold residual blocks which the others can do without, in the model's order.

    Args:
        model: in eval mode.
        inputs: what its forward takes, on its device; see `trace_groups`.
    """
    blocks = set(_outermost_blocks(model, _residual_children(model, inputs)))
    values = _random_values(model)
    stages = []
    for name, children in _block_lists(model).items():
        removable = tuple(index for index, child in enumerate(children) if child in blocks)
        stage = Stage(name, len(children), removable)
        if removable and (not stage.spare or _can_spare(model, stage, values, inputs)):
            stages.append(stage)
    return stages


@torch.no_grad()
def check_without(model: nn.Module, kept: KeptBlocks, inputs: Inputs) -> None:
    """Finds out whether `model`, which stays as it is, can do with the `kept` blocks, in eval and in training mode.

    Raises:
        UserError: it has no such blocks, or others depend on those that would go.
    """
    values = _random_values(model)
    try:
        error = _error_without(model, kept, values, inputs)
        _train_without(model, kept, values, inputs)
    except REFUSALS as failure:
        raise UserError(f"the model cannot lose these blocks: {first_line(failure)}") from failure
    if not error <= TOLERANCE:
        raise UserError(
            f"the model cannot lose these blocks: those that stay depend on how many there are ({error:.0e})"
        )


@contextlib.contextmanager
def shortened(model: nn.Module, kept: KeptBlocks) -> Iterator[None]:
    """Inside, `model` has only the `kept` blocks; the others are put back."""
    holders = [model.get_submodule(name) for name in kept]
    before = [dict(holder._modules) for holder in holders]
    try:
        keep_blocks(model, kept)
        yield
    finally:
        for holder, modules in zip(holders, before, strict=True):
            holder._modules.clear()
            holder._modules.update(modules)


def _block_lists(model: nn.Module) -> dict[str, list[str]]:
    """The names of their children by the names of all Sequentials and ModuleLists."""
    return {
        name: [f"{name}.{child}" if name else child for child in module._modules]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Sequential, nn.ModuleList))
    }


def _residual_children(model: nn.Module, inputs: Inputs) -> list[str]:
    """The residual children of lists, by name, in the model's order."""
    children = dict.fromkeys(child for names in _block_lists(model).values() for child in names)
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {name: [] for name in children}

    def note(name: str, positional: tuple[Any, ...], keyword: dict[str, Any]) -> None:
        calls[name].append((positional, keyword))

    with module_calls({name: model.get_submodule(name) for name in children}, before=note):
        call(model, inputs)
    once = {name: made[0] for name, made in calls.items() if len(made) == 1}
    return [name for name, call in once.items() if _is_residual(model.get_submodule(name), *call)]


def _is_residual(block: nn.Module, positional: tuple[Any, ...], keyword: dict[str, Any]) -> bool:
    """Whether the block, with parameters of zero, returns what it is given.

    It is given noise, positive where it was given nothing else: an activation after the sum does not matter then.
    """
    zeros = {name: torch.zeros_like(p) for name, p in block.named_parameters(remove_duplicate=False)}
    if not zeros or not positional or not isinstance(positional[0], Tensor) or not positional[0].is_floating_point():
        return False
    noise = torch.randn(positional[0].shape, generator=torch.Generator().manual_seed(0)).to(positional[0])
    given = noise.abs() if (positional[0] >= 0).all() else noise
    try:
        returned = functional_call(block, zeros, (given, *positional[1:]), keyword, tie_weights=False)
    except REFUSALS:
        return False
    is_alike = isinstance(returned, Tensor) and returned.shape == given.shape
    return is_alike and _difference(returned, given) <= TOLERANCE


def _outermost_blocks(model: nn.Module, residual: Sequence[str]) -> Iterator[str]:
    """Blocks that lie in no other. What holds blocks of one class only is no block but a stage of them."""
    chosen: list[str] = []
    for name in residual:  # outer ones come first
        nested = {type(model.get_submodule(other)) for other in residual if other.startswith(f"{name}.")}
        if len(nested) != 1 and not any(name.startswith(f"{outer}.") for outer in chosen):
            chosen.append(name)
    yield from chosen


def _can_spare(model: nn.Module, stage: Stage, values: _Values, inputs: Inputs) -> bool:
    """Whether the model can do without the first removable block of the stage."""
    kept = tuple(index for index in range(stage.num_blocks) if index != stage.removable[0])
    try:
        return _error_without(model, {stage.name: kept}, values, inputs) <= TOLERANCE
    except REFUSALS:
        return False


def _error_without(model: nn.Module, kept: KeptBlocks, values: _Values, inputs: Inputs) -> float:
    """How far the shorter model is from the one whose other blocks are zero, as a share of the largest output."""
    expected = _run(model, values, inputs, without=_removed(model, kept))
    if not all(tensor.isfinite().all() for tensor in expected):  # some parameters are no place for noise
        values = {id(parameter): parameter for parameter in model.parameters()}
        expected = _run(model, values, inputs, without=_removed(model, kept))
    with shortened(model, kept):
        found = _run(model, values, inputs)
    return max(_difference(*pair) for pair in zip(found, expected, strict=True))


def _train_without(model: nn.Module, kept: KeptBlocks, values: _Values, inputs: Inputs) -> None:
    """Runs both in training mode, where forward code may use other blocks, with nothing random and no statistics.

    Raises:
        REFUSALS: the shorter model fails where the dense one does not, or gives other outputs.
    """
    with _training(model):
        try:
            expected = [tensor.shape for tensor in _run(model, values, inputs)]
        except REFUSALS:
            return
        with shortened(model, kept):
            found = [tensor.shape for tensor in _run(model, values, inputs)]
    if found != expected:
        raise ValueError("without them its outputs in training are others")


def _random_values(model: nn.Module) -> _Values:
    """Noise for every parameter, scaled so that what runs through many layers stays of order one."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for parameter in model.parameters():
        if parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter[0].numel() or 1)
        else:
            noise = 0.5 + torch.rand(parameter.shape, generator=generator)
        values[id(parameter)] = noise.to(parameter) if parameter.is_floating_point() else parameter
    return values


def _run(model: nn.Module, values: _Values, inputs: Inputs, *, without: tuple[str, ...] = ()) -> list[Tensor]:
    """The outputs with other parameters, of zero where names start as in `without`; buffers stay as they are."""
    state = {
        name: torch.zeros_like(parameter) if name.startswith(without) else values[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    state |= {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}
    positional, keyword = arguments(inputs)
    return tensors_in(functional_call(model, state, positional, keyword, tie_weights=False))


def _removed(model: nn.Module, kept: KeptBlocks) -> tuple[str, ...]:
    """What the names of the parameters of the blocks that go start with."""
    lists = _block_lists(model)
    return tuple(
        f"{block}." for name, indices in kept.items() for i, block in enumerate(lists.get(name, ())) if i not in indices
    )


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode, for a while, but for layers such as dropout and batch norm."""
    with modes_kept(model):
        for module in model.modules():
            module.training = any(True for _ in module.children())
        yield


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))
