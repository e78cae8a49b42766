"""One run in a folder at a time: a lock on a file in there, which ends with the process that holds it.

The lock is a POSIX record lock, which NFS, Lustre and GPFS pass on between hosts, and which processes that load images
do not inherit: it is free at the moment the run is gone, however it ended. The file names host and process.

    run A            holds the lock on output/run.lock: {"host": "node1", "pid": 1234, "run": "5f3c…"}
    run B, node1     cannot have it: "output is in use by another run, process 1234 on node1"
    run B, node2     the same, where locks reach over hosts. Where they do not, B gets the lock, sees that A has not
                     taken back its note, says so, and leaves its own. A reads that before it next writes, and stops:
                     never do both write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from isomorphic.errors import UserError

NAME = "run.lock"
# What a file system answers where another process has the lock, and where it has no locks at all.
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """A context in which no other run may use the folder; a process that joins it makes no lock of its own.

    Attributes:
        note: a line for the user about a run that did not take back its own note; None mostly.
    """

    def __init__(self, folder: Path, *, patience: float = 0.0) -> None:
        """`patience`: seconds to wait for a run that is just ending."""
        self.path = folder / NAME
        self.note: str | None = None
        self._patience = patience
        self._mine = {"host": socket.gethostname(), "pid": os.getpid(), "run": uuid.uuid4().hex}
        self._file = -1
        self._made: list[Path] = []

    def __enter__(self) -> RunLock:
        """
        Raises:
            UserError: another run has the folder, or it cannot be written.
        """
        folder = self.path.parent
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            if self._is_mine():
                self.path.unlink()  # while it is locked: who waits for it sees that it is gone, and makes a new one
        with contextlib.suppress(OSError):
            os.close(self._file)
        for folder in self._made:  # those that are still empty
            with contextlib.suppress(OSError):
                folder.rmdir()

    def check(self) -> None:
        """Makes sure, before something is written, that the folder is still this run's.

        Raises:
            UserError: another run has taken it over, on a host that this one's lock does not reach.
        """
        with contextlib.suppress(OSError):  # the file is gone: somebody tidied up
            if not self._is_mine():
                raise UserError(
                    f"{self.path.parent} was taken over by {_described(_read(self.path))}: "
                    "this run stops and writes no more; its training states are as they were"
                )

    def _acquire(self) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _read(self._file)
                if error.errno not in (*_HELD, *_NO_LOCKS):
                    raise
                if error.errno in _HELD or self._is_running_here(holder):
                    os.close(self._file)
                    if time.monotonic() >= deadline:
                        raise self._in_use(holder) from error
                    time.sleep(0.5)
                    continue
            if self._is_there():
                break
            os.close(self._file)  # its owner removed it meanwhile: the lock is on a file that nobody finds
        self._sign()

    def _sign(self) -> None:
        """Leaves this run's note in place of an earlier one's."""
        earlier = _read(self._file)
        if earlier and earlier.get("host") != self._mine["host"]:
            self.note = (
                f"{self.path} was left behind by {_described(earlier)}, which was killed or still runs; if it does, "
                "it will stop before it next writes here"
            )
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, (json.dumps(self._mine) + "\n").encode(), 0)
        os.fsync(self._file)

    def _is_there(self) -> bool:
        """Returns True if the open file is the one of that name."""
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _is_mine(self) -> bool:
        """Raises an OSError where the file is gone. It is never opened again: closing it would give up the lock."""
        return os.path.samestat(os.fstat(self._file), os.stat(self.path)) and _read(self._file) == self._mine

    def _is_running_here(self, holder: dict[str, Any]) -> bool:
        """Returns True if another process of this host signed the file: all that is known without locks."""
        pid = holder.get("pid")
        if holder.get("host") != self._mine["host"] or not isinstance(pid, int) or pid == os.getpid():
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it is another user's
            pass
        return True

    def _in_use(self, holder: dict[str, Any]) -> UserError:
        elsewhere = holder.get("host") != self._mine["host"]
        gone = f" (if that process is gone, remove {self.path})" if elsewhere else ""
        return UserError(
            f"{self.path.parent} is in use by {_described(holder)}: wait for it, or choose another --output-dir{gone}"
        )


def _read(file: int | Path) -> dict[str, Any]:
    """Returns the note in a lock's file; {} where there is none, or half of one."""
    try:
        content = os.pread(file, 4096, 0) if isinstance(file, int) else file.read_bytes()
        found = json.loads(content)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _described(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "another run"
    return f"another run, process {holder['pid']} on {holder.get('host')}"
