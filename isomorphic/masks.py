"""Weights that stay zero: an unstructured mask is the zeros of the masked parameters, and nothing else.

A checkpoint names the masked parameters (`ModelSpec.masked`); which of their weights are pruned is what is zero in
them. Whatever changes weights afterwards puts those zeros back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from isomorphic.processes import distributed


@dataclass(frozen=True)
class Masks:
    """Where the masked parameters of a model are zero.

    Attributes:
        pruned: by parameter name, bool, true where the weight stays zero; of a sharded parameter, this process's part.
    """

    pruned: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str]) -> Masks:
        """The masks of the parameters `names`, which are those of their zeros.

        Make them of the model that is trained: on its device, and after its parameters were sharded.

        Raises:
            AttributeError: the model has no such parameter.
        """
        return cls({name: _weights(model, name) == 0 for name in names})

    def apply(self, model: nn.Module) -> None:
        """Puts the zeros back, in place, into the model that the masks are of, or a copy that is sharded alike."""
        for name, pruned in self.pruned.items():
            _weights(model, name).masked_fill_(pruned, 0)


@torch.no_grad()
def _weights(model: nn.Module, name: str) -> Tensor:
    """What this process holds of a parameter: the very memory of it, without its gradient."""
    return distributed.local_shard(model.get_parameter(name).detach())
