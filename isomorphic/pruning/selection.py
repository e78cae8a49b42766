"""Which groups a person means by module names: layers to spare, and layers with a ratio of their own.

A pattern is a module's name as `named_modules` prints it, with `*` for any text and `?` for any letter; it stands for
the modules inside as well ("blocks.0" for all of the first block). It reaches the groups whose units these modules make
or pass on: their outputs. What a spared layer reads may still shrink, and what is shared moves together: a layer that
adds to a residual stream takes the whole stream along.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from isomorphic.errors import UserError
from isomorphic.pruning.groups import UNUSED, ChannelGraph, CoupledGroup, short_name
from isomorphic.pruning.widths import producers


def spared_groups(model: nn.Module, graph: ChannelGraph, ignore: Sequence[str]) -> frozenset[str]:
    """Returns the names of the groups that stay whole so that the modules in `ignore` keep the width of their outputs.

    Raises:
        UserError: a pattern that matches no module, or only modules without parameters, which make no channels.
    """
    spared: set[str] = set()
    for pattern in ignore:
        modules = matching_modules(model, pattern, "ignore")
        made = {group.name for group in graph.groups if _is_made_by(group, modules)}
        if not made and not _with_parameters(model, modules):
            raise UserError(f"ignore {pattern!r}: {_why_not(model, graph, modules)}")
        spared |= made
    return frozenset(with_partners(graph, spared))


def ratios_by_group(
    model: nn.Module, graph: ChannelGraph, ratios: Mapping[str, float], spared: frozenset[str]
) -> dict[str, float]:
    """Returns the share that groups lose because `ratios` names a module that makes them, by the groups' names.

    Args:
        model, graph: the model and its groups.
        ratios: shares in [0, 1) by pattern.
        spared: groups that stay whole.

    Raises:
        UserError: a pattern that matches no module, or none that makes prunable units; a share outside [0, 1); one
            group with two shares, or with a share although it is spared.
    """
    found: dict[str, float] = {}
    asked_by: dict[str, str] = {}
    for pattern, ratio in ratios.items():
        check_share(ratio, f"ratios[{pattern!r}]")
        modules = matching_modules(model, pattern, "ratios")
        groups = [group for group in graph.groups if _is_made_by(group, modules)]
        if not groups:
            raise UserError(f"ratios {pattern!r}: {_why_not(model, graph, modules)}")
        for name in with_partners(graph, [group.name for group in groups]):
            if name in spared:
                raise UserError(f"{short_name(name)} is in ratios ({pattern!r}) and in ignore: leave one of them out")
            if found.setdefault(name, ratio) != ratio:
                others = f"{asked_by[name]!r} ({found[name]}) and {pattern!r} ({ratio})"
                raise UserError(f"ratios gives two shares for {short_name(name)}, whose units move together: {others}")
            asked_by[name] = pattern
    return found


def matching_modules(model: nn.Module, pattern: str, what: str) -> set[str]:
    """Returns the names of the modules that `pattern` stands for, and of those inside them.

    Args:
        model: whose modules.
        pattern: a name with `*` and `?`.
        what: which argument the pattern is from, for the message.

    Raises:
        UserError: there is none; the message names those with similar names.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not matched:
        similar = difflib.get_close_matches(pattern, names, n=3)
        hint = f"did you mean {', '.join(similar)}?" if similar else "named_modules() lists the names"
        raise UserError(f"{what} {pattern!r} matches no module of the model: {hint}")
    tops = tuple(f"{name}." for name in matched)
    return {*matched, *(name for name in names if name.startswith(tops))}


def check_names(ignore: Any, ratios: Any) -> None:
    """Raises a UserError for `ignore` and `ratios` that are no collection and no mapping of names."""
    if isinstance(ignore, str):
        raise UserError(f"ignore={ignore!r} is one text: give a list of module names, ignore=[{ignore!r}]")
    if isinstance(ignore, nn.Module) or not isinstance(ignore, Collection):
        raise UserError(f"ignore is {type(ignore).__name__}: give a list of module names, as named_modules() has them")
    if not isinstance(ratios, Mapping):
        raise UserError(f'ratios is {type(ratios).__name__}: give shares by module name, ratios={{"name": 0.5}}')
    for what, names in {"ignore": ignore, "ratios": ratios}.items():
        for name in names:
            if isinstance(name, nn.Module):
                raise UserError(f"{what} holds a {type(name).__name__}: give its name, as named_modules() has it")
            if not isinstance(name, str):
                raise UserError(
                    f"{what} holds {name!r}, which is no name of a module: write it as a text, {str(name)!r}"
                )


def check_share(value: Any, name: str) -> None:
    """Raises a UserError unless `value` is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{name} = {value!r} is not a share in [0, 1)")


def _is_made_by(group: CoupledGroup, modules: set[str]) -> bool:
    return any(node.module in modules and node.side != "in" for node in group.nodes)


def with_partners(graph: ChannelGraph, names: Iterable[str]) -> list[str]:
    """Returns the names, and those of the groups that shrink together with them."""
    wanted = set(names)
    for together in graph.shrink_together:
        if wanted & set(together):
            wanted |= set(together)
    return [group.name for group in graph.groups if group.name in wanted]


def _with_parameters(model: nn.Module, modules: set[str]) -> list[str]:
    """Those of the modules that hold parameters themselves, in the model's order."""
    every = model.named_modules(remove_duplicate=False)
    return [name for name, module in every if name in modules and list(module.parameters(recurse=False))]


def _why_not(model: nn.Module, graph: ChannelGraph, modules: set[str]) -> str:
    """Why none of these modules makes units that can go."""
    for name, frozen in graph.frozen.items():
        module = name.rpartition(":")[0].rpartition(".")[0]
        if module in modules and frozen.reason != UNUSED:
            return f"what {module} makes stays ({frozen})"
    layers = _with_parameters(model, modules)
    if not layers:
        return "a module without parameters makes no channels: name the layer before it"
    made = [weight.shape[dim] for name, (weight, dim) in producers(model).items() if name.rpartition(".")[0] in layers]
    if made and max(made) == 1:
        return f"what {layers[0]} makes is a single channel, which cannot go"
    return f"the forward pass on these inputs does not use {layers[0]}"
