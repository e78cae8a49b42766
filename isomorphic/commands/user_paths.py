"""Paths in flags: where relative ones start, if a script of `scripts/` was called from another folder.

Scripts go to the repository and call a command there, with paths of their own and then their user's flags, which may
name paths, too. `scripts/setup.sh` notes where the user stands and what they gave:

    ~/mine$ bash ~/iso/scripts/pruning/deit_4.2G.sh --data-path own
        ISOMORPHIC_USER_FOLDER=~/mine ISOMORPHIC_USER_WORDS="--data-path␟own␟"
        ~/iso$ python prune.py … --data-path data/imagenet --save-as output/pruned/deit_4.2G.safetensors --data-path own
    becomes
               python prune.py … --data-path ~/iso/data/imagenet …                          --data-path ~/mine/own

All paths are absolute then, so that a message shows which folder is meant. Nothing changes for a user who stands in the
repository, nor where no script was called.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isomorphic.checkpoints.hub import is_on_hub
from isomorphic.checkpoints.sources import LOCAL, is_checkpoint
from isomorphic.user_file import is_user_file

FOLDER, WORDS = "ISOMORPHIC_USER_FOLDER", "ISOMORPHIC_USER_WORDS"
SEPARATOR = "\x1f"  # ends each of the words


@dataclass(frozen=True)
class PathFlag:
    """An argparse type for a path.

    Attributes:
        suffixes: what it must end in; empty for anything.
        may_be_name: it may also be the name of a model, or `path/to/file.py:factory`.
        other: a text that is no path.
        may_be_empty: a text without a character is let through, and is no path either.
    """

    suffixes: tuple[str, ...] = ()
    may_be_name: bool = False
    other: str | None = None
    may_be_empty: bool = True

    def __call__(self, text: str) -> str:
        if not text and not self.may_be_empty:
            raise argparse.ArgumentTypeError("it is empty")
        if not text.endswith(self.suffixes or ("",)):
            raise argparse.ArgumentTypeError(f"{text} must end in {' or '.join(self.suffixes)}")
        return text

    def absolute(self, text: str, folder: str) -> str:
        """Returns the text with the folder that it starts from, if it is a relative path."""
        if text.startswith(LOCAL):
            return LOCAL + self.absolute(text.removeprefix(LOCAL), folder)
        if is_on_hub(text):
            return text
        path = os.path.join(folder, text)
        is_name = self.may_be_name and not (is_user_file(path) or is_checkpoint(path))
        return text if not text or text == self.other or is_name else os.path.normpath(path)


def user_elsewhere(variables: Mapping[str, str] = os.environ) -> str | None:
    """Returns the folder from which a script was called; None if it is the working folder, or there was no script."""
    folder = variables.get(FOLDER)
    return None if folder is None or Path(folder).resolve() == Path.cwd().resolve() else folder


def absolute_words(
    words: Sequence[str], types: Mapping[str, object], variables: Mapping[str, str] = os.environ
) -> list[str]:
    """Returns a command's words with absolute paths in place of relative ones, if a script was called from elsewhere.

    Args:
        words: of the command line; of the program's own, they may have other spellings, but are as many.
        types: the argparse types of flags, by flag.
        variables: environment variables.
    """
    user_folder, here = user_elsewhere(variables), os.getcwd()
    if user_folder is None:
        return list(words)
    given = variables.get(WORDS, "").split(SEPARATOR)[:-1]
    is_theirs = bool(given) and sys.argv[-len(given) :] == given
    first = len(words) - len(given) if is_theirs else len(words)
    found = list(words)
    for position, word in enumerate(words):
        flag, equals, value = word.partition("=")
        type_, place = types.get(flag), position if equals else position + 1
        if isinstance(type_, PathFlag) and place < len(words):
            folder = user_folder if position >= first else here
            text = value if equals else words[place]
            found[place] = flag * bool(equals) + equals + type_.absolute(text, folder)
    return found
