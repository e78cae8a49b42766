"""Commands as processes of their own that start in no time: forked from one that has imported everything.

A process that `Preloaded.start` gives can be signalled, killed and waited for as any other, and ends as python does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from tests.processes import without_stages

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Started:
    """A process, and the files that it prints to."""

    pid: int
    out_file: Path
    err_file: Path
    server: subprocess.Popen[str]

    @property
    def out(self) -> str:
        return self.out_file.read_text()

    @property
    def err(self) -> str:
        """What it said on stderr, but for the stages that it went through."""
        return without_stages(self.err_file.read_text())

    def poll(self) -> int | None:
        """How it ended (-9: it was killed), None as long as it runs."""
        status = _ask(self.server, {"poll": self.pid})
        return None if status is None else int(status)

    def is_gone(self) -> bool:
        """Whether it has ended, and all processes that it started, too."""
        if self.poll() is None:
            return False
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.pid and state != "Z":
                    return False
        return True

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Preloaded:
    """Starts commands, all of which end with it."""

    def __enter__(self) -> Preloaded:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.preloaded"]
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdin=pipe, stdout=pipe, text=True)
        self._pids: list[int] = []
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pid in self._pids:
            if _ask(self._server, {"poll": pid}) is None:
                os.kill(pid, signal.SIGKILL)
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(timeout=60)

    def start(
        self,
        command: str,
        *words: str,
        folder: Path,
        environment: dict[str, str] | None = None,
        file_size: int | None = None,
        before: tuple[str, str, str] | None = None,
    ) -> Started:
        """Runs `command`, a file of the repository, in `folder`.

        No file of it can grow beyond `file_size` bytes. `before` is a module, a function in there that the process
        calls first, and its argument.
        """
        number = len(self._pids)
        files = folder / f"process{number}.out", folder / f"process{number}.err"
        for file in files:
            file.touch()
        wish: dict[str, object] = {"words": [str(REPOSITORY / command), *words], "folder": str(folder)}
        wish |= {
            "files": [str(file) for file in files],
            "environment": environment or {},
            "file_size": file_size,
            "before": before,
        }
        pid = _ask(self._server, wish)
        assert isinstance(pid, int)
        self._pids.append(pid)
        return Started(pid, files[0], files[1], self._server)


def _ask(server: subprocess.Popen[str], wish: dict[str, object]) -> int | None:
    assert server.stdin and server.stdout
    print(json.dumps(wish), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def serve() -> Sequence[str]:
    """Answers one request a line until there are none; in a process that was forked for a command, its words."""
    ended: dict[int, int] = {}
    for line in iter(sys.stdin.readline, ""):
        wish = json.loads(line)
        if "poll" in wish:
            pid = wish["poll"]
            found, status = (0, 0) if pid in ended else os.waitpid(pid, os.WNOHANG)
            if found:
                ended[pid] = os.waitstatus_to_exitcode(status)
            print(json.dumps(ended.get(pid)), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            _become(wish)
            return wish["words"]
    return ()


def _become(wish: dict) -> None:
    os.setsid()
    os.chdir(wish["folder"])
    os.environ.update(wish["environment"])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, path in enumerate(wish["files"], start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    if wish["file_size"] is not None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (wish["file_size"], hard))
    if wish["before"] is not None:
        module, function, argument = wish["before"]
        getattr(importlib.import_module(module), function)(argument)


def wait_until(condition: Callable[[], object], seconds: float = 120.0, *, every: float = 0.02) -> None:
    """Waits for a condition to come true.

    Raises `TimeoutError` where it does not within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(every)


if __name__ == "__main__":
    import isomorphic.commands.train  # noqa: F401

    if sys.argv[1:] == [] and (words := serve()):
        sys.argv = list(words)
        sys.path[0] = str(REPOSITORY)
        runpy.run_path(words[0], run_name="__main__")
