"""Scripts called from another folder: relative paths of the user start there, the scripts' own in the repository."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isomorphic.commands import evaluate, export, prune_flags, train_flags
from isomorphic.commands.user_paths import PathFlag, absolute_words
from studies.intra_fusion import __main__ as intra_fusion

REPOSITORY = Path(__file__).resolve().parents[2]
# Every script that passes its user's flags on to a command.
SCRIPTS = [
    str(path.relative_to(REPOSITORY))
    for folder in ("pruning", "finetuning", "evaluation", "dimap", "intra_fusion")
    for path in sorted((REPOSITORY / "scripts" / folder).glob("*.sh"))
    if path.name not in ("swin.sh", "compare.sh")
] + ["scripts/two_hosts.sh", "scripts/digits_deit.sh"]
# Stands in for python: notes, in a file of its own for each call, what it is told.
RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "$ISOMORPHIC_USER_FOLDER" "$ISOMORPHIC_USER_WORDS" "$PWD" "$@" >"$RECORD/$(ls "$RECORD" | wc -l)"
"""
# Flags as a user gives them: what they become, from the user's folder.
GIVEN = {
    "prune.py": {"--data-path": "own", "--save-as": "mine.safetensors", "--plan-file": "../plan.json"},
    "finetune.py": {"--data-path": "own", "--output-dir": "runs/1", "--teacher-model": "t.safetensors"},
    "convnext_train.py": {"--data-dir": "own", "--output": "runs/1", "--pruned-model": "net.py:build"},
    "evaluate.py": {"--data-path": "own", "--checkpoint": "w.safetensors", "--results-file": "r.json"},
}
PARSERS: dict[str, Callable[[], argparse.Namespace]] = {
    "prune.py": prune_flags.parse_args,
    "evaluate.py": evaluate.parse_args,
    "finetune.py": train_flags.parse_finetune_args,
    "convnext_train.py": train_flags.parse_convnext_args,
    "studies.intra_fusion": intra_fusion.parse_args,
}


