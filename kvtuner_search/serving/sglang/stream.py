"""SGLang's stream of an answer.

SGLang 0.5.14 and 0.5.23 answer ``data: {"text", "output_ids", "meta_info"}`` lines and ``data: [DONE]``. ``output_ids`` are all ids so far, or with
``--incremental-streaming-output`` those since the last line. The ids and the claimed count together distinguish the two, because either alone can
mislead: an answer that repeats one token looks like both, and intermediate cumulative lines of 0.5.14 can hold more ids than they claim (the list grows
between being referenced and being sent). Only the last line's claim is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json  # about three times as fast as json, and pydantic brings it along

from kvtuner_search.servers.stream import StreamEvent, StreamFault


def stream_body(identifier: str, prompt: Sequence[int], asked: int) -> dict[str, Any]:
    """See :meth:`kvtuner_search.servers.interface.Interface.stream_body`."""
    sampling = {"temperature": 0, "max_new_tokens": asked, "ignore_eos": True}
    return {"rid": identifier, "input_ids": list(prompt), "sampling_params": sampling, "stream": True}


class EventReader:
    """See :class:`kvtuner_search.servers.stream.StreamReader`."""

    def __init__(self) -> None:
        self._cumulative: bool | None = None

    def read(self, content: bytes, seen: list[int]) -> StreamEvent:
        """One line."""
        try:
            event = from_json(content)
        except ValueError as error:
            raise StreamFault("malformed", f"{error}: {content[:80]!r}") from error
        if not isinstance(event, dict):
            raise StreamFault("malformed", content[:200])
        if "error" in event:
            raise StreamFault("server-error", event["error"])
        meta, ids = event.get("meta_info"), event.get("output_ids")
        if not isinstance(meta, dict) or not isinstance(ids, list):
            raise StreamFault("malformed", f"an event without meta_info or output_ids: {content[:80]!r}")
        reason: Any = meta.get("finish_reason")
        message: Any = ""
        if isinstance(reason, dict):
            reason, message = str(reason.get("type")), reason.get("message", "")
        return StreamEvent(meta.get("id"), self._new(ids, seen, meta), meta, reason, message)

    def _new(self, ids: list[Any], seen: list[int], meta: dict[str, Any]) -> list[Any] | None:
        """The ids that are new; None if earlier ones have changed."""
        count = len(seen)
        if not count:
            return ids
        repeats = ids[:count] == seen
        if self._cumulative is None:
            # If the ids allow both readings, the one nearer to the claim.
            claimed = meta.get("completion_tokens")
            if type(claimed) is not int or not 0 < claimed < 2**31:
                claimed = len(ids)
            self._cumulative = repeats and abs(len(ids) - claimed) <= abs(count + len(ids) - claimed)
        if not self._cumulative:
            return ids
        return ids[count:] if repeats else None
