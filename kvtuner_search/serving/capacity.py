"""Bytes of cache for a token on each rank, and the tokens that fit. Pure Python over ``kvtuner_kernels.layout``.

Under tensor parallelism a rank holds its own KV heads of every layer in its stage; with fewer heads than ranks each rank holds one,
so heads are stored more than once. Under pipeline parallelism every stage must hold every token: the heaviest stage decides.

Beside the rows a rank holds the bases of its layers and heads (:func:`basis_bytes`): they do not grow with the tokens, and reduce
the memory for tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvtuner_kernels.layout import RAW, LayerSpec, bytes_per_token
from kvtuner_search.errors import UsageError
from kvtuner_search.profile.kinds import LayerKind

_FLOAT32: Final = 4  # bytes


@dataclass(frozen=True)
class StageBytes:
    """Bytes that one rank of a pipeline stage stores for a token; all ranks of a stage store the same number."""

    first: int  # global index of the stage's first layer
    end: int  # one past its last layer
    stored: int  # bytes, including codes, scales, minima and padding
    raw: int  # bytes of an unquantized 16-bit cache
    bases: int  # bytes of the stage's bases, independent of the tokens
    windows: int = 0  # the part of `stored` in layers with windows or chunks
    windows_raw: int = 0  # the same part of `raw`


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


def stage_bytes(
    layers: Sequence[LayerSpec],
    counts: Sequence[int],
    kv_heads: int,
    head_dim: int,
    kinds: Sequence[LayerKind] | None = None,
) -> list[StageBytes]:
    """The bytes of each stage on one rank.

    Args:
        layers: one spec a layer of the whole model.
        counts: number of layers of each stage; they add up to all layers.
        kv_heads: KV heads on the rank (:func:`heads_per_rank`).
        head_dim: channels of a head.
        kinds: of all layers; None: all are full.
    """
    stages, first = [], 0
    for count in counts:
        end = first + count
        own = layers[first:end]
        stored = bytes_per_token(own, kv_heads, head_dim)
        raw = bytes_per_token([LayerSpec(RAW, RAW)] * count, kv_heads, head_dim)
        windowed = (
            [] if kinds is None else [layer for layer, kind in zip(own, kinds[first:end], strict=True) if kind.window]
        )
        windows = [bytes_per_token(part, kv_heads, head_dim) for part in (windowed, [LayerSpec()] * len(windowed))]
        stages.append(StageBytes(first, end, stored, raw, basis_bytes(own, kv_heads, head_dim), *windows))
        first = end
    return stages


def basis_bytes(layers: Sequence[LayerSpec], kv_heads: int, head_dim: int) -> int:
    """Bytes that a rank holds for the bases of these layers.

    Each head has the tensor of the transforms file and, in fp32, the tensors that ``kvtuner_kernels.bands.basis`` derives for the
    kernels: the matrix, its inverse, the inverse transposed, the mean and the first token's point. Centring vectors are too small to count.

    Args:
        layers: of the rank's stage.
        kv_heads: on the rank.
        head_dim: channels of a head.
    """
    numbers = (head_dim + 2) * head_dim + 3 * head_dim * head_dim + 2 * head_dim
    sides = sum(side.banded for layer in layers for side in (layer.key, layer.value))
    return sides * kv_heads * numbers * _FLOAT32


def share_of_windows(nbytes: int, windows: int, ratio: float | None) -> float:
    """Bytes that a token costs where layers with windows have ``ratio`` slots for each slot of the others.

    Args:
        nbytes: of a token in all layers.
        windows: the part of it in layers with windows.
        ratio: None if all layers share one pool, and so keep every token.

    Example:
        >>> share_of_windows(1000, 600, 0.5)
        700.0
    """
    return nbytes if ratio is None else nbytes - windows + ratio * windows


def token_capacity(cache_bytes: int, nbytes: float, page_size: int = 1, limit: int | None = None) -> int:
    """Tokens that every rank can hold, in whole pages.

    Args:
        cache_bytes: bytes of cache on each rank.
        nbytes: bytes of a token on a rank of the heaviest stage (:func:`share_of_windows`).
        page_size: tokens of a page.
        limit: the user's limit on tokens (``--max-total-tokens``).
    """
    tokens = int(max(0, cache_bytes) // nbytes)
    return (tokens if limit is None else min(tokens, limit)) // page_size * page_size
