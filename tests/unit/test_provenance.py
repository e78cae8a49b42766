"""Provenance: what a checkpoint says about where it comes from is complete and fits into JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from isomorphic import provenance
from isomorphic.commands import flags
from isomorphic.provenance import file_sha256, run_provenance

REPOSITORY = Path(__file__).resolve().parents[2]


def test_command_arguments_and_versions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["prune.py", "--model", "a b"])
    arguments = {
        "target_macs": flags.budget("50%"),
        "model_kwargs": [("depth", 2), ("pool", "avg")],
        "report": None,
        "data_path": Path("data/imagenet"),
        "seed": 3,
    }
    found = run_provenance(arguments)
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == "python prune.py --model 'a b'"
    assert found["arguments"] == {
        "data_path": "data/imagenet",
        "model_kwargs": [["depth", 2], ["pool", "avg"]],
        "report": None,
        "seed": 3,
        "target_macs": {"value": 0.5, "relative": True},
    }
    assert list(found["arguments"]) == sorted(arguments)
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["timm"] == metadata.version("timm")


def test_packages_that_are_not_installed_are_null(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package",))
    assert run_provenance({})["versions"]["no-such-package"] is None


def test_hardware_of_this_machine():
    found = run_provenance({})["hardware"]
    assert list(found) == ["cpu", "cores", "memory_gib", "gpus"] and json.loads(json.dumps(found)) == found
    assert isinstance(found["cpu"], str) and found["cpu"].strip() == found["cpu"] != ""
    assert 1 <= found["cores"] <= (os.cpu_count() or 1)
    assert found["memory_gib"] > 0.5 and found == run_provenance({})["hardware"]
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_cores_are_those_that_the_process_may_use():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from isomorphic import provenance; "
    code += "print(provenance.hardware()['cores'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout == "1\n"


def test_hardware_that_does_not_say_is_null(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError

    for owner, name in ((Path, "read_text"), (os, "sysconf"), (os, "sched_getaffinity"), (os, "cpu_count")):
        monkeypatch.setattr(owner, name, (lambda: None) if name == "cpu_count" else fail, raising=False)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken_driver)
    assert provenance.hardware() == {"cpu": None, "cores": None, "memory_gib": None, "gpus": None}


def broken_driver(index: int) -> None:
    raise RuntimeError("CUDA unknown error")


def test_gpus_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name=f"GPU {index}"))
    assert provenance.hardware()["gpus"] == ["GPU 0", "GPU 1"]


def test_checksum(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"a" * 1_000_000)  # the million a of FIPS 180-2
    assert file_sha256(path) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"


def git(folder: Path, *words: str) -> None:
    settings = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *settings, *words], cwd=folder, check=True, capture_output=True)


def commit_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setattr(provenance, "_REPOSITORY", folder)
    return run_provenance({})["commit"]


def test_the_commit_says_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)  # set where a commit hook runs the tests
    assert commit_of(tmp_path, monkeypatch) is None
    git(tmp_path, "init")
    assert commit_of(tmp_path, monkeypatch) is None
    (tmp_path / "file").write_text("old")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "v1")
    commit = commit_of(tmp_path, monkeypatch)
    assert commit is not None and re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "file").write_text("new")
    assert commit_of(tmp_path, monkeypatch) == f"{commit}-dirty"

    installed = tmp_path / "site-packages"
    installed.mkdir()
    assert commit_of(installed, monkeypatch) is None  # the repository around it is not ours


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert run_provenance({})["commit"] is None
