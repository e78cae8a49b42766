"""One run in a folder at a time, for as long as its process lives and not longer."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from isomorphic.errors import UserError
from isomorphic.training.run_lock import NAME, RunLock
from tests.faults import contents, one_line

HERE = socket.gethostname()


def hold(folder: Path, *, with_child: bool = False) -> int:
    """Returns the number of a process that holds the lock until it is killed, perhaps with a child that lives on."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        with RunLock(folder):
            if with_child and os.fork() == 0:  # as a loader's worker
                time.sleep(30)
                os._exit(0)
            os.write(writer, b"held")
            time.sleep(300)
            os._exit(0)
    assert os.read(reader, 4) == b"held"
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("with_child", [False, True])
def test_a_second_run_is_told_host_and_process_until_the_first_is_gone(with_child: bool, tmp_path: Path):
    pid = hold(tmp_path / "run", with_child=with_child)
    try:
        told = f"run is in use by another run, process {pid} on {HERE}: wait for it, or choose another --output-dir"
        with pytest.raises(UserError, match=re.escape(told)) as error, RunLock(tmp_path / "run"):
            pass
        one_line(error)
        assert json.loads((tmp_path / "run" / NAME).read_text())["pid"] == pid
    finally:
        kill(pid)
    with RunLock(tmp_path / "run") as lock:
        assert lock.note is None  # nobody needs to know of a dead process of this host
        lock.check()
        assert json.loads((tmp_path / "run" / NAME).read_text())["pid"] == os.getpid()


def test_a_run_that_just_ends_is_waited_for(tmp_path: Path):
    pid = hold(tmp_path)
    with pytest.raises(UserError), RunLock(tmp_path):
        pass
    if os.fork() == 0:
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        os._exit(0)
    with RunLock(tmp_path, patience=60):
        pass
    os.waitpid(pid, 0)


def test_nothing_is_left_behind(tmp_path: Path):
    with RunLock(tmp_path / "new" / "run"):
        assert contents(tmp_path / "new" / "run").keys() == {NAME}
    assert not (tmp_path / "new").exists()
    with pytest.raises(KeyError), RunLock(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "state.pt").touch()
        raise KeyError
    assert contents(tmp_path / "new" / "run") == {"state.pt": b""}


def sign(path: Path, host: str, pid: int) -> None:
    path.write_text(json.dumps({"host": host, "pid": pid, "run": "theirs"}))  # in place, as a lock's owner does


def test_where_locks_do_not_reach_another_host_the_older_run_stops(tmp_path: Path):
    sign(tmp_path / NAME, "node7", 1234)
    with RunLock(tmp_path) as lock:
        assert lock.note is not None and "left behind by another run, process 1234 on node7" in lock.note
        lock.check()
        sign(tmp_path / NAME, "node8", 77)
        with pytest.raises(
            UserError, match="was taken over by another run, process 77 on node8: this run stops"
        ) as error:
            lock.check()
        one_line(error)
    assert json.loads((tmp_path / NAME).read_text())["host"] == "node8"  # theirs stays


def test_a_lock_that_somebody_removed_belongs_to_whoever_makes_the_next(tmp_path: Path):
    with RunLock(tmp_path) as lock:
        (tmp_path / NAME).unlink()
        lock.check()  # tidied up, and nobody has come
        with RunLock(tmp_path), pytest.raises(UserError, match="was taken over by another run"):
            lock.check()


@pytest.mark.parametrize(("host", "pid", "refused"), [(HERE, 1, True), (HERE, 2**22 + 1, False), ("node7", 1, False)])
def test_without_locks_a_living_process_of_this_host_counts(
    host: str, pid: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    sign(tmp_path / NAME, host, pid)
    if refused:
        with pytest.raises(UserError, match=f"in use by another run, process {pid} on {host}"), RunLock(tmp_path):
            pass
        return
    with RunLock(tmp_path) as lock:
        assert (lock.note is None) == (host == HERE)


def test_a_lock_of_another_host_that_is_in_force_can_be_removed(tmp_path: Path):
    pid = hold(tmp_path)
    try:
        sign(tmp_path / NAME, "node7", pid)
        with (
            pytest.raises(UserError, match=r"on node7: .*\(if that process is gone, remove .*run.lock\)"),
            RunLock(tmp_path),
        ):
            pass
    finally:
        kill(pid)
