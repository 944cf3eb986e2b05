# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"

"""Merge of decode's partial results, with the first token of banded layers, sinks, and the way back out of the basis of values.

A request's sink enters here, once, however many partial results there are. It has no value, so that it only scales the result, after
what was taken from the values has been added again.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtuner_kernels.basis_kernel import Overlap, bases, transform_heads
from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.merge_parts import first_rows, first_scores, sink_logits, spans
from kvtuner_kernels.operands import butterflies, power_of_2, rotation_shift, share_beside
from kvtuner_kernels.reference import Centres, rotation_block
from kvtuner_kernels.rotation import rotate_heads
from kvtuner_kernels.sides import sides
from kvtuner_kernels.tuning import DecodeLaunch, overlaps

FEW_PARTS: Final = 12  # of a request in the mean: up to here a warp, or a tile's row, merges them one after the other
BACK_WARPS: Final = 8
BACK_COLUMNS: Final = 128


@triton.jit(do_not_specialize=["batch", "splits"])
def merge_kernel(
    partial, lse, kv_indptr, split_counts, centre, out, query, query_shift, rows, kv_indices, key_point, value_point,
    sinks, sink_query, key_mean, shares, batch, splits,
    out_token_stride, out_head_stride, query_token_stride, query_head_stride, row_stride, sink_token_stride, sink_head_stride,
    softmax_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROTATED: tl.constexpr, CENTRED: tl.constexpr,
    WINDOW: tl.constexpr, RUNS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
    FIRST: tl.constexpr, CAP: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted mean of a request's partial results, and of its first token if that is handled separately (FIRST).

    A request without tokens gives 0. With ``sinks``, results are what visible tokens leave of them, or, if the values' basis is left
    later, that share is written to ``shares`` (fp32 [batch, query heads]). Grid: (batch, query heads, blocks of WIDTH channels); to
    rotate back, one block has all channels.
    """
    if OVERLAP and FIRST:
        gdc_launch_dependents()
    request = tl.program_id(0)
    head = tl.program_id(1)
    query_heads = tl.num_programs(1)
    first, last, high = spans(kv_indptr, split_counts, request, batch, splits, WINDOW, FIRST, TILE)
    channel = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)[None, :]
    top = tl.full([1, 1], -1.0e30, tl.float32)
    total = tl.zeros([1, 1], tl.float32)
    acc = tl.zeros([1, WIDTH], tl.float32)
    if FIRST:  # not written by the previous kernels: read while they run
        one = tl.zeros([1], tl.int32)
        these = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
        key, acc, seen = first_rows(
            rows, kv_indptr, kv_indices, one + request, one + head // GROUP, high, these, key_point, value_point, row_stride,
            KEY, VALUE, HEAD_DIM, WINDOW, RAW,
        )  # fmt: skip
    if OVERLAP:
        gdc_wait()
    if sinks is not None:
        zero = tl.zeros([1], tl.int32)
        sink = sink_logits(
            sinks, sink_query, key_mean, zero + request, zero + head, zero + head // GROUP, sink_token_stride, sink_head_stride,
            softmax_scale, HEAD_DIM,
        )  # fmt: skip
    if FIRST:
        score = first_scores(
            key, query, query_shift, one + request, one + head, query_heads, query_token_stride, query_head_stride,
            softmax_scale, HEAD_DIM, CAP,
        )  # fmt: skip
        top = tl.where(seen, score, top)
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
    if sinks is not None:
        share = share_beside(sink, top, total)
        if shares is None:
            result *= share
        else:
            tl.store(shares + request * query_heads + head + tl.zeros([1, 1], tl.int32), share)
    target = out + request.to(tl.int64) * out_token_stride + head * out_head_stride + channel
    tl.store(target, result.to(out.dtype.element_ty), mask=channel < HEAD_DIM)


