"""SGLang features that cannot be combined with a profile, by name. Pure functions over SGLang's server arguments."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvtuner_search.errors import UsageError

ATTENTION: Final = {"cuda": "triton", "cpu": "torch_native"}  # the backend that reads packed rows on a device
SPECULATION: Final = ("STANDALONE", "NGRAM")  # tested on GPUs; the others are not


@dataclass(frozen=True)
class Refusal:
    """A server argument that is refused."""

    field: str  # of SGLang's ServerArgs
    name: str  # what users call it
    allowed: Callable[[Any], bool]  # of the field's value
    remedy: str

    @property
    def option(self) -> str:
        """The command-line option."""
        return "--" + self.field.replace("_", "-")

    def check(self, value: Any) -> None:
        """Refuse a value that cannot be combined with a profile.

        Raises:
            UsageError: names the option, its value and the remedy.
        """
        if not self.allowed(value):
            raise UsageError(f"{self.option} {value}: {self.name} cannot be combined with a profile: {self.remedy}")


def off(value: Any) -> bool:
    """A switch that is not set."""
    return not value


def one(value: Any) -> bool:
    """A size that divides nothing."""
    return value in (None, 1)


LEAVE: Final = "leave it out, or serve without a profile"
_COMMON: Final = (  # arguments that every version here has
    Refusal("kv_cache_dtype", "another KV-cache dtype", lambda v: v == "auto", "the profile says how the cache is stored: leave it at auto"),
    Refusal("enable_hierarchical_cache", "HiCache", off, LEAVE),
    Refusal("hicache_storage_backend", "HiCache's storage", off, LEAVE),
    Refusal("enable_lmcache", "LMCache", off, LEAVE),
    Refusal("radix_cache_backend", "another prefix cache", off, LEAVE),
    Refusal("enable_hisparse", "hierarchical sparse attention", off, LEAVE),
    Refusal("disaggregation_mode", "PD disaggregation", lambda v: v == "null", "serve prefill and decode together, or without a profile"),
    Refusal("encoder_only", "encoder disaggregation", off, LEAVE),
    Refusal("enable_pdmux", "PD multiplexing", off, LEAVE),
    Refusal("dp_size", "data parallelism within a server", one, "start one server for each replica"),
    Refusal("enable_dp_attention", "data-parallel attention", off, LEAVE),
    Refusal("attn_cp_size", "context parallelism", one, LEAVE),
    Refusal("enable_prefill_cp", "context parallelism of prompts", off, LEAVE),
    Refusal("enable_two_batch_overlap", "two-batch overlap", off, LEAVE),
    Refusal("enable_memory_saver", "the memory saver", off, LEAVE),
    Refusal("prefill_only_disable_kv_cache", "serving without a cache", off, LEAVE),
    Refusal("kv_canary", "the KV canary", lambda v: v in (None, "none"), LEAVE),
    Refusal("dllm_algorithm", "diffusion language models", off, LEAVE),
    Refusal("elastic_ep_backend", "elastic expert parallelism", off, LEAVE),
    Refusal("use_ray", "Ray", off, LEAVE),
)  # fmt: skip
_SINCE_0_5_23: Final = (
    Refusal("enable_unified_memory", "unified memory", off, LEAVE),
    Refusal("enable_unified_cache_external_linker", "an external cache", off, LEAVE),
    Refusal("enable_page_major_kv_layout", "the page-major layout", off, LEAVE),
    Refusal("enable_kv_cache_sharding", "sharding of the cache by pages", off, LEAVE),
    Refusal("dcp_size", "decode context parallelism", one, LEAVE),
    Refusal("flexkv_config_file", "FlexKV", off, LEAVE),
)
# By version, since SGLang's own object has no field for an argument that only another version knows. Here and not in the versions' modules,
# which import SGLang: ``serve`` refuses arguments without it.
BY_VERSION: Final[Mapping[str, tuple[Refusal, ...]]] = {
    "0.5.14": _COMMON,
    "0.5.23": (*_COMMON, *_SINCE_0_5_23),
}
ALL: Final = tuple(dict.fromkeys(refusal for known in BY_VERSION.values() for refusal in known))


def check_arguments(arguments: Any, refusals: Iterable[Refusal]) -> None:
    """Refuse arguments that cannot be combined with a profile.

    Args:
        arguments: SGLang's ServerArgs, resolved.
        refusals: those of its version (BY_VERSION).

    Raises:
        UsageError: names the option, its value and the remedy.
        AttributeError: if SGLang has no such argument: it does not belong into its version's row of BY_VERSION.
    """
    for refusal in refusals:
        refusal.check(getattr(arguments, refusal.field))
    backend = attention_backend(arguments.device)
    if arguments.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":  # the kernels run on the CPU then
        backend = arguments.attention_backend if arguments.attention_backend in ATTENTION.values() else backend
    for field in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        value = getattr(arguments, field)
        if value not in (backend, None) or (value is None and field == "attention_backend"):
            raise UsageError(
                f"--{field.replace('_', '-')} {value}: only {backend} reads packed rows on {arguments.device}: give"
                f" --attention-backend {backend}"
            )
    check_speculation(arguments.speculative_algorithm, arguments.device)


def check_speculation(algorithm: str | None, device: str) -> None:
    """Refuse an algorithm of speculative decoding that was not tested with a profile.

    Raises:
        UsageError: if it was not tested.
    """
    if algorithm is not None and (algorithm not in SPECULATION or device != "cuda"):
        raise UsageError(
            f"--speculative-algorithm {algorithm}: with a profile only {', '.join(SPECULATION)} have been tested, on GPUs: leave it out"
        )


def attention_backend(device: str) -> str:
    """SGLang's name of the attention backend that reads packed rows on ``device``.

    Raises:
        UsageError: if there is none.
    """
    try:
        return ATTENTION[device]
    except KeyError:
        raise UsageError(f"--device {device}: a profile is served on {' and '.join(ATTENTION)} only") from None
