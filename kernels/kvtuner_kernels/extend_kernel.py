# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment, misc"
# ruff: noqa: RUF005, SIM300 - see operands.py
"""The kernel of :mod:`kvtuner_kernels.extend`: attention of new tokens over a packed prefix and their own chunk.

A program takes one KV head and a tile of rows; a row is one query head of one new token, so that a tile of keys is read and
unpacked once for the whole query group. Keys are multiplied as integer codes, and scale and minimum folded into the scores; values
are put on their grid in registers, in the model's dtype. The prefix is not split: a short chunk over a long prefix leaves
multiprocessors idle.

A banded side is attended in its basis. There a request's first stored token may be relative to another point than all others, so the
loop skips it, and it is added separately (:func:`kvtuner_kernels.basis_kernel.first_rows`).

With a window, a program reads no row and no key of the chunk that none of its queries sees. A sink has no value, so that it only
scales the result; where that is transformed afterwards, its share is written instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvtuner_kernels.extend_sides import (
    add_packed,
    band_steps,
    column_channel,
    first_values,
    load_query,
    packed_scores,
    padded,
    times,
)
from kvtuner_kernels.operands import ASSEMBLY_BODY, LOG2E, fill, power_of_2, rounded, share_beside
from kvtuner_kernels.planes import banded


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
    first_key, first_value, sinks, shares, mask_offsets,
    query_token_stride, query_head_stride, prefix_token_stride, prefix_head_stride,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride, out_token_stride, out_head_stride,
    softmax_scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, ROW: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, AS_STORED: tl.constexpr,
    SKIP_PREFIX_MASK: tl.constexpr, DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows, KV heads, requests). With ``first_key``, a request's first stored token is read only there.

    With ``shares`` (fp32 [tokens, query heads]) sinks are left to whoever transforms the result.
    """
    request = tl.program_id(2)
    head = tl.program_id(1)
    first_query = tl.load(qo_indptr + request)
    new = tl.load(qo_indptr + request + 1) - first_query
    origin = first_query.to(tl.int64)  # a token's number fits in 32 bits, its number times a stride does not
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
        mask_width = before + new
        mask_row = custom_mask + tl.load(mask_indptr + request)
        if mask_offsets is not None:  # the mask is of all tokens, the slots are of those in a window
            left_out = tl.load(mask_offsets + request).to(tl.int32)
            mask_width += left_out
            mask_row += left_out
        mask_row += token.to(tl.int64) * mask_width

    top = tl.full([TILE_ROWS, 1], -1.0e30, tl.float32)
    total = tl.zeros([TILE_ROWS, 1], tl.float32)
    GROUPS: tl.constexpr = VALUE.groups
    PADDED: tl.constexpr = padded(VALUE)
    PLANES: tl.constexpr = VALUE.planes_a_group
    acc = fill(GROUPS, [TILE_ROWS, PADDED * PLANES], 0.0)
    column = tl.arange(0, TOKENS)

    at = (origin + token) * prefix_token_stride + query_head * prefix_head_stride
    operands, sums = load_query(prefix_query, at, live, KEY, DTYPE)
    if first_key is not None:
        first_at = (request * HEADS + head) * HEAD_DIM
        first_score = times(prefix_query + at, live, first_key + first_at, HEAD_DIM)
    at = (first_query + token) * query_token_stride + query_head * query_head_stride
    channel = tl.arange(0, power_of_2(HEAD_DIM))[None, :]
    shift = tl.zeros([TILE_ROWS, 1], tl.float32)
    # The part of the scores removed by centring: the chunk's keys have it, and a soft cap and a sink need it.
    if key_centre is not None and (not AS_STORED or CAP != 0 or sinks is not None):
        shift = times(query + at, live, key_centre + head * HEAD_DIM, HEAD_DIM)

    busy = first_row < new * GROUP  # otherwise nothing is read or written
    end = tl.where(busy, stored, 0)
    if AS_STORED and CAUSAL and not masked:
        end = tl.minimum(end, last + 1)
    if first_key is not None:
        seen = live & (tl.zeros([TILE_ROWS, 1], tl.int32) < end)
        if masked and not SKIP_PREFIX_MASK:
            seen = seen & (tl.load(mask_row, mask=seen, other=0) != 0)
        if WINDOW:
            seen = seen & (position < WINDOW)
        weight, top, total, _ = _softmax_step(first_score, shift, top, total, softmax_scale, seen, CAP)
        acc = first_values(first_value + first_at, weight, VALUE)
    # Low halves: a slot's number fits in 32 bits, its address does not.
    slots = kv_indices.to(tl.pointer_type(tl.int32))
    begin = earliest // TOKENS * TOKENS
    if WINDOW:
        begin = tl.where(earliest < end, begin, end)
    for tile in tl.range(begin, end, TOKENS, num_stages=STAGES):
        index = tile + column
        # Beyond the end the last stored token is read again and hidden.
        near = tl.minimum(index, stored - 1)
        if WINDOW:
            near = tl.maximum(near, earliest)  # and before all windows the first that one of them has
        slot = tl.load(slots + (first_slot + near) * 2).to(tl.int64)
        if first_key is None:
            visible = live & (index < end)[None, :]
        else:  # all but 0, by one comparison
            visible = live & ((index - 1).to(tl.uint32) < (end - 1).to(tl.uint32))[None, :]
        if masked:
            if not SKIP_PREFIX_MASK:
                visible = visible & (tl.load(mask_row + index[None, :], mask=visible, other=0) != 0)
        elif AS_STORED and CAUSAL:
            visible = visible & (index[None, :] <= position)
        if WINDOW:
            visible = visible & (index[None, :] > position - WINDOW)
        scores = packed_scores(rows, slot, head, operands, sums, KEY, ROW, DTYPE)
        p, top, total, decay = _softmax_step(scores, shift, top, total, softmax_scale, visible, CAP)
        acc = add_packed(rows, slot, head, p, decay, acc, VALUE, ROW, VALUE_DTYPE)

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
    if banded(VALUE):
        acc = (acc[0] * band_steps(place // PADDED, VALUE),)

    # Rows, recomputed from a number that the compiler cannot know to be 0: otherwise their addresses occupy registers through the loop.
    row = first_row + tl.load(qo_indptr + request, volatile=True) - first_query + tl.arange(0, TILE_ROWS)
    token = (row // GROUP)[:, None]
    query_head = head * GROUP + (row % GROUP)[:, None]
    live = (row < new * GROUP)[:, None]
    if not AS_STORED:
        at = (first_query + token) * query_token_stride + query_head * query_head_stride
        q = tl.load(query + at + channel, mask=live & (channel < HEAD_DIM), other=0.0).to(DTYPE)
        key_channel = tl.arange(0, power_of_2(HEAD_DIM))[:, None]
        end = tl.where(busy, new, 0)
        if CAUSAL and not masked:
            end = tl.minimum(end, last - before + 1)
        start = 0
        if WINDOW:
            nearest = tl.maximum(earliest - before, 0)  # of the chunk's tokens that are seen
            start = nearest // TOKENS * TOKENS
        for tile in tl.range(start, end, TOKENS, num_stages=STAGES):
            index = tile + column
            inside = index < new
            if WINDOW:
                inside = inside & (index >= nearest)
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
    if sinks is not None:
        sink = tl.load(sinks + query_head, mask=live, other=0.0) * LOG2E
        share = share_beside(sink, top, total)
        if shares is None:
            inverse *= share
        else:
            tl.store(shares + (origin + token) * (HEADS * GROUP) + query_head, share, mask=live)
    target = out + (origin + token) * out_token_stride + query_head * out_head_stride + group_channel
    for group in tl.static_range(GROUPS):
        result = (acc[group] * inverse).to(out.dtype.element_ty)
        tl.store(target + group * (PLANES * VALUE.words), result, mask=live & exists)
