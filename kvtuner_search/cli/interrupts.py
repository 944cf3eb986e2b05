"""Signals that end a command."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from kvtuner_search.errors import ExitCode


@contextmanager
def kill_as_interrupt() -> Iterator[None]:
    """Inside the block a catchable kill signal acts like Ctrl-C: servers are stopped, answers are kept.

    It raises KeyboardInterrupt itself instead of sending SIGINT, which shells ignore for background jobs. A signal
    that is ignored on purpose, as ``nohup`` does with SIGHUP, stays ignored.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def end_with(pipe: int) -> None:
    """End this process as soon as nobody holds the other end of a pipe any more, even if its holder was killed."""

    def watch() -> None:
        with suppress(OSError):
            while os.read(pipe, 1):
                pass
        os._exit(ExitCode.INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()
