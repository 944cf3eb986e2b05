"""A streamed answer, event by event, whichever engine sends it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol


class StreamFault(Exception):
    """An answer that cannot count, by one of the names of ``bench.client.FAILURES``; ``detail`` is as the server sent it."""

    def __init__(self, kind: str, detail: object) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class StreamEvent(NamedTuple):
    """One event of a stream, in this program's terms. Its values are the server's, and not checked yet."""

    id: Any  # of the request that it answers
    tokens: list[Any] | None  # ids that it adds; None: ids that came before have changed
    counts: Mapping[str, Any]  # the server's own, so far: prompt_tokens, completion_tokens, cached_tokens
    finish: Any  # why the answer ended, "length" or "abort" among others; None: it goes on
    message: Any = ""  # the reason of an abort


class StreamReader(Protocol):
    """Reads the events of one answer."""

    def read(self, content: bytes, seen: list[int]) -> StreamEvent:
        """The event in the data of one line.

        Args:
            content: what follows ``data:``, stripped; never the ``[DONE]`` at the end.
            seen: ids that came before.

        Raises:
            StreamFault: ``malformed`` or ``server-error``.
        """
