"""scripts/setup.sh and the files behind it: installs once, recovers, explains; versions fit together."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((REPOSITORY / "scripts").rglob("*.sh"))

# Stands in for python3 and, copied by its own "venv", for the interpreter in .venv. Notes what it is asked.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  -V) echo "Python ${FAKE_VERSION:-3.11.7}" ;;
  *"(3, 10)"*) [ -z "${FAKE_TOO_OLD:-}" ] ;;
  *"(3, 11)"*) [ "${FAKE_VERSION:-}" != 3.10.13 ] ;;
  *"import pip"*) [ -z "${FAKE_NO_PIP:-}" ] ;;
  *ensurepip*) [ -z "${FAKE_NO_VENV:-}" ] ;;
  "-m venv --clear "*) echo venv >>"$FAKE_LOG"; rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
  "-m pip install "*) echo "pip $*" >>"$FAKE_LOG"; sleep "${FAKE_SLEEP:-0}"; [ -z "${FAKE_NO_NETWORK:-}" ] ;;
  *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""


class Copy:
    """A repository of setup.sh and small requirement files, with the fake python3 first in PATH."""

    def __init__(self, root: Path) -> None:
        self.root = root / "a repository"
        self.log = root / "log"
        (self.root / "scripts").mkdir(parents=True)
        shutil.copy(REPOSITORY / "scripts" / "setup.sh", self.root / "scripts")
        for name in ("requirements.txt", "requirements-dev.txt", "constraints.txt", "constraints-oldest.txt"):
            (self.root / name).write_text(f"{name}\n")
        tools = root / "tools"
        tools.mkdir()
        (tools / "python3").write_text(FAKE_PYTHON)
        (tools / "python3").chmod(0o755)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ISOMORPHIC_", "VIRTUAL_ENV"))}
        self.environment = inherited | {"PATH": f"{tools}:{os.environ['PATH']}", "FAKE_LOG": str(self.log)}
        self.stamp = self.root / ".venv" / "installed"

    def start(self, command: str = "bash scripts/setup.sh", **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.root,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, command: str = "bash scripts/setup.sh", **environment: str) -> tuple[int, str, str]:
        process = self.start(command, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def asked(self) -> list[str]:
        """What was done since the last question: 'venv' and 'pip' in order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line.split()[0] for line in lines]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_first_call_installs_with_one_line_and_the_second_does_nothing(copy: Copy):
    status, out, err = copy.run()
    assert (status, out) == (0, "")
    assert err == "setup: making .venv with Python 3.11.7 and installing into it (a few minutes, once)\n"
    pip = copy.log.read_text().splitlines()[1]
    assert f"-r {copy.root}/requirements-dev.txt" in pip and f"-c {copy.root}/constraints.txt" in pip
    assert copy.asked() == ["venv", "pip"]
    assert copy.run() == (0, "", "")
    assert copy.asked() == []


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "constraints.txt"])
def test_changed_requirements_update_the_environment_once(copy: Copy, name: str):
    copy.run()
    copy.asked()
    with (copy.root / name).open("a") as file:
        file.write("more\n")
    assert copy.run()[2] == "setup: the requirements have changed, updating .venv\n"
    assert copy.asked() == ["pip"]
    assert copy.run() == (0, "", "")


def test_another_python_version_counts_as_outdated(copy: Copy):
    copy.run()
    copy.asked()
    copy.run(FAKE_VERSION="3.11.8")
    assert copy.asked() == ["pip"]
    # a new minor version does not see the packages of the old one
    copy.run(FAKE_VERSION="3.12.1", FAKE_NO_PIP="1")
    assert copy.asked() == ["venv", "pip"]


def test_python_3_10_installs_from_the_ranges(copy: Copy):
    assert copy.run(FAKE_VERSION="3.10.13")[0] == 0
    assert "constraints.txt" not in copy.log.read_text()


@pytest.mark.parametrize("version", ["3.10.13", "3.11.7"])
def test_the_oldest_versions_have_an_environment_of_their_own(copy: Copy, version: str):
    copy.run()
    copy.asked()
    _, _, err = copy.run(ISOMORPHIC_OLDEST="1", FAKE_VERSION=version)
    assert err.startswith(f"setup: making .venv-oldest with Python {version}")
    assert f"-c {copy.root}/constraints-oldest.txt" in copy.log.read_text()
    assert copy.asked() == ["venv", "pip"]
    assert copy.run() == copy.run(ISOMORPHIC_OLDEST="1", FAKE_VERSION=version) == (0, "", "")
    _, out, _ = copy.run("set -euo pipefail; source scripts/setup.sh; command -v python", ISOMORPHIC_OLDEST="1")
    assert out.strip() == f"{copy.root}/.venv-oldest/bin/python"


def test_an_interrupted_installation_starts_afresh(copy: Copy):
    status, _, err = copy.run(FAKE_NO_NETWORK="1")
    assert status == 1 and not copy.stamp.exists()
    assert err.splitlines()[-1].startswith("setup: pip could not install the requirements")
    assert copy.asked() == ["venv", "pip"]
    assert copy.run()[0] == 0
    assert copy.asked() == ["venv", "pip"]


