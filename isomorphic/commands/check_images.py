"""What tools/check_images.py does: decode every image of a folder, and name those that cannot be read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from isomorphic import progress
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
    progress.stage(f"listing the images in {args.folder}")
    listings = dict(list_images(args.folder))
    paths = [path for listing in listings.values() for path, _ in listing.samples]
    if not paths:
        raise UserError(f"no images in {args.folder}")
    unreadable = 0
    with naming_dead_workers():
        for reasons in progress.Bar(reader(paths, args.workers), desc="Reading", unit="batch"):
            for reason in filter(None, reasons):
                progress.Bar.write(reason, file=sys.stdout)
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
