# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"
# ruff: noqa: RUF005, RET505 - see operands.py
"""Heads times a matrix, and rows to numbers: the way into a fitted basis and out of it.

Products take fp32 operands, split into three products of tf32, which is about the accuracy of fp32. Tiles have 16 or 32 rows,
never the 64 for which Hopper uses another instruction, and one order of channels: so a row's result depends, bit for bit, on
the row alone.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtuner_kernels.bands import Basis, basis
from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_kernels.operands import (
    FIRST_MARK,
    plane_bits,
    plane_half,
    plane_run,
    plane_start,
    plane_step,
    power_of_2,
    scale_byte,
    scale_of,
)
from kvtuner_kernels.planes import banded
from kvtuner_kernels.reference import NO_CENTRES, Centres
from kvtuner_kernels.sides import HEAD_DIMS, sides

FEW_TILES = 512  # of 16 rows, over all heads: up to this number tiles stay small, so that they spread over the chip
TRANSFORM_WARPS = 4
CHUNK = tl.constexpr(32)  # channels that are multiplied at a time
FIRST_TILE = 1024  # channels a program of first_rows


@triton.jit
def product(x, live, before, weights, exists, column_stride, HEAD_DIM: tl.constexpr):
    """``weights @ (x - before)`` as fp32 [R, W], for pointers to rows ``x`` [R, 1], ``before``, and matrix rows ``weights`` [W, 1].

    Entries that are neither ``live`` [R, 1] nor ``exists`` [W, 1] are 0.
    """
    acc = tl.zeros([x.shape[0], weights.shape[0]], tl.float32)
    for start in tl.range(0, HEAD_DIM, CHUNK):
        acc = multiplied(acc, x, live, before, weights, exists, column_stride, start, HEAD_DIM)
    return acc


@triton.jit
def multiplied(acc, x, live, before, weights, exists, column_stride, start, HEAD_DIM: tl.constexpr):
    """``acc`` plus the part of :func:`product` that comes from CHUNK channels."""
    channel = start + tl.arange(0, CHUNK)[None, :]
    inside = channel < HEAD_DIM
    part = tl.load(x + channel, mask=live & inside, other=0.0).to(tl.float32)
    if before is not None:
        part -= tl.load(before + channel, mask=inside, other=0.0)
    weight = tl.load(weights + channel * column_stride, mask=exists & inside, other=0.0)
    return tl.dot(part, tl.trans(weight), acc, input_precision="tf32x3")


@triton.jit
def _product_later(x, live, weights, exists, column_stride, HEAD_DIM: tl.constexpr):
    """:func:`product`, bit for bit, for ``x`` written by the previous kernel: the matrix is read while that one runs."""
    matrix = ()
    for start in tl.static_range(0, HEAD_DIM, CHUNK):
        column = start + tl.arange(0, CHUNK)[None, :]
        matrix = matrix + (tl.load(weights + column * column_stride, mask=exists & (column < HEAD_DIM), other=0.0),)
    gdc_wait()
    acc = tl.zeros([x.shape[0], weights.shape[0]], tl.float32)
    for start in tl.static_range(0, HEAD_DIM, CHUNK):
        column = start + tl.arange(0, CHUNK)[None, :]
        part = tl.load(x + column, mask=live & (column < HEAD_DIM), other=0.0).to(tl.float32)
        acc = tl.dot(part, tl.trans(matrix[start // CHUNK]), acc, input_precision="tf32x3")
    return acc


@triton.jit(do_not_specialize=["pairs"])
def transform_kernel(
    x, matrix, before, after, indptr, shares, out, pairs, token_stride, head_stride, out_token_stride, out_head_stride,
    matrix_stride, matrix_row_stride, matrix_column_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LEADS: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """``out = matrix @ (x - before) + after``, times a head's ``shares``, and 0 for a token whose span of ``indptr`` is empty.

    Grid: (tiles of pairs of a token and a query head of one KV head, KV heads, blocks of channels). LEADS: the next kernel may be
    scheduled early. FOLLOWS: this one was scheduled early, and waits for the previous one.
    """
    if LEADS:
        gdc_launch_dependents()
    head = tl.program_id(1)
    pair = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    live = (pair < pairs)[:, None]
    token = (pair // GROUP).to(tl.int64)[:, None]
    query_head = head * GROUP + (pair % GROUP)[:, None]
    at = x + token * token_stride + query_head * head_stride
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    weights = matrix + head * matrix_stride + column[:, None] * matrix_row_stride
    if before is not None:
        before += head * HEAD_DIM
    if FOLLOWS and COLUMNS <= 64 and HEAD_DIM <= 128 and before is None:  # a larger matrix would not fit in registers
        acc = _product_later(at, live, weights, (column < HEAD_DIM)[:, None], matrix_column_stride, HEAD_DIM)
    else:
        if FOLLOWS:
            gdc_wait()
        acc = product(at, live, before, weights, (column < HEAD_DIM)[:, None], matrix_column_stride, HEAD_DIM)
    column = column[None, :]
    if after is not None:
        acc += tl.load(after + head * HEAD_DIM + column, mask=column < HEAD_DIM, other=0.0)
    if indptr is not None:
        exists = live & (tl.load(indptr + token, mask=live, other=0) < tl.load(indptr + token + 1, mask=live, other=0))
        acc = tl.where(exists, acc, 0.0)
    if shares is not None:
        acc *= tl.load(shares + token * (HEADS * GROUP) + query_head, mask=live, other=0.0)
    target = out + token * out_token_stride + query_head * out_head_stride + column
    tl.store(target, acc.to(out.dtype.element_ty), mask=live & (column < HEAD_DIM))


class Overlap(NamedTuple):
    """How a kernel's launch overlaps its neighbours' (programmatic dependent launch, from sm_90 on)."""

    leads: bool = False  # the next kernel is scheduled early, and waits
    follows: bool = False  # this one is


ALONE: Final = Overlap()


def transform_heads(
    x: Tensor,
    matrix: Tensor,
    heads: int,
    before: Tensor | None = None,
    after: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
    indptr: Tensor | None = None,
    shares: Tensor | None = None,
    overlap: Overlap = ALONE,
) -> Tensor:
    """``matrix @ (x - before) + after`` for each token and head, in fp32, as a dense ``dtype`` [N, Hq, D] tensor.

    Args:
        x: [N, Hq, D] fp32 or 16-bit, Hq a multiple of ``heads``; query head ``h`` belongs to KV head ``h // (Hq // heads)``.
        matrix: fp32 [heads, D, D], dense or transposed.
        heads: KV heads.
        before, after: fp32 [heads, D], dense; zero if not given.
        out: [N, Hq, D], dense along D, written instead of a new tensor; its dtype counts.
        indptr: int32 [N + 1]; a token whose span is empty gives 0.
        shares: fp32 [N, Hq], dense: factors of the results, such as what a sink leaves.
        overlap: with the kernels launched before and after.

    Raises:
        LayoutError: for shapes or dtypes that the kernel does not cover.
    """
    tokens, query_heads, head_dim = x.shape
    if query_heads % heads or head_dim not in HEAD_DIMS:
        raise LayoutError(
            f"{query_heads} heads of {head_dim} channels: expected a multiple of {heads} heads of one of {HEAD_DIMS}"
        )
    if matrix.shape != (heads, head_dim, head_dim) or matrix.dtype != torch.float32:
        raise LayoutError(
            f"the matrix is {matrix.dtype} {list(matrix.shape)}, expected float32 {[heads, head_dim, head_dim]}"
        )
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out
    if tokens == 0:
        return out
    pairs = tokens * (query_heads // heads)
    constants = transform_constants(pairs, heads, query_heads // heads, head_dim, overlap)
    grid = (triton.cdiv(pairs, constants["TILE_ROWS"]), heads, triton.cdiv(head_dim, constants["COLUMNS"]))
    transform_kernel[grid](
        x, matrix, before, after, indptr, shares, out, pairs, x.stride(0), x.stride(1), out.stride(0), out.stride(1),
        *matrix.stride(), **constants, num_warps=TRANSFORM_WARPS, **({"launch_pdl": True} if overlap.follows else {}),
    )  # fmt: skip
    return out


def transform_constants(pairs: int, heads: int, group: int, head_dim: int, overlap: Overlap = ALONE) -> dict[str, Any]:
    """Compile-time constants of :func:`transform_kernel` for ``pairs`` of a token and a query head of one KV head."""
    few = triton.cdiv(pairs, 16) * heads <= FEW_TILES
    # With heads of 80 or 96, one block of channels wastes a third of the products, three blocks read x three times.
    columns = 64 if few or head_dim in (64, 192) else 128
    return {
        "HEADS": heads, "GROUP": group, "HEAD_DIM": head_dim, "TILE_ROWS": 16 if few else 32, "COLUMNS": columns,
        "LEADS": overlap.leads, "FOLLOWS": overlap.follows,
    }  # fmt: skip


def bases(spec: LayerSpec, centres: Centres) -> tuple[Basis | None, Basis | None]:
    """The bases of a layer's keys and values; None for a side that is not banded."""
    key, value = (
        basis(centre) if side.banded and centre is not None else None
        for side, centre in zip((spec.key, spec.value), centres, strict=True)
    )
    return key, value


