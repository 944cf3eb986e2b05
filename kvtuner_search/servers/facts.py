"""The facts in ``/server_info`` that a validation depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from kvtuner_search.errors import NotComparableError, UsageError
from kvtuner_search.profile.schema import Profile
from kvtuner_search.servers.info import ServerInfo

_ALIKE = ("version", "model", "dtype", "tensor_parallel", "pipeline_parallel", "quantization")
_SAME_MEMORY = ("memory_fraction", "device", "page_size")


@dataclass(frozen=True)
class Facts:
    """One server, as it reports itself."""

    version: str
    model: str  # path or hub id given to the server
    dtype: str  # given to the server: may be ``auto``
    quantization: str | None  # of weights
    attention_backend: str
    device: str
    tensor_parallel: int
    pipeline_parallel: int
    page_size: int  # tokens
    prefix_cache: bool
    memory_fraction: float | None
    token_cap: int | None  # --max-total-tokens
    tokens: int  # capacity of the cache
    cache_gib: float | None  # memory of the first rank's cache, GiB to two digits
    profile_digest: str | None  # None: a stock server
    as_stored: bool  # prefill also reads a prompt's own keys and values as stored
    tool: str | None  # the plugin's name and version

    @classmethod
    def of(cls, content: dict[str, Any], url: str) -> Self:
        """Read ``/server_info``.

        Raises:
            ServerError: if a field is missing, of another type or implausible.
        """
        return cls.from_info(ServerInfo.of(content, url))

    @classmethod
    def from_info(cls, info: ServerInfo) -> Self:
        """The same from checked information."""
        plugin = info.kvtuner
        return cls(
            version=info.version,
            model=info.model_path,
            dtype=info.dtype,
            quantization=info.quantization,
            attention_backend=info.attention_backend,
            device=str(info.device),
            tensor_parallel=info.tp_size,
            pipeline_parallel=info.pp_size,
            page_size=info.page_size,
            prefix_cache=not info.disable_radix_cache,
            memory_fraction=info.mem_fraction_static,
            token_cap=info.max_total_tokens,
            tokens=info.max_total_num_tokens,
            cache_gib=info.cache_gib,
            profile_digest=None if plugin is None else plugin.profile_digest,
            as_stored=plugin is not None and bool(plugin.as_stored),
            tool=None if plugin is None else plugin.tool,
        )

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


def resolve_dtype(stated: str, config_dtype: str) -> str:
    """The dtype that a server computes in, from the given one: SGLang's ``auto`` is the config's, with float16 for float32."""
    if stated == "auto":
        return "float16" if config_dtype == "float32" else config_dtype
    return {"half": "float16", "float": "float32"}.get(stated, stated)
