"""Bytes of cache for a token on each rank, and the tokens that fit. Pure Python over ``kvtuner_kernels.layout``.

Under tensor parallelism a rank holds its own KV heads of every layer in its stage; with fewer heads than ranks each rank holds one,
so heads are stored more than once. Under pipeline parallelism every stage must hold every token: the heaviest stage decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtuner_kernels.layout import RAW, LayerSpec, bytes_per_token
from kvtuner_search.errors import UsageError


@dataclass(frozen=True)
class StageBytes:
    """What one rank of a pipeline stage stores for a token; the ranks of a stage store equally much."""

    first: int  # global index of the stage's first layer
    end: int  # one past its last layer
    stored: int  # bytes, everything counted (codes, scales, minima, padding)
    raw: int  # bytes of an unquantized 16-bit cache


def heads_per_rank(kv_heads: int, tp_size: int) -> int:
    """KV heads that each of ``tp_size`` ranks stores.

    Raises:
        UsageError: if the heads cannot be divided, or repeated, evenly.
    """
    if kv_heads % tp_size and tp_size % kv_heads:
        raise UsageError(
            f"{kv_heads} KV heads cannot be spread over {tp_size} ranks: choose a tensor-parallel size that divides"
            f" {kv_heads}, or a multiple of it"
        )
    return max(1, kv_heads // tp_size)


def stage_bytes(layers: Sequence[LayerSpec], counts: Sequence[int], kv_heads: int, head_dim: int) -> list[StageBytes]:
    """The bytes of each stage on one rank.

    Args:
        layers: one spec a layer of the whole model.
        counts: number of layers of each stage; they add up to all layers.
        kv_heads: KV heads on the rank (:func:`heads_per_rank`).
        head_dim: channels of a head.
    """
    stages, first = [], 0
    for count in counts:
        end = first + count
        stored = bytes_per_token(layers[first:end], kv_heads, head_dim)
        stages.append(
            StageBytes(first, end, stored, bytes_per_token([LayerSpec(RAW, RAW)] * count, kv_heads, head_dim))
        )
        first = end
    return stages


def token_capacity(cache_bytes: int, nbytes: int, page_size: int = 1, limit: int | None = None) -> int:
    """Tokens that every rank can hold, in whole pages.

    Args:
        cache_bytes: bytes of cache on each rank.
        nbytes: bytes of a token on a rank of the heaviest stage.
        page_size: tokens of a page.
        limit: most tokens that were asked for (``--max-total-tokens``).
    """
    tokens = max(0, cache_bytes) // nbytes
    return (tokens if limit is None else min(tokens, limit)) // page_size * page_size
