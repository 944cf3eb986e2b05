"""Kinds of attention layers, as a profile names them: ``full``, ``sliding:512``, ``chunked:8192``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import Field

PATTERN: Final = r"^(full|(sliding|chunked):[1-9][0-9]{0,8})$"
KindText = Annotated[str, Field(pattern=PATTERN)]
Kind = Literal["full", "sliding", "chunked"]


class LayerKind(NamedTuple):
    """What a layer's queries see: all earlier tokens, the latest ``window``, or those of their own chunk of ``window`` tokens.

    Example:
        ``LayerKind("sliding", 512)`` is written ``sliding:512``; token 600 sees 89 to 600, 512 of them.
    """

    kind: Kind = "full"
    window: int = 0  # tokens, a query's own included; 0 for full attention

    def __str__(self) -> str:
        return f"{self.kind}:{self.window}" if self.window else self.kind

    @classmethod
    def parse(cls, text: str) -> LayerKind:
        """The inverse of ``str``.

        Raises:
            ValueError: if the text is no kind.
        """
        if not re.fullmatch(PATTERN, text):
            raise ValueError(f"{text!r} is no kind of layer: write full, sliding:TOKENS or chunked:TOKENS")
        kind, _, window = text.partition(":")
        values: Any = (kind, int(window or 0))
        return cls(*values)

    def within(self, most: int | None) -> LayerKind:
        """The same for sequences of at most ``most`` tokens: a window at least that long is full attention."""
        return FULL_KIND if most is not None and self.window >= most else self

    def kept(self, tokens: int) -> int:
        """Of a sequence of ``tokens`` tokens, how many the next query can see: those whose rows must be kept."""
        return min(tokens, self.window) if self.window else tokens


FULL_KIND: Final = LayerKind()