def test_an_interrupted_update_starts_afresh(copy: Copy):
    copy.run()
    (copy.root / "requirements.txt").write_text("other\n")
    assert copy.run(FAKE_NO_NETWORK="1")[0] == 1
    copy.asked()
    assert copy.run()[0] == 0
    assert copy.asked() == ["venv", "pip"]


def test_an_interpreter_that_is_gone_is_replaced(copy: Copy):
    copy.run()
    copy.asked()
    (copy.root / ".venv" / "bin" / "python").unlink()
    assert copy.run()[0] == 0
    assert copy.asked() == ["venv", "pip"]


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is what keeps two installers apart")
def test_two_at_once_install_once(copy: Copy):
    processes = [copy.start(FAKE_SLEEP="0.5") for _ in range(3)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert copy.asked() == ["venv", "pip"]
    assert sum("setup: making .venv" in err for err in errors) == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FAKE_TOO_OLD": "1", "FAKE_VERSION": "3.8.10"}, "setup: Python 3.8.10 is too old: put a python3"),
        ({"FAKE_NO_VENV": "1"}, "setup: python3 lacks its venv module: install it (Debian, "),
        ({"ISOMORPHIC_PYTHON": "/no/such/python"}, "setup: ISOMORPHIC_PYTHON=/no/such/python is not"),
    ],
)
def test_failures_are_one_line_and_stop_the_script(copy: Copy, environment: dict[str, str], message: str):
    for command in ("bash scripts/setup.sh", "set -euo pipefail; source scripts/setup.sh; echo went on"):
        status, out, err = copy.run(command, **environment)
        assert (status, out) == (1, "")
        assert err.startswith(message) and len(err.splitlines()) == 1
    assert copy.asked() == []


def test_sourcing_gives_the_interpreter(copy: Copy):
    show = 'set -euo pipefail; cd /; source "$ROOT/scripts/setup.sh"; echo "$PYTHON"; command -v python; pwd'
    _, out, _ = copy.run(show, ROOT=str(copy.root), VIRTUAL_ENV="/some/other/environment")
    python = f"{copy.root}/.venv/bin/python"
    assert out.splitlines() == [python, python, "/"]


def test_a_given_interpreter_is_used_as_it_is(copy: Copy):
    command = 'set -euo pipefail; source scripts/setup.sh; "$PYTHON" -c "import sys; print(sys.executable)"'
    status, out, err = copy.run(command, ISOMORPHIC_PYTHON=sys.executable)
    assert (status, err) == (0, "")
    assert Path(out.strip()) == Path(sys.executable)
    assert copy.asked() == [] and not (copy.root / ".venv").exists()


SOURCED = ("setup.sh", "requeue.sh")


@pytest.mark.parametrize(
    "script", [*SCRIPTS, REPOSITORY / ".ci" / "run"], ids=lambda path: str(path.relative_to(REPOSITORY))
)
def test_scripts_parse_and_stop_at_errors(script: Path):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    if script.name not in SOURCED:  # those leave the caller's settings alone
        assert "\nset -euo pipefail\n" in text
    if script.name not in (*SOURCED, "run"):
        assert "setup.sh" in text, "each script uses the repository's environment"


# --- versions ---


def requirements(name: str) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in (REPOSITORY / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


DIRECT = requirements("requirements.txt") + requirements("requirements-dev.txt")


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def test_constraints_are_exact_and_satisfy_the_ranges():
    pins: dict[str, Version] = {}
    for pin in requirements("constraints.txt"):
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and canonical(pin.name) not in pins
        pins[canonical(pin.name)] = Version(specifier.version)
    for requirement in DIRECT:
        version = pins[canonical(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_installed_versions_satisfy_the_ranges(requirement: Requirement):
    assert requirement.specifier.contains(importlib.metadata.version(requirement.name))


def test_the_oldest_set_is_where_the_ranges_begin():
    """A range that promises more than the tests of the oldest set have seen is a promise that nobody has kept."""
    pins = {
        canonical(pin.name): Version(next(iter(pin.specifier)).version)
        for pin in requirements("constraints-oldest.txt")
    }
    tools = {canonical(r.name) for r in requirements("requirements-dev.txt")} - {
        canonical(r.name) for r in requirements("requirements-export.txt")
    }
    for requirement in DIRECT:
        if canonical(requirement.name) in tools:
            continue
        lowest = next(Version(s.version) for s in requirement.specifier if s.operator == ">=")
        pin = pins[canonical(requirement.name)]
        assert pin.release[: len(lowest.release)] == lowest.release, f"{requirement} against {pin}"


def test_what_exporting_needs_is_what_the_tests_install():
    assert set(requirements("requirements-export.txt")) < set(requirements("requirements-dev.txt"))


@pytest.mark.parametrize(
    "name",
    [
        "requirements.txt",
        "requirements-dev.txt",
        "requirements-export.txt",
        "constraints.txt",
        "constraints-oldest.txt",
    ],
)
def test_requirement_files_name_no_host(name: str):
    text = (REPOSITORY / name).read_text()
    assert "://" not in text and "index" not in text and "find-links" not in text
