"""Writing files so that a reader never meets half of one."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from isomorphic.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed, else removed.

    Raises:
        UserError: the folder or the file cannot be written; whatever stood at `path` before is still there.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        os.close(descriptor)
        yield temporary
        _sync(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every file system can sync a folder
            _sync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | Path) -> None:
    """Removes the temporary files of `atomic_write(path)` that killed processes have left; none may be writing it.

    Raises:
        UserError: one cannot be removed.
    """
    path = Path(path)
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}"):
        try:
            temporary.unlink()
        except OSError as error:
            raise UserError(f"cannot remove {temporary}: {error.strerror or error}") from error


def check_writable(path: str | Path) -> None:
    """Finds out early, and without leaving anything behind, that `atomic_write(path)` will work.

    Raises:
        UserError: the folder cannot be made or written, or `path` is a folder itself.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
