"""What a server says of itself, in this program's terms, and what a comparison of two depends on."""

from __future__ import annotations

from dataclasses import dataclass

from kvtuner_search.errors import NotComparableError, UsageError
from kvtuner_search.profile.schema import Profile

_ALIKE = ("version", "model", "dtype", "tensor_parallel", "pipeline_parallel", "quantization")
_SAME_MEMORY = ("memory_fraction", "device", "page_size")


@dataclass(frozen=True)
class Facts:
    """One server, as it reports itself: what a validation depends on."""

    version: str  # of the engine
    model: str  # path or hub id given to the server
    dtype: str  # as the server says; Interface.resolve_dtype has what is meant
    quantization: str | None  # of weights
    attention_backend: str
    device: str
    tensor_parallel: int
    pipeline_parallel: int
    page_size: int  # tokens
    prefix_cache: bool
    memory_fraction: float | None
    token_cap: int | None  # tokens that the user limited the cache to
    tokens: int  # capacity of the cache
    cache_gib: float | None  # memory of the first rank's cache, GiB to two digits
    profile_digest: str | None  # None: a stock server
    as_stored: bool  # prefill also reads a prompt's own keys and values as stored
    tool: str | None  # the plugin's name and version

    def check_profile(self, profile: Profile, url: str) -> None:
        """Refuse a server that does not serve this very profile.

        Raises:
            NotComparableError: names what it serves.
        """
        if self.profile_digest != profile.digest:
            serves = (
                "no profile" if self.profile_digest is None else f"a profile with digest {self.profile_digest[:19]}…"
            )
            raise NotComparableError(
                f"{url} serves {serves}, {profile.name} has {profile.digest[:19]}…: start it with this profile"
            )

    def check_stock(self, url: str) -> None:
        """Refuse a baseline that serves a profile.

        Raises:
            NotComparableError: says so.
        """
        if self.profile_digest is not None:
            raise NotComparableError(
                f"{url} serves a profile ({self.profile_digest[:19]}…): the baseline must be a stock server"
            )


@dataclass(frozen=True)
class ServerInfo:
    """All that a server says of itself and this program uses, each field checked for type and plausibility."""

    facts: Facts
    revision: str | None  # of the model
    overrides: str | None  # JSON of the fields that replace those of config.json
    dummy_weights: bool  # random
    cache_dtype: str  # of a stock server's cache, as stated
    profile_bytes: int | None  # of a token as the profile stores it, on the first rank
    longest: int | None  # most tokens of prompt and answer together, if the server says so
    context: int | None  # most positions, if the user limited them
    nodes: int
    copies: int  # of the model, which share nothing
    first_gpu: int  # index of the first GPU among those that the server sees
    speculative: str | None  # algorithm
    draft_tokens: int  # most tokens that one step can yield for a request; 1 without speculation


def check_alike(baseline: Facts, ours: Facts) -> None:
    """Refuse two servers that differ in more than the profile.

    Raises:
        UsageError: names what differs.
    """
    for name in _ALIKE:
        a, b = getattr(baseline, name), getattr(ours, name)
        if a != b:
            raise UsageError(
                f"the baseline server has {name.replace('_', ' ')} {a}, the profile's {b}: start both with the same flags"
            )


def memory_differs(baseline: Facts, ours: Facts) -> str:
    """Why the two token capacities cannot be compared; empty if they can."""
    for server, name in ((baseline, "baseline"), (ours, "profile's")):
        if server.token_cap is not None:
            return f"the {name} server is capped at {server.token_cap} tokens"
    if baseline.dtype in ("float32", "float"):
        return "the stock server stores 32 bits a number, but the prediction assumes 16"
    for field in _SAME_MEMORY:
        a, b = getattr(baseline, field), getattr(ours, field)
        if a != b:
            return f"{field.replace('_', ' ')} is {a} on the baseline server and {b} on the profile's"
    a, b = baseline.cache_gib, ours.cache_gib
    if a and b and abs(a - b) > max(0.01 * a, 0.02):  # 0.02: both are rounded to 0.01 GiB
        return f"the caches fill {a} and {b} GiB, so memory was not equal"
    return ""
