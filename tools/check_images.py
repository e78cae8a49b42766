#!/usr/bin/env python3
"""Reads every image of a folder, and names each that cannot be read.

    python tools/check_images.py path/to/data               # with train/ and val/, or any folder of images
    python tools/check_images.py path/to/data --workers 32

Prints a line for each image that cannot be read, with the reason; a line for each folder from which files are left
out, with counts and reasons; and how many images there are. The exit status is 1 if any cannot be read. Images are
read as the commands read them, whole; --skip-unreadable makes those go on without the ones that are named here.
"""

from __future__ import annotations

from isomorphic import progress


def main() -> None:
    from isomorphic.commands.check_images import main

    main()


if __name__ == "__main__":
    with progress.telling("loading"):
        from isomorphic.commands import entry

        entry.run(main)
