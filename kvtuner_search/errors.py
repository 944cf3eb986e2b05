"""The exceptions that a command turns into one line on stderr and a documented exit code.

Every message carries the value, the reason and the remedy. See docs/cli.md for the table of exit codes.
"""

from __future__ import annotations

from enum import IntEnum

from kvtuner_search.secrets import mask


def first_line(error: BaseException) -> str:
    """What an error of a library says, as far as one line goes: the first that is not blank, or else the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class ExitCode(IntEnum):
    """What a command returns to the shell."""

    OK = 0
    GATE_FAILED = 1  # the command ran, and a requested threshold does not hold
    USAGE = 2  # an option or argument cannot be used
    DATA = 3  # an input cannot be read, or is invalid
    NOT_COMPARABLE = 4  # two profiles describe different models or layouts
    SERVER = 5  # a server could not be started as asked, e.g. its ranks disagree or one serves another cache
    INTERRUPTED = 130  # Ctrl-C; what was finished is kept
    UNREAD = 141  # the reader of standard output closed it, where SIGPIPE ends other programs: no verdict was delivered


class KVTunerError(Exception):
    """Base of all errors that the caller can fix. Passwords and keys in the message are masked, wherever it goes."""

    exit_code: ExitCode = ExitCode.DATA

    def __init__(self, message: object = "") -> None:
        super().__init__(mask(message))


class UsageError(KVTunerError):
    """An option or argument cannot be used."""

    exit_code = ExitCode.USAGE


class DataError(KVTunerError):
    """An input file, model or dataset cannot be read, or is invalid."""

    exit_code = ExitCode.DATA


class ProfileError(DataError):
    """A profile cannot be read, or is invalid."""


class NotComparableError(KVTunerError):
    """Two profiles cannot be compared, or a profile does not belong to this model."""

    exit_code = ExitCode.NOT_COMPARABLE


class ServingError(KVTunerError):
    """A server does not store its cache as asked, and must not serve."""

    exit_code = ExitCode.SERVER
