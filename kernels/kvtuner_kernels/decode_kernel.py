# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment, misc"
# ruff: noqa: RUF005, RET505, SIM108 - see operands.py
"""The kernel of split-KV decode attention over packed rows.

One program reads whole rows: all local KV heads (up to ``BATCH``) of a run of tokens. The tile is three-dimensional and a warp
owns one entry of its first axis, a KV head (or, with fewer heads, every other run of tokens of one), so that softmax and both
products stay inside a warp. Keys are the left operand, so a query group of 7 pads to 8 columns and not to 16 rows. Codes go
from shared memory to registers in the layout of the matrix instruction and are turned into operands there.

Scores are ``scale * (q . code) + minimum * sum(q)``; for values, scales are multiplied into the probabilities and minima
are summed with them. Nothing is dequantized.

A banded side is a symmetric one whose planes have bits, a place and a step of their own. Queries come, and results are left, in its
basis. Its first token lies about another point than all others, so the loop leaves it out and the merge adds it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvtuner_kernels.operands import (
    ASSEMBLY,
    approximate_log2,
    fill,
    grid_of,
    inverse_power,
    plane_bits,
    power_below,
    rounded,
    scale_of,
    small,
    small_by_position,
)
from kvtuner_kernels.planes import (
    banded,
    bits,
    channels,
    digit_fields,
    digit_unit,
    even,
    fields,
    least_unit,
    masks,
    middles,
    plane_count,
    plane_group,
    plane_tile,
    starts,
    steps,
    tile_count,
    tile_run,
    tile_words,
    units,
)

SPLIT_ALIGNMENT = tl.constexpr(32)  # tokens; SGLang's _MIN_BLOCK_KV
LOG2E = tl.constexpr(1.4426950408889634)
ASSEMBLY_BODY = tl.constexpr(ASSEMBLY)


@triton.jit
def _by_run(run, VALUES: tl.constexpr, RUNS: tl.constexpr):
    """One of VALUES for each entry of ``run``, as fp32 or int32."""
    result = tl.zeros(run.shape, tl.int32) + VALUES[0]
    for r in tl.static_range(1, RUNS):
        result = tl.where(run == r, VALUES[r], result)
    return result


@triton.jit
def _codes(words, PLANE: tl.constexpr, AXIS: tl.constexpr, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """One plane of uint16 ``words``, a tile whose words lie along AXIS (1 or 2), as numbers of DTYPE in units of :func:`units`."""
    if even(SIDE, PLANE):
        return small(words, bits(SIDE, PLANE)[0], starts(SIDE, PLANE)[0], DTYPE, ASSEMBLY_BODY)
    elif ASSEMBLY_BODY:
        # A thread's words: along the words first, in blocks of 16 tokens, or along the tokens first. 32 threads hold a head.
        EACH: tl.constexpr = SIDE.padded * (16 if AXIS == 2 else words.shape[2]) // 32
        return small_by_position(words, fields(SIDE, PLANE), EACH)
    else:
        RUNS: tl.constexpr = words.shape[AXIS] // SIDE.padded
        run = tl.arange(0, RUNS * SIDE.padded) // SIDE.padded
        run = run[None, None, :] if AXIS == 2 else run[None, :, None]
        start = _by_run(run, starts(SIDE, PLANE), RUNS).to(tl.uint16)
        return ((words >> start) & _by_run(run, masks(SIDE, PLANE), RUNS).to(tl.uint16)).to(DTYPE)


@triton.jit
def bounds(kv_indptr, request, WINDOW: tl.constexpr, FIRST: tl.constexpr):
    """Where a request's visible tokens begin and end, without its first token if that is added apart (FIRST)."""
    low = tl.load(kv_indptr + request)
    high = tl.load(kv_indptr + request + 1)
    start = low
    if WINDOW:
        start = tl.maximum(low, high - WINDOW)
    if FIRST:
        start = tl.minimum(tl.maximum(start, low + 1), high)
    return start, high


