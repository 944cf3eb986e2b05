# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment, misc"
# ruff: noqa: RUF005 - see operands.py
"""Store banded sides: transform a tile of tokens to the basis, quantize it, and write whole words.

After the product with the matrix the arithmetic is :func:`kvtuner_kernels.bands.quantize_bands` step for step. Keys and values that
share words are handled by one program, so that each word is written once.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kvtuner_kernels import bands
from kvtuner_kernels.basis_kernel import FEW_TILES, bases, product
from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.operands import (
    FIRST_MARK,
    SCALE_MIDDLE,
    Side,
    plane_bits,
    plane_run,
    plane_start,
    plane_step,
    power_of_2,
    sides,
)
from kvtuner_kernels.reference import Centres

HIGHEST = tl.constexpr(bands.FP16_MAX)
TRIED = tl.constexpr(bands.TRIED)
TRIES = tl.constexpr(len(bands.TRIED))
WEIGHTS = tl.constexpr(bands.WEIGHTS)
THRESHOLDS = tl.constexpr(bands.THRESHOLDS)
ROOTS = tl.constexpr(bands.ROOTS)
FINE = tl.constexpr(bands.FINE)
FAR = tl.constexpr(2.0**12)  # steps from zero; anything beyond has the largest error anyway
FARTHEST = tl.constexpr(bands.FARTHEST)
ENDS = tl.constexpr(bands.ENDS)
RATIOS = tl.constexpr(bands.RATIOS)


@triton.constexpr_function
def _holds(side, pair):
    """Whether runs ``2 * pair`` and ``2 * pair + 1`` of a head's words hold codes of a side."""
    return any(place.bits and place.word // 2 == pair for place in side.bands)


@triton.constexpr_function
def _per_step(side, plane):
    """Inverse of a band's step; 0 without bits."""
    return 1 / plane_step(side, plane) if plane_bits(side, plane) else 0.0


@triton.constexpr_function
def _middle(side, plane):
    """Code of the first level above zero."""
    return 2.0 ** (plane_bits(side, plane) - 1) if plane_bits(side, plane) else 0.0


@triton.constexpr_function
def _either(key, value):
    """A side that is not None; if both are, they share their words."""
    return value if key is None else key


@triton.jit
def _scale_number(mean_square):
    """:func:`kvtuner_kernels.bands.scale_number`."""
    stored = mean_square.to(tl.int32, bitcast=True)
    mantissa = stored & (2**23 - 1)
    above = (mantissa >= THRESHOLDS[0]).to(tl.int32) + (mantissa >= THRESHOLDS[1]).to(tl.int32)
    return ((stored >> 23) - 127) * 2 + SCALE_MIDDLE + above


@triton.jit
def _inverse_scale(number):
    """Exact as in :func:`kvtuner_kernels.bands.quantize_bands`: a root, times a power of two."""
    power = SCALE_MIDDLE - number  # in quarters of an octave
    root = tl.full(power.shape, ROOTS[0], tl.float32)
    for x in tl.static_range(1, 4):
        root = tl.where((power & 3) == x, ROOTS[x], root)
    return root * (((power >> 2) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _add_side(
    words, x, matrix, mean, point, first, token, live, head, token_stride, head_stride,
    SIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Add one side's codes and scales to ``words``: int32 [R, words of a run] for each two runs of the head."""
    PLANES: tl.constexpr = SIDE.planes_a_group
    # Codes that share a word are neighbouring columns, so that one thread or its neighbours hold them.
    column = tl.arange(0, power_of_2(SIDE.words) * PLANES)
    band = column % PLANES
    word = column // PLANES
    channel = band * SIDE.words + word
    exists = word < SIDE.words
    at = x + token.to(tl.int64)[:, None] * token_stride + head * head_stride
    weights = matrix + head * (HEAD_DIM * HEAD_DIM) + channel[:, None] * HEAD_DIM
    y = product(at, live[:, None], mean + head * HEAD_DIM, weights, exists[:, None], 1, HEAD_DIM)
    if first is not None:
        from_point = tl.load(point + head * HEAD_DIM + channel, mask=exists, other=0.0)
        y = tl.where(first[:, None], y - from_point[None, :], y)

    scaled = tl.minimum(tl.maximum(y, -HIGHEST), HIGHEST).to(tl.float16).to(tl.float32)
    square = scaled.to(tl.float64)
    nearest = _scale_number(tl.sum(square * square, 1).to(tl.float32) * (1 / HEAD_DIM))
    per_step = tl.zeros(band.shape, tl.float32)
    middle = per_step
    top = per_step
    start = tl.zeros(band.shape, tl.int32)
    pair_of = start
    for x in tl.static_range(PLANES):
        per_step = tl.where(band == x, _per_step(SIDE, x), per_step)
        middle = tl.where(band == x, _middle(SIDE, x), middle)
        top = tl.where(band == x, 2.0 ** plane_bits(SIDE, x) - 1, top)
        start = tl.where(band == x, plane_run(SIDE, x) % 2 * 16 + plane_start(SIDE, x), start)
        pair_of = tl.where(band == x, plane_run(SIDE, x) // 2, pair_of)
    counts = (exists & (top > 0))[None, :]
    nearest = tl.minimum(tl.maximum(nearest, ENDS[0]), ENDS[1])
    steps = (scaled * _inverse_scale(nearest)[:, None]) * per_step[None, :]
    best = tl.full(nearest.shape, float("inf"), tl.float32)
    number = nearest
    ratio = best
    for x in tl.static_range(TRIES):
        these = tl.minimum(tl.maximum(steps * RATIOS[x], -FAR), FAR)
        code = tl.minimum(tl.maximum(tl.floor(these) + middle[None, :], 0.0), top[None, :])
        wrong = tl.floor(these * FINE).to(tl.int32) - ((code - middle[None, :]).to(tl.int32) * FINE + FINE // 2)
        wrong = tl.minimum(tl.maximum(tl.where(counts, wrong, 0), -FARTHEST), FARTHEST)
        cost = tl.sum(wrong * wrong, 1).to(tl.float32) * WEIGHTS[x]
        number = tl.where(cost < best, nearest + TRIED[x], number)
        ratio = tl.where(cost < best, RATIOS[x], ratio)
        best = tl.minimum(cost, best)
    code = tl.floor(steps * ratio[:, None]) + middle[None, :]
    code = tl.minimum(tl.maximum(code, 0.0), top[None, :]).to(tl.int32) << start[None, :]
    PAIRS: tl.constexpr = len(words)
    SHAPE: tl.constexpr = [code.shape[0], code.shape[1] // PLANES, PLANES]
    result = ()
    for pair in tl.static_range(PAIRS):
        if _holds(SIDE, pair):
            part = tl.where((pair_of == pair)[None, :], code, 0).reshape(SHAPE)
            result = result + (words[pair] + tl.sum(part, 2),)  # their bits do not overlap
        else:
            result = result + (words[pair],)

    if first is not None:
        number += tl.where(first, FIRST_MARK, 0)
    digit = tl.arange(0, power_of_2(SIDE.words)) - SIDE.digits.channel
    mine = (digit >= 0) & (digit < 8 // SIDE.digits.bits)
    shift = tl.where(mine, digit * SIDE.digits.bits, 0)
    digits = ((number[:, None] >> shift[None, :]) & (2**SIDE.digits.bits - 1)) << SIDE.digits.start
    return (result[0] + tl.where(mine[None, :], digits, 0),) + result[1:]


@triton.jit(do_not_specialize=["tokens"])
def store_bands_kernel(
    key, value, key_matrix, key_mean, key_point, value_matrix, value_mean, value_point, positions, slots, rows, tokens,
    row_stride, key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    KEY: tl.constexpr, VALUE: tl.constexpr, RUNS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of tokens, KV heads). A side that is None is not stored by this kernel."""
    token = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    head = tl.program_id(1)
    live = token < tokens
    row = rows + tl.load(slots + token, mask=live, other=0).to(tl.int64) * row_stride
    first = None
    if positions is not None:
        first = tl.load(positions + token, mask=live, other=1) == 0
    SIDE: tl.constexpr = _either(KEY, VALUE)
    words = ()
    for _ in tl.static_range((RUNS + 1) // 2):
        words = words + (tl.zeros([TILE_ROWS, power_of_2(SIDE.words)], tl.int32),)
    if KEY is not None:
        words = _add_side(
            words, key, key_matrix, key_mean, key_point, first, token, live, head, key_token_stride,
            key_head_stride, KEY, HEAD_DIM,
        )  # fmt: skip
    if VALUE is not None:
        words = _add_side(
            words, value, value_matrix, value_mean, value_point, first, token, live, head, value_token_stride,
            value_head_stride, VALUE, HEAD_DIM,
        )  # fmt: skip
    word = tl.arange(0, power_of_2(SIDE.words))
    target = (row + SIDE.codes).to(tl.pointer_type(tl.uint16)) + head * (SIDE.head_codes // 2)
    target = target[:, None] + word[None, :]
    written = live[:, None] & (word < SIDE.words)[None, :]
    for run in tl.static_range(RUNS):
        tl.store(target + run * SIDE.words, (words[run // 2] >> (run % 2 * 16)).to(tl.uint16), mask=written)


def store_bands(
    key: Tensor, value: Tensor, rows: Tensor, slots: Tensor, spec: LayerSpec, centres: Centres, positions: Tensor | None
) -> None:
    """The banded sides of :func:`kvtuner_kernels.quantize.store`, which has checked everything."""
    tokens, heads, head_dim = key.shape
    tensors: list[Tensor | None] = []
    for found in bases(spec, centres):
        tensors += [None] * 3 if found is None else [found.matrix, found.mean, found.first]
    constants = store_bands_constants(spec, heads, head_dim, tokens)
    store_bands_kernel[(triton.cdiv(tokens, constants["TILE_ROWS"]), heads)](
        key, value, *tensors, positions, slots, rows, tokens, rows.stride(0),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), **constants,
        num_warps=store_bands_warps(head_dim, constants["TILE_ROWS"]),
    )  # fmt: skip


def store_bands_constants(spec: LayerSpec, heads: int, head_dim: int, tokens: int) -> dict[str, Any]:
    """Compile-time constants of :func:`store_bands_kernel`."""
    # Hopper multiplies 64 rows with another instruction: a token's codes must not depend on the number of tokens.
    small = head_dim > 128 or triton.cdiv(tokens, 16) * heads <= FEW_TILES
    return {**_store_bands_constants(spec, heads, head_dim), "TILE_ROWS": 16 if small else 32}


@functools.cache
def _store_bands_constants(spec: LayerSpec, heads: int, head_dim: int) -> dict[str, Any]:
    key_side, value_side = (side if side.bands else None for side in sides(spec, heads, head_dim))
    some: Side | None = key_side or value_side
    assert some is not None  # a layer without bands is not stored here
    return {
        "KEY": key_side,
        "VALUE": value_side,
        "RUNS": some.head_codes // 2 // some.words,
        "HEAD_DIM": head_dim,
    }


def store_bands_warps(head_dim: int, tile_rows: int) -> int:
    """Warps of :func:`store_bands_kernel`: the fewest without spills."""
    return 4 if head_dim <= 64 or (head_dim <= 128 and tile_rows == 16) else 8
