# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment, misc, var-annotated"
# ruff: noqa: RUF005, RET505, SIM300 - see operands.py
"""The kernel of :mod:`kvtuner_kernels.extend`: attention of new tokens over a packed prefix and their own chunk.

A program takes one KV head and a tile of rows; a row is one query head of one new token, so that a tile of keys is read and
unpacked once for the whole query group. Keys are multiplied as integer codes, and scale and minimum folded into the scores; values
are put on their grid in registers, in the model's dtype. The prefix is not split: a short chunk over a long prefix leaves
multiprocessors idle.

A banded side is attended in its basis. There a request's first stored token may be relative to another point than all others, so the
loop skips it, and it is added separately (:func:`kvtuner_kernels.basis_kernel.first_rows`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvtuner_kernels.operands import (
    ASSEMBLY_BODY,
    FIRST_MARK,
    codes,
    fill,
    first_run,
    grid_of,
    log2,
    plane_bits,
    plane_half,
    plane_run,
    plane_start,
    plane_step,
    power_of_2,
    rounded,
    runs,
    scale_byte,
    scale_of,
)
from kvtuner_kernels.planes import banded

LOG2E = tl.constexpr(1.4426950408889634)
PIECE = tl.constexpr(32)  # channels


@triton.constexpr_function
def _padded(side):
    """Columns of a tile that one plane takes."""
    return 1 << (side.words - 1).bit_length() if side.bands else side.padded


@triton.constexpr_function
def _step(side, plane):
    """Distance of two levels, in scales; any number but 0 without bits, because the only level is 0."""
    return plane_step(side, plane) or 1.0


@triton.jit
def _steps(plane, SIDE: tl.constexpr):
    """fp32 distance of two levels of a banded side, in scales, for each of ``plane``."""
    step = tl.full(plane.shape, 1.0, tl.float32)
    PLANES: tl.constexpr = SIDE.planes_a_group
    for x in tl.static_range(PLANES):
        step = tl.where(plane == x, _step(SIDE, x), step)
    return step


@triton.jit
def _column_channel(column, GROUP: tl.constexpr, SIDE: tl.constexpr):
    """Channel within the head of a column of :func:`_tile`, and whether it exists."""
    PLANES_A_GROUP: tl.constexpr = SIDE.planes_a_group
    word = column // PLANES_A_GROUP
    return (GROUP * PLANES_A_GROUP + column % PLANES_A_GROUP) * SIDE.words + word, word < SIDE.words


@triton.jit
def _load_query(query, at, live, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Per group of the keys one [M, columns] operand, columns as in :func:`_tile`, and the sum of q [M, 1].

    If keys are banded, the operand includes the steps of their bands.
    """
    GROUPS: tl.constexpr = SIDE.groups
    PLANES: tl.constexpr = SIDE.planes_a_group
    PADDED: tl.constexpr = _padded(SIDE)
    column = tl.arange(0, PADDED * PLANES)[None, :]
    operands = ()
    sums = ()
    for group in tl.static_range(GROUPS):
        if banded(
            SIDE
        ):  # read in stored order; neighbouring planes would need an address and registers for each number
            channel = column // PADDED * SIDE.words + column % PADDED
            exists = column % PADDED < SIDE.words
        else:
            channel, exists = _column_channel(column, group, SIDE)
        part = tl.load(query + at + channel, mask=live & exists, other=0.0)
        if banded(SIDE):
            part = (part.to(tl.float32) * _steps(column // PADDED, SIDE)).to(DTYPE)
            part = part.reshape([part.shape[0], PLANES, PADDED]).permute(0, 2, 1).reshape(part.shape)
        part = part.to(DTYPE)
        operands = operands + (part,)
        sums = sums + (tl.sum(part.to(tl.float32), 1, keep_dims=True),)
    return operands, sums


@triton.jit
def _times(query, live, vector, HEAD_DIM: tl.constexpr):
    """Query rows at pointers ``query`` [M, 1] times one fp32 vector of a head, [M, 1], in pieces that leave registers free."""
    score = tl.zeros(live.shape, tl.float32)
    for start in tl.range(0, HEAD_DIM, PIECE, num_stages=1):
        channel = start + tl.arange(0, PIECE)[None, :]
        part = tl.load(query + channel, mask=live & (channel < HEAD_DIM), other=0.0).to(tl.float32)
        part *= tl.load(vector + channel, mask=channel < HEAD_DIM, other=0.0)
        score += tl.sum(part, 1, keep_dims=True)
    return score


@triton.jit
def _words(rows, slot, head, RUN: tl.constexpr, SIDE: tl.constexpr, ROW: tl.constexpr):
    """uint16 [N, words] of one run of words: a segment's, or some bands'."""
    word = tl.arange(0, _padded(SIDE))[None, :]
    pointer = rows.to(tl.pointer_type(tl.uint16)) + (SIDE.codes // 2 + RUN * SIDE.words) + word
    pointer = pointer + slot[:, None] * (ROW // 2) + head * (SIDE.head_codes // 2)
    if SIDE.words == _padded(SIDE):
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=word < SIDE.words, other=0)


@triton.jit
def _tile(words, GROUP: tl.constexpr, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Codes of one group as [N, words * planes]; planes of a word are neighbours, so that no thread passes codes to another."""
    FIRST: tl.constexpr = GROUP * SIDE.planes_a_group % SIDE.planes
    PLANES: tl.constexpr = SIDE.planes_a_group
    BITS: tl.constexpr = SIDE.bits
    planes = ()
    for y in tl.static_range(PLANES):
        planes = planes + (codes(words, BITS, FIRST + y, DTYPE, ASSEMBLY_BODY),)
    return _joined(planes)


@triton.jit
def _joined(planes):
    """A power of two of planes [N, words] as [N, words * planes], planes of a word neighbours."""
    PLANES: tl.constexpr = len(planes)
    SHAPE: tl.constexpr = [planes[0].shape[0], planes[0].shape[1] * PLANES]
    for step in tl.static_range(log2(PLANES)):
        joined = ()
        for y in tl.static_range(PLANES >> (step + 1)):
            joined = joined + (tl.join(planes[y], planes[y + (PLANES >> (step + 1))]),)
        planes = joined
    return planes[0].reshape(SHAPE)


@triton.jit
def _levels(words, factor, SIDE: tl.constexpr, PLANE: tl.constexpr, DTYPE: tl.constexpr):
    """Levels of one band in units of its step, times ``factor`` [N, 1] if there is one, from int32 ``words`` [N, words]."""
    BITS: tl.constexpr = plane_bits(SIDE, PLANE)
    START: tl.constexpr = plane_start(SIDE, PLANE)
    # Code bits under 2**22, whose last place is a half, from where they are: no conversion from integers.
    bits = words << 1 if START == 0 else words >> (START - 1)
    bits = (bits & (2 ** (BITS + 1) - 2)) | 0x4A800000
    level = bits.to(tl.float32, bitcast=True) - (4194304.0 + plane_half(SIDE, PLANE))
    if factor is not None:
        level *= factor
    return rounded(level, DTYPE, ASSEMBLY_BODY)


@triton.jit
def _band_tile(rows, slot, head, factor, SIDE: tl.constexpr, ROW: tl.constexpr, DTYPE: tl.constexpr):
    """:func:`_levels` of all bands as [N, words * planes], columns as in :func:`_tile`."""
    FIRST: tl.constexpr = first_run(SIDE)
    RUNS: tl.constexpr = runs(SIDE)
    PLANES: tl.constexpr = SIDE.planes_a_group
    tiles = ()
    for run in tl.static_range(RUNS):
        tiles = tiles + (_words(rows, slot, head, FIRST + run, SIDE, ROW).to(tl.int32),)
    planes = ()
    for y in tl.static_range(PLANES):
        if plane_bits(SIDE, y) > 0:
            planes = planes + (_levels(tiles[plane_run(SIDE, y) - FIRST], factor, SIDE, y, DTYPE),)
        else:
            planes = planes + (tl.zeros([slot.shape[0], _padded(SIDE)], DTYPE),)
    return _joined(planes)


@triton.jit
def _band_scale(rows, slot, head, SIDE: tl.constexpr, ROW: tl.constexpr):
    """fp32 scales [N] of a banded side; finite for the first token too, whose row is read but hidden."""
    return scale_of(scale_byte(_words(rows, slot, head, 0, SIDE, ROW), SIDE) & (FIRST_MARK - 1))


@triton.jit
def _packed_scores(rows, slot, head, operands, sums, SIDE: tl.constexpr, ROW: tl.constexpr, DTYPE: tl.constexpr):
    """q . k as [M, N] without the softmax scale."""
    GROUPS: tl.constexpr = SIDE.groups
    if banded(SIDE):
        scale = _band_scale(rows, slot, head, SIDE, ROW)
        return tl.dot(operands[0], tl.trans(_band_tile(rows, slot, head, None, SIDE, ROW, DTYPE))) * scale[None, :]
    else:
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

    Values are put on their grid in registers: unlike in decode, a tile of them is multiplied with many rows. Values of a banded side
    lack the steps of their bands.
    """
    GROUPS: tl.constexpr = SIDE.groups
    weights = rounded(p, DTYPE, ASSEMBLY_BODY)
    if banded(SIDE):
        scale = _band_scale(rows, slot, head, SIDE, ROW)
        values = _band_tile(rows, slot, head, scale[:, None], SIDE, ROW, DTYPE)
        return (tl.dot(weights, values, acc[0] * decay),)
    else:
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
def _first_values(first_value, weight, SIDE: tl.constexpr):
    """Accumulators that begin with one token's values, weighted with ``weight`` [M, 1], in units of :func:`_add_packed`."""
    GROUPS: tl.constexpr = SIDE.groups
    PLANES: tl.constexpr = SIDE.planes_a_group
    column = tl.arange(0, _padded(SIDE) * PLANES)[None, :]
    acc = ()
    for group in tl.static_range(GROUPS):
        channel, exists = _column_channel(column, group, SIDE)
        number = tl.load(first_value + channel, mask=exists, other=0.0)
        if banded(SIDE):
            number /= _steps(column % PLANES, SIDE)
        acc = acc + (weight * number,)
    return acc


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
    first_key, first_value,
    query_token_stride, query_head_stride, prefix_token_stride, prefix_head_stride,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride, out_token_stride, out_head_stride,
    softmax_scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, ROW: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr, AS_STORED: tl.constexpr,
    SKIP_PREFIX_MASK: tl.constexpr, DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr,
    TILE_ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows, KV heads, requests). With ``first_key``, a request's first stored token is read only there."""
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
        mask_row = custom_mask + tl.load(mask_indptr + request) + token.to(tl.int64) * (before + new)

    top = tl.full([TILE_ROWS, 1], -1.0e30, tl.float32)
    total = tl.zeros([TILE_ROWS, 1], tl.float32)
    GROUPS: tl.constexpr = VALUE.groups
    PADDED: tl.constexpr = _padded(VALUE)
    PLANES: tl.constexpr = VALUE.planes_a_group
    acc = fill(GROUPS, [TILE_ROWS, PADDED * PLANES], 0.0)
    column = tl.arange(0, TOKENS)

    at = (origin + token) * prefix_token_stride + query_head * prefix_head_stride
    operands, sums = _load_query(prefix_query, at, live, KEY, DTYPE)
    if first_key is not None:
        first_at = (request * HEADS + head) * HEAD_DIM
        first_score = _times(prefix_query + at, live, first_key + first_at, HEAD_DIM)
    at = (first_query + token) * query_token_stride + query_head * query_head_stride
    channel = tl.arange(0, power_of_2(HEAD_DIM))[None, :]
    shift = tl.zeros([TILE_ROWS, 1], tl.float32)
    # The part of the scores removed by centring: the chunk's keys have it, and a soft cap needs it.
    if key_centre is not None and (not AS_STORED or CAP != 0):
        shift = _times(query + at, live, key_centre + head * HEAD_DIM, HEAD_DIM)

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
        acc = _first_values(first_value + first_at, weight, VALUE)
    # Low halves: a slot's number fits in 32 bits, its address does not.
    slots = kv_indices.to(tl.pointer_type(tl.int32))
    for tile in tl.range(earliest // TOKENS * TOKENS, end, TOKENS, num_stages=STAGES):
        index = tile + column
        # Beyond the end the last stored token is read again and hidden.
        slot = tl.load(slots + (first_slot + tl.minimum(index, stored - 1)) * 2).to(tl.int64)
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
    if banded(VALUE):
        acc = (acc[0] * _steps(place // PADDED, VALUE),)

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
    target = out + (origin + token) * out_token_stride + query_head * out_head_stride + group_channel
    for group in tl.static_range(GROUPS):
        result = (acc[group] * inverse).to(out.dtype.element_ty)
        tl.store(target + group * (PLANES * VALUE.words), result, mask=live & exists)
