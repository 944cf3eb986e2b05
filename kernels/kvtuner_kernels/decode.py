# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Split-KV decode attention over packed rows: the launch, and the merge of the splits.

The kernel and its parts are in :mod:`kvtuner_kernels.decode_kernel`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtuner_kernels.bands import basis
from kvtuner_kernels.basis_kernel import Overlap, bases, dequantized, transform_heads
from kvtuner_kernels.decode_kernel import LOG2E, SPLIT_ALIGNMENT, bounds, decode_kernel
from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_kernels.operands import (
    ASSEMBLY,
    butterflies,
    check_centre,
    check_rows,
    power_of_2,
    rotation_shift,
    sides,
    within_reach,
)
from kvtuner_kernels.planes import banded
from kvtuner_kernels.reference import NO_CENTRES, Centres, rotation_block
from kvtuner_kernels.rotation import rotate_heads
from kvtuner_kernels.tuning import DecodeLaunch, decode_launch, multiprocessors, overlaps, shared_memory


@triton.jit
def _first_number(row, head, channel, seen, point, SIDE: tl.constexpr, HEAD_DIM: tl.constexpr, RAW: tl.constexpr):
    """Numbers of ``row`` [1] in channels [W] of ``head`` [1], in the basis, as fp32 [1, W]; 0 where it is not ``seen``."""
    exists = (channel < HEAD_DIM)[None, :] & seen
    number, marked = dequantized(row, head, channel, exists, SIDE, HEAD_DIM, RAW)
    if banded(SIDE):
        number += tl.load(point + head[:, None] * HEAD_DIM + channel[None, :], mask=exists & marked, other=0.0)
    return number


