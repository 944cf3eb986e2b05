"""Standard output and standard error, with a last guard against text that controls what reads them.

A profile, a server's answer or a file name may hold text that a CI service takes for a command (``::error::`` at the start of a
line, ``##[group]`` anywhere), that a terminal takes for a control sequence, or that changes the direction of what follows. Text
printed from files goes through ``profile.text.printable``; this guard holds for everything else too, and for what only line
breaks or folded table cells put at the start of a line.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Final, TextIO

REPLACED: Final = "\ufffd"
# GitHub's runner splits at CR and LF, skips white space, and reads `::name` there; `##[name]` (and Azure's `##vso[`) anywhere.
_COMMAND: Final = re.compile(r"(^|[\r\n])([^\S\r\n]*):(?=:)")
_BRACKET: Final = re.compile(r"(##\w{0,32})\[")
_TAIL: Final = 35  # characters that may come before the bracket
# C0 but tab, line feed and carriage return; DEL and C1; marks, embeddings, overrides and isolates of direction; separators.
_BIDI: Final = "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
_CONTROL: Final = re.compile(rf"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f{_BIDI}]")
# What colours and progress bars need of a terminal: ESC [ parameters and one of these letters, and nothing that begins otherwise.
_CONTROL_BUT_CSI: Final = re.compile(
    rf"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f{_BIDI}]|\x1b(?!\[[0-9;?]{{0,24}}[A-HJKhlm])"
)


class OutputError(Exception):
    """Standard output cannot be written: its reader closed it, or its disk is full. Not an OSError, so that no library handles it."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause.strerror or str(cause))
        self.gone = cause.errno in (errno.EPIPE, errno.ESHUTDOWN, errno.ECONNRESET)


class Guard:
    """A text stream that passes on what is written, and replaces what could control a reader character by character.

    Args:
        stream: where it goes.
        required: True: a failure raises OutputError. False: it is ignored, because a lost message must not lose the result.
    """

    def __init__(self, stream: TextIO, *, required: bool) -> None:
        self.stream, self.required = stream, required
        coloured = stream.isatty() or bool(os.environ.get("FORCE_COLOR"))
        self._control = _CONTROL_BUT_CSI if coloured else _CONTROL
        self.buffer = _Bytes(self)
        self._line = ""  # of the current line: white space alone, that and a colon, or else its last characters
        self._start = True  # whether `_line` is the whole line so far

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # not set yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write ``text``, made harmless; returns its length."""
        if not isinstance(text, str):
            raise TypeError(
                f"text is written here, not {type(text).__name__}"
            )  # by which click tells the kinds of streams
        if text:
            self._put(self._harmless(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def commands(self, text: str) -> None:
        """Write whole lines as they are, among them the workflow commands that this program itself makes."""
        self._put(text if self._start and not self._line else "\n" + text)
        self._line, self._start = "", True

    def flush(self) -> None:
        """Pass on what is buffered."""
        self._try(self.stream.flush)

    def _put(self, text: str) -> None:
        self._try(self.stream.write, text)

    def _try(self, action: Any, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            _drop(self.stream)
            if self.required:
                raise OutputError(error) from error
        except ValueError:  # the stream was closed
            if self.required:
                raise

    def _harmless(self, text: str) -> str:
        before, at_start = self._line, self._start
        shown = before + self._control.sub(REPLACED, text)
        # Every replacement is as long as what it replaces, and none changes `before`, which went through here already.
        if at_start:
            shown = _COMMAND.sub(rf"\1\2{REPLACED}", shown)
            if (
                before.endswith(":") and shown[: len(before)] != before
            ):  # the first colon is out: the second must not follow
                shown = before + REPLACED + shown[len(before) + 1 :]
        else:
            shown = _COMMAND.sub(rf"\1\2{REPLACED}", "x" + shown)[1:]
        shown = _BRACKET.sub(rf"\1{REPLACED}", shown)
        cut = max(shown.rfind("\r"), shown.rfind("\n"))
        line = shown[cut + 1 :]
        self._start = (cut >= 0 or at_start) and re.fullmatch(r"\s*:?", line) is not None
        self._line = line if self._start else line[-_TAIL:]
        return shown[len(before) :]


class _Bytes(io.RawIOBase):
    """Bytes that go through the guard as text."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self._guard = guard

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = bytes(data)
        self._guard.write(content.decode("utf-8", errors="replace"))
        return len(content)

    def flush(self) -> None:
        if not self.closed:
            self._guard.flush()


def _drop(stream: TextIO) -> None:
    """Discard what is still buffered, or the interpreter would complain about it at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def write_commands(text: str) -> None:
    """Print lines that hold workflow commands of this program's own making on standard output."""
    if isinstance(sys.stdout, Guard):
        sys.stdout.commands(text)
    else:
        sys.stdout.write(text)


def open_closed_streams() -> None:
    """Open /dev/null for each of the three standard streams that is closed, so that no other file gets its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)  # the lowest number that is free
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - a descriptor, for good
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def guard() -> None:
    """Guard standard output and standard error from now on."""
    if not isinstance(sys.stdout, Guard):
        sys.stdout = Guard(sys.stdout, required=True)
    if not isinstance(sys.stderr, Guard):
        sys.stderr = Guard(sys.stderr, required=False)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Guard both streams inside the block."""
    before = sys.stdout, sys.stderr
    guard()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
