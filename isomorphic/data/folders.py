"""Folders of images: which files count, and what is left out, with the reason.

A folder with train/ and val/ holds one folder a class in each. Whatever Pillow reads is an image, by the ending of its
name, at any depth below its class. Left out, and counted, are other files; hidden ones and those that systems put
beside a user's (`._0.png`, `Thumbs.db`, `__MACOSX/`); images outside of class folders; and links that lead back to a
folder around them, which would count its images without end. A link to any other folder counts as that folder.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isomorphic.data.decoding import image_suffixes
from isomorphic.errors import UserError
from isomorphic.progress import steps

# What other systems put into folders, in lower case; @eaDir holds thumbnails, which are images.
SYSTEM_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"}
# How many of many names a message gives.
NAMED = 5

# The real path of a folder, after those of the folders where a link was taken on the way to it.
Way = tuple[str, ...]


@dataclass
class LeftOut:
    """How many files and folders do not count, by reason.

    Attributes:
        endings: files that are no images by the endings of their names.
        hidden: files and folders that begin with a dot, or that another system made.
        links: links to a folder around them.
        outside: images that are in no class folder.
        unmapped: names of class folders that the class map does not have.
    """

    endings: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    links: int = 0
    outside: int = 0
    unmapped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """`120 .heic, 4 .txt (not read by Pillow); 3 hidden or of another system`; empty if nothing was left out."""
        parts = []
        if self.endings:
            endings = [f"{count} {ending}" for ending, count in sorted(self.endings.items(), key=_most_first)]
            parts.append(f"{some_of(endings)} (not read by Pillow)")
        if self.hidden:
            parts.append(f"{self.hidden} hidden or of another system")
        if self.links:
            parts.append(f"{count_of(self.links, 'link')} to a folder around them")
        if self.outside:
            parts.append(f"{count_of(self.outside, 'image')} outside of class folders")
        if self.unmapped:
            folders = count_of(len(self.unmapped), "class folder")
            parts.append(f"{folders} that the class map does not name ({some_of(self.unmapped)})")
        return "; ".join(parts)


@dataclass(frozen=True)
class FolderListing:
    """The images of a folder.

    Attributes:
        samples: (path, label), in order of class folder, folder and name.
        left_out: what is in the folder and does not count.
        folders: paths of the class folders that count, by name.
    """

    samples: list[tuple[str, int]]
    left_out: LeftOut
    folders: Mapping[str, str] = field(default_factory=dict)


def class_folders(folder: Path) -> list[str]:
    """Returns the names of a split's class folders, sorted.

    Raises:
        UserError: the folder cannot be listed, or has no class folders.
    """
    return [name for name, _ in _class_folders(folder, LeftOut())[1]]


def list_class_folders(folder: Path, labels: Mapping[str, int]) -> FolderListing:
    """Returns the images of a split; `labels` has the label of each class folder by name."""
    left_out = LeftOut()
    samples: list[tuple[str, int]] = []
    counting: dict[str, str] = {}
    images, folders = _class_folders(folder, left_out)
    left_out.outside = len(images)
    with steps(f"listing the images in {folder}", len(folders), unit="class") as bar:
        for name, way in folders:
            if name in labels:
                counting[name] = os.path.join(folder, name)
                samples += [(path, labels[name]) for path in _walk(counting[name], way, left_out)]
            else:
                left_out.unmapped.append(name)
            bar.update()
    return FolderListing(samples, left_out, counting)


def list_folder(folder: Path) -> FolderListing:
    """Returns all images below a folder, of whatever class; their label is 0."""
    left_out = LeftOut()
    paths = _walk(str(folder), (os.path.realpath(folder),), left_out)
    return FolderListing([(path, 0) for path in paths], left_out)


def _class_folders(folder: Path, left_out: LeftOut) -> tuple[list[str], list[tuple[str, Way]]]:
    images, folders = _contents(str(folder), (os.path.realpath(folder),), image_suffixes(), left_out)
    if not folders:
        raise UserError(f"no class folders in {folder}: each class needs a folder of its own, named after it")
    return images, folders


def _walk(top: str, way: Way, left_out: LeftOut) -> list[str]:
    """Returns the paths of the images below `top`: folders in order of their whole paths, files by name.

    That is the order of torchvision's ImageFolder.
    """
    suffixes = image_suffixes()
    found: list[tuple[str, list[str]]] = []
    to_list = [(top, way)]
    while to_list:
        folder, way = to_list.pop()
        images, folders = _contents(folder, way, suffixes, left_out)
        found.append((folder, images))
        to_list += [(os.path.join(folder, name), onward) for name, onward in folders]
    return [os.path.join(folder, name) for folder, names in sorted(found) for name in names]


def _contents(
    folder: str, way: Way, suffixes: Container[str], left_out: LeftOut
) -> tuple[list[str], list[tuple[str, Way]]]:
    """Returns the names of a folder's images, and its folders by name with the way to each; counts all else."""
    images: list[str] = []
    folders: list[tuple[str, Way]] = []
    for entry in _entries(folder):
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES:
            left_out.hidden += 1
        elif _is_folder(entry):
            onward = _onward(way, entry)
            if onward:
                folders.append((entry.name, onward))
            else:
                left_out.links += 1
        elif suffix in suffixes:
            images.append(entry.name)
        else:
            left_out.endings[suffix or "without an ending"] += 1
    return images, folders


def _onward(way: Way, entry: os.DirEntry[str]) -> Way | None:
    """Returns the way to a folder in the last folder of `way`, or None for a link that leads back.

    A link leads back to the folders of the way, and to those that hold one of them:

        train/cat/more -> /data/extra, /data/extra/back -> train      way: (…/train/cat, /data/extra); train holds one
    """
    if not entry.is_symlink():
        return (*way[:-1], os.path.join(way[-1], entry.name))
    target = os.path.realpath(entry.path)
    leads_back = any(_holds(target, place) for place in way)
    return None if leads_back else (*way, target)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Returns what is in a folder, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # a link that leads nowhere, or in a circle of links, is none
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _holds(folder: str, place: str) -> bool:
    """Says whether `place` is the folder or lies in it; both are real paths."""
    return place == folder or place.startswith(folder.rstrip(os.sep) + os.sep)


def count_of(count: int, noun: str) -> str:
    """`1 link`, `2 links`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def some_of(names: Sequence[str]) -> str:
    """`a, b`, or of many names the first ones: `a, b, c, d, e and 7 more`."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _most_first(item: tuple[str, int]) -> tuple[int, str]:
    name, count = item
    return -count, name
