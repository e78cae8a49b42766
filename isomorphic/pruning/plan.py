"""A pruning plan: plain data that says which units every group keeps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isomorphic.errors import UserError
from isomorphic.files import atomic_write
from isomorphic.pruning.groups import CoupledGroup

FORMAT = 1


@dataclass(frozen=True)
class PruningPlan:
    """Kept units by group name.

    Attributes:
        kept: ascending unit numbers, in the dense model's coordinates, for every prunable group.
        sizes: (units, heads) of the groups that the plan was made for, where it was read from a file.
    """

    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict, compare=False)

    def removed(self, group: CoupledGroup) -> list[int]:
        """The units of `group` that go, ascending."""
        kept = set(self.kept[group.name])
        return [unit for unit in range(group.num_units) if unit not in kept]

    def kept_heads(self, group: CoupledGroup) -> list[int]:
        """The heads of an attention group that keep any unit, ascending."""
        return sorted({unit // group.head_dim for unit in self.kept[group.name]})

    def check(self, groups: Sequence[CoupledGroup]) -> None:
        """Holds the plan against the groups of a model.

        Raises:
            UserError: other groups, units that do not exist, an empty group, or heads of unequal width.
        """
        if set(self.kept) != {group.name for group in groups}:
            difference = sorted(set(self.kept) ^ {group.name for group in groups})
            raise UserError(f"the plan belongs to another model: they differ in {', '.join(difference[:3])}")
        for group in groups:
            self._check_group(group)

    def _check_group(self, group: CoupledGroup) -> None:
        kept = self.kept[group.name]
        size = (group.num_units, group.num_heads)
        if self.sizes.get(group.name, size) != size:
            raise UserError(f"the plan belongs to another model: {group.name} has other units or heads there")
        if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= group.num_units:
            raise UserError(f"the plan's units of {group.name} are not an ascending part of 0 … {group.num_units - 1}")
        dims_by_head = Counter(unit // group.head_dim for unit in kept)
        if len(set(dims_by_head.values())) != 1:
            raise UserError(f"the plan keeps heads of unequal width in {group.name}")


def save_plan(path: str | Path, plan: PruningPlan, groups: Sequence[CoupledGroup], about: dict[str, Any]) -> None:
    """Writes a plan as JSON: `about` (JSON values), then each group's size and kept units.

    Raises:
        UserError: the file cannot be written.
    """
    stored = {
        "format": FORMAT,
        **about,
        "groups": {
            group.name: {"units": group.num_units, "heads": group.num_heads, "kept": list(plan.kept[group.name])}
            for group in groups
        },
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(stored) + "\n")


def load_plan(path: str | Path) -> PruningPlan:
    """Reads a plan that `save_plan` wrote.

    Raises:
        UserError: no such file, or not a plan.
    """
    try:
        stored = json.loads(Path(path).read_text())
        if stored["format"] != FORMAT:
            raise UserError(f"{path} is of plan format {stored['format']}; this version reads format {FORMAT}")
        kept = {name: _units(group["kept"]) for name, group in stored["groups"].items()}
        return PruningPlan(kept, {name: (group["units"], group["heads"]) for name, group in stored["groups"].items()})
    except OSError as error:
        raise UserError(f"cannot read the plan {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a pruning plan") from error


def _units(stored: object) -> tuple[int, ...]:
    if not isinstance(stored, list) or not all(type(unit) is int for unit in stored):
        raise ValueError("units are whole numbers in a list")
    return tuple(stored)