@triton.jit(do_not_specialize=["batch", "splits"])
def merge_kernel(
    partial, lse, kv_indptr, split_counts, centre, out, query, query_shift, rows, kv_indices, key_point, value_point, batch, splits,
    out_token_stride, out_head_stride, query_token_stride, query_head_stride, row_stride, softmax_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROTATED: tl.constexpr, CENTRED: tl.constexpr,
    WINDOW: tl.constexpr, RUNS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
    FIRST: tl.constexpr, CAP: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted mean of a request's partial results, and of its first token if that is handled separately (FIRST).

    A request without tokens gives 0. Grid: (batch, query heads, blocks of WIDTH channels); to rotate back, one block has all channels.
    """
    if OVERLAP and FIRST:
        gdc_launch_dependents()
    request = tl.program_id(0)
    head = tl.program_id(1)
    query_heads = tl.num_programs(1)
    low, high = bounds(kv_indptr, request, WINDOW, FIRST)
    if split_counts is not None:
        count = tl.load(split_counts + request)
        length = tl.cdiv(tl.cdiv(high - low, count), SPLIT_ALIGNMENT) * SPLIT_ALIGNMENT
        first = request * splits
        last = first + tl.cdiv(high - low, tl.maximum(length, 1))
    else:
        begin = tl.load(kv_indptr)
        length = tl.maximum(tl.cdiv(tl.cdiv(tl.load(kv_indptr + batch) - begin, splits), TILE) * TILE, 1)
        first = (low - begin) // length + request
        last = (high - 1 - begin) // length + 1 + request
    if high == low:
        last = first
    channel = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)[None, :]
    top = tl.full([1, 1], -1.0e30, tl.float32)
    total = tl.zeros([1, 1], tl.float32)
    acc = tl.zeros([1, WIDTH], tl.float32)
    if FIRST:  # not written by the previous kernels: read while they run
        begins = tl.load(kv_indptr + request)
        token = tl.full([1, 1], begins, tl.int32)
        seen = token < high
        if WINDOW:
            seen = seen & (token >= high - WINDOW)
        slot = tl.load(kv_indices + begins, mask=begins < high, other=0)
        first_row = rows + slot.to(tl.int64) * row_stride + tl.zeros([1], tl.int32)
        kv_head = tl.zeros([1], tl.int32) + head // GROUP
        every = tl.arange(0, power_of_2(HEAD_DIM))
        k = _first_number(first_row, kv_head, every, seen, key_point, KEY, HEAD_DIM, RAW)
        these = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
        acc = _first_number(first_row, kv_head, these, seen, value_point, VALUE, HEAD_DIM, RAW)
    if OVERLAP:
        gdc_wait()
    if FIRST:
        at = query + request.to(tl.int64) * query_token_stride + head * query_head_stride + every[None, :]
        q = tl.load(at, mask=(every < HEAD_DIM)[None, :], other=0.0)
        score = tl.sum(q.to(tl.float32) * k, 1, keep_dims=True)
        if query_shift is not None:
            score += tl.load(query_shift + request * query_heads + head)
        score *= softmax_scale
        if CAP != 0:
            score = CAP * (1 - 2 / (1 + tl.exp2(score * (2 / CAP * LOG2E))))
        top = tl.where(seen, score * LOG2E, top)
        total = tl.where(seen, total + 1.0, total)
    for block in tl.range(first * RUNS, last * RUNS, PARTS, num_stages=2):
        part = (block + tl.arange(0, PARTS))[:, None]
        live = part < last * RUNS
        row = part.to(tl.int64) * query_heads + head
        log = tl.load(lse + row, mask=live, other=float("-inf"))
        values = tl.load(partial + row * HEAD_DIM + channel, mask=live & (channel < HEAD_DIM), other=0.0)
        new_top = tl.maximum(top, tl.max(log, 0, keep_dims=True))
        decay = tl.exp2(top - new_top)
        p = tl.exp2(log - new_top)
        top = new_top
        total = total * decay + tl.sum(p, 0, keep_dims=True)
        acc = acc * decay + tl.sum(values * p, 0, keep_dims=True)
    result = acc / tl.where(total > 0, total, 1.0)
    if ROTATED:
        result = butterflies(result, 1, WIDTH, HEAD_DIM, rotation_shift(HEAD_DIM, True))
    if CENTRED:
        shift = tl.load(centre + head // GROUP * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
        result += tl.where(total > 0, shift, 0.0)
    target = out + request.to(tl.int64) * out_token_stride + head * out_head_stride + channel
    tl.store(target, result.to(out.dtype.element_ty), mask=channel < HEAD_DIM)


class Workspace(NamedTuple):
    """Partial results of one decode call; may be shared by all layers of a model and kept across CUDA-graph replays."""

    partial: Tensor  # fp32 [parts, runs, query heads, D]
    lse: Tensor  # fp32 [parts, runs, query heads], logarithms to base 2


class Workspaces:
    """The workspace of all decode calls of a model, which grows with the batches.

    An earlier workspace is freed when a larger one replaces it, unless a CUDA graph was captured with it: replays write there. At most
    half more is held than the largest batch took.

    Args:
        parts: maps a number of requests to the most partial results of any layer, runs included.
        query_heads: local ones.
        head_dim: channels of a head.
        device: where they are kept.

    Example::

        spaces = Workspaces(lambda requests: decode_parts(requests, splits, False) * launch.runs, 28, 128, rows.device)
        decode(query, rows, spec, 4, kv_indptr, kv_indices, workspace=spaces.of(len(query)))
    """

    def __init__(self, parts: Callable[[int], int], query_heads: int, head_dim: int, device: torch.device) -> None:
        self._parts, self._query_heads, self._head_dim, self._device = parts, query_heads, head_dim, device
        self._captured: list[Workspace] = []
        self._current: Workspace | None = None
        self._capacity = 0  # requests that fit into the current one

    def of(self, requests: int) -> Workspace:
        """Space for a batch of ``requests`` requests: two fp32 buffers, in one dimension."""
        capturing = is_capturing(self._device)
        if self._current is None or requests > self._capacity:
            self._let_go(capturing)
            self._capacity = max(requests, self._capacity + self._capacity // 2)
            numbers = self._parts(self._capacity) * self._query_heads
            self._current = Workspace(
                torch.empty(numbers * self._head_dim, dtype=torch.float32, device=self._device),
                torch.empty(numbers, dtype=torch.float32, device=self._device),
            )
        if capturing and not any(kept is self._current for kept in self._captured):
            self._captured.append(self._current)
        return self._current

    def _let_go(self, capturing: bool) -> None:
        """Give up the current workspace, before a larger one is allocated."""
        current, self._current = self._current, None
        if current is None or any(kept is current for kept in self._captured):
            return
        if capturing:  # frees and waits during a capture belong to its graph
            self._captured.append(current)
        elif self._device.type == "cuda":
            for buffer in current:  # its last call may still run, on another stream than it was allocated on
                buffer.record_stream(torch.cuda.current_stream(self._device))


def is_capturing(device: torch.device) -> bool:
    """Whether calls on ``device`` are now captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def decode_parts(batch: int, splits: int, per_request: bool) -> int:
    """Partial results that a decode call may write."""
    return batch * splits if per_request else batch + splits


def decode(
    query: Tensor,
    rows: Tensor,
    spec: LayerSpec,
    heads: int,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    out: Tensor | None = None,
    *,
    centres: Centres = NO_CENTRES,
    softmax_scale: float | None = None,
    soft_cap: float = 0.0,
    window: int = 0,
    num_kv_splits: Tensor | None = None,
    max_kv_splits: int = 0,
    launch: DecodeLaunch | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Attention of one new token of each request over its packed rows.

    Safe under CUDA-graph capture: the grid depends on the batch size alone, and lengths are read on the device.

    Args:
        query: [B, Hq, D] bf16 or fp16, after rotary embedding, contiguous along D. Query head ``h`` reads KV head ``h // (Hq // H)``.
        rows: the pool, uint8 [R, row bytes].
        spec: how the layer is stored.
        heads: local KV heads H.
        kv_indptr: int32 [B + 1]; request ``b`` has the slots ``kv_indices[kv_indptr[b]:kv_indptr[b + 1]]``.
        kv_indices: int64, slots (rows) in the order of tokens; the query's own token is among them.
        out: [B, Hq, D], written; made if not given.
        centres: centring vectors, given exactly where the spec asks for them.
        softmax_scale: factor of the scores, above 0; ``D ** -0.5`` if not given.
        soft_cap: scores become ``cap * tanh(score / cap)``; 0 is off.
        window: number of latest tokens that are seen; 0 is all.
        num_kv_splits: int32 [B], splits of each request as SGLang counts them (multiples of 32 tokens); needs ``max_kv_splits``.
            If not given, all tokens of the batch are spread evenly over the chip.
        launch: launch parameters instead of the tuned ones.
        workspace: space for partial results, ``decode_workspace``; made if not given.

    Returns:
        ``out``. A request without tokens gives zeros.

    Raises:
        LayoutError: for shapes, dtypes or strides that the kernel does not cover, or 2**31 numbers in the query.
    """
    batch, query_heads, head_dim = query.shape
    check_rows(rows, spec, heads, head_dim)
    key_side, value_side = sides(spec, heads, head_dim)
    check_centre(key_side, centres.key, heads, head_dim)
    check_centre(value_side, centres.value, heads, head_dim)
    if query_heads % heads or query.stride(2) != 1:
        raise LayoutError(
            f"{query_heads} query heads, strides {query.stride()}: expected a dense multiple of {heads} heads"
        )
    if (num_kv_splits is not None) != bool(max_kv_splits):
        raise LayoutError(f"max_kv_splits={max_kv_splits}: give it exactly when num_kv_splits is given")
    if query.dtype == torch.float32 and ASSEMBLY:
        raise LayoutError("fp32 queries are for the interpreter only: convert to bf16 or fp16")
    query = within_reach(query, "queries")
    out = torch.empty_like(query) if out is None else out
    if batch == 0:
        return out
    group = query_heads // heads
    launch = launch or decode_launch(spec, heads, group, head_dim, shared_memory(rows.device))
    splits = max_kv_splits or multiprocessors(rows.device) * launch.programs
    workspace = workspace or decode_workspace(
        batch, splits, query_heads, head_dim, launch, rows.device, bool(max_kv_splits)
    )
    shift, model = None, query.dtype
    if centres.key is not None and soft_cap:
        mean = basis(centres.key).mean if key_side.bands else centres.key
        shift = (query.float() * mean.repeat_interleave(group, 0)).sum(-1)
    if key_side.rotated:
        query = rotate_heads(query, inverse=True, dtype=query.dtype)
    apart, overlap = _has_first(spec), overlaps(rows.device)
    key_basis, value_basis = bases(spec, centres)
    if key_basis is not None:
        query = transform_heads(query, key_basis.dual, heads, overlap=Overlap(leads=overlap))
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    programs = batch * splits if max_kv_splits else splits
    blocks = triton.cdiv(heads, launch.batch // launch.runs), triton.cdiv(group, launch.columns)
    decode_kernel[(programs, *blocks)](
        query, shift, rows, kv_indptr, kv_indices, num_kv_splits, workspace.partial, workspace.lse, batch, splits,
        query.stride(0), query.stride(1), scale,
        **decode_constants(spec, heads, group, head_dim, model, rows.stride(0), launch, soft_cap, window, overlap),
        num_warps=launch.warps, **launch.options(), **({"launch_pdl": True} if overlap and key_basis is not None else {}),
    )  # fmt: skip
    rotated_later = value_side.rotated and rotation_block(head_dim) < head_dim
    later = rotated_later or bool(value_side.bands)  # undone by a separate kernel
    merged = torch.empty(query.shape, dtype=torch.float32, device=query.device) if later else out
    # If splits depend on the request alone, their merge must not depend on the batch either.
    constants = merge_constants(
        spec, 1 if max_kv_splits else batch, splits, heads, group, head_dim, model, launch, window, overlap, soft_cap
    )
    merge_kernel[(batch, query_heads, triton.cdiv(head_dim, constants["WIDTH"]))](
        workspace.partial, workspace.lse, kv_indptr, num_kv_splits, centres.value if constants["CENTRED"] else None, merged,
        query if apart else None, shift if apart else None, rows if apart else None, kv_indices if apart else None,
        None if key_basis is None else key_basis.first, None if value_basis is None else value_basis.first, batch, splits,
        merged.stride(0), merged.stride(1), query.stride(0), query.stride(1), rows.stride(0), scale, **constants, num_warps=1 if constants["WIDTH"] >= head_dim else 4,
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    if value_basis is not None:
        # A request without tokens attends to nothing, so that no mean value is owed.
        behind = Overlap(follows=overlap)
        transform_heads(
            merged, value_basis.inverse, heads, after=value_basis.mean, out=out, indptr=kv_indptr, overlap=behind
        )
    elif later:
        centre = None if centres.value is None else centres.value.repeat_interleave(group, 0)
        turned = rotate_heads(merged, inverse=True, dtype=out.dtype, centre=centre)
        empty = kv_indptr[1:] == kv_indptr[:-1]  # attends to nothing, so that no mean value is owed
        out.copy_(turned.masked_fill_(empty[:, None, None], 0))
    return out


def _has_first(spec: LayerSpec) -> bool:
    """Whether a request's first token is left to the merge: banded sides store it relative to a point of its own."""
    return spec.key.banded or spec.value.banded


def decode_workspace(
    batch: int,
    splits: int,
    query_heads: int,
    head_dim: int,
    launch: DecodeLaunch,
    device: torch.device,
    per_request: bool = False,
) -> Workspace:
    """Space for the partial results of :func:`decode` with these parameters."""
    parts = decode_parts(batch, splits, per_request)
    shape = (parts, launch.runs, query_heads)
    return Workspace(
        torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
    )


def decode_constants(
    spec: LayerSpec,
    heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    row_stride: int,
    launch: DecodeLaunch,
    soft_cap: float = 0.0,
    window: int = 0,
    overlap: bool = False,
) -> dict[str, Any]:
    """Compile-time constants of :func:`decode_kernel`; ``dtype`` is the query's."""
    key_side, value_side = sides(spec, heads, head_dim)
    model = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    # fp16 has room for more planes without a shift, and for bytes; its subnormal numbers need no bias.
    key_dtype = tl.float16 if ASSEMBLY and key_side.bits < 16 else model
    value_dtype = tl.float16 if ASSEMBLY and value_side.bits < 16 else model
    return {
        "KEY": key_side, "VALUE": value_side, "ROW": row_stride, "HEADS": heads, "GROUP": group, "HEAD_DIM": head_dim,
        "CAP": soft_cap, "WINDOW": window, "KEY_DTYPE": key_dtype, "VALUE_DTYPE": value_dtype, "BATCH": launch.batch,
        "RUNS": launch.runs, "TOKENS": launch.tokens, "COLUMNS": launch.columns, "STAGES": launch.stages,
        "OVERLAP": overlap, "FIRST": _has_first(spec),
    }  # fmt: skip


def merge_constants(
    spec: LayerSpec,
    batch: int,
    splits: int,
    heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    launch: DecodeLaunch,
    window: int = 0,
    overlap: bool = False,
    soft_cap: float = 0.0,
) -> dict[str, Any]:
    """Compile-time constants of :func:`merge_kernel`.

    Few partial results: one warp merges a head. Many: its channels are spread over several programs.
    """
    apart = _has_first(spec)
    key_side, value_side = sides(spec, heads, head_dim)
    rotated = spec.value.rotated and rotation_block(head_dim) == head_dim
    few = splits * launch.runs <= 12 * batch or rotated
    # Beside a first token's row of a wide head, more parts at a time would not fit in registers.
    width, parts = (triton.next_power_of_2(head_dim), 8) if few else (32, 64 if apart and head_dim > 128 else 128)
    return {
        "GROUP": group, "HEAD_DIM": head_dim, "WIDTH": width, "ROTATED": rotated,
        "CENTRED": spec.value.centred and (rotated or not spec.value.rotated),
        "WINDOW": window, "RUNS": launch.runs, "TILE": launch.runs * launch.tokens, "PARTS": parts, "OVERLAP": overlap,
        "FIRST": apart, "CAP": soft_cap if apart else 0.0, "KEY": key_side if apart else None,
        "VALUE": value_side if apart else None, "RAW": tl.float16 if dtype == torch.float16 else tl.bfloat16,
    }  # fmt: skip
