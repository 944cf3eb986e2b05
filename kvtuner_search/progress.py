"""Progress on stderr: bars with the time left on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kvtuner_search.secrets import mask


class Reporter:
    """Shows stages one after the other and remembers how long each took (``seconds``, by stage name)."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """A stage of ``total`` units; yields a function that advances it (by 1, or by the number given)."""
        started = time.monotonic()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(name, total=total, note="")

            def advance(amount: int = 1, note: str | None = None) -> None:
                progress.advance(task, amount)
                if note is not None:
                    progress.update(task, note=note)

            try:
                yield advance
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
        self.say(f"{name}: {self.seconds[name]:.1f} s")

    def say(self, message: str) -> None:
        """Print one line."""
        self.console.print(mask(message), highlight=False, soft_wrap=True, markup=False)
