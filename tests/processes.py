"""Several processes that work together, for tests: forked from one that has imported everything, on a store of its own.

They see what torchrun would tell them, but nobody ends the others when one fails: that is left to the code under test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS = 120.0  # until a scenario counts as hanging
PORT_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended (-9: it was killed), what it printed, and what its function gave back."""

    status: int
    out: str
    err: str
    value: Any = None


def run_together(module: str, scenarios: dict[str, int]) -> dict[str, list[Outcome]]:
    """Runs functions of a module without arguments, each in so many processes, all at once; outcomes in order of rank.

    A process that takes longer than `SECONDS` is killed.
    """
    return _parsed(_run(module, scenarios))


def run_together_once(
    factory: pytest.TempPathFactory, module: str, scenarios: dict[str, int]
) -> dict[str, list[Outcome]]:
    """Does what `run_together` does, but once for all workers of pytest-xdist: the others wait for the first one."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return run_together(module, scenarios)
    path = factory.getbasetemp().parent / f"{module}.json"  # the folder of the whole session
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if not path.exists():
            path.write_text(_run(module, scenarios))
    return _parsed(path.read_text())


def _run(module: str, scenarios: dict[str, int]) -> str:
    """Returns the outcomes as JSON."""
    words = [f"{name}:{size}" for name, size in scenarios.items()]
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.processes", module, *words]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def _parsed(text: str) -> dict[str, list[Outcome]]:
    found = json.loads(text)
    return {name: [Outcome(**outcome) for outcome in outcomes] for name, outcomes in found.items()}


def without_stages(text: str) -> str:
    """What was said on stderr, but for the stages that a command goes through (see `isomorphic/progress.py`)."""
    return re.sub(r"^\[ *\d+ s\] .*\n", "", text, flags=re.MULTILINE)


def main(module: str, *words: str) -> None:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    importlib.import_module(module)
    scenarios = {name: int(size) for name, _, size in (word.partition(":") for word in words)}
    with tempfile.TemporaryDirectory() as folder:
        begun = {name: _begin(module, name, size, Path(folder)) for name, size in scenarios.items()}
        # stores come after the last fork: a lock that a thread of theirs held then would stay locked in the child
        stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in begun]
        for (name, (_, pipe)), store in zip(begun.items(), stores, strict=True):
            os.write(pipe, f"{store.port:<{PORT_BYTES}}".encode() * scenarios[name])
        deadline = time.monotonic() + SECONDS
        ended = {name: [_end(pid, deadline) for pid in pids] for name, (pids, _) in begun.items()}
        print(json.dumps({name: _outcomes(Path(folder), name, ended[name]) for name in scenarios}))


def _begin(module: str, name: str, size: int, folder: Path) -> tuple[list[int], int]:
    """Process numbers, and a pipe from which each of them reads the port of its store."""
    reader, writer = os.pipe()
    pids = []
    for rank in range(size):
        if pid := os.fork():
            pids.append(pid)
            continue
        port = os.read(reader, PORT_BYTES).decode().strip()
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ.update({name: str(value) for name, value in variables.items()})
        _be(module, name, folder / f"{name}.{rank}")
    return pids, writer


def _be(module: str, name: str, path: Path) -> None:
    """What a new process does until its end."""
    status = 0
    for stream, ending in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        os.dup2(os.open(path.with_name(path.name + ending), os.O_CREAT | os.O_WRONLY), stream.fileno())
    try:
        value = getattr(sys.modules[module], name)()
        path.with_name(path.name + ".json").write_text(json.dumps(value))
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end(pid: int, deadline: float) -> int:
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _outcomes(folder: Path, name: str, statuses: list[int]) -> list[dict[str, Any]]:
    outcomes = []
    for rank, status in enumerate(statuses):
        out, err = ((folder / f"{name}.{rank}.{ending}").read_text() for ending in ("out", "err"))
        value = None
        with contextlib.suppress(FileNotFoundError):
            value = json.loads((folder / f"{name}.{rank}.json").read_text())
        outcomes.append({"status": status, "out": out, "err": without_stages(err), "value": value})
    return outcomes


if __name__ == "__main__":
    main(*sys.argv[1:])
