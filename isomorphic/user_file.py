"""A user's own model: one Python file, and a function or class in it that makes the model.

A file is imported because its user names it, never because a checkpoint does. What runs are the very bytes whose
SHA-256 stands in a checkpoint; modules beside the file can be imported as usual, and are not part of the checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from isomorphic.errors import UserError


def is_user_file(source: str) -> bool:
    """Whether `source` is, or is meant to be, `path/to/file.py:factory`."""
    path, _, _ = source.rpartition(":")
    return source.endswith(".py") or path.endswith(".py") or os.path.isfile(path)


def load_factory(source: str) -> UserFactory:
    """Imports the file of `path/to/file.py:factory` and picks the factory.

    Raises:
        UserError: `source` is nothing of the kind, or as `UserFile.read` and `UserFile.load`.
    """
    path, colon, name = source.rpartition(":")
    if not colon and not source.endswith(".py"):
        raise UserError(f"{source} is not path/to/file.py:factory")
    if source.endswith(".py") or not name:
        file = source.rstrip(":")
        raise UserError(f"{file}: say which function or class of it makes the model, as in {file}:build")
    return UserFile.read(path).load(name)


@dataclass(frozen=True)
class UserFile:
    """A Python file as it was read, before anything of it runs."""

    path: Path
    source: bytes = field(repr=False)

    @classmethod
    def read(cls, path: str | Path) -> UserFile:
        """Reads a file.

        Raises:
            UserError: it is not there, cannot be read, or is not a .py file.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no such file: {path}")
        if path.suffix != ".py":
            raise UserError(f"{path} is not a Python file: a model of your own is named as path/to/file.py:factory")
        try:
            return cls(path, path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file's bytes, in hexadecimal."""
        return hashlib.sha256(self.source).hexdigest()

    def load(self, name: str) -> UserFactory:
        """Imports the file, once in a process, and picks the function or class `name`.

        Only what the file itself defines is a factory: a checkpoint that names one cannot reach what it imports.

        Raises:
            UserError: importing raises, or the file defines no such function or class.
        """
        module = self._import()
        own = [key for key, value in vars(module).items() if _is_defined_in(module, value)]
        if name not in own:
            what = "is not a function or class that it defines" if hasattr(module, name) else "is not in it"
            choice = f"it defines {', '.join(own[:8])}" if own else "it defines none"
            raise UserError(f"{self.path}: {name!r} {what} ({choice})")
        return UserFactory(self, name, vars(module)[name])

    def function(self, name: str) -> Callable[..., Any] | None:
        """Returns a function that the file defines beside its factory, such as `loss`; None where it defines none.

        Raises:
            UserError: importing the file raises.
        """
        value = vars(self._import()).get(name)
        return value if callable(value) and not isinstance(value, type) else None

    def _import(self) -> ModuleType:
        path = self.path.resolve()
        name = "_isomorphic_" + hashlib.sha256(bytes(path) + b"\0" + self.source).hexdigest()[:16]
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None  # the name ends in .py
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses and pickle look there
        try:
            with _neighbours(path.parent):
                exec(_compiled(self.source, path), vars(module))
        except BaseException as error:
            sys.modules.pop(name, None)
            if isinstance(error, KeyboardInterrupt):
                raise
            raise UserError(f"cannot import {self.path}: {_reason(error, path)}") from error
        return module


@dataclass(frozen=True)
class UserFactory:
    """A function or class of a user's file that returns a model."""

    file: UserFile
    name: str
    make: Callable[..., Any] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.file.path.name}:{self.name}"

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """What the factory takes, by name."""
        return inspect.signature(self.make).parameters

    def build(self, kwargs: dict[str, Any]) -> nn.Module:
        """Calls the factory; the model is put on the current default device.

        Raises:
            UserError: the factory raises, or what it returns is not a module with parameters.
        """
        path = self.file.path.resolve()
        try:
            with _neighbours(path.parent):
                model = self.make(**kwargs)
        except (Exception, SystemExit) as error:
            given = kwargs or "its defaults"
            hint = "; --model-kwargs NAME=VALUE gives it arguments" if isinstance(error, TypeError) else ""
            raise UserError(f"cannot build {self} with {given}: {_reason(error, path)}{hint}") from error
        if not isinstance(model, nn.Module):
            raise UserError(f"{self} returns {type(model).__name__}, not a torch.nn.Module")
        parameters = list(model.parameters())
        if not parameters or any(is_lazy(parameter) for parameter in parameters):
            raise UserError(
                f"{self} returns a model without parameters; lazy layers need one image before they have any"
            )
        return model.to(torch.empty(0).device)  # the default device; torch 2.6 does not tell of `with torch.device(…)`


def _compiled(source: bytes, path: Path) -> CodeType:
    """The file's code; what cannot be any is a SyntaxError in all versions of Python."""
    try:
        return compile(source, path, "exec", dont_inherit=True)
    except ValueError as error:  # null bytes, before Python 3.11.4
        raise SyntaxError(str(error)) from error


@contextlib.contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """Modules beside the user's file come first in the search, as when python runs that file.

    They keep their plain names: of two neighbours with one name, a process knows the first.
    """
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the file may have put its own search path in place
            sys.path.remove(str(folder))


def _is_defined_in(module: ModuleType, value: Any) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _reason(error: BaseException, path: Path) -> str:
    """An exception in one line, with the last line of the user's file that it went through."""
    text = str(error).strip().partition("\n")[0]
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        text, lines = error.msg, [error.lineno]
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{said} (line {lines[-1]})" if lines else said
