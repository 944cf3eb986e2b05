# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment, misc"
# ruff: noqa: RUF005, RET505, SIM300 - see operands.py
"""Attention of new tokens over a packed prefix and their own chunk.

A program takes one KV head and a tile of rows; a row is one query head of one new token, so that a tile of keys is read and
unpacked once for the whole query group. Keys are multiplied as integer codes, and scale and minimum folded into the scores; values
are put on their grid in registers, in the model's dtype. Splits of the prefix are not covered: a short chunk over a long prefix leaves
multiprocessors idle.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_kernels.operands import (
    ASSEMBLY,
    check_centre,
    check_rows,
    codes,
    fill,
    grid_of,
    log2,
    power_of_2,
    rounded,
    sides,
)
from kvtuner_kernels.reference import NO_CENTRES, Centres
from kvtuner_kernels.rotation import rotate_heads
from kvtuner_kernels.tuning import LONG, ExtendLaunch, extend_launch, shared_memory

LOG2E = tl.constexpr(1.4426950408889634)
ASSEMBLY_BODY = tl.constexpr(ASSEMBLY)


@triton.jit
def _column_channel(column, GROUP: tl.constexpr, SIDE: tl.constexpr):
    """Channel within the head of a column of :func:`_tile`, and whether it exists."""
    PLANES_A_GROUP: tl.constexpr = SIDE.planes_a_group
    word = column // PLANES_A_GROUP
    return (GROUP * PLANES_A_GROUP + column % PLANES_A_GROUP) * SIDE.words + word, word < SIDE.words


@triton.jit
def _load_query(query, at, live, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Per group of the keys one [M, columns] operand, columns as in :func:`_tile`, and the sum of q [M, 1]."""
    GROUPS: tl.constexpr = SIDE.groups
    column = tl.arange(0, SIDE.padded * SIDE.planes_a_group)[None, :]
    operands = ()
    sums = ()
    for group in tl.static_range(GROUPS):
        channel, exists = _column_channel(column, group, SIDE)
        part = tl.load(query + at + channel, mask=live & exists, other=0.0).to(DTYPE)
        operands = operands + (part,)
        sums = sums + (tl.sum(part.to(tl.float32), 1, keep_dims=True),)
    return operands, sums


