"""What a model was before its first cut: one that is cut again, or loaded and cut, is saved as cut from that model.

    iso.prune(model, inputs, ratio=0.2, inplace=True)   # 64 channels -> 51
    iso.prune(model, inputs, ratio=0.2, inplace=True)   # 51 -> 41; saved as 64 -> 41, which fits what build() returns

Origins, and the names of classes that a checkpoint held, stand beside the models, not in them, so that a pruned model
holds nothing of this project and can be pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from isomorphic.models import ModelSpec
from isomorphic.skeletons import shape_copy


@dataclass(frozen=True)
class Origin:
    """The dense model that a model was cut from.

    Attributes:
        dense: the dense model, on the meta device.
        kept_blocks: indices of its blocks that are still there, by the name of the module that holds them.
    """

    dense: nn.Module
    kept_blocks: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def keeping(self, kept: Mapping[str, Sequence[int]]) -> Origin:
        """Returns the origin of the same model after `keep_blocks(model, kept)`."""
        before = ModelSpec("none", "", kept_blocks={name: tuple(blocks) for name, blocks in self.kept_blocks.items()})
        return Origin(self.dense, before.keeping(kept).kept_blocks)


_ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()


def known_origin(model: nn.Module) -> Origin | None:
    """Returns what `model` was cut from; None where it was never cut, as far as this process knows."""
    return _ORIGINS.get(model)


def origin_of(model: nn.Module) -> Origin:
    """Returns what `model` was cut from; a model that was never cut is its own origin.

    Raises:
        UserError: something in the model cannot be copied.
    """
    return known_origin(model) or Origin(shape_copy(model))


def remember_origin(model: nn.Module, origin: Origin) -> None:
    """Notes that `model` was cut from `origin`, for as long as the model lives."""
    _ORIGINS[model] = origin


_CLASS_NAMES: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()


def known_class_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the classes that a model's logits stand for, by its checkpoint; none where it had none."""
    return _CLASS_NAMES.get(model, ())


def remember_class_names(model: nn.Module, names: Sequence[str]) -> None:
    """Notes what the logits of `model` stand for, for as long as the model lives."""
    _CLASS_NAMES[model] = tuple(names)
