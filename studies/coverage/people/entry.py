"""What an entry is, and the inputs that many of them take."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.checkpoints.open import load_model
from isomorphic.checkpoints.save import save_module
from studies.coverage.example import Example

IMPORTED_AS = {
    "segmentation-models-pytorch": "segmentation_models_pytorch",
    "vit-pytorch": "vit_pytorch",
    "open-clip": "open_clip",
    "pyg": "torch_geometric",
    "plain": "torch",
}


# The usual names of the sizes of an encoder and a decoder in transformers, small.
ENCODER_DECODER: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}


@dataclass(frozen=True)
class Entry:
    """One model of a library.

    Attributes:
        set: the library, by the name that people install it by.
        model: "library/name".
        example: builds it with its inputs.
    """

    set: str
    model: str
    example: Callable[[], Example]

    def save(self, path: Path, pruned: nn.Module, dense: nn.Module) -> None:
        """Writes what is loaded into the dense model."""
        save_module(path, pruned, dense, provenance={})

    def load(self, path: Path) -> nn.Module:
        """Returns what `save` wrote."""
        return load_model(path, model=self.example().model)

    def __reduce__(self) -> tuple[Any, ...]:  # another process finds it by its name: functions cannot be sent
        return _find, (self.model,)


def _find(model: str) -> Entry:
    entries = importlib.import_module("studies.coverage.people").ENTRIES
    return next(entry for entry in entries if entry.model == model)


def library(name: str) -> Any:
    """Returns a library's module, which may not be installed, and whose types nobody checks."""
    return importlib.import_module(name)


def entry(set: str, name: str, example: Callable[[], Example]) -> Entry:
    """Returns the entry of a library's model."""
    return Entry(set, f"{set}/{name}", example)


def images(size: int, channels: int = 3, batch: int = 2) -> Tensor:
    """Returns random images (batch, channels, size, size)."""
    return torch.randn(batch, channels, size, size)


def pixels(size: int, **others: Any) -> dict[str, Any]:
    """Returns images as models of transformers take them, and further arguments."""
    return {"pixel_values": images(size), **others}


def tokens(length: int = 12, vocabulary: int = 100, **others: Any) -> dict[str, Any]:
    """Returns two random texts as models of transformers take them, and further arguments.

    The padding token (0 or 1 in most vocabularies) is not among them.
    """
    ids = torch.randint(3, vocabulary, (2, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **others}