class Place:
    """A repository that has the scripts, and a user's folder elsewhere."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.mine, self.record = (tmp_path / name for name in ("iso", "mi ne", "record"))
        for folder in (self.root, self.mine, self.record):
            folder.mkdir()
        (self.root / "scripts").symlink_to(REPOSITORY / "scripts")
        self.recorder = tmp_path / "recorder"
        self.recorder.write_text(RECORDER)
        self.recorder.chmod(0o755)
        self.monkeypatch = monkeypatch

    def calls(self, script: str, *words: str, cwd: Path, **variables: str) -> list[list[str]]:
        """What each of the commands that the script calls is told: folder, words and place of the user, its words."""
        environment = os.environ | {"ISOMORPHIC_PYTHON": str(self.recorder), "RECORD": str(self.record)} | variables
        environment["FIRST_HOST"] = "node1"
        done = subprocess.run(
            ["bash", str(self.root / script), *words], cwd=cwd, env=environment, capture_output=True, timeout=60
        )
        assert done.returncode == 0 or script == "scripts/digits_deit.sh", done.stderr  # which copies what was trained
        files = sorted(self.record.iterdir(), key=lambda path: int(path.name))
        return [file.read_text().removesuffix("\0").split("\0") for file in files]

    def parse(self, call: list[str]) -> argparse.Namespace:
        """The flags as the command of a call has them."""
        folder, given, cwd, *words = call
        start = next(place for place, word in enumerate(words) if word in PARSERS)
        self.monkeypatch.chdir(cwd)
        self.monkeypatch.setenv("ISOMORPHIC_USER_FOLDER", folder)
        self.monkeypatch.setenv("ISOMORPHIC_USER_WORDS", given)
        self.monkeypatch.setattr(sys, "argv", words[start:])
        return PARSERS[words[start]]()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def paths_of(args: argparse.Namespace) -> dict[str, str]:
    names = ("model", "data_path", "save_as", "output_dir", "teacher_model", "checkpoint", "results_file", "plan_file")
    return {name: value for name in names if (value := getattr(args, name, None))}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_users_paths_start_where_they_stand(script: str, place: Place):
    family = "evaluation" if "evaluation" in script else "pruning" if "pruning" in script else "finetuning"
    last = {"evaluation": "evaluate.py", "pruning": "prune.py"}.get(family, "finetune.py")
    last = "convnext_train.py" if "convnext" in script and family == "finetuning" else last
    given = GIVEN[last]
    if "intra_fusion" in script:
        given = {"--results-file": "rows.csv"}
    if "two_hosts" in script:
        given = given | {"--model": "net.safetensors"}
    alone = ["--"] if "dimap" in script else []  # the rest is for finetune.py
    calls = place.calls(script, *alone, *[word for pair in given.items() for word in pair], cwd=place.mine)
    folder, words, cwd, *_ = calls[-1]
    assert (folder, cwd) == (str(place.mine), str(place.root))
    theirs = [word for pair in given.items() for word in pair]
    assert words.split("\x1f")[:-1][-len(theirs) :] == theirs
    for call in calls:
        found = paths_of(place.parse(call))
        paths = {os.path.normpath(place.mine / path) for path in given.values()} if call is calls[-1] else set()
        assert paths <= set(found.values())
        for name, value in found.items():
            if value not in paths and ("/" in value or value.endswith(".safetensors")):
                assert Path(value).is_relative_to(place.root), (name, value)


@pytest.mark.parametrize("script", ["scripts/pruning/deit_4.2G.sh", "scripts/finetuning/convnext_8.5G.sh"])
def test_in_the_repository_paths_stay_as_they_are(script: str, place: Place):
    (call,) = place.calls(script, "--data-path", "own", cwd=place.root)
    args = place.parse(call)
    assert args.data_path == "own" and not any(value.startswith("/") for value in paths_of(args).values())


def test_flags_for_both_commands_of_dimap_count_in_both(place: Place):
    words = ["--data-path", "own", "--", "--output-dir", "runs"]
    prune, finetune = map(place.parse, place.calls("scripts/dimap/swin_tiny_15.sh", *words, cwd=place.mine))
    assert prune.data_path == finetune.data_path == str(place.mine / "own")
    assert finetune.output_dir == str(place.mine / "runs") and finetune.model == prune.save_as
    assert prune.save_as.startswith(str(place.root))


def test_flags_for_every_command_of_a_chain_count_in_each(place: Place):
    words = ["--data-path", "own", "--", "--teacher-model", "t.safetensors"]
    sparse, prune, finetune, evaluate = map(
        place.parse, place.calls("scripts/depgraph/resnet50_2.0G.sh", *words, cwd=place.mine)
    )
    assert {args.data_path for args in (sparse, prune, finetune, evaluate)} == {str(place.mine / "own")}
    assert sparse.teacher_model == finetune.teacher_model == str(place.mine / "t.safetensors")
    assert finetune.model == prune.save_as == str(place.root / "output/depgraph/resnet50/2.0G/pruned.safetensors")


def test_a_folder_in_a_variable_counts_too(place: Place):
    calls = place.calls("scripts/intra_fusion/resnet18.sh", cwd=place.mine, CIFAR10="cifar")
    assert place.parse(calls[0]).data_path == f"{place.mine}/cifar"


def test_so_does_that_of_a_chain(place: Place):
    calls = place.calls("scripts/depgraph/vgg19_cifar100_8.9x.sh", cwd=place.mine, CIFAR100="cifar")
    assert [place.parse(call).data_path for call in calls] == [f"{place.mine}/cifar"] * 5


def test_a_message_names_the_whole_path(tmp_path: Path):
    script = REPOSITORY / "scripts" / "evaluation" / "resnet50.tv_in1k.sh"
    words = ["bash", str(script), "--data-path", "missing", "--no-pretrained"]
    environment = os.environ | {"ISOMORPHIC_PYTHON": sys.executable}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and f"no data folder {tmp_path}/missing/val" in done.stderr


# --- word by word ---

TYPES = {
    "--data-path": PathFlag(),
    "--model": PathFlag(may_be_name=True),
    "--checkpoint": PathFlag(may_be_empty=False),
    "--resume": PathFlag(other="auto"),
}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--data-path own", "--data-path MINE/own"),
        ("--data-path=own/../x", "--data-path=MINE/x"),
        ("--data-path /abs", "--data-path /abs"),
        ("--model resnet50.tv_in1k", "--model resnet50.tv_in1k"),
        ("--model net.safetensors", "--model MINE/net.safetensors"),
        ("--model=code/net.py:build", "--model=MINE/code/net.py:build"),
        ("--model there", "--model MINE/there"),
        ("--model hf-hub:me/net.pt", "--model hf-hub:me/net.pt"),
        ("--checkpoint hf-hub:me/net@v1", "--checkpoint hf-hub:me/net@v1"),
        ("--resume auto --resume state.pt", "--resume auto --resume MINE/state.pt"),
        ("--dataset torch/cifar10 --epochs 3", "--dataset torch/cifar10 --epochs 3"),
        ("--data-path", "--data-path"),
    ],
)
def test_what_is_a_path_and_what_a_name(words: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "there").touch()
    theirs = words.split()
    ours = ["--model", "deit_tiny", "--data-path", "data/imagenet"]
    monkeypatch.setattr(sys, "argv", ["prune.py", *ours, *theirs])
    variables: Any = {"ISOMORPHIC_USER_FOLDER": str(tmp_path)}
    told = variables | {"ISOMORPHIC_USER_WORDS": "".join(f"{word}\x1f" for word in theirs)}
    here = ["--model", "deit_tiny", "--data-path", f"{os.getcwd()}/data/imagenet"]
    assert absolute_words([*ours, *theirs], TYPES, told) == [*here, *expected.replace("MINE", str(tmp_path)).split()]
    assert absolute_words([*ours, *theirs], TYPES, {}) == [*ours, *theirs]
    elsewhere = variables | {"ISOMORPHIC_USER_WORDS": "--epochs\x1f7\x1f"}  # those of another command of the script
    assert absolute_words(ours, TYPES, elsewhere) == here


def test_every_flag_that_takes_a_file_knows_that_it_does():
    from isomorphic.commands import flags

    for build in (_train_parser, _prune_parser, _evaluate_parser):
        for action in build(flags)._actions:
            if action.metavar and any(word in str(action.metavar) for word in ("FILE", "DIR")):
                assert isinstance(action.type, PathFlag), action.option_strings


def test_a_flag_has_one_spelling_and_the_pages_name_no_other():
    from isomorphic.commands import flags

    spellings: dict[str, tuple[str, ...]] = {"--help": ("-h", "--help")}
    for build in (_train_parser, _convnext_parser, _prune_parser, _evaluate_parser, _export_parser):
        for action in build(flags)._actions:
            for flag in action.option_strings:
                assert spellings.setdefault(flag, tuple(action.option_strings)) == tuple(action.option_strings), flag
    of_others = {"--nproc_per_node", "--max-restarts", "--name"}  # torchrun's, and tools/convert.py's
    for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")):
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text()))
        assert named <= spellings.keys() | of_others, page.name


def _captured(parse: Callable[[], Any], flags: Any) -> argparse.ArgumentParser:
    """The parser that a command makes, before it reads anything."""
    made: list[argparse.ArgumentParser] = []
    make = flags.make_parser

    class Made(Exception):
        pass

    def stop(*_: Any, **__: Any) -> Any:
        raise Made

    def keep(description: str) -> argparse.ArgumentParser:
        made.append(make(description))
        made[0].parse_args = stop  # type: ignore[method-assign]
        return made[0]

    flags.make_parser = keep
    try:
        with pytest.raises(Made):
            parse()
    finally:
        flags.make_parser = make
    return made[0]


def _prune_parser(flags: Any) -> argparse.ArgumentParser:
    return _captured(prune_flags.parse_args, flags)


def _evaluate_parser(flags: Any) -> argparse.ArgumentParser:
    return _captured(evaluate.parse_args, flags)


def _train_parser(flags: Any) -> argparse.ArgumentParser:
    return _captured(train_flags.parse_finetune_args, flags)


def _convnext_parser(flags: Any) -> argparse.ArgumentParser:
    return _captured(train_flags.parse_convnext_args, flags)


def _export_parser(flags: Any) -> argparse.ArgumentParser:
    return _captured(export.parse_args, flags)
