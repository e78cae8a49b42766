"""An optimizer goes on after a cut: its parameters and what it keeps of them are cut alike.

In the middle of training, an optimizer holds the parameters that the cut replaces, and for each of them a state: the
momentum of SGD, the two averages of AdamW, Lion's one. A state of the parameter's shape loses the positions that the
parameter loses; a state of one number, such as a count of updates, stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from isomorphic.errors import UserError
from isomorphic.pruning.cutting.cut import kept_positions
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.plan import PruningPlan


class OptimizerCut:
    """What an optimizer loses in one cut: made before it, carried out after it.

    Example: `fc1.weight` (16, 6) keeps rows 0 to 7. Before: the optimizer's first group holds the old parameter, its
    state {"step": 12, "exp_avg": (16, 6)}. After `apply`: the new parameter (8, 6) stands in the same place of the
    same group, its state {"step": 12, "exp_avg": (8, 6)}: the first eight rows.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> None:
        """
        Args:
            optimizer: of a parameter of `model` and whatever else.
            model: before the cut.
            graph: its groups.
            plan: what the cut will keep.

        Raises:
            UserError: the optimizer knows none of the model's parameters, or holds a state that cannot be cut.
        """
        self._optimizer = optimizer
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._kept = {  # by parameter: the positions of each dim that stay
            model.get_submodule(module).get_parameter(tensor): dims
            for (module, tensor), dims in kept_positions(model, graph, plan).items()
            if tensor in dict(model.get_submodule(module).named_parameters(recurse=False))
        }
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not any(parameter in self._names for parameter in held):
            raise UserError(
                "optimizer= holds none of the model's parameters: it has to be made from the model that is pruned"
            )
        for parameter in held if self._kept else ():
            if parameter in self._names:  # cut or not: LBFGS keeps the states of all of them with the first
                self._check_state(parameter)

    def apply(self, model: nn.Module) -> None:
        """Puts the parameters of the cut `model` in the places of the old ones, with what is left of their states.

        A parameter that the cut model has gained, such as a bias, joins the group of a parameter beside it.
        """
        new = dict(model.named_parameters())
        state: dict[Any, Any] = self._optimizer.state
        for group in self._optimizer.param_groups:
            for position, old in enumerate(group["params"]):
                name = self._names.get(old)
                if name is None or new[name] is old:
                    continue
                group["params"][position] = new[name]
                if old in state:
                    state[new[name]] = {key: self._cut(old, value) for key, value in state.pop(old).items()}
        self._add_gained(new)

    def _add_gained(self, new: Mapping[str, nn.Parameter]) -> None:
        held = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        for name in new.keys() - set(self._names.values()):
            module = name.rpartition(".")[0]
            beside = {id(parameter) for other, parameter in new.items() if other.rpartition(".")[0] == module}
            for group in self._optimizer.param_groups:
                if id(new[name]) not in held and any(id(parameter) in beside for parameter in group["params"]):
                    group["params"].append(new[name])
                    held.add(id(new[name]))

    def _check_state(self, parameter: nn.Parameter) -> None:
        for key, value in self._optimizer.state.get(parameter, {}).items():  # type: ignore[call-overload]
            if not _can_be_cut(value, parameter):
                shape = tuple(value.shape) if isinstance(value, Tensor) else "a list of tensors"
                raise UserError(
                    f"{type(self._optimizer).__name__} keeps {key!r} ({shape}) of {self._names[parameter]}: it is not "
                    "of the parameter's shape and cannot be cut; make a new optimizer from the pruned model instead"
                )

    def _cut(self, old: nn.Parameter, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != old.shape:
            return value
        for dim, positions in self._kept.get(old, {}).items():
            value = value.index_select(dim, positions.to(value.device))
        return value


def _can_be_cut(value: Any, parameter: Tensor) -> bool:
    """Says whether a state is of the parameter's shape, or does not depend on it."""
    if isinstance(value, Tensor):
        return value.shape == parameter.shape or value.numel() == 1
    return not (isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value))


def forget(optimizer: Optimizer, gone: set[nn.Parameter]) -> None:
    """Drops parameters that the model has no more, as those of removed blocks, and what was kept of them."""
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in gone]
    for parameter in gone:
        optimizer.state.pop(parameter, None)  # type: ignore[call-overload]
