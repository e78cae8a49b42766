"""What a page shows, read from a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from isomorphic.checkpoints.open import load_model, read_header
from isomorphic.errors import UserError
from isomorphic.inputs import without_data
from isomorphic.models import ModelSpec, build_skeleton, example_inputs
from isomorphic.page.facts import CUT, CutFacts, gather_facts
from isomorphic.page.inventory import take_inventory
from isomorphic.page.page import Subject
from isomorphic.pruning.planning import PlannedPruning


def read_subject(path: str | Path) -> Subject:
    """Returns what a page shows of a checkpoint.

    Checkpoints of before pages, and those that were never pruned, do not hold facts: widths and costs are counted on
    the model and on the dense one, where a library builds both.

    Raises:
        UserError: the file is missing or no checkpoint, its facts are damaged, or nobody but its user can build it.
    """
    header = read_header(path)
    provenance = header.get("provenance")
    provenance = provenance if isinstance(provenance, dict) else {}
    stored = provenance.get(CUT)
    cut = _facts_of_models(path, header) if stored is None else _parse(stored, path)
    return Subject(Path(path).name, str(header.get("name")), cut, provenance)


def inherited_facts(path: str | Path) -> dict[str, Any]:
    """Returns the facts that a model which is trained further takes over from its checkpoint, as its provenance.

    Empty where there are none. The command that cut the model is among them, since the file's own will be another.
    """
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return {}
    provenance = read_header(path).get("provenance")
    stored = provenance.get(CUT) if isinstance(provenance, dict) else None
    if not isinstance(provenance, dict) or not isinstance(stored, dict):
        return {}
    return {CUT: {**stored, "command": stored.get("command") or str(provenance.get("command", ""))}}


def _parse(stored: Any, path: str | Path) -> CutFacts:
    try:
        return CutFacts.from_dict(stored)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} has a damaged header: its facts of the cut cannot be read ({error})") from error


def _facts_of_models(path: str | Path, header: dict[str, Any]) -> CutFacts:
    if header.get("builder") not in ("timm", "torchvision"):
        raise UserError(
            f"{path} holds no facts of its cut, and its model cannot be built by name: save it again with "
            "pruned.save or prune.py, or write the page where it is pruned, pruned.report(...) or prune.py --report"
        )
    model = load_model(path)
    spec = ModelSpec.from_dict(header)
    dense = build_skeleton(dataclasses.replace(spec, kept_blocks={}))
    image = example_inputs(spec)
    with torch.no_grad():
        before, after = take_inventory(dense, without_data(image)), take_inventory(model, image)
    return gather_facts(before, after, PlannedPruning({}, spec.kept_blocks))
