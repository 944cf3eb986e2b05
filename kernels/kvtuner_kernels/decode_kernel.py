# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment, misc"
# ruff: noqa: RUF005, RET505, SIM108 - see operands.py
"""The kernel of split-KV decode attention over packed rows.

One program reads whole rows: all local KV heads (up to ``BATCH``) of a run of tokens. The tile is three-dimensional and a warp
owns one entry of its first axis, a KV head (or, with fewer heads, every other run of tokens of one), so that softmax and both
products stay inside a warp. Keys are the left operand, so a query group of 7 pads to 8 columns and not to 16 rows. Codes go
from shared memory to registers in the layout of the matrix instruction and are turned into operands there.

Scores are ``scale * (q . code) + minimum * sum(q)``; for values, scales are multiplied into the probabilities and minima
are summed with them. Nothing is dequantized.

A banded side is a symmetric one whose planes have individual bits, places and steps. Queries and results are in its
basis. Its first token is stored relative to another point than all others, so the loop skips it and the merge adds it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtuner_kernels.decode_sides import (
    by_run,
    digit_weights,
    exponentials,
    load_tiles,
    load_words,
    plane_codes,
    query_operands,
    scale_digits,
    scale_numbers,
    scale_powers,
)
from kvtuner_kernels.operands import (
    ASSEMBLY_BODY,
    LOG2E,
    approximate_log2,
    fill,
    grid_of,
    inverse_power,
    plane_bits,
    rounded,
)
from kvtuner_kernels.planes import (
    banded,
    bits,
    channels,
    middles,
    plane_count,
    plane_group,
    plane_tile,
    steps,
    tile_words,
    units,
)

SPLIT_ALIGNMENT = tl.constexpr(32)  # tokens; SGLang's _MIN_BLOCK_KV


@triton.jit
def bounds(kv_indptr, request, WINDOW: tl.constexpr, FIRST: tl.constexpr):
    """Begin and end of a request's visible tokens, without its first token if that is added separately (FIRST)."""
    low = tl.load(kv_indptr + request)
    high = tl.load(kv_indptr + request + 1)
    start = low
    if WINDOW:
        start = tl.maximum(low, high - WINDOW)
    if FIRST:
        start = tl.minimum(tl.maximum(start, low + 1), high)
    return start, high


