"""What the labels of a data set stand for: names of classes, in order of their labels.

A label of an image folder is, by default, the position of its class folder's name among those of train/, which are all
that there are; val/ may lack some. The names of a model's classes, which its checkpoint holds, or a class map go first.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from isomorphic.data.folders import class_folders, some_of
from isomorphic.errors import UserError

# More labels than any data set has: a class map with larger ones is none.
MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class FolderClasses:
    """The classes of an image folder.

    Attributes:
        labels: label of each class folder, by name.
        names: names of the classes, by label.
        origin: where the labels come from, for messages: "train/", "the model", the class map's file.
    """

    labels: Mapping[str, int]
    names: tuple[str, ...]
    origin: str


def folder_classes(root: Path, *, class_map: str | None = None, model_classes: Sequence[str] = ()) -> FolderClasses:
    """Returns the classes of the folder that holds train/, val/, or both.

    Args:
        root: that folder.
        class_map: a file that says which class folder has which label; it decides alone.
        model_classes: names of a model's classes, by label; they decide if they include all of the folder's.

    Raises:
        UserError: no such folder, or no class folders in it; val/ has classes that train/ has not; a class map that
            cannot be read.
    """
    if class_map:
        labels = read_class_map(class_map, root)
        return FolderClasses(labels, names_of_map(labels), class_map)
    splits = [root / split for split in ("train", "val") if (root / split).is_dir()]
    if not splits:
        raise no_data(root / "val")
    named = [class_folders(split) for split in splits]
    known = {name: label for label, name in enumerate(model_classes)}
    if len(known) == len(model_classes) > 0 and all(name in known for names in named for name in names):
        return FolderClasses(known, tuple(model_classes), "the model")
    if set(named[-1]) - set(named[0]):
        unshared = sorted(set(named[-1]) ^ set(named[0]))
        raise UserError(f"train/ and val/ under {root} need the same class folders; only one has: {some_of(unshared)}")
    return FolderClasses({name: label for label, name in enumerate(named[0])}, tuple(named[0]), f"{splits[0].name}/")


def read_class_map(path: str, root: Path) -> dict[str, int]:
    """Returns the label of each class folder from a file as timm's `--class-map` takes it.

    A .txt file has one name a line, and the first line's label is 0; a .pkl file holds a dict of names and labels, and
    nothing that runs code. A file that is not found is looked for under `root`.

    Raises:
        UserError: the file is missing, or is no class map.
    """
    from timm.data.readers.class_map import load_class_map

    file = Path(path) if os.path.isfile(path) else root / path
    if not file.is_file():
        raise UserError(f"no such class map: {path}")
    try:
        labels = _unpickled(file) if file.suffix == ".pkl" else load_class_map(str(file))
    except (
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        OSError,
        pickle.UnpicklingError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(f"{path} is no class map: {' '.join(str(error).split())}") from error
    labels = {name: label for name, label in labels.items() if name != ""}  # timm counts an empty last line, too
    valid = all(isinstance(name, str) and label in range(MOST_CLASSES) for name, label in labels.items())
    if not (labels and valid):
        raise UserError(f"{path} is no class map: it needs one name of a class folder a line, in order of the labels")
    return labels


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, texts and numbers; older versions of timm run whatever code a class map names."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not permitted")


def _unpickled(file: Path) -> dict[Any, Any]:
    with open(file, "rb") as content:
        labels = _PlainUnpickler(content).load()
    if not isinstance(labels, dict):
        raise ValueError(f"it holds {type(labels).__name__}, not names and labels")
    return labels


def names_of_map(labels: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the names of a class map's classes, by label.

    The names of several folders with the same label are joined, and a label that no folder has is named "".
    """
    folders: list[list[str]] = [[] for _ in range(max(labels.values()) + 1)]
    for name, label in labels.items():
        folders[label].append(name)
    return tuple(", ".join(sorted(names)) for names in folders)


def first_difference(ours: Sequence[str], theirs: Sequence[str], here: str, there: str) -> str:
    """Returns where two lists of class names differ first: `class 3 is 'dog' here and 'cat' there`; "" if nowhere."""
    for label, (our, their) in enumerate(zip_longest(ours, theirs)):
        if our != their:
            return f"class {label} is {_quoted(our)} {here} and {_quoted(their)} {there}"
    return ""


def _quoted(name: str | None) -> str:
    return "missing" if name is None else repr(name)


def no_data(folder: Path) -> UserError:
    """Returns the error for a folder of images that is not there."""
    return UserError(
        f"no data folder {folder}: --data-path names the folder that holds train/ and val/, "
        "or try --dataset digits, which ships with the project"
    )