@triton.jit
def _query_operands(query, columns, mask, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Per plane one [BATCH, words, N] operand, per group a sum of q [BATCH, 1, N], and the unit of scores [BATCH, 1, N].

    Operands and sums are in units of powers of two, so that a query of any magnitude is exact in fp16 and operands make up for
    those of :func:`small`. Sums are what minima are multiplied with; for a symmetric side, what its codes are about, less.
    """
    operands = ()
    sums = ()
    PLANES: tl.constexpr = plane_count(SIDE)
    LEAST: tl.constexpr = least_unit(SIDE, ASSEMBLY_BODY)
    ONE: tl.constexpr = 2.0**-24 if ASSEMBLY_BODY else 1.0
    peak = tl.full([1, 1, 1], 0.0, tl.float32)
    for x in tl.static_range(PLANES):
        part, step, _, _ = _query_part(query, columns, mask, SIDE, x)
        peak = tl.maximum(peak, tl.max(tl.abs(part) * step, 1, keep_dims=True))
    unit = tl.maximum(power_below(peak), 2.0**-60) * 2.0**-14  # the largest channel becomes 2**14 or more
    for x in tl.static_range(PLANES):
        part, step, one, run = _query_part(query, columns, mask, SIDE, x)
        part = (part * (inverse_power(unit) * (step * (LEAST / one)))).to(DTYPE)
        if SIDE.bits < 16:
            # Summed by a product: a second use keeps the operand in registers, instead of bringing it there for every tile.
            weight = one / ONE
            if SIDE.symmetric:
                weight *= -_by_run(run, middles(SIDE, x), tile_words(SIDE, plane_tile(SIDE, x)) // SIDE.padded)
            weight = weight.to(DTYPE).reshape([1, 1, part.shape[1]])
            total = tl.dot(tl.broadcast_to(weight, [part.shape[0], 16, part.shape[1]]), part)
            total = tl.max(total, 1, keep_dims=True) * ONE  # all rows are alike
            if x == 0:
                group_sum = total
            elif plane_group(SIDE, x) == plane_group(SIDE, x - 1):
                group_sum += total
            else:
                sums = sums + (group_sum,)
                group_sum = total
            if x == PLANES - 1:
                sums = sums + (group_sum,)
        operands = operands + (part,)
    return operands, sums, unit / LEAST


@triton.jit
def _query_part(query, columns, mask, SIDE: tl.constexpr, PLANE: tl.constexpr):
    """A plane's channels of the query, fp32 [BATCH, words, N]; and steps, units and runs [1, words, 1]."""
    TILE: tl.constexpr = plane_tile(SIDE, PLANE)
    RUNS: tl.constexpr = tile_words(SIDE, TILE) // SIDE.padded
    word = tl.arange(0, tile_words(SIDE, TILE))[None, :, None]
    run = word // SIDE.padded
    word = word % SIDE.padded
    exists = (word < SIDE.words) & (_by_run(run, bits(SIDE, PLANE), RUNS) > 0)
    channel = _by_run(run, channels(SIDE, PLANE), RUNS) + word
    part = tl.load(query + columns + channel, mask=mask & exists, other=0.0).to(tl.float32)
    return part, _by_run(run, steps(SIDE, PLANE), RUNS), _by_run(run, units(SIDE, PLANE, ASSEMBLY_BODY), RUNS), run


@triton.jit
def _load_words(
    rows, slot, heads, column, RUN: tl.constexpr, SIDE: tl.constexpr, ROW: tl.constexpr, CONTIGUOUS: tl.constexpr
):  # fmt: skip
    """uint16 words from run RUN on, padded ones of each run one after the other; ``slot``, ``heads`` and ``column`` broadcast to the tile."""
    # Neighbouring tokens are declared contiguous, which is not true and has one effect: lanes are laid over tokens before
    # heads. A thread then has few tokens to address, one multiply-add each, and its heads lie at constant offsets from there.
    token = tl.max_contiguous(slot * (ROW // 2), CONTIGUOUS)
    pointer = rows.to(tl.pointer_type(tl.uint16)) + (SIDE.codes // 2 + RUN * SIDE.words)
    if SIDE.words == SIDE.padded:
        return tl.load(((pointer + column) + token) + heads * (SIDE.head_codes // 2))
    else:
        word = column % SIDE.padded
        pointer = pointer + column // SIDE.padded * SIDE.words + word
        return tl.load((pointer + token) + heads * (SIDE.head_codes // 2), mask=word < SIDE.words, other=0)


@triton.jit
def _tiles(rows, slot, heads, AXIS: tl.constexpr, SIDE: tl.constexpr, ROW: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """uint16 words of all of a side's tiles; words lie along AXIS, 1 or 2."""
    COUNT: tl.constexpr = tile_count(SIDE)
    tiles = ()
    for x in tl.static_range(COUNT):
        column = tl.arange(0, tile_words(SIDE, x))
        column = column[None, None, :] if AXIS == 2 else column[None, :, None]
        tiles = tiles + (_load_words(rows, slot, heads, column, tile_run(SIDE, x), SIDE, ROW, CONTIGUOUS),)
    return tiles


@triton.jit
def _digit_weights(BATCH: tl.constexpr, N: tl.constexpr, RUNS: tl.constexpr, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """What a tile's digits are multiplied with to give the number of a scale, [BATCH, words, N], N columns alike."""
    word = tl.arange(0, RUNS * SIDE.padded)[None, :, None]
    digit = word - SIDE.digits.channel
    mine = (digit >= 0) & (digit < 8 // SIDE.digits.bits)
    weight = tl.where(mine, 1 << tl.where(mine, digit * SIDE.digits.bits, 0), 0).to(DTYPE)
    return tl.broadcast_to(weight, [BATCH, RUNS * SIDE.padded, N])


@triton.jit
def _digits(words, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Digits of scales in a tile whose first run is a head's first, [BATCH, TOKENS, words], in units of :func:`digit_unit`."""
    RUNS: tl.constexpr = words.shape[2] // SIDE.padded
    if RUNS == 1:
        return small(words, SIDE.digits.bits, SIDE.digits.start, DTYPE, ASSEMBLY_BODY)
    elif ASSEMBLY_BODY:
        return small_by_position(words, digit_fields(SIDE, RUNS), SIDE.padded * 16 // 32)
    else:
        here = tl.arange(0, words.shape[2])[None, None, :] < SIDE.padded
        return tl.where(here, (words >> SIDE.digits.start) & (2**SIDE.digits.bits - 1), 0).to(DTYPE)


@triton.jit
def _scales(digits, weights, SHAPE: tl.constexpr, SIDE: tl.constexpr):
    """fp32 scales [BATCH, TOKENS, N], N columns alike; rows hold no first tokens."""
    number = tl.dot(digits, weights, tl.zeros(SHAPE, tl.float32))
    return scale_of(number * (1 / digit_unit(SIDE, ASSEMBLY_BODY)))


@triton.jit
def _scores(
    tiles, scales, rows, slot, heads, operands, sums,
    SIDE: tl.constexpr, ROW: tl.constexpr, DTYPE: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """q . k as [BATCH, TOKENS, N] in the query's unit; ``slot`` int64 [1 or BATCH, TOKENS], ``heads`` [BATCH, 1].

    ``scales`` are those of a banded side.
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
                codes = _codes(tiles[plane_tile(SIDE, x)], x, 2, SIDE, DTYPE)
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
    """``weights`` [BATCH, TOKENS, N] as they are, but laid over the lanes of a warp as a right operand wants them."""
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

    The product takes codes, weighted with ``p * scale``. What it lacks is gathered in ``offsets``: the weighted minima of each
    lane's tokens [BATCH, 8, N] or, for a symmetric side, the sum of the weights, to be taken ``n / 2`` times, in all of 16 rows.
    """
    BATCH: tl.constexpr = p.shape[0]
    TOKENS: tl.constexpr = p.shape[1]
    slot3 = slot[:, None, :]
    heads3 = heads[:, :, None]
    GROUPS: tl.constexpr = SIDE.groups
    PLANES: tl.constexpr = plane_count(SIDE)
    tiles = _tiles(rows, slot3, heads3, 1, SIDE, ROW, [1, 1, 2])
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
                numbers = _codes(tiles[plane_tile(SIDE, x)], x, 1, SIDE, DTYPE)
                new_acc = new_acc + (tl.dot(numbers, weights, acc[x] * decay),)
    return new_acc, new_offsets


@triton.jit
def _store_plane(target, acc, offset, inverse, found, SIDE: tl.constexpr, PLANE: tl.constexpr):
    """What a plane's accumulator [BATCH, words, N] and its offsets come to, times ``inverse``, to their channels from ``target`` on."""
    WORDS: tl.constexpr = acc.shape[1]
    RUNS: tl.constexpr = WORDS // SIDE.padded
    word = tl.arange(0, WORDS)[None, :, None]
    run = word // SIDE.padded
    word = word % SIDE.padded
    out = acc / _by_run(run, units(SIDE, PLANE, ASSEMBLY_BODY), RUNS)
    if SIDE.bits < 16 and SIDE.symmetric:
        offset = tl.broadcast_to(offset[:, None, :, :], [acc.shape[0], WORDS // 16, 16, acc.shape[2]])
        out -= offset.reshape(acc.shape) * _by_run(run, middles(SIDE, PLANE), RUNS)
        out *= _by_run(run, steps(SIDE, PLANE), RUNS)
    elif SIDE.bits < 16:
        out += tl.sum(offset, 1, keep_dims=True)
    channel = _by_run(run, channels(SIDE, PLANE), RUNS) + word
    exists = (word < SIDE.words) & (_by_run(run, bits(SIDE, PLANE), RUNS) > 0)
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
        stored_heads = tl.minimum(heads, HEADS - 1)  # where heads are padded, the last is read again
    # Low halves: a slot's number fits in 32 bits, its address does not.
    slots = kv_indices.to(tl.pointer_type(tl.int32))
    run = entry % RUNS if RUNS > 1 else tl.full([1, 1], 0, tl.int32)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    query_heads = heads[:, :, None] * GROUP + column
    mask = (heads[:, :, None] < HEADS) & (column < GROUP)

    # The tile that brings the scales has one run, or two of the keys.
    if banded(KEY):
        DIGIT_RUNS: tl.constexpr = tile_words(KEY, 0) // KEY.padded
        key_weights = _digit_weights(BATCH, COLUMNS, DIGIT_RUNS, KEY, KEY_DTYPE)
        if banded(VALUE):
            value_weights = _digit_weights(BATCH, COLUMNS, DIGIT_RUNS, VALUE, KEY_DTYPE)
    elif banded(VALUE):
        value_weights = _digit_weights(BATCH, COLUMNS, 1, VALUE, VALUE_DTYPE)

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
        operands, sums, unit = _query_operands(query, columns, mask, KEY, KEY_DTYPE)
        # fp32 [batch, query heads]: what centring took from the scores, seen only by a soft cap.
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
            # Beyond the end the last token is read again and weighted with 0: no mask, and no row that is not in use.
            slot = tl.load(slots + tl.minimum(token, high - 1) * 2).to(tl.int64)
            key_tiles = _tiles(rows, slot[:, :, None], stored_heads[:, :, None], 2, KEY, ROW, [1, 2, 1])
            key_scales = None
            value_scales = None
            if banded(KEY):
                digits = _digits(key_tiles[0], KEY, KEY_DTYPE)
                key_scales = _scales(digits, key_weights, SHAPE, KEY)
                if banded(VALUE):
                    value_scales = _scales(digits, value_weights, SHAPE, KEY)
            elif banded(VALUE):
                words = tl.arange(0, VALUE.padded)[None, None, :]
                lone = _load_words(rows, slot[:, :, None], stored_heads[:, :, None], words, 0, VALUE, ROW, [1, 2, 1])
                value_scales = _scales(_digits(lone, VALUE, VALUE_DTYPE), value_weights, SHAPE, VALUE)
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
            top = tl.maximum(top, tl.max(scores, 1, keep_dims=True) * factor)
            # Exponents are taken from a reference that makes the largest p * scale up to 2**14: fp16 weights neither overflow
            # nor lose what counts.
            if VALUE.bits < 16:
                if banded(VALUE):
                    scales = (value_scales,)
                    minima = ()
                    tile_largest = tl.max(value_scales, 1, keep_dims=True)
                else:
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
        for x in tl.static_range(BANDS):
            if plane_bits(VALUE, x) == 0:
                word = tl.arange(0, VALUE.padded)[None, :, None]
                nothing = tl.zeros([BATCH, VALUE.padded, COLUMNS], tl.float32)
                tl.store(target + (x * VALUE.words + word), nothing, mask=found & (word < VALUE.words))