@triton.jit
def _scores(
    tiles, scales, rows, slot, heads, operands, sums,
    SIDE: tl.constexpr, ROW: tl.constexpr, DTYPE: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """q . k as [BATCH, TOKENS, N] in the query's unit; ``slot`` int64 [1 or BATCH, TOKENS], ``heads`` [BATCH, 1].

    ``scales`` belong to a banded side.
    """
    GROUPS: tl.constexpr = SIDE.groups
    PLANES: tl.constexpr = plane_count(SIDE)
    for group in tl.static_range(GROUPS):
        if SIDE.symmetric and SIDE.bits < 16:
            part = tl.broadcast_to(sums[group], SHAPE)
        else:
            part = tl.full(SHAPE, 0.0, tl.float32)
        for x in tl.static_range(PLANES):
            if plane_group(SIDE, x) == group:
                codes = plane_codes(tiles[plane_tile(SIDE, x)], x, 2, SIDE, DTYPE)
                part = tl.dot(codes, operands[x], part)
        if scales is not None:
            part = part * scales
        elif SIDE.bits < 16:
            scale, minimum = grid_of(rows, slot, heads, group, SIDE, ROW)
            part = part * scale[:, :, None]
            if not SIDE.symmetric:
                part += minimum[:, :, None] * sums[group]
        if group == 0:
            scores = part
        else:
            scores += part
    return scores


@triton.jit
def _value_grids(rows, slot, heads, SIDE: tl.constexpr, ROW: tl.constexpr, SHAPE: tl.constexpr):
    """Scales and minima fp32 [BATCH, TOKENS, 1] of each group, and the tile's largest scale [BATCH, 1, 1]."""
    scales = ()
    minima = ()
    GROUPS: tl.constexpr = SIDE.groups
    for group in tl.static_range(GROUPS):
        scale, minimum = grid_of(rows, slot, heads, group, SIDE, ROW)
        scales = scales + (scale[:, :, None],)
        minima = minima + (minimum[:, :, None],)
        if group == 0:
            largest = scale
        else:
            largest = tl.maximum(largest, scale)
    return scales, minima, tl.max(tl.broadcast_to(largest[:, :, None], SHAPE), 1, keep_dims=True)


@triton.jit
def _transposed(weights, ASM: tl.constexpr):
    """``weights`` [BATCH, TOKENS, N] with the same values, distributed over the lanes of a warp as a right operand needs them."""
    if ASM and weights.shape[2] == 8:
        BLOCKS: tl.constexpr = [weights.shape[0], weights.shape[1] // 8, 8, 8]
        moved = tl.inline_asm_elementwise(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
            "=r,r",
            [weights],
            dtype=weights.dtype,
            is_pure=False,
            pack=2,
        )
        return moved.reshape(BLOCKS).permute(0, 1, 3, 2).reshape(weights.shape)
    else:
        return weights


@triton.jit
def _add_values(
    rows, slot, heads, p, decay, acc, offsets, scales, minima, SIDE: tl.constexpr, ROW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Decay the accumulators and add the tile's values, weighted with ``p`` [BATCH, TOKENS, N].

    The product uses codes, weighted with ``p * scale``. ``offsets`` collects the rest: the weighted minima of each
    lane's tokens [BATCH, 8, N] or, for a symmetric side, the sum of the weights, to be taken ``n / 2`` times, in all of 16 rows.
    """
    BATCH: tl.constexpr = p.shape[0]
    TOKENS: tl.constexpr = p.shape[1]
    slot3 = slot[:, None, :]
    heads3 = heads[:, :, None]
    GROUPS: tl.constexpr = SIDE.groups
    PLANES: tl.constexpr = plane_count(SIDE)
    tiles = load_tiles(rows, slot3, heads3, 1, SIDE, ROW, [1, 1, 2])
    new_acc = ()
    new_offsets = ()
    for group in tl.static_range(GROUPS):
        if SIDE.bits == 16:
            weights = rounded(p, DTYPE, ASSEMBLY_BODY)
        else:
            weights = rounded(p * scales[group], DTYPE, ASSEMBLY_BODY)
        weights = _transposed(weights, ASSEMBLY_BODY)
        if SIDE.bits == 16:
            new_offsets = new_offsets + (offsets[group],)
        elif SIDE.symmetric:
            ones = tl.full([BATCH, 16, TOKENS], 1.0, DTYPE)
            new_offsets = new_offsets + (tl.dot(ones, weights, offsets[group] * decay),)
        else:
            new_offsets = new_offsets + (offsets[group] * decay + lane_sums(p * minima[group]),)
        for x in tl.static_range(PLANES):
            if plane_group(SIDE, x) == group:
                numbers = plane_codes(tiles[plane_tile(SIDE, x)], x, 1, SIDE, DTYPE)
                new_acc = new_acc + (tl.dot(numbers, weights, acc[x] * decay),)
    return new_acc, new_offsets


@triton.jit
def _store_plane(target, acc, offset, inverse, found, SIDE: tl.constexpr, PLANE: tl.constexpr):
    """Store a plane's accumulator [BATCH, words, N] with its offsets, times ``inverse``, to their channels from ``target`` on."""
    WORDS: tl.constexpr = acc.shape[1]
    RUNS: tl.constexpr = WORDS // SIDE.padded
    word = tl.arange(0, WORDS)[None, :, None]
    run = word // SIDE.padded
    word = word % SIDE.padded
    out = acc / by_run(run, units(SIDE, PLANE, ASSEMBLY_BODY), RUNS)
    if SIDE.bits < 16 and SIDE.symmetric:
        offset = tl.broadcast_to(offset[:, None, :, :], [acc.shape[0], WORDS // 16, 16, acc.shape[2]])
        out -= offset.reshape(acc.shape) * by_run(run, middles(SIDE, PLANE), RUNS)
        out *= by_run(run, steps(SIDE, PLANE), RUNS)
    elif SIDE.bits < 16:
        out += tl.sum(offset, 1, keep_dims=True)
    channel = by_run(run, channels(SIDE, PLANE), RUNS) + word
    exists = (word < SIDE.words) & (by_run(run, bits(SIDE, PLANE), RUNS) > 0)
    tl.store(target + channel, out * inverse, mask=found & exists)


@triton.jit
def lane_sums(x):
    """[BATCH, TOKENS, N] to [BATCH, 8, N], the sums of every eighth token: those that one thread holds anyway."""
    return tl.sum(x.reshape([x.shape[0], x.shape[1] // 8, 8, x.shape[2]]), 1)


@triton.jit(do_not_specialize=["batch", "splits"])
def decode_kernel(
    query, query_shift, rows, kv_indptr, kv_indices, split_counts, partial, lse, batch, splits,
    query_token_stride, query_head_stride, softmax_scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, ROW: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
    KEY_DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr, BATCH: tl.constexpr, RUNS: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Grid: (programs, blocks of BATCH // RUNS KV heads, blocks of COLUMNS query heads of a group).

    With ``split_counts`` (int32 [batch]), program ``b * splits + s`` takes split ``s`` of request ``b`` by SGLang's rule.
    Without, all requests' tokens are cut into ``splits`` equal runs, whatever request they belong to. The part of program ``i``
    that belongs to request ``b`` is partial result ``i + b``; neighbours differ in one or both, so the numbers are unique.
    """
    TILE: tl.constexpr = RUNS * TOKENS
    SHAPE: tl.constexpr = [BATCH, TOKENS, COLUMNS]
    QUERY_HEADS: tl.constexpr = HEADS * GROUP
    PLANES: tl.constexpr = plane_count(VALUE)
    BANDS: tl.constexpr = len(VALUE.bands)
    GROUPS: tl.constexpr = VALUE.groups
    OFFSET_ROWS: tl.constexpr = 16 if VALUE.symmetric and VALUE.bits < 16 else 8
    if OVERLAP:
        gdc_launch_dependents()  # the merge may be scheduled once all programs have started; it waits for their end itself
        if banded(KEY):
            gdc_wait()  # for the queries in the basis
    program = tl.program_id(0)
    entry = tl.arange(0, BATCH)[:, None]
    heads = entry // RUNS
    if HEADS > BATCH // RUNS:
        heads += tl.program_id(1) * (BATCH // RUNS)
    if HEADS % (BATCH // RUNS) == 0:
        stored_heads = heads
    else:
        stored_heads = tl.minimum(heads, HEADS - 1)  # with padded heads, the last is read again
    # Low halves: a slot's number fits in 32 bits, its address does not.
    slots = kv_indices.to(tl.pointer_type(tl.int32))
    run = entry % RUNS if RUNS > 1 else tl.full([1, 1], 0, tl.int32)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    query_heads = heads[:, :, None] * GROUP + column
    mask = (heads[:, :, None] < HEADS) & (column < GROUP)

    # The tile that brings the scales has one run, or two of the keys. One product brings both sides' scales, in alternate columns.
    if banded(KEY):
        DIGIT_RUNS: tl.constexpr = tile_words(KEY, 0) // KEY.padded
        ODD: tl.constexpr = VALUE if banded(VALUE) else None
        weights = digit_weights(BATCH, COLUMNS, DIGIT_RUNS, KEY, ODD, KEY_DTYPE)
    elif banded(VALUE):
        weights = digit_weights(BATCH, COLUMNS, 1, VALUE, None, VALUE_DTYPE)

    if split_counts is not None:
        first = program // splits
        last = first + 1
        start = 0
        end = 0
    else:
        begin = tl.load(kv_indptr)
        length = tl.cdiv(tl.cdiv(tl.load(kv_indptr + batch) - begin, splits), TILE) * TILE
        start = begin + program * length
        end = start + length
        first = 0
        last = 0
        for block in range(0, batch, 128):
            bound = block + tl.arange(0, 128)
            indptr = tl.load(kv_indptr + 1 + bound, mask=bound < batch, other=2147483647)
            first += tl.sum((indptr <= start).to(tl.int32))
            last += tl.sum((indptr < end).to(tl.int32))
        last = tl.minimum(last + 1, batch)

    for request in range(first, last):
        low, high = bounds(kv_indptr, request, WINDOW, FIRST)
        if split_counts is not None:
            count = tl.load(split_counts + request)
            length = tl.cdiv(tl.cdiv(high - low, count), SPLIT_ALIGNMENT) * SPLIT_ALIGNMENT
            low += (program % splits) * length
            high = tl.minimum(low + length, high)
            part = program
        else:
            low = tl.maximum(low, start)
            high = tl.minimum(high, end)
            part = program + request

        columns = request * query_token_stride + query_heads * query_head_stride
        operands, sums, unit = query_operands(query, columns, mask, KEY, KEY_DTYPE)
        # fp32 [batch, query heads]: the part of the scores removed by centring, which only a soft cap needs.
        if query_shift is not None:
            shift = tl.load(query_shift + request * QUERY_HEADS + query_heads, mask=mask, other=0.0)
            shift *= inverse_power(unit)
        top = tl.full([BATCH, 1, COLUMNS], -1.0e30, tl.float32)
        lane_total = tl.zeros([BATCH, 8, COLUMNS], tl.float32)
        acc = ()
        for x in tl.static_range(PLANES):
            acc = acc + (tl.zeros([BATCH, tile_words(VALUE, plane_tile(VALUE, x)), COLUMNS], tl.float32),)
        reference = top
        offsets = fill(GROUPS, [BATCH, OFFSET_ROWS, COLUMNS], 0.0)
        largest = tl.full([BATCH, 1, COLUMNS], 2.0**-24, tl.float32)
        for tile in tl.range(low, high, TILE, num_stages=STAGES):
            token = tile + run * TOKENS + tl.arange(0, TOKENS)[None, :]
            # Beyond the end the last token is read again and weighted with 0: no mask, and no unused row.
            slot = tl.load(slots + tl.minimum(token, high - 1) * 2).to(tl.int64)
            key_tiles = load_tiles(rows, slot[:, :, None], stored_heads[:, :, None], 2, KEY, ROW, [1, 2, 1])
            key_scales = None
            if banded(KEY):
                numbers = scale_numbers(scale_digits(key_tiles[0], KEY, KEY_DTYPE), weights, SHAPE)
                key_scales = exponentials(scale_powers(numbers, 0, KEY))
                if banded(VALUE):
                    powers = scale_powers(numbers, 1, KEY)
            elif banded(VALUE):
                words = tl.arange(0, VALUE.padded)[None, None, :]
                lone = load_words(rows, slot[:, :, None], stored_heads[:, :, None], words, 0, VALUE, ROW, [1, 2, 1])
                numbers = scale_numbers(scale_digits(lone, VALUE, VALUE_DTYPE), weights, SHAPE)
                powers = scale_powers(numbers, 0, VALUE)
            scores = _scores(
                key_tiles, key_scales, rows, slot, stored_heads, operands, sums, KEY, ROW, KEY_DTYPE, SHAPE
            )
            if CAP != 0:
                if query_shift is not None:
                    scores += shift
                # tanh(x) = 1 - 2 / (1 + exp(2 x)), scores in units of log2
                scores = 1 - 2 / (1 + tl.exp2(scores * (unit * softmax_scale * (2 / CAP * LOG2E))))
                factor = tl.full([1, 1, 1], CAP * LOG2E, tl.float32)
            else:
                factor = unit * softmax_scale * LOG2E
            inside = run[:, :, None] * TOKENS + tl.arange(0, TOKENS)[None, :, None] < high - tile
            scores = tl.where(inside, scores, float("-inf"))
            # Exponents are relative to a reference that makes the largest p * scale at most 2**14: fp16 weights neither overflow
            # nor lose what counts.
            if banded(VALUE):
                scales = (exponentials(powers),)
                minima = ()
                new_reference = tl.maximum(reference, tl.max(scores * factor + powers, 1, keep_dims=True) - 14)
            else:
                top = tl.maximum(top, tl.max(scores, 1, keep_dims=True) * factor)
                if VALUE.bits < 16:
                    scales, minima, tile_largest = _value_grids(rows, slot, stored_heads, VALUE, ROW, SHAPE)
                    largest = tl.maximum(largest, tile_largest)
                    new_reference = top + (approximate_log2(largest, ASSEMBLY_BODY) - 14)
                else:
                    scales = ()
                    minima = ()
                    new_reference = top
            decay = tl.exp2(reference - new_reference)
            p = tl.exp2(scores * factor - new_reference)
            reference = new_reference
            lane_total = lane_total * decay + lane_sums(p)
            acc, offsets = _add_values(
                rows, slot, stored_heads, p, decay, acc, offsets, scales, minima, VALUE, ROW, VALUE_DTYPE
            )

        total = tl.sum(lane_total, 1, keep_dims=True)
        found = mask & (column < tl.where(low < high, GROUP, 0))
        partial_rows = (part.to(tl.int64) * RUNS + run[:, :, None]) * QUERY_HEADS + query_heads
        tl.store(lse + partial_rows, tl.where(total > 0, reference + tl.log2(total), float("-inf")), mask=found)
        inverse = 1 / tl.where(total > 0, total, 1.0)
        target = partial + partial_rows * HEAD_DIM
        for x in tl.static_range(PLANES):
            _store_plane(target, acc[x], offsets[plane_group(VALUE, x)], inverse, found, VALUE, x)
        PADDED: tl.constexpr = VALUE.padded  # Triton 3.6 takes no attribute as a part of a shape
        for x in tl.static_range(BANDS):
            if plane_bits(VALUE, x) == 0:
                word = tl.arange(0, PADDED)[None, :, None]
                nothing = tl.zeros([BATCH, PADDED, COLUMNS], tl.float32)
                tl.store(target + (x * VALUE.words + word), nothing, mask=found & (word < VALUE.words))
