"""Provenance: what a checkpoint says about where it comes from is complete and fits into JSON."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from isomorphic import cli, provenance
from isomorphic.provenance import file_sha256, run_provenance


def test_command_arguments_and_versions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["prune.py", "--model", "a b"])
    arguments = {
        "target_macs": cli.budget("50%"),
        "model_kwargs": [("depth", 2), ("pool", "avg")],
        "report": None,
        "data_path": Path("data/imagenet"),
        "seed": 3,
    }
    found = run_provenance(arguments)
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == "prune.py --model 'a b'"
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
