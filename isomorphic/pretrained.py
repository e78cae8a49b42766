"""Where a library's pretrained weights come from, and whether they can be had, found out within seconds.

The libraries try for minutes, silently, where there is no network: each file several times, each time until a timeout.
So the first question is whether the weights are on this machine already, and the second one whether their host answers.
"""

from __future__ import annotations

import os
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isomorphic import progress
from isomorphic.errors import UserError
from isomorphic.kinds import library

TRY_SECONDS = 20.0  # until a host that does not answer counts as out of reach
# The names under which the Hugging Face hub may have a model's weights.
HUB_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Weights:
    """Pretrained weights of a library.

    Attributes:
        address: of the file, or of its folder.
        is_here: this machine has a copy.
        folder: where the library keeps its copies.
    """

    address: str
    is_here: bool
    folder: str


def check_within_reach(builder: str, name: str, weights: str | None = None) -> None:
    """Says that pretrained weights have to be fetched, if they have, and makes sure that their host answers.

    Args:
        builder: "timm" or "torchvision".
        name: the model's name in that library.
        weights: torchvision's name of the weights.

    Raises:
        UserError: it does not.
    """
    found = _of_timm(name) if builder == "timm" else _of_torchvision(name, weights)
    if found is None or found.is_here:
        return
    host = urllib.parse.urlsplit(found.address).netloc
    progress.stage(f"fetching the pretrained weights of {name} from {host}")
    if reason := out_of_reach(found.address):
        raise UserError(
            f"cannot get the pretrained weights of {name} from {host} ({reason}): check the connection; or copy "
            f"{found.folder} from a machine that has used this model; or pass --no-pretrained for random weights"
        )


def out_of_reach(address: str, seconds: float | None = None) -> str | None:
    """Returns why a host does not answer, within so many seconds; None if it does, whatever it answers."""
    limit = TRY_SECONDS if seconds is None else seconds
    reasons: list[str | None] = []

    def ask() -> None:
        reasons.append(_refusal(address, limit))

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name may take longer than any timeout
    asking.start()
    asking.join(limit)
    return reasons[0] if reasons else f"no answer within {limit:.0f} s"


def _refusal(address: str, seconds: float) -> str | None:
    """Asks through the proxies that the environment names, as the libraries do."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=seconds):
            return None
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):  # it is there; the libraries may know its certificate
            return None
        reason = error.reason
        return (reason.strerror if isinstance(reason, OSError) else None) or str(reason) or "no answer"
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__


def _of_timm(name: str) -> Weights | None:
    """Returns None where timm has no weights, or was told to stay offline and answers at once."""
    config: Any = library("timm").get_pretrained_cfg(name)
    if config is None or config.file or config.state_dict:
        return None
    if not config.hf_hub_id:
        return _of_address(config.url) if config.url else None
    hub = library("huggingface_hub")
    if hub.constants.HF_HUB_OFFLINE:
        return None
    names = (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES
    is_here = any(isinstance(hub.try_to_load_from_cache(config.hf_hub_id, each), str) for each in names)
    return Weights(f"{hub.constants.ENDPOINT}/{config.hf_hub_id}", is_here, hub.constants.HF_HUB_CACHE)


def _of_torchvision(name: str, weights: str | None) -> Weights | None:
    models = library("torchvision").models
    entry: Any = getattr(models.get_model_weights(name), weights or "DEFAULT", None)
    return _of_address(entry.url) if entry is not None else None


def _of_address(address: str) -> Weights:
    """Of a file that torch.hub fetches."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    return Weights(address, (Path(folder) / Path(urllib.parse.urlsplit(address).path).name).is_file(), folder)
