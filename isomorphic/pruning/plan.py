"""A pruning plan: plain data that says which units every group keeps."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isomorphic.errors import UserError
from isomorphic.files import atomic_write
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup

FORMAT = 2


@dataclass(frozen=True)
class PruningPlan:
    """Kept blocks, and kept units by group name.

    Attributes:
        kept: ascending unit numbers for every prunable group of the model without its removed blocks, in the
            coordinates that they have before the cut.
        kept_blocks: ascending indices of the blocks that stay, by the name of the module that holds them, where any
            go. They are removed before the model is traced: what follows the names of groups knows nothing of them.
        sizes: (units, sections) of the groups that the plan was made for, where it was read from a file.
        ratios: the shares that its pools lose, by what the pools are called, where these were searched for.
    """

    kept: Mapping[str, tuple[int, ...]]
    kept_blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict, compare=False)
    ratios: Mapping[str, float] = field(default_factory=dict, compare=False)

    def removed(self, group: CoupledGroup) -> list[int]:
        """The units of `group` that go, ascending."""
        gone = np.ones(group.num_units, bool)
        gone[self._units[group.name]] = False
        return np.flatnonzero(gone).tolist()

    def kept_heads(self, group: CoupledGroup) -> list[int]:
        """The heads, or other sections, of a group that keep any unit, ascending."""
        return np.unique(self._units[group.name] // group.section_size).tolist()

    @functools.cached_property
    def _units(self) -> dict[str, NDArray[np.int64]]:
        return {name: np.array(units, np.int64) for name, units in self.kept.items()}

    def check(self, graph: ChannelGraph) -> None:
        """Holds the plan against the groups of a model.

        Raises:
            UserError: other groups, units that do not exist, an empty group, sections of unequal width, a missing
                section where they are not heads that may go, unequal shares of groups that shrink together, or other
                heads in one group of a head set than in another.
        """
        groups = {group.name: group for group in graph.groups}
        if set(self.kept) != set(groups):
            difference = sorted(set(self.kept) ^ set(groups))
            raise UserError(f"the plan belongs to another model: they differ in {', '.join(difference[:3])}")
        may_lose_heads = {group.name for group in graph.attention}
        for group in graph.groups:
            self._check_group(group, heads_may_go=group.name in may_lose_heads)
        for names in graph.shrink_together:
            self._check_shares([groups[name] for name in names])
        for head_set in graph.head_sets:
            self._check_heads(*head_set)

    def _check_group(self, group: CoupledGroup, heads_may_go: bool) -> None:
        size = (group.num_units, group.num_sections)
        if self.sizes.get(group.name, size) != size:
            raise UserError(f"the plan belongs to another model: {group.name} has other units or blocks there")
        units = self._units[group.name]
        if not len(units) or (np.diff(units) <= 0).any() or units[0] < 0 or units[-1] >= group.num_units:
            raise UserError(f"the plan's units of {group.name} are not an ascending part of 0 … {group.num_units - 1}")
        widths = np.unique(units // group.section_size, return_counts=True)[1]
        if (widths != widths[0]).any():
            raise UserError(f"the plan keeps {_sections(group)} of unequal width in {group.name}")
        if len(widths) < group.num_sections and not heads_may_go:
            raise UserError(f"the plan removes whole {_sections(group)} of {group.name}, which must all stay")

    def _check_shares(self, together: Sequence[CoupledGroup]) -> None:
        """Sections that stay keep one share of their units in all groups that shrink together."""
        shares = {
            group.name: Fraction(len(self.kept[group.name]), len(self.kept_heads(group)) * group.section_size)
            for group in together
        }
        first = together[0].name
        for name, share in shares.items():
            if share != shares[first]:
                raise UserError(f"the plan keeps unequal shares of {first} and {name}, which must shrink together")

    def _check_heads(self, first: CoupledGroup, *others: CoupledGroup) -> None:
        for other in others:
            if self.kept_heads(other) != self.kept_heads(first):
                raise UserError(f"the plan keeps other heads of {first.name} than of {other.name}, which share them")


def save_plan(path: str | Path, plan: PruningPlan, groups: Iterable[CoupledGroup], about: dict[str, Any]) -> None:
    """Writes a plan as JSON: `about` (JSON values), ratios that were searched for, each group's size and kept units.

    Raises:
        UserError: the file cannot be written.
    """
    stored = {
        "format": FORMAT,
        **about,
        **({"ratios": dict(plan.ratios)} if plan.ratios else {}),
        "kept_blocks": {name: list(kept) for name, kept in plan.kept_blocks.items()},
        "groups": {
            group.name: {"units": group.num_units, "blocks": group.num_sections, "kept": list(plan.kept[group.name])}
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
        kept_blocks = {name: _units(blocks) for name, blocks in stored.get("kept_blocks", {}).items()}
        sizes = {name: (group["units"], group["blocks"]) for name, group in stored["groups"].items()}
        return PruningPlan(kept, kept_blocks, sizes, _ratios(stored.get("ratios", {})))
    except OSError as error:
        raise UserError(f"cannot read the plan {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a pruning plan") from error


def _sections(group: CoupledGroup) -> str:
    return "heads" if group.heads else "blocks"


def _units(stored: object) -> tuple[int, ...]:
    if not isinstance(stored, list) or not all(type(unit) is int for unit in stored):
        raise ValueError("units are whole numbers in a list")
    return tuple(stored)


def _ratios(stored: object) -> dict[str, float]:
    if not isinstance(stored, dict) or not all(type(r) in (int, float) and 0 <= r <= 1 for r in stored.values()):
        raise ValueError("ratios are shares by name")
    return {name: float(ratio) for name, ratio in stored.items()}