@triton.jit
def _words(rows, slot, head, SEGMENT: tl.constexpr, SIDE: tl.constexpr, ROW: tl.constexpr):
    """uint16 [N, words] of one segment."""
    word = tl.arange(0, SIDE.padded)[None, :]
    pointer = rows.to(tl.pointer_type(tl.uint16)) + (SIDE.codes // 2 + SEGMENT * SIDE.words) + word
    pointer = pointer + slot[:, None] * (ROW // 2) + head * (SIDE.head_codes // 2)
    if SIDE.words == SIDE.padded:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=word < SIDE.words, other=0)


@triton.jit
def _tile(words, GROUP: tl.constexpr, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Codes of one group as [N, words * planes]; planes of a word are neighbours, so that no thread gives codes away."""
    FIRST: tl.constexpr = GROUP * SIDE.planes_a_group % SIDE.planes
    PLANES: tl.constexpr = SIDE.planes_a_group
    BITS: tl.constexpr = SIDE.bits
    planes = ()
    for y in tl.static_range(PLANES):
        planes = planes + (codes(words, BITS, FIRST + y, DTYPE, ASSEMBLY_BODY),)
    for step in tl.static_range(log2(PLANES)):
        joined = ()
        for y in tl.static_range(PLANES >> (step + 1)):
            joined = joined + (tl.join(planes[y], planes[y + (PLANES >> (step + 1))]),)
        planes = joined
    return planes[0].reshape([words.shape[0], words.shape[1] * PLANES])


@triton.jit
def _packed_scores(rows, slot, head, operands, sums, SIDE: tl.constexpr, ROW: tl.constexpr, DTYPE: tl.constexpr):
    """q . k as [M, N] without the softmax scale."""
    GROUPS: tl.constexpr = SIDE.groups
    for group in tl.static_range(GROUPS):
        if group * SIDE.planes_a_group % SIDE.planes == 0:
            words = _words(rows, slot, head, group * SIDE.planes_a_group // SIDE.planes, SIDE, ROW)
        part = tl.dot(operands[group], tl.trans(_tile(words, group, SIDE, DTYPE)))
        if SIDE.bits < 16:
            scale, minimum = grid_of(rows, slot, head, group, SIDE, ROW)
            part = part * scale[None, :] + minimum[None, :] * sums[group]
        if group == 0:
            scores = part
        else:
            scores += part
    return scores


@triton.jit
def _add_packed(rows, slot, head, p, decay, acc, SIDE: tl.constexpr, ROW: tl.constexpr, DTYPE: tl.constexpr):
    """Decay the accumulators and add a packed tile's values, weighted with ``p`` [M, N].

    Values are put on their grid in registers: unlike in decode, a tile of them is multiplied with many rows.
    """
    GROUPS: tl.constexpr = SIDE.groups
    weights = rounded(p, DTYPE, ASSEMBLY_BODY)
    new_acc = ()
    for group in tl.static_range(GROUPS):
        if group * SIDE.planes_a_group % SIDE.planes == 0:
            words = _words(rows, slot, head, group * SIDE.planes_a_group // SIDE.planes, SIDE, ROW)
        values = _tile(words, group, SIDE, DTYPE)
        if SIDE.bits < 16:
            scale, minimum = grid_of(rows, slot, head, group, SIDE, ROW)
            values = rounded(values.to(tl.float32) * scale[:, None] + minimum[:, None], DTYPE, ASSEMBLY_BODY)
        new_acc = new_acc + (tl.dot(weights, values, acc[group] * decay),)
    return new_acc


@triton.jit
def _softmax_step(scores, unit, top, total, softmax_scale, visible, CAP: tl.constexpr):
    """Probabilities [M, N] of a tile, and the new maximum, total and decay [M, 1]; ``unit`` is added to the raw scores."""
    scores = (scores + unit) * softmax_scale
    if CAP != 0:
        scores = CAP * (1 - 2 / (1 + tl.exp2(scores * (2 / CAP * LOG2E))))
    scores = tl.where(visible, scores * LOG2E, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1, keep_dims=True))
    decay = tl.exp2(top - new_top)
    p = tl.exp2(scores - new_top)
    return p, new_top, total * decay + tl.sum(p, 1, keep_dims=True), decay


@triton.jit
def extend_kernel(
    query, prefix_query, key, value, out, rows, qo_indptr, kv_indptr, kv_indices, custom_mask, mask_indptr, key_centre,
    query_token_stride, query_head_stride, prefix_token_stride, prefix_head_stride,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride, out_token_stride, out_head_stride,
    softmax_scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, ROW: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, AS_STORED: tl.constexpr,
    SKIP_PREFIX_MASK: tl.constexpr, DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows, KV heads, requests)."""
    request = tl.program_id(2)
    head = tl.program_id(1)
    first_query = tl.load(qo_indptr + request)
    new = tl.load(qo_indptr + request + 1) - first_query
    first_row = tl.program_id(0) * TILE_ROWS
    first_slot = tl.load(kv_indptr + request)
    stored = tl.load(kv_indptr + request + 1) - first_slot
    row = first_row + tl.arange(0, TILE_ROWS)
    token = (row // GROUP)[:, None]
    query_head = head * GROUP + (row % GROUP)[:, None]
    live = (row < new * GROUP)[:, None]
    before = stored - new if AS_STORED else stored  # tokens before the first new one
    position = before + token
    last = before + tl.minimum((first_row + TILE_ROWS - 1) // GROUP, new - 1)  # of this tile's queries
    earliest = 0
    if WINDOW:
        earliest = tl.maximum(before + first_row // GROUP - WINDOW + 1, 0)
    masked: tl.constexpr = custom_mask is not None
    if masked:
        mask_row = custom_mask + tl.load(mask_indptr + request) + token * (before + new)

    top = tl.full([TILE_ROWS, 1], -1.0e30, tl.float32)
    total = tl.zeros([TILE_ROWS, 1], tl.float32)
    GROUPS: tl.constexpr = VALUE.groups
    PADDED: tl.constexpr = VALUE.padded
    PLANES: tl.constexpr = VALUE.planes_a_group
    acc = fill(GROUPS, [TILE_ROWS, PADDED * PLANES], 0.0)
    column = tl.arange(0, TOKENS)

    at = (first_query + token) * prefix_token_stride + query_head * prefix_head_stride
    operands, sums = _load_query(prefix_query, at, live, KEY, DTYPE)
    at = (first_query + token) * query_token_stride + query_head * query_head_stride
    channel = tl.arange(0, power_of_2(HEAD_DIM))[None, :]
    shift = tl.zeros([TILE_ROWS, 1], tl.float32)
    # What centring took from the scores: the chunk's keys have it, and a soft cap sees it.
    if KEY.centred and (not AS_STORED or CAP != 0):
        q = tl.load(query + at + channel, mask=live & (channel < HEAD_DIM), other=0.0).to(tl.float32)
        centre = tl.load(key_centre + head * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
        shift += tl.sum(q * centre, 1, keep_dims=True)

    busy = first_row < new * GROUP  # else nothing is read and nothing written
    end = tl.where(busy, stored, 0)
    if AS_STORED and CAUSAL and not masked:
        end = tl.minimum(end, last + 1)
    # Low halves: a slot's number fits in 32 bits, its address does not.
    slots = kv_indices.to(tl.pointer_type(tl.int32))
    for tile in tl.range(earliest // TOKENS * TOKENS, end, TOKENS, num_stages=STAGES):
        index = tile + column
        # Beyond the end the last stored token is read again and hidden.
        slot = tl.load(slots + (first_slot + tl.minimum(index, stored - 1)) * 2).to(tl.int64)
        visible = live & (index < end)[None, :]
        if masked:
            if not SKIP_PREFIX_MASK:
                visible = visible & (tl.load(mask_row + index[None, :], mask=visible, other=0) != 0)
        elif AS_STORED and CAUSAL:
            visible = visible & (index[None, :] <= position)
        if WINDOW:
            visible = visible & (index[None, :] > position - WINDOW)
        scores = _packed_scores(rows, slot, head, operands, sums, KEY, ROW, DTYPE)
        p, top, total, decay = _softmax_step(scores, shift, top, total, softmax_scale, visible, CAP)
        acc = _add_packed(rows, slot, head, p, decay, acc, VALUE, ROW, VALUE_DTYPE)

    # Once: from neighbouring planes to neighbouring channels, with gaps where a plane is padded.
    ordered = ()
    for group in tl.static_range(GROUPS):
        planes = acc[group].reshape([TILE_ROWS, PADDED, PLANES]).permute(0, 2, 1)
        ordered = ordered + (planes.reshape([TILE_ROWS, PADDED * PLANES]),)
    acc = ordered
    place = tl.arange(0, PADDED * PLANES)[None, :]
    if PADDED == VALUE.words:
        group_channel = place
        exists = place < PADDED * PLANES
    else:
        group_channel = place // PADDED * VALUE.words + place % PADDED
        exists = place % PADDED < VALUE.words

    if not AS_STORED:
        q = tl.load(query + at + channel, mask=live & (channel < HEAD_DIM), other=0.0).to(DTYPE)
        key_channel = tl.arange(0, power_of_2(HEAD_DIM))[:, None]
        end = tl.where(busy, new, 0)
        if CAUSAL and not masked:
            end = tl.minimum(end, last - before + 1)
        start = 0
        if WINDOW:
            start = tl.maximum(earliest - before, 0) // TOKENS * TOKENS
        for tile in tl.range(start, end, TOKENS, num_stages=STAGES):
            index = tile + column
            inside = index < new
            visible = live & (index < end)[None, :]
            if masked:
                visible = visible & (tl.load(mask_row + before + index[None, :], mask=visible, other=0) != 0)
            elif CAUSAL:
                visible = visible & (index[None, :] <= token)
            if WINDOW:
                visible = visible & (index[None, :] > token - WINDOW)
            keys = key + (first_query + index)[None, :] * key_token_stride + head * key_head_stride + key_channel
            k = tl.load(keys, mask=inside[None, :] & (key_channel < HEAD_DIM), other=0.0).to(DTYPE)
            scores = tl.dot(q, k)
            p, top, total, decay = _softmax_step(scores, 0.0, top, total, softmax_scale, visible, CAP)
            weights = rounded(p, VALUE_DTYPE, ASSEMBLY_BODY)
            values = (
                value + (first_query + index)[:, None] * value_token_stride + head * value_head_stride + group_channel
            )
            new_acc = ()
            for group in tl.static_range(GROUPS):
                v = tl.load(values + group * (PLANES * VALUE.words), mask=inside[:, None] & exists, other=0.0)
                new_acc = new_acc + (tl.dot(weights, v.to(VALUE_DTYPE), acc[group] * decay),)
            acc = new_acc

    inverse = 1 / tl.where(total > 0, total, 1.0)
    target = out + (first_query + token) * out_token_stride + query_head * out_head_stride + group_channel
    for group in tl.static_range(GROUPS):
        result = (acc[group] * inverse).to(out.dtype.element_ty)
        tl.store(target + group * (PLANES * VALUE.words), result, mask=live & exists)


def extend(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    rows: Tensor,
    spec: LayerSpec,
    heads: int,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    max_new: int,
    out: Tensor | None = None,
    *,
    centres: Centres = NO_CENTRES,
    causal: bool = True,
    custom_mask: Tensor | None = None,
    mask_indptr: Tensor | None = None,
    skip_prefix_mask: bool = True,
    softmax_scale: float | None = None,
    soft_cap: float = 0.0,
    window: int = 0,
    batch_invariant: bool = False,
) -> Tensor:
    """Attention of the new tokens of several requests over their packed prefixes and over each other.

    Args:
        query: [T, Hq, D] bf16 or fp16, all requests' new tokens in turn; query head ``h`` reads KV head ``h // (Hq // H)``.
        key, value: [T, H, D] of the new tokens, read unquantized; both None if ``kv_indices`` covers the new tokens too, which are
            then read as stored. Where values are stored centred or rotated, the chunk's are brought to that basis in 16 bits.
        rows: the pool, uint8 [R, row bytes].
        spec: how the layer is stored.
        heads: local KV heads H.
        qo_indptr: int32 [B + 1], where a request's new tokens start.
        kv_indptr: int32 [B + 1], where a request's slots start in ``kv_indices``; a prefix may be empty.
        kv_indices: int64 slots in the order of tokens.
        max_new: the largest number of new tokens of a request.
        out: [T, Hq, D], written; made if not given.
        centres: centring vectors, given exactly where the spec asks for them.
        causal: a new token sees no later one. Without effect where a custom mask is given.
        custom_mask: bool or uint8, for each request [new tokens, prefix + new tokens] flattened, non-zero where visible.
        mask_indptr: int64 [B + 1], where a request's mask starts.
        skip_prefix_mask: the mask is applied to new tokens only. Without effect if key is None.
        softmax_scale: factor of the scores, above 0; ``D ** -0.5`` if not given.
        soft_cap: scores become ``cap * tanh(score / cap)``; 0 is off.
        window: number of latest tokens that a token sees, itself included; 0 is all.
        batch_invariant: the tile does not depend on ``max_new``. Then a token's result depends, bit for bit, on its own
            request alone, and where nothing is read but stored rows also not on how much of it is prefix.

    Returns:
        ``out``. A token that sees nothing gives zeros.

    Raises:
        LayoutError: for shapes, dtypes or strides that the kernel does not cover.
    """
    tokens, query_heads, head_dim = query.shape
    check_rows(rows, spec, heads, head_dim)
    key_side, value_side = sides(spec, heads, head_dim)
    check_centre(key_side, centres.key, heads, head_dim)
    check_centre(value_side, centres.value, heads, head_dim)
    if query_heads % heads or query.stride(2) != 1:
        raise LayoutError(
            f"{query_heads} query heads, strides {query.stride()}: expected a dense multiple of {heads} heads"
        )
    if (key is None) != (value is None) or (custom_mask is None) != (mask_indptr is None):
        raise LayoutError("give both of key and value, and both of custom_mask and mask_indptr, or neither")
    if query.dtype == torch.float32 and ASSEMBLY:
        raise LayoutError("fp32 queries are for the interpreter alone: convert to bf16 or fp16")
    out = torch.empty_like(query) if out is None else out
    if tokens == 0:
        return out
    as_stored = key is None or value is None
    transformed = value_side.rotated or value_side.centred
    if key is None or value is None:
        key = value = query  # not read
    elif transformed:
        shift = None if centres.value is None else -centres.value
        value = rotate_heads(
            value if shift is None else value.float() + shift,
            inverse=False,
            dtype=query.dtype,
            rotated=value_side.rotated,
        )
    prefix_query = rotate_heads(query, inverse=True, dtype=query.dtype) if key_side.rotated else query
    result = torch.empty(query.shape, dtype=torch.float32, device=query.device) if transformed else out
    group = query_heads // heads
    longest = LONG if batch_invariant else max_new * group
    launch = extend_launch(spec, head_dim, longest, shared_memory(rows.device))
    options = {
        "CAP": soft_cap, "WINDOW": window, "CAUSAL": causal, "AS_STORED": as_stored,
        "SKIP_PREFIX_MASK": skip_prefix_mask and not as_stored,
    }  # fmt: skip
    extend_kernel[(triton.cdiv(max_new * group, launch.rows), heads, len(qo_indptr) - 1)](
        query, prefix_query, key, value, result, rows, qo_indptr, kv_indptr, kv_indices, custom_mask, mask_indptr, centres.key,
        query.stride(0), query.stride(1), prefix_query.stride(0), prefix_query.stride(1),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), result.stride(0), result.stride(1),
        head_dim**-0.5 if softmax_scale is None else softmax_scale,
        **extend_constants(spec, heads, group, head_dim, query.dtype, rows.stride(0), launch), **options,
        num_warps=launch.warps,
    )  # fmt: skip
    if transformed:
        centre = None if centres.value is None else centres.value.repeat_interleave(group, 0)
        out.copy_(rotate_heads(result, inverse=True, dtype=out.dtype, rotated=value_side.rotated, centre=centre))
    return out


@functools.cache
def extend_constants(
    spec: LayerSpec, heads: int, group: int, head_dim: int, dtype: torch.dtype, row_stride: int, launch: ExtendLaunch
) -> dict[str, Any]:
    """Compile-time constants of :func:`extend_kernel` that the layer and the launch decide; ``dtype`` is the query's."""
    key_side, value_side = sides(spec, heads, head_dim)
    model = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    return {
        "KEY": key_side, "VALUE": value_side, "ROW": row_stride, "HEADS": heads, "GROUP": group, "HEAD_DIM": head_dim,
        "DTYPE": model, "VALUE_DTYPE": model, "TILE_ROWS": launch.rows, "TOKENS": launch.tokens,
        "STAGES": launch.stages,
    }  # fmt: skip
