#!/usr/bin/env python3
"""Reads every image of a folder, and names each that cannot be read.

    python tools/check_images.py path/to/data               # with train/ and val/, or any folder of images
    python tools/check_images.py path/to/data --workers 32

Prints a line for each image that cannot be read, with the reason; a line for each folder from which files are left
out, with counts and reasons; and how many images there are. The exit status is 1 if any cannot be read. Images are
read as the commands read them, whole; --skip-unreadable makes those go on without the ones that are named here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from isomorphic.commands import entry, flags
from isomorphic.data.decoding import UnreadableImage, decode
from isomorphic.data.folders import FolderListing, class_folders, count_of, list_class_folders, list_folder
from isomorphic.data.workers import loader_options, naming_dead_workers
from isomorphic.errors import UserError
from isomorphic.training.recipe import LoaderRecipe

# Images that a worker process is sent at once.
BATCH = 32


class Reasons(Dataset[str]):
    """Why each image cannot be read, by name; "" if it can."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str:
        try:
            decode(self.paths[index], self.paths[index])
        except UnreadableImage as error:
            return str(error)
        return ""


def parse_args() -> argparse.Namespace:
    parser = flags.make_parser("Read every image of a folder, and name each that cannot be read.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with train/ and val/, or any folder of images")
    workers_help = "processes that read"
    parser.add_argument("--workers", "-j", type=flags.non_negative_int, default=LoaderRecipe.workers, help=workers_help)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    listings = dict(list_images(args.folder))
    paths = [path for listing in listings.values() for path, _ in listing.samples]
    if not paths:
        raise UserError(f"no images in {args.folder}")
    unreadable = 0
    with naming_dead_workers():
        for reasons in tqdm(reader(paths, args.workers), "Reading", unit="batch", disable=None):
            for reason in filter(None, reasons):
                tqdm.write(reason, file=sys.stdout)
                unreadable += 1
    for folder, listing in listings.items():
        if str(listing.left_out):
            entry.say(f"Left out of {folder}: {listing.left_out}")
    entry.say(f"{count_of(len(paths), 'image')} in {args.folder}, of which {unreadable} cannot be read")
    sys.exit(1 if unreadable else 0)


def list_images(root: Path) -> Iterator[tuple[Path, FolderListing]]:
    """Yields the images of train/ and val/, as the commands list them; of a folder without those, all of its images."""
    splits = [root / split for split in ("train", "val") if (root / split).is_dir()]
    for split in splits:
        yield split, list_class_folders(split, dict.fromkeys(class_folders(split), 0))
    if not splits:
        yield root, list_folder(root)


def reader(paths: list[str], workers: int) -> DataLoader[Any]:
    """Returns a loader of lists of `Reasons`."""
    return DataLoader(Reasons(paths), BATCH, collate_fn=list, **loader_options(workers, "cpu"))


if __name__ == "__main__":
    entry.run(main)