@triton.jit(do_not_specialize=["batch", "splits", "pairs"])
def merge_back_kernel(
    partial, lse, kv_indptr, split_counts, matrix, mean, out, query, query_shift, rows, kv_indices, key_point, value_point,
    sinks, sink_query, key_mean,
    batch, splits, pairs, out_token_stride, out_head_stride, query_token_stride, query_head_stride, row_stride,
    sink_token_stride, sink_head_stride, softmax_scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, RUNS: tl.constexpr, TILE: tl.constexpr,
    OVERLAP: tl.constexpr, CAP: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, RAW: tl.constexpr,
    TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """:func:`merge_kernel` for a layer whose values are banded, and ``inverse @ merged + mean``, which leaves their basis.

    A row's result depends, bit for bit, on the row alone. ``matrix`` is :attr:`kvtuner_kernels.bands.Basis.dual`. Grid: (tiles of pairs of a request and a query head of one KV head, KV heads, blocks of COLUMNS channels).
    """
    kv_head = tl.program_id(1)
    query_heads = tl.num_programs(1) * GROUP
    pair = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    live = pair < pairs
    request = tl.minimum(pair // GROUP, batch - 1)
    head = kv_head * GROUP + pair % GROUP
    channel = tl.arange(0, power_of_2(HEAD_DIM))
    exists = channel < HEAD_DIM
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    wanted = column < HEAD_DIM
    # Nothing here is written by the previous kernels: it is read while they run.
    weight = tl.load(
        matrix + kv_head * (HEAD_DIM * HEAD_DIM) + channel[:, None] * HEAD_DIM + column[None, :],
        mask=exists[:, None] & wanted[None, :],
        other=0.0,
    )
    first, last, high = spans(kv_indptr, split_counts, request, batch, splits, WINDOW, True, TILE)
    key, acc, seen = first_rows(
        rows, kv_indptr, kv_indices, request, tl.zeros([TILE_ROWS], tl.int32) + kv_head, high, channel, key_point, value_point,
        row_stride, KEY, VALUE, HEAD_DIM, WINDOW, RAW,
    )  # fmt: skip
    if OVERLAP:
        gdc_wait()
    if sinks is not None:
        sink = sink_logits(
            sinks, sink_query, key_mean, request, head, tl.zeros([TILE_ROWS], tl.int32) + kv_head, sink_token_stride,
            sink_head_stride, softmax_scale, HEAD_DIM,
        )  # fmt: skip
    score = first_scores(
        key, query, query_shift, request, head, query_heads, query_token_stride, query_head_stride, softmax_scale,
        HEAD_DIM, CAP,
    )  # fmt: skip
    top = tl.where(seen, score, -1.0e30)
    total = tl.where(seen, 1.0, 0.0)
    longest = tl.max(tl.where(live, last - first, 0))
    for step in tl.range(0, longest * RUNS):
        part = first * RUNS + step
        some = part < last * RUNS
        row = part.to(tl.int64) * query_heads + head
        log = tl.load(lse + row, mask=some, other=float("-inf"))[:, None]
        values = tl.load(
            partial + row[:, None] * HEAD_DIM + channel[None, :], mask=some[:, None] & exists[None, :], other=0.0
        )
        new_top = tl.maximum(top, log)
        decay = tl.exp2(top - new_top)
        p = tl.exp2(log - new_top)
        top = new_top
        total = total * decay + p
        acc = acc * decay + values * p
    merged = acc / tl.where(total > 0, total, 1.0)
    result = tl.dot(merged, weight, input_precision="tf32x3")
    shift = tl.load(mean + kv_head * HEAD_DIM + column, mask=wanted, other=0.0)[None, :]
    result += tl.where(
        total > 0, shift, 0.0
    )  # a request without tokens attends to nothing, so that no mean value is owed
    if sinks is not None:
        result *= share_beside(sink, top, total)
    target = out + request.to(tl.int64)[:, None] * out_token_stride + head[:, None] * out_head_stride + column[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=live[:, None] & wanted[None, :])


def merge(
    out: Tensor,
    partial: Tensor,
    lse: Tensor,
    query: Tensor,
    shift: Tensor | None,
    rows: Tensor,
    spec: LayerSpec,
    heads: int,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    num_kv_splits: Tensor | None,
    splits: int,
    centres: Centres,
    launch: DecodeLaunch,
    softmax_scale: float,
    soft_cap: float,
    window: int,
    dtype: torch.dtype,
    sinks: Tensor | None = None,
    plain_query: Tensor | None = None,
) -> None:
    """Merge what :func:`kvtuner_kernels.decode.decode_kernel` wrote, and leave the basis or rotation of values.

    Args:
        out: [B, Hq, D] of ``dtype``, written; zeros for a request without tokens.
        partial, lse: partial results.
        query: [B, Hq, D] as the kernel took them, in the basis of keys.
        shift: fp32 [B, Hq], what centring removed from scores, where a soft cap needs it.
        sinks: fp32 [Hq], or None.
        plain_query: [B, Hq, D] in the model's own basis; given with ``sinks``.
        The rest is as in :func:`kvtuner_kernels.decode.decode`.
    """
    batch, query_heads, head_dim = query.shape
    group = query_heads // heads
    overlap = overlaps(rows.device)
    early = {"launch_pdl": True} if overlap else {}
    # If splits depend on the request alone, their merge must not depend on the batch either.
    counted = batch if num_kv_splits is None else 1
    key_basis, value_basis = bases(spec, centres)
    key_point = None if key_basis is None else key_basis.first
    value_point = None if value_basis is None else value_basis.first
    key_mean, shares, sink_strides = None, None, (None, None)
    if (
        sinks is not None and plain_query is not None and not soft_cap
    ):  # under a soft cap, scores have what centring took
        key_mean = centres.key if key_basis is None else key_basis.mean
        sink_strides = (plain_query.stride(0), plain_query.stride(1)) if key_mean is not None else sink_strides
    sink_query = None if key_mean is None else plain_query
    if value_basis is not None and leaves_basis(spec, counted, splits, head_dim, launch):
        pairs = batch * group
        constants = merge_back_constants(spec, heads, group, head_dim, dtype, launch, window, overlap, soft_cap)
        merge_back_kernel[(triton.cdiv(pairs, constants["TILE_ROWS"]), heads, triton.cdiv(head_dim, constants["COLUMNS"]))](
            partial, lse, kv_indptr, num_kv_splits, value_basis.dual, value_basis.mean, out, query, shift, rows, kv_indices,
            key_point, value_point, sinks, sink_query, key_mean, batch, splits, pairs, out.stride(0), out.stride(1),
            query.stride(0), query.stride(1), rows.stride(0), *sink_strides, softmax_scale, **constants, num_warps=BACK_WARPS, **early,
        )  # fmt: skip
        return
    rotated_later = spec.value.rotated and rotation_block(head_dim) < head_dim
    later = rotated_later or value_basis is not None  # undone by a separate kernel
    merged = torch.empty(query.shape, dtype=torch.float32, device=query.device) if later else out
    constants = merge_constants(spec, counted, splits, heads, group, head_dim, dtype, launch, window, overlap, soft_cap)
    if sinks is not None and later:
        shares = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    apart = has_first(spec)
    merge_kernel[(batch, query_heads, triton.cdiv(head_dim, constants["WIDTH"]))](
        partial, lse, kv_indptr, num_kv_splits, centres.value if constants["CENTRED"] else None, merged,
        query if apart else None, shift if apart else None, rows if apart else None, kv_indices if apart else None,
        key_point, value_point, sinks, sink_query, key_mean, shares, batch, splits, merged.stride(0), merged.stride(1),
        query.stride(0), query.stride(1), rows.stride(0), *sink_strides, softmax_scale, **constants, num_warps=1 if constants["WIDTH"] >= head_dim else 4, **early,
    )  # fmt: skip
    if value_basis is not None:
        # A request without tokens attends to nothing, so that no mean value is owed.
        behind = Overlap(follows=overlap)
        transform_heads(
            merged, value_basis.inverse, heads, after=value_basis.mean, out=out,
            indptr=kv_indptr if shares is None else None, shares=shares, overlap=behind,
        )  # fmt: skip
    elif later:
        centre = None if centres.value is None else centres.value.repeat_interleave(group, 0)
        if shares is not None:
            out.copy_(rotate_heads(merged, inverse=True, centre=centre).mul_(shares[..., None]))
            return
        turned = rotate_heads(merged, inverse=True, dtype=out.dtype, centre=centre)
        empty = kv_indptr[1:] == kv_indptr[:-1]  # attends to nothing, so that no mean value is owed
        out.copy_(turned.masked_fill_(empty[:, None, None], 0))


def has_first(spec: LayerSpec) -> bool:
    """Whether a request's first token is left to the merge: banded sides store it relative to a point of its own."""
    return spec.key.banded or spec.value.banded


def few_parts(batch: int, splits: int, launch: DecodeLaunch) -> bool:
    """Whether ``batch`` requests have so few partial results that one warp or row takes all of a request's."""
    return splits * launch.runs <= FEW_PARTS * batch


def leaves_basis(spec: LayerSpec, batch: int, splits: int, head_dim: int, launch: DecodeLaunch) -> bool:
    """Whether :func:`merge_back_kernel` merges, because values are banded and the matrix fits in registers."""
    return spec.value.banded and head_dim <= 128 and few_parts(batch, splits, launch)


def merge_back_constants(
    spec: LayerSpec,
    heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    launch: DecodeLaunch,
    window: int = 0,
    overlap: bool = False,
    soft_cap: float = 0.0,
) -> dict[str, Any]:
    """Compile-time constants of :func:`merge_back_kernel`."""
    key_side, value_side = sides(spec, heads, head_dim)
    return {
        "GROUP": group, "HEAD_DIM": head_dim, "WINDOW": window, "RUNS": launch.runs, "TILE": launch.runs * launch.tokens,
        "OVERLAP": overlap, "CAP": soft_cap, "KEY": key_side, "VALUE": value_side,
        "RAW": tl.float16 if dtype == torch.float16 else tl.bfloat16, "TILE_ROWS": 16, "COLUMNS": BACK_COLUMNS,
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
    apart = has_first(spec)
    key_side, value_side = sides(spec, heads, head_dim)
    rotated = spec.value.rotated and rotation_block(head_dim) == head_dim
    few = few_parts(batch, splits, launch) or rotated
    # Beside a first token's row of a wide head, more parts at a time would not fit in registers.
    width, parts = (triton.next_power_of_2(head_dim), 8) if few else (32, 64 if apart and head_dim > 128 else 128)
    return {
        "GROUP": group, "HEAD_DIM": head_dim, "WIDTH": width, "ROTATED": rotated,
        "CENTRED": spec.value.centred and (rotated or not spec.value.rotated),
        "WINDOW": window, "RUNS": launch.runs, "TILE": launch.runs * launch.tokens, "PARTS": parts, "OVERLAP": overlap,
        "FIRST": apart, "CAP": soft_cap if apart else 0.0, "KEY": key_side if apart else None,
        "VALUE": value_side if apart else None, "RAW": tl.float16 if dtype == torch.float16 else tl.bfloat16,
    }  # fmt: skip
