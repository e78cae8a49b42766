"""Models of other libraries than timm, as their users build them: small configurations with random weights.

    pip install --no-deps -r studies/coverage/requirements.txt     # the versions that the results are of
    python -m studies.coverage --set people

A file a field holds the entries; nothing of a library is imported before one of its models is built.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from studies.coverage.people import diffusion, graphs, language, plain, tasks, vision, vision_transformers, volumes
from studies.coverage.people.entry import IMPORTED_AS, Entry

ENTRIES: tuple[Entry, ...] = (
    *vision.ENTRIES,
    *language.ENTRIES,
    *tasks.ENTRIES,
    *volumes.ENTRIES,
    *vision_transformers.ENTRIES,
    *diffusion.ENTRIES,
    *graphs.ENTRIES,
    *plain.ENTRIES,
)


def installed(entries: Sequence[Entry] = ENTRIES) -> tuple[list[Entry], list[str]]:
    """Returns the entries whose libraries are here, and a line for each library that is not."""
    missing: dict[str, list[str]] = {}
    for entry in entries:
        if importlib.util.find_spec(IMPORTED_AS.get(entry.set, entry.set)) is None:
            missing.setdefault(entry.set, []).append(entry.model)
    lines = [f"{library} is not installed, left out: {', '.join(names)}" for library, names in missing.items()]
    return [entry for entry in entries if entry.set not in missing], lines
