"""How much fits into an amount of memory: tokens, and, where layers have windows, requests of a stated length."""

from __future__ import annotations

from typing import Final

from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.text import runs

CONTEXTS: Final = (4096, 32768)  # tokens of a request, where nobody says how many


def capacity(memory: int, profile: Profile, context: int | None = None) -> int:
    """Whole tokens that fit into ``memory`` bytes of cache.

    Args:
        memory: bytes.
        profile: whose layers store them.
        context: tokens of each request: layers with windows keep no more of it than that. Without it every layer keeps every token.
    """
    if context is None:
        return memory // max(1, profile.storage.bytes_per_token)
    return memory * context // max(1, profile.bytes_per_request(context))


def request_rows(profile: Profile, memory: int | None, context: int | None = None) -> list[tuple[int, int, int | None]]:
    """Rows of (tokens of a request, its bytes, such requests that fit); none if all layers are full, and no context is asked for."""
    if profile.model.layer_kinds is None and context is None:
        return []
    contexts = CONTEXTS if context is None else (context,)
    sizes = [(tokens, profile.bytes_per_request(tokens)) for tokens in contexts]
    return [(tokens, size, None if memory is None else memory // max(1, size)) for tokens, size in sizes]


def kinds_line(profile: Profile) -> str:
    """``layers: 15 sliding:512, 3 full`` for a model with windows; empty if all layers are full."""
    if profile.model.layer_kinds is None:
        return ""
    found = [f"{len(layers)} {kind}" for layers, kind in runs(profile.model.layer_kinds)]
    return f"layers: {', '.join(found)}"
