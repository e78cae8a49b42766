"""A folder as people download it from a hub, or as timm writes it: `config.json` beside the weights.

    {"architecture": "resnet18", "num_classes": 10, "model_args": {...}, "pretrained_cfg": {"mean": [...], ...}}

Older files hold the `pretrained_cfg` alone, with the architecture in it. The arguments are data, as those in a
checkpoint's header are, and are refused and limited like them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from isomorphic.checkpoints.sources import CONFIG, folder_of
from isomorphic.data.transforms import Preprocessing
from isomorphic.errors import UserError
from isomorphic.models import ModelSpec, check_preprocessing, describe_model

# Arguments that say where weights are to be fetched from, which is the folder.
NOT_ITS_BUSINESS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def describe_folder(
    source: str | Path, *, kwargs: dict[str, Any] | None = None, input_size: int | None = None
) -> ModelSpec:
    """Returns how to build the model of a folder's weights.

    Args:
        source: the folder, or "local-dir:" and the folder.
        kwargs: of the builder, before those that the folder names.
        input_size: side of the input in pixels (default: the folder's).

    Raises:
        UserError: its `config.json` is missing, or is not one of timm's.
    """
    path = folder_of(source) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        told = config.get("pretrained_cfg", config)
        architecture, arguments = config.get("architecture"), dict(config.get("model_args") or {})
    except FileNotFoundError as error:
        raise UserError(f"no {CONFIG} in the folder {path.parent}, which would say what its weights are of") from error
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a whole file of JSON with a model's name in it") from error
    if not isinstance(architecture, str):
        kinds = config.get("architectures")
        whose = f"a {kinds[0]} of transformers" if isinstance(kinds, list) and kinds else "not a model of timm"
        raise UserError(f"{path.parent} holds {whose}: load that in Python and prune it there (docs/python.md)")
    classes = config.get("num_classes", told.get("num_classes"))
    own = {name: value for name, value in arguments.items() if name not in NOT_ITS_BUSINESS}
    own |= {"num_classes": classes} if isinstance(classes, int) else {}
    own |= kwargs or {}
    size = input_size or _side(own.get("img_size")) or _side(told.get("input_size"))
    if "img_size" in own:
        own["img_size"] = size
    spec = describe_model(architecture, kwargs=own, input_size=size)
    return dataclasses.replace(spec, preprocessing=_preprocessing(told, spec.preprocessing, path))


def _side(size: Any) -> int | None:
    """Returns the side in pixels of 224, [224, 224] or [3, 224, 224]."""
    side = size[-1] if isinstance(size, (list, tuple)) and size else size
    return side if type(side) is int and side > 0 else None


def _preprocessing(told: Any, default: Preprocessing, path: Path) -> Preprocessing:
    """Returns the transform that the folder's weights were made with, where it says so."""
    try:
        mean, std = (tuple(float(value) for value in told.get(key, getattr(default, key))) for key in ("mean", "std"))
        interpolation = str(told.get("interpolation", default.interpolation))
        found = dataclasses.replace(default, mean=mean, std=std, interpolation=interpolation)
        check_preprocessing(found)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} does not say how images are prepared: {error}") from error
    return found
