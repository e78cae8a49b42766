"""Finding the weights in what a trainer stored: under the keys that people use, or under any other.

{"state_dict": …, "epoch": 3}                    timm, Lightning, torchvision's examples
{"model": …, "model_ema": …, "args": …}          torchvision, DeiT, MAE, Swin
{"model_state_dict": …, "optimizer_state_dict"}  PyTorch's tutorials
{"net": …, "acc": 90.0}                          CIFAR repositories
{"student": …, "teacher": …}                     DINO, whose teacher is the student's moving average
{"stage": {"backbone": …, "loss": …}}            any other: one set, whose names begin with their keys
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from isomorphic.errors import UserError

# What holds weights in the dicts that trainers write, averaged ones (EMA) and raw ones, in the order of preference.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "model_state_dict_ema", "ema")
AVERAGED += ("ema_model", "params_ema", "teacher")
RAW = ("model", "state_dict", "model_state_dict", "model_state", "net", "network", "module", "params", "student")
# Words in a name of tensors that stand for a moving average.
AVERAGED_WORD = re.compile(r"(^|[._])(ema|teacher|momentum|averaged)([._]|$)")
# Beside weights, dicts of tensors of another kind.
NO_WEIGHTS = re.compile(r"optim|sched|scaler|rng|random|callback|loop|hyper_param")
DEEPEST = 3


def choose_weights(stored: Any, use_ema: bool | None, path: Any) -> nn.Module | dict[str, Tensor]:
    """Returns the model or the state dict among what was stored.

    Args:
        stored: what a file holds.
        use_ema: take averaged weights, or raw ones; None takes the averaged ones where there are some.
        path: the file, for messages.

    Raises:
        UserError: there is none, or none of the kind that is asked for.
    """
    if isinstance(stored, nn.Module) or not isinstance(stored, dict):
        stored = {"model": stored}
    averaged, raw = (_first(stored, keys) for keys in (AVERAGED, RAW))
    if averaged is None and raw is None:
        raw = _all_sets(stored)
    if raw is None and averaged is None:
        raise UserError(f"{path} holds neither a model nor weights (under {', '.join(AVERAGED[:2] + RAW)}, or bare)")
    if use_ema and averaged is None and not has_averaged_names(raw):
        raise UserError(f"{path} holds no averaged weights (of {' or '.join(AVERAGED[:2])}): leave out --use-ema")
    if use_ema is False and raw is None:
        raise UserError(f"{path} holds averaged weights only: leave out --no-use-ema")
    chosen = raw if averaged is None or use_ema is False else averaged
    assert chosen is not None
    return chosen


def has_averaged_names(weights: Any) -> bool:
    """Returns True if a state dict has tensors whose names say that they are a moving average."""
    return isinstance(weights, dict) and any(AVERAGED_WORD.search(name) for name in weights)


def is_state_dict(value: Any) -> bool:
    """Returns True for a dict that holds tensors by name, and nothing else."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def _first(stored: dict[Any, Any], keys: tuple[str, ...]) -> nn.Module | dict[str, Tensor] | None:
    """Returns the weights under the first of these keys that has some, whatever wraps them there."""
    for key in keys:
        value = stored.get(key)
        if isinstance(value, nn.Module):
            return value
        found = _all_sets(value) if isinstance(value, dict) else None
        if found is not None:
            return found
    return None


def _all_sets(stored: dict[Any, Any]) -> nn.Module | dict[str, Tensor] | None:
    """Returns all sets of tensors by name in there as one, with names that begin with their keys; or the only model.

    {"net": {"fc.bias": b}, "loss": {"weight": w}} gives {"net.fc.bias": b, "loss.weight": w}.
    """
    sets = dict(_sets(stored, ()))
    models = [value for value in sets.values() if isinstance(value, nn.Module)]
    if models:
        return models[0] if len(sets) == 1 else None
    joined = {".".join((*keys, name)): tensor for keys, tensors in sets.items() for name, tensor in tensors.items()}
    return joined or None


def _sets(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields models and state dicts with the keys that lead to them."""
    if isinstance(value, nn.Module) or is_state_dict(value):
        yield keys, value
    elif isinstance(value, dict) and len(keys) < DEEPEST:
        for key, item in value.items():
            if isinstance(key, str) and not NO_WEIGHTS.search(key):
                yield from _sets(item, (*keys, key))


def told_names(stored: Any) -> Iterator[str]:
    """Yields the names that a file gives its model: beside the weights, in its arguments or its hyperparameters."""
    if not isinstance(stored, dict):
        return
    for place in (stored, *(stored.get(key) for key in ("args", "hyper_parameters", "config", "hparams"))):
        values = place if isinstance(place, dict) else getattr(place, "__dict__", {})
        told = (values.get(key) for key in ("arch", "architecture", "model", "model_name"))
        yield from (name for name in told if isinstance(name, str))
