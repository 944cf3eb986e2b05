# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment, misc"
# ruff: noqa: RUF005, RET505 - see operands.py
"""How decode reads one side of a row: tiles of words, planes of codes as matrix operands, and the query that goes with them.

The positions of codes are in :mod:`kvtuner_kernels.planes`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvtuner_kernels.operands import (
    ASSEMBLY_BODY,
    SCALE_MIDDLE,
    SCALES_AN_OCTAVE,
    inverse_power,
    power_below,
    small,
    small_by_position,
)
from kvtuner_kernels.planes import (
    bits,
    channels,
    digit_fields,
    even,
    fields,
    least_unit,
    masks,
    middles,
    plane_count,
    plane_group,
    plane_tile,
    power_factor,
    starts,
    steps,
    tile_count,
    tile_run,
    tile_words,
    units,
)


@triton.jit
def by_run(run, VALUES: tl.constexpr, RUNS: tl.constexpr):
    """One of VALUES for each entry of ``run``, as fp32 or int32."""
    result = tl.zeros(run.shape, tl.int32) + VALUES[0]
    for r in tl.static_range(1, RUNS):
        result = tl.where(run == r, VALUES[r], result)
    return result


@triton.jit
def plane_codes(words, PLANE: tl.constexpr, AXIS: tl.constexpr, SIDE: tl.constexpr, DTYPE: tl.constexpr):
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
        start = by_run(run, starts(SIDE, PLANE), RUNS).to(tl.uint16)
        return ((words >> start) & by_run(run, masks(SIDE, PLANE), RUNS).to(tl.uint16)).to(DTYPE)


@triton.jit
def query_operands(query, columns, mask, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Per plane one [BATCH, words, N] operand, per group a sum of q [BATCH, 1, N], and the unit of scores [BATCH, 1, N].

    Operands and sums are in units of powers of two, so that a query of any magnitude is exact in fp16 and operands compensate for
    those of :func:`small`. Sums are the factors of minima; for a symmetric side, with the centre of its codes subtracted.
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
            # Summed by a product: a second use keeps the operand in registers, instead of loading it for every tile.
            weight = one / ONE
            if SIDE.symmetric:
                weight *= -by_run(run, middles(SIDE, x), tile_words(SIDE, plane_tile(SIDE, x)) // SIDE.padded)
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
    exists = (word < SIDE.words) & (by_run(run, bits(SIDE, PLANE), RUNS) > 0)
    channel = by_run(run, channels(SIDE, PLANE), RUNS) + word
    part = tl.load(query + columns + channel, mask=mask & exists, other=0.0).to(tl.float32)
    return part, by_run(run, steps(SIDE, PLANE), RUNS), by_run(run, units(SIDE, PLANE, ASSEMBLY_BODY), RUNS), run


@triton.jit
def load_words(
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
def load_tiles(rows, slot, heads, AXIS: tl.constexpr, SIDE: tl.constexpr, ROW: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """uint16 words of all of a side's tiles; words lie along AXIS, 1 or 2."""
    COUNT: tl.constexpr = tile_count(SIDE)
    tiles = ()
    for x in tl.static_range(COUNT):
        column = tl.arange(0, tile_words(SIDE, x))
        column = column[None, None, :] if AXIS == 2 else column[None, :, None]
        tiles = tiles + (load_words(rows, slot, heads, column, tile_run(SIDE, x), SIDE, ROW, CONTIGUOUS),)
    return tiles


@triton.jit
def digit_weights(
    BATCH: tl.constexpr, N: tl.constexpr, RUNS: tl.constexpr, SIDE: tl.constexpr, ODD: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Factors that turn a tile's digits into numbers of scales, [BATCH, words, N]: SIDE's in all columns, or ODD's in odd ones."""
    word = tl.arange(0, RUNS * SIDE.padded)[None, :, None]
    weight = _digit_weight(word, SIDE)
    if ODD is not None:
        column = tl.arange(0, N)[None, None, :]
        weight = tl.where(column % 2 == 0, weight, _digit_weight(word, ODD))
    return tl.broadcast_to(weight.to(DTYPE), [BATCH, RUNS * SIDE.padded, N])


@triton.jit
def _digit_weight(word, SIDE: tl.constexpr):
    digit = word - SIDE.digits.channel
    mine = (digit >= 0) & (digit < 8 // SIDE.digits.bits)
    return tl.where(mine, 1 << tl.where(mine, digit * SIDE.digits.bits, 0), 0)


@triton.jit
def scale_digits(words, SIDE: tl.constexpr, DTYPE: tl.constexpr):
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
def scale_numbers(digits, weights, SHAPE: tl.constexpr):
    """Numbers of scales [BATCH, TOKENS, N] in units of :func:`digit_unit`; rows hold no first tokens."""
    return tl.dot(digits, weights, tl.zeros(SHAPE, tl.float32))


@triton.jit
def scale_powers(numbers, ODD: tl.constexpr, SIDE: tl.constexpr):
    """Logarithms to base 2 of the scales in even (ODD = 0) or odd columns of ``numbers``, fp32 [BATCH, TOKENS, N], N equal columns."""
    FACTOR: tl.constexpr = power_factor(SIDE, ASSEMBLY_BODY)
    SHIFT: tl.constexpr = -SCALE_MIDDLE // SCALES_AN_OCTAVE
    if ASSEMBLY_BODY:
        return tl.inline_asm_elementwise(
            _from_column(FACTOR, SHIFT, ODD), "=&r,=&r,r,r", [numbers], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        column = tl.arange(0, numbers.shape[2])[None, None, :]
        number = tl.sum(tl.where(column == ODD, numbers, 0.0), 2, keep_dims=True)
        return tl.broadcast_to(number * FACTOR + SHIFT, numbers.shape)


@triton.constexpr_function
def _from_column(factor, shift, odd):
    """Assembly that gives both of a row's neighbouring columns, which one thread holds, ``number * factor + shift`` of one of them."""
    return f"fma.rn.f32 $0, ${2 + odd}, {float(factor)}, {float(shift)}; mov.b32 $1, $0;"


@triton.jit
def exponentials(powers):
    """``2**powers`` for equal neighbouring columns."""
    if ASSEMBLY_BODY:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $2; mov.b32 $1, $0;",
            "=&r,=&r,r,r",
            [powers],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.exp2(powers)
