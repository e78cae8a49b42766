"""README and docs: every Python block runs, every command names files and flags that exist, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from isomorphic.commands import evaluate, export, prune_flags, train_flags
from tests.versions import IS_NEWEST_TORCH

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PARSERS: dict[str, Callable] = {
    "prune.py": prune_flags.parse_args,
    "finetune.py": train_flags.parse_finetune_args,
    "convnext_train.py": train_flags.parse_convnext_args,
}
OF_ARGV: dict[str, Callable] = {"evaluate.py": evaluate.parse_args, "tools/export.py": export.parse_args}
name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, without their fences."""
    return blocks_in(page.read_text(), language)


def blocks_in(text: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)  # all: a fence may close another's
    return [block for found, block in fenced if found == language]


def test_what_stands_between_two_blocks_is_none():
    text = "```python\na = 1\n```\nprose prune.py\n```\nbash b.sh\n```\nmore\n```python\nc = 2\n```\n"
    assert blocks_in(text, "") == ["bash b.sh\n"] and blocks_in(text, "python") == ["a = 1\n", "c = 2\n"]


@name
def test_python_blocks_run_one_after_the_other(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if page.name == "export.md":
        for library in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(library, reason="needs the libraries of requirements-export.txt")
        if not IS_NEWEST_TORCH:
            pytest.skip("exporting is tested from torch 2.14 on")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page, "python"):
        if "output/" not in block:  # what another command has to make first
            exec(compile(block, str(page), "exec"), scope)


def commands(page: Path) -> list[list[str]]:
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    found = [
        shlex.split(line, comments=True) for line in lines if re.search(r"\.py\b|^bash|^\w+=\S+ bash|sbatch", line)
    ]
    return [[word for word in words if "=" not in word or word.startswith("-")] for words in found if words]


@name
def test_commands_name_what_exists(page: Path, monkeypatch: pytest.MonkeyPatch):
    for words in commands(page):
        files = [word for word in words if re.fullmatch(r"(scripts|tools|examples)/\S+\.(py|sh|sbatch)", word)]
        files += [word for word in words[:4] if word in (*PARSERS, "evaluate.py")]
        for file in files:
            assert (REPOSITORY / file).is_file(), words
        called = next((word for word in words if word in PARSERS or word in OF_ARGV), None)
        if called is None or "…" in words:
            continue
        flags = words[words.index(called) + 1 :]
        if called in OF_ARGV:
            monkeypatch.setattr(sys, "argv", [called, *flags])
            OF_ARGV[called]()
        else:
            PARSERS[called](flags)


@name
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 200