@triton.jit
def dequantized(row, head, channel, mask, SIDE: tl.constexpr, HEAD_DIM: tl.constexpr, RAW: tl.constexpr):
    """Stored numbers of one side: fp32 [R, W] on their grid, neither rotated back nor uncentred.

    First tokens of a banded side come relative to their point; numbers of raw sides have type RAW.

    Args:
        row: pointers to rows, uint8 [R].
        head: KV head of each, [R].
        channel: [W], of the basis where the side is banded.
        mask: [R, W], the entries to read; the rest is 0.

    Returns:
        the numbers, and whether a row is marked as a first token's [R, 1] (never, unless the side is banded).
    """
    words = (row + SIDE.codes).to(tl.pointer_type(tl.uint16)) + head * (SIDE.head_codes // 2)
    metadata = (row + SIDE.metadata).to(tl.pointer_type(tl.float16))
    marked = tl.zeros([row.shape[0], 1], tl.int1)
    if SIDE.bits == 16:
        raw = tl.load(words[:, None] + channel[None, :], mask=mask, other=0)
        return raw.to(RAW, bitcast=True).to(tl.float32), marked
    elif banded(SIDE):
        band = channel // SIDE.words
        at = channel % SIDE.words
        start = tl.zeros(channel.shape, tl.int32)
        top = start
        half = tl.zeros(channel.shape, tl.float32)
        step = half
        PLANES: tl.constexpr = SIDE.planes_a_group
        for x in tl.static_range(PLANES):
            at += tl.where(band == x, plane_run(SIDE, x) * SIDE.words, 0)
            start = tl.where(band == x, plane_start(SIDE, x), start)
            top = tl.where(band == x, 2 ** plane_bits(SIDE, x) - 1, top)
            half = tl.where(band == x, plane_half(SIDE, x), half)
            step = tl.where(band == x, plane_step(SIDE, x), step)
        stored = tl.load(words[:, None] + at[None, :], mask=mask & (top > 0)[None, :], other=0).to(tl.int32)
        code = (stored >> start[None, :]) & top[None, :]
        some = tl.max(mask.to(tl.int32), 1, keep_dims=True) > 0
        word = tl.arange(0, power_of_2(SIDE.words))[None, :]
        first = tl.load(words[:, None] + word, mask=some & (word < SIDE.words), other=0)
        number = scale_byte(first, SIDE)[:, None]
        scale = tl.where(some, scale_of(number & (FIRST_MARK - 1)), 0.0)
        return (code.to(tl.float32) - half[None, :]) * step[None, :] * scale, number >= FIRST_MARK
    else:
        SEGMENT: tl.constexpr = SIDE.planes * SIDE.words
        EACH: tl.constexpr = 1 if SIDE.symmetric else 2
        start = channel % SEGMENT // SIDE.words * SIDE.bits
        at = channel // SEGMENT * SIDE.words + channel % SIDE.words
        stored = tl.load(words[:, None] + at[None, :], mask=mask, other=0).to(tl.int32)
        code = (stored >> start[None, :]) & (2**SIDE.bits - 1)
        grid = metadata[:, None] + head[:, None] * (SIDE.groups * EACH)
        grid += (channel // (HEAD_DIM // SIDE.groups) * EACH)[None, :]
        scale = tl.load(grid, mask=mask, other=0.0).to(tl.float32)
        if SIDE.symmetric:
            minimum = scale * (-(2**SIDE.bits - 1) / 2)
        else:
            minimum = tl.load(grid + 1, mask=mask, other=0.0).to(tl.float32)
        return code.to(tl.float32) * scale + minimum, marked


@triton.jit
def _first_side(
    out, point, kv_indptr, kv_indices, rows, pairs, row_stride,
    SIDE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_ROWS: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)  # request and head in one number
    request = pair // HEADS
    head = pair % HEADS
    live = pair < pairs
    begin = tl.load(kv_indptr + request, mask=live, other=0)
    some = live & (tl.load(kv_indptr + request + 1, mask=live, other=0) > begin)
    row = rows + tl.load(kv_indices + begin, mask=some, other=0).to(tl.int64) * row_stride
    channel = tl.arange(0, power_of_2(HEAD_DIM))
    exists = (channel < HEAD_DIM)[None, :]
    values, marked = dequantized(row, head, channel, some[:, None] & exists, SIDE, HEAD_DIM, RAW)
    if banded(SIDE):
        wanted = some[:, None] & exists & marked
        values += tl.load(point + head[:, None] * HEAD_DIM + channel[None, :], mask=wanted, other=0.0)
    target = out + pair.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
    tl.store(target, values, mask=live[:, None] & exists)  # 0 where nothing was read


@triton.jit(do_not_specialize=["pairs"])
def first_rows_kernel(
    key, value, key_point, value_point, kv_indptr, kv_indices, rows, pairs, row_stride,
    KEY: tl.constexpr, VALUE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_ROWS: tl.constexpr,
    RAW: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of pairs of a request and a KV head, 2); the second axis is keys, then values."""
    if tl.program_id(1) == 0:
        _first_side(
            key, key_point, kv_indptr, kv_indices, rows, pairs, row_stride, KEY, HEADS, HEAD_DIM, TILE_ROWS, RAW
        )
    else:
        _first_side(
            value, value_point, kv_indptr, kv_indices, rows, pairs, row_stride, VALUE, HEADS, HEAD_DIM, TILE_ROWS, RAW
        )


def first_rows(
    rows: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    spec: LayerSpec,
    heads: int,
    head_dim: int,
    centres: Centres = NO_CENTRES,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Key and value of each request's first slot, fp32 [B, H, D], in the basis in which kernels attend.

    That is: on its grid, still rotated and centred as stored. First tokens of banded sides have their point added. Safe under
    CUDA-graph capture.

    Args:
        rows: the pool, uint8 [R, row bytes].
        kv_indptr: int32 or int64 [B + 1]; request ``b`` has the slots ``kv_indices[kv_indptr[b]:kv_indptr[b + 1]]``.
        kv_indices: int64 slots.
        dtype: of 16-bit sides, which must be the type that was stored.

    Returns:
        keys and values; zeros for a request without slots.
    """
    key_side, value_side = sides(spec, heads, head_dim)
    if dtype.itemsize != 2 and 16 in (key_side.bits, value_side.bits):
        raise TypeError(f"a 16-bit side cannot be read as {dtype}: give the dtype that was stored")
    requests = len(kv_indptr) - 1
    key, value = torch.empty(2, requests, heads, head_dim, dtype=torch.float32, device=rows.device)
    if requests:
        points = [None if found is None else found.first for found in bases(spec, centres)]
        constants = first_rows_constants(spec, heads, head_dim, dtype)
        first_rows_kernel[(triton.cdiv(requests * heads, constants["TILE_ROWS"]), 2)](
            key, value, *points, kv_indptr, kv_indices, rows, requests * heads, rows.stride(0), **constants
        )
    return key, value


def first_rows_constants(spec: LayerSpec, heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time constants of :func:`first_rows_kernel`."""
    key_side, value_side = sides(spec, heads, head_dim)
    return {
        "KEY": key_side, "VALUE": value_side, "HEADS": heads, "HEAD_DIM": head_dim,
        "TILE_ROWS": max(1, FIRST_TILE // triton.next_power_of_2(head_dim)),
        "RAW": tl.float16 if dtype == torch.float16 else tl.bfloat16,
    }  # fmt: skip
