"""Prefill attention by FlashInfer, where it is available and pays.

A prompt's own keys and values are still in 16 bits when its attention is computed. FlashInfer's kernel for Hopper does that
arithmetic at three times the rate of our portable Triton kernel (docs/log.md), so it decides TTFT. A cached prefix is dequantized
first, one layer at a time: every query of the chunk reads it, so writing it out costs little beside the arithmetic of a long chunk,
and none of it is kept.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from kvtuner_kernels.gather import gather
from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.reference import attend, pack_rows
from kvtuner_kernels.tuning import multiprocessors
from kvtuner_search.errors import UsageError, first_line
from kvtuner_search.serving.sglang.pool import LayerStorage

WORKSPACE: Final = 128 * 2**20  # bytes; FlashInfer's own advice
SWITCH: Final = "KVTUNER_PREFILL"  # environment variable: auto, or triton for the packed kernel alone
HEAD_DIMS: Final = (64, 128, 256)
CAPABILITY: Final = (9, 0)  # where it was measured
TOLERANCE: Final = 0.02  # relative error against the reference: several times what rounding costs
LEAST_TOKENS: Final = 16  # new tokens of a request on average; fewer were not measured
ENOUGH_TOKENS: Final = 128  # new tokens of a batch, whatever each request has
LARGEST_SHARE: Final = 16  # prefix tokens for each new one, if the packed kernel has work for the whole chip
TILE: Final = 128  # query heads of one group that a program of the packed kernel takes
_FLOAT32: Final = 4  # bytes
LARGEST_COPY: Final = (
    512 * 2**20
)  # bytes of dequantized keys and values of one layer, from the memory that SGLang leaves free

logger = logging.getLogger(__name__)


class PrefillAttention:
    """Causal attention of the chunks of several requests over their prefixes and themselves: planned once a batch, run once a layer.

    Args:
        heads: query heads of this rank.
        kv_heads: KV heads of this rank.
        head_dim: channels of a head, one of ``HEAD_DIMS``.
        dtype: bf16 or fp16.
        device: a CUDA device.

    Raises:
        ImportError: if FlashInfer is not installed.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        self.shape = heads, kv_heads, head_dim
        self.dtype, self.device, self.scale = dtype, device, head_dim**-0.5
        self.multiprocessors = multiprocessors(device)
        self._tokens, self._rows = 0, _Rows(0, None, None)  # of the batch that is planned
        self._wrapper = BatchPrefillWithRaggedKVCacheWrapper(
            torch.empty(WORKSPACE, dtype=torch.uint8, device=device), "NHD"
        )

    def plan(self, lengths: Sequence[int], prefixes: Sequence[int]) -> bool:
        """Prepare for chunks of these lengths over these prefixes. False, without preparation, if it does not pay."""
        new, old = sum(lengths), sum(prefixes)
        heads, kv_heads, head_dim = self.shape
        numbers, nbytes = kv_heads * head_dim, self.dtype.itemsize  # of one side of a token, and bytes of one
        # At most at a time: the prefix, and prefix and chunk together; or, in a fitted basis, both sides in fp32 and one turned back.
        copied = max(2 * (new + 2 * old) * nbytes, (2 * _FLOAT32 + nbytes) * old) * numbers if old else 0
        tiles = kv_heads * sum(-(-length * heads // kv_heads // TILE) for length in lengths)
        # Short chunks of many requests: dequantizing would cost more than attending to the packed rows.
        short = old > LARGEST_SHARE * new and tiles >= self.multiprocessors
        few = new < min(LEAST_TOKENS * max(1, len(lengths)), ENOUGH_TOKENS)
        if few or copied > LARGEST_COPY or short:
            return False
        self.prepare(lengths, prefixes)
        return True

    def prepare(self, lengths: Sequence[int], prefixes: Sequence[int]) -> None:
        """As :meth:`plan`, whether it pays or not."""
        ends = torch.tensor([[0, *lengths], [0, *prefixes]], dtype=torch.int32).cumsum(1, dtype=torch.int32)
        queries, keys = ends[0], ends.sum(0, dtype=torch.int32)
        self._wrapper.plan(
            queries, keys, *self.shape, causal=True, sm_scale=self.scale, q_data_type=self.dtype,
            kv_data_type=self.dtype,
        )  # fmt: skip
        self._tokens = int(queries[-1])
        self._rows = _rows(lengths, prefixes, self.device)

    def takes(self, scale: float | None, soft_cap: float, window: int) -> bool:
        """Whether a layer with these settings can be run; a window below 0 means none."""
        return scale in (None, self.scale) and not soft_cap and window < 0

    def run(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, slots: Tensor, layer: LayerStorage) -> None:
        """Write the attention of a chunk to ``out``.

        Args:
            query: [T, Hq, D]; rows beyond the plan are padding, in ``out`` as well.
            key: [T, H, D], unquantized, of the chunk.
            value: as ``key``.
            out: [T, Hq, D].
            slots: int64, of all prefixes.
            layer: where the prefixes are stored.
        """
        part = slice(self._tokens)
        key, value = key[part].contiguous(), value[part].contiguous()
        total, old, new = self._rows
        if old is not None and new is not None:
            _, kv_heads, head_dim = self.shape
            stored = gather(layer.rows, slots[: len(old)], layer.spec, kv_heads, head_dim, layer.centres, self.dtype)
            both = torch.empty(2, total, kv_heads, head_dim, dtype=self.dtype, device=key.device)
            for target, prefix, chunk in zip(both, stored, (key, value), strict=True):
                target.index_copy_(0, old, prefix)
                target.index_copy_(0, new, chunk)
            key, value = both
        self._wrapper.run(query[part], key, value, out=out[part])

    def check(self) -> None:
        """Compare with the reference, in 16 bits.

        Raises:
            RuntimeError: if FlashInfer cannot be compiled here, or its results are wrong.
        """
        heads, kv_heads, head_dim = self.shape
        lengths, prefixes = [200, 1, 57], [0, 130, 64]
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(sum(lengths) + tokens, n, head_dim, generator=generator).to(self.device, self.dtype)
            for n, tokens in ((heads, 0), (kv_heads, sum(prefixes)), (kv_heads, sum(prefixes)))
        )
        out = torch.empty_like(query)
        self.prepare(lengths, prefixes)
        self._wrapper.run(query, key, value, out=out)
        raw = LayerSpec()
        first = keys = 0
        for length, prefix in zip(lengths, prefixes, strict=True):
            new, seen = slice(first, first + length), slice(keys, keys + prefix + length)
            expected = attend(query[new], pack_rows(key[seen], value[seen], raw), raw, kv_heads)
            error = float((out[new].float() - expected).norm() / expected.norm())
            if not error < TOLERANCE:
                raise RuntimeError(f"its attention of {length} tokens over {prefix} is off by {error:.1e}")
            first, keys = new.stop, seen.stop


class _Rows(NamedTuple):
    """Where a batch's tokens go when each request's prefix and chunk are put side by side."""

    total: int
    prefix: Tensor | None  # int64 [tokens of all prefixes]; None if there is none
    chunk: Tensor | None  # int64 [new tokens]


def _rows(lengths: Sequence[int], prefixes: Sequence[int], device: torch.device) -> _Rows:
    new, old = sum(lengths), sum(prefixes)
    if not old:
        return _Rows(new, None, None)
    chunk, prefix = torch.tensor([lengths, prefixes]).to(device)

    def moved(tokens: int, counts: Tensor, by: Tensor) -> Tensor:
        return torch.arange(tokens, device=device) + by.repeat_interleave(counts, output_size=tokens)

    return _Rows(new + old, moved(old, prefix, chunk.cumsum(0) - chunk), moved(new, chunk, prefix.cumsum(0)))


def prefill_attention(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, capability: tuple[int, int]
) -> PrefillAttention | None:
    """FlashInfer's attention for prompts, checked; None if it is not installed, not measured on this GPU, or does not work.

    The Triton kernels do the same then. A failure of FlashInfer is logged.

    Raises:
        UsageError: if the environment variable SWITCH has an unknown value.
    """
    choice = os.environ.get(SWITCH) or "auto"
    if choice not in ("auto", "triton"):
        raise UsageError(f"{SWITCH}={choice} is unknown: set it to auto or triton")
    served = capability == CAPABILITY and head_dim in HEAD_DIMS and dtype in (torch.bfloat16, torch.float16)
    if choice == "triton" or not served:
        return None
    try:
        found = PrefillAttention(heads, kv_heads, head_dim, dtype, device)
        logger.info("prefill: FlashInfer's kernel, which is compiled once per machine (a minute)")
        found.check()
    except ModuleNotFoundError:
        return None
    except (ImportError, AttributeError, RuntimeError, OSError, ValueError, TypeError) as error:
        logger.warning("prefill: Triton's kernel, since FlashInfer does not work here: %s", first_line(error))
        return None
    return found
