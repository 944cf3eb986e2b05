# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: RUF005, RET505 - Triton compiles what follows a return and has no starred tuples
"""Attention of new tokens over a packed prefix and their own chunk.

A program takes one KV head and a tile of rows; a row is one query head of one new token, so that a tile of keys is read and
unpacked once for the whole query group. The arithmetic is :mod:`kvtuner_kernels.decode`'s: integer codes are multiplied, scale and
minimum are folded into scores and probabilities. Splits of the prefix are not covered: a short chunk over a long prefix leaves
multiprocessors idle.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_kernels.operands import ASSEMBLY, check_centre, check_rows, codes, fill, grid_of, rounded, sides
from kvtuner_kernels.reference import NO_CENTRES, Centres
from kvtuner_kernels.rotation import rotate_heads
from kvtuner_kernels.tuning import ExtendLaunch, extend_launch

LOG2E = tl.constexpr(1.4426950408889634)
ASSEMBLY_BODY = tl.constexpr(ASSEMBLY)


@triton.jit
def _load_query(query, at, mask, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Per plane of the keys one [M, words] operand, and per group the sum of q [M, 1]."""
    word = tl.arange(0, SIDE.padded)[None, :]
    PLANES: tl.constexpr = SIDE.segments * SIDE.planes
    operands = ()
    sums = ()
    for x in tl.static_range(PLANES):
        part = tl.load(query + at + x * SIDE.words + word, mask=mask & (word < SIDE.words), other=0.0).to(DTYPE)
        operands = operands + (part,)
        total = tl.sum(part.to(tl.float32), 1, keep_dims=True)
        if x % SIDE.planes_a_group == 0:
            group_sum = total
        else:
            group_sum += total
        if x % SIDE.planes_a_group == SIDE.planes_a_group - 1:
            sums = sums + (group_sum,)
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
def _packed_scores(rows, slot, head, operands, sums, SIDE: tl.constexpr, ROW: tl.constexpr, DTYPE: tl.constexpr):
    """q . k as [M, N] without the softmax scale."""
    GROUPS: tl.constexpr = SIDE.groups
    PLANES_A_GROUP: tl.constexpr = SIDE.planes_a_group
    for group in tl.static_range(GROUPS):
        for x in tl.static_range(group * PLANES_A_GROUP, (group + 1) * PLANES_A_GROUP):
            if x % SIDE.planes == 0:
                words = _words(rows, slot, head, x // SIDE.planes, SIDE, ROW)
            keys = tl.trans(codes(words, SIDE.bits, x % SIDE.planes, DTYPE, ASSEMBLY_BODY))
            if x % PLANES_A_GROUP == 0:
                part = tl.dot(operands[x], keys)
            else:
                part = tl.dot(operands[x], keys, part)
        if SIDE.bits < 16:
            scale, minimum = grid_of(rows, slot, head, group, SIDE, ROW)
            part = part * scale[None, :] + minimum[None, :] * sums[group]
        if group == 0:
            scores = part
        else:
            scores += part
    return scores


@triton.jit
def _add_packed(
    rows, slot, head, p, decay, acc, SIDE: tl.constexpr, ROW: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Decay the accumulators and add a packed tile's values, weighted with ``p`` [M, N]."""
    GROUPS: tl.constexpr = SIDE.groups
    PLANES_A_GROUP: tl.constexpr = SIDE.planes_a_group
    new_acc = ()
    for group in tl.static_range(GROUPS):
        if SIDE.bits < 16:
            scale, minimum = grid_of(rows, slot, head, group, SIDE, ROW)
            weights = rounded(p * scale[None, :], DTYPE, ASSEMBLY_BODY)
            middle = tl.sum(p * (minimum + scale * ((2**SIDE.bits - 1) / 2))[None, :], 1, keep_dims=True)
        else:
            weights = rounded(p, DTYPE, ASSEMBLY_BODY)
        for x in tl.static_range(group * PLANES_A_GROUP, (group + 1) * PLANES_A_GROUP):
            if x % SIDE.planes == 0:
                words = _words(rows, slot, head, x // SIDE.planes, SIDE, ROW)
            values = codes(words, SIDE.bits, x % SIDE.planes, DTYPE, ASSEMBLY_BODY)
            out = acc[x] * decay
            if SIDE.bits < 16:  # centred on the grid's middle, so that rounded weights meet small numbers
                values -= (2**SIDE.bits - 1) / 2
                out += middle
            new_acc = new_acc + (tl.dot(weights, values, out),)
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
    if first_row >= new * GROUP:
        return
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
    PLANES: tl.constexpr = VALUE.segments * VALUE.planes
    PADDED: tl.constexpr = VALUE.padded
    acc = fill(PLANES, [TILE_ROWS, PADDED], 0.0)
    column = tl.arange(0, TOKENS)

    at = (first_query + token) * prefix_token_stride + query_head * prefix_head_stride
    operands, sums = _load_query(prefix_query, at, live, KEY, DTYPE)
    at = (first_query + token) * query_token_stride + query_head * query_head_stride
    shift = tl.zeros([TILE_ROWS, 1], tl.float32)
    if KEY.centred and not AS_STORED:  # what stored keys lack and the chunk's keys have
        channel = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
        q = tl.load(query + at + channel, mask=live & (channel < HEAD_DIM), other=0.0).to(tl.float32)
        centre = tl.load(key_centre + head * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
        shift += tl.sum(q * centre, 1, keep_dims=True)

    end = stored
    if AS_STORED and CAUSAL and not masked:
        end = tl.minimum(stored, last + 1)
    slots = kv_indices.to(tl.pointer_type(tl.int32))  # low halves: a slot's number fits in 32 bits, its address does not
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

    if not AS_STORED:
        operands, sums = _load_query(query, at, live, KEY, DTYPE)
        KEY_PLANES: tl.constexpr = KEY.segments * KEY.planes
        key_word = tl.arange(0, KEY.padded)[:, None]
        value_word = tl.arange(0, PADDED)[None, :]
        end = new
        if CAUSAL and not masked:
            end = tl.minimum(new, last - before + 1)
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
            keys = key + (first_query + index)[None, :] * key_token_stride + head * key_head_stride + key_word
            for x in tl.static_range(KEY_PLANES):
                k = tl.load(keys + x * KEY.words, mask=inside[None, :] & (key_word < KEY.words), other=0.0).to(DTYPE)
                if x == 0:
                    scores = tl.dot(operands[x], k)
                else:
                    scores = tl.dot(operands[x], k, scores)
            p, top, total, decay = _softmax_step(scores, 0.0, top, total, softmax_scale, visible, CAP)
            weights = rounded(p, VALUE_DTYPE, ASSEMBLY_BODY)
            values = value + (first_query + index)[:, None] * value_token_stride + head * value_head_stride + value_word
            new_acc = ()
            for x in tl.static_range(PLANES):
                inside_value = inside[:, None] & (value_word < VALUE.words)
                v = tl.load(values + x * VALUE.words, mask=inside_value, other=0.0).to(VALUE_DTYPE)
                new_acc = new_acc + (tl.dot(weights, v, acc[x] * decay),)
            acc = new_acc

    inverse = 1 / tl.where(total > 0, total, 1.0)
    word = tl.arange(0, PADDED)[None, :]
    target = out + (first_query + token) * out_token_stride + query_head * out_head_stride + word
    for x in tl.static_range(PLANES):
        result = (acc[x] * inverse).to(out.dtype.element_ty)
        tl.store(target + x * VALUE.words, result, mask=live & (word < VALUE.words))


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
        raise LayoutError(f"{query_heads} query heads, strides {query.stride()}: expected a dense multiple of {heads} heads")
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
            value if shift is None else value.float() + shift, inverse=False, dtype=query.dtype, rotated=value_side.rotated
        )
    prefix_query = rotate_heads(query, inverse=True, dtype=query.dtype) if key_side.rotated else query
    result = torch.empty(query.shape, dtype=torch.float32, device=query.device) if transformed else out
    group = query_heads // heads
    launch = extend_launch(spec, head_dim, max_new * group)
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


def extend_constants(
    spec: LayerSpec, heads: int, group: int, head_dim: int, dtype: torch.dtype, row_stride: int, launch: ExtendLaunch
) -> dict[str, Any]:
    """Compile-time constants of :func:`extend_kernel` that the layer and the launch decide; ``dtype`` is the query's."""
    key_side, value_side = sides(spec, heads, head_dim)
    model = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    # fp16 weights would underflow once a value's scale is multiplied in; bf16 has the range, whatever the model's dtype.
    value_dtype = model if value_side.bits == 16 or not ASSEMBLY else tl.bfloat16
    return {
        "KEY": key_side, "VALUE": value_side, "ROW": row_stride, "HEADS": heads, "GROUP": group, "HEAD_DIM": head_dim,
        "DTYPE": model, "VALUE_DTYPE": value_dtype, "TILE_ROWS": launch.rows, "TOKENS": launch.tokens,
        "STAGES": launch.stages,
    }  # fmt: skip
