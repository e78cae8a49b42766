"""A model of a list, with what it is run on: what the study builds anew wherever it needs one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn

from isomorphic.inputs import Inputs


@dataclass
class Example:
    """A dense model and inputs for it.

    Attributes:
        model: with random weights.
        inputs: what it is traced and compared on.
        training: what it takes in train mode, more than one item; None: `inputs`.
        statistics: what its batch norms get their statistics from, in train mode; None: `training`.
        heads: attention heads that could go, where `count_heads` would not see as many.
        classifies: whether its first output are logits, whose layer does not count as width.
    """

    model: nn.Module
    inputs: Inputs
    training: Inputs | None = None
    statistics: Inputs | None = None
    heads: int | None = None
    classifies: bool = False

    @property
    def training_inputs(self) -> Inputs:
        """What the model takes in train mode."""
        return self.inputs if self.training is None else self.training


class Case(Protocol):
    """One line of a list: how to build a model, and how its pruned copy is written and read."""

    @property
    def set(self) -> str:
        """The list, or the part of a list, that the model is counted in."""
        ...

    @property
    def model(self) -> str:
        """The model's name."""
        ...

    def example(self) -> Example:
        """Returns the dense model with its inputs; random numbers come from torch's global generator."""
        ...

    def save(self, path: Path, pruned: nn.Module, dense: nn.Module) -> None:
        """Writes a pruned copy of `dense`."""
        ...

    def load(self, path: Path) -> nn.Module:
        """Returns the pruned model from its file, in eval mode."""
        ...
