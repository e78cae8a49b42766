"""What a command prints is never worth its result: a reader that went away (`| head`) or a full disk ends nothing."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from isomorphic.errors import first_line


class Lasting:
    """A stream for printing, whose errors are told once, on the other stream, and otherwise make no difference.

    What cannot be printed is lost; what comes later is tried again, as a disk may have room by then.
    """

    def __init__(self, stream: TextIO, name: str, command: str) -> None:
        self._stream, self._name, self._command = stream, name, command
        self._is_lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._telling_errors():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with self._telling_errors():
            self._stream.flush()

    def finish(self) -> None:
        """Flushes what is left, or drops it: Python does so once more at its end, and would fail there."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    @contextlib.contextmanager
    def _telling_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._is_lost:
                self._is_lost = True
                self._tell(error.strerror or first_line(error))

    def _tell(self, reason: str) -> None:
        other = sys.stderr if self._name == "stdout" else sys.stdout
        if isinstance(other, Lasting):
            print(f"{self._command}: cannot print to {self._name} ({reason}); the work goes on", file=other, flush=True)


@contextlib.contextmanager
def lasting(command: str) -> Iterator[None]:
    """Returns a context in which printing raises nothing, whatever happens to stdout and stderr."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # for a stream that was closed from the start, which Python has as None
        streams = [
            Lasting(stream or nowhere, name, command) for name, stream in zip(("stdout", "stderr"), before, strict=True)
        ]
        sys.stdout, sys.stderr = streams  # type: ignore[assignment]
        try:
            yield
        finally:
            for stream in streams:
                stream.finish()
            sys.stdout, sys.stderr = before
