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
from kvtuner_kernels.basis_kernel import CHUNK, FEW_TILES, bases, multiplied, product
from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.operands import (
    ASSEMBLY_BODY,
    FIRST_MARK,
    SCALE_MIDDLE,
    plane_bits,
    plane_run,
    plane_start,
    plane_step,
    power_of_2,
)
from kvtuner_kernels.reference import Centres
from kvtuner_kernels.sides import Side, sides

HIGHEST = tl.constexpr(bands.FP16_MAX)
TRIED = tl.constexpr(bands.TRIED)
TRIES = tl.constexpr(len(bands.TRIED))
WEIGHTS = tl.constexpr(bands.WEIGHTS)
THRESHOLDS = tl.constexpr(bands.THRESHOLDS)
ROOTS = tl.constexpr(bands.ROOTS)
FINE = tl.constexpr(bands.FINE)
FINE_BITS = tl.constexpr(bands.FINE.bit_length() - 1)
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
    return 2 ** (plane_bits(side, plane) - 1) if plane_bits(side, plane) else 0


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
def floored(x):
    """The largest int32 up to fp32 ``x``, of which ``abs(x)`` is below 2**22."""
    if ASSEMBLY_BODY:  # conversions have a sixteenth of an addition's rate; the sum's last places are the integer
        rounded = tl.inline_asm_elementwise(
            "add.rm.f32 $0, $1, 12582912.0;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
        return rounded.to(tl.int32, bitcast=True) - 0x4B400000
    return tl.floor(x).to(tl.int32)


@triton.jit
def _columns(SIDE: tl.constexpr):
    """Band and word of each column. Codes that share a word are neighbouring columns, so that one thread or its neighbours hold them."""
    column = tl.arange(0, power_of_2(SIDE.words) * SIDE.planes_a_group)
    return column % SIDE.planes_a_group, column // SIDE.planes_a_group


@triton.jit
def _operands(x, matrix, mean, token, head, token_stride, head_stride, SIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where one side's product finds its rows, the mean and the matrix rows of :func:`_columns`."""
    band, word = _columns(SIDE)
    at = x + token.to(tl.int64)[:, None] * token_stride + head * head_stride
    weights = matrix + head * (HEAD_DIM * HEAD_DIM) + (band * SIDE.words + word)[:, None] * HEAD_DIM
    return at, mean + head * HEAD_DIM, weights, (word < SIDE.words)[:, None]


@triton.jit
def _both_products(key, value, live, HEAD_DIM: tl.constexpr):
    """:func:`kvtuner_kernels.basis_kernel.product` of both sides, bit for bit; what one waits for, the other overlaps."""
    key_acc = tl.zeros([live.shape[0], key[2].shape[0]], tl.float32)
    value_acc = tl.zeros([live.shape[0], value[2].shape[0]], tl.float32)
    for start in tl.range(0, HEAD_DIM, CHUNK):
        key_acc = multiplied(key_acc, key[0], live, key[1], key[2], key[3], 1, start, HEAD_DIM)
        value_acc = multiplied(value_acc, value[0], live, value[1], value[2], value[3], 1, start, HEAD_DIM)
    return key_acc, value_acc


@triton.jit
def _add_side(words, y, point, first, head, SIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Add one side's codes and scales to ``words``: int32 [R, words of a run] for each two runs of the head.

    ``y`` are the numbers in the basis, fp32 [R, W], in the order of :func:`_columns`.
    """
    PLANES: tl.constexpr = SIDE.planes_a_group
    band, word = _columns(SIDE)
    channel = band * SIDE.words + word
    exists = word < SIDE.words
    if first is not None:
        from_point = tl.load(point + head * HEAD_DIM + channel, mask=exists, other=0.0)
        y = tl.where(first[:, None], y - from_point[None, :], y)

    scaled = tl.minimum(tl.maximum(y, -HIGHEST), HIGHEST).to(tl.float16).to(tl.float32)
    square = scaled.to(tl.float64)
    nearest = _scale_number(tl.sum(square * square, 1).to(tl.float32) * (1 / HEAD_DIM))
    per_step = tl.zeros(band.shape, tl.float32)
    middle = tl.zeros(band.shape, tl.int32)
    top = middle
    start = middle
    pair_of = middle
    for x in tl.static_range(PLANES):
        per_step = tl.where(band == x, _per_step(SIDE, x), per_step)
        middle = tl.where(band == x, _middle(SIDE, x), middle)
        top = tl.where(band == x, 2 ** plane_bits(SIDE, x) - 1, top)
        start = tl.where(band == x, plane_run(SIDE, x) % 2 * 16 + plane_start(SIDE, x), start)
        pair_of = tl.where(band == x, plane_run(SIDE, x) // 2, pair_of)
    lowest = -middle[None, :]
    highest = (top - middle)[None, :]
    counts = (exists & (top > 0))[None, :]
    nearest = tl.minimum(tl.maximum(nearest, ENDS[0]), ENDS[1])
    steps = (scaled * _inverse_scale(nearest)[:, None]) * per_step[None, :]
    best = tl.full(nearest.shape, float("inf"), tl.float32)
    number = nearest
    ratio = best
    for x in tl.static_range(TRIES):
        fine = floored(tl.minimum(tl.maximum(steps * RATIOS[x], -FAR), FAR) * FINE)
        level = tl.minimum(tl.maximum(fine >> FINE_BITS, lowest), highest)
        wrong = tl.where(counts, fine - (level << FINE_BITS) - FINE // 2, 0)
        wrong = tl.minimum(tl.maximum(wrong, -FARTHEST), FARTHEST)
        cost = tl.sum(wrong * wrong, 1).to(tl.float32) * WEIGHTS[x]
        number = tl.where(cost < best, nearest + TRIED[x], number)
        ratio = tl.where(cost < best, RATIOS[x], ratio)
        best = tl.minimum(cost, best)
    level = floored(tl.minimum(tl.maximum(steps * ratio[:, None], -FAR), FAR))
    code = (tl.minimum(tl.maximum(level, lowest), highest) + middle[None, :]) << start[None, :]
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
    TOGETHER: tl.constexpr,
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
        of_key = _operands(key, key_matrix, key_mean, token, head, key_token_stride, key_head_stride, KEY, HEAD_DIM)
    if VALUE is not None:
        of_value = _operands(
            value, value_matrix, value_mean, token, head, value_token_stride, value_head_stride, VALUE, HEAD_DIM
        )
    if KEY is None:
        value_y = product(of_value[0], live[:, None], of_value[1], of_value[2], of_value[3], 1, HEAD_DIM)
    elif VALUE is None:
        key_y = product(of_key[0], live[:, None], of_key[1], of_key[2], of_key[3], 1, HEAD_DIM)
    elif TOGETHER:
        key_y, value_y = _both_products(of_key, of_value, live[:, None], HEAD_DIM)
    else:
        key_y = product(of_key[0], live[:, None], of_key[1], of_key[2], of_key[3], 1, HEAD_DIM)
        value_y = product(of_value[0], live[:, None], of_value[1], of_value[2], of_value[3], 1, HEAD_DIM)
    if KEY is not None:
        words = _add_side(words, key_y, key_point, first, head, KEY, HEAD_DIM)
    if VALUE is not None:
        words = _add_side(words, value_y, value_point, first, head, VALUE, HEAD_DIM)
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
        num_warps=store_bands_warps(head_dim),
    )  # fmt: skip


def store_bands_constants(spec: LayerSpec, heads: int, head_dim: int, tokens: int) -> dict[str, Any]:
    """Compile-time constants of :func:`store_bands_kernel`."""
    # Hopper multiplies 64 rows with another instruction: a token's codes must not depend on the number of tokens.
    small = head_dim > 128 or triton.cdiv(tokens, 16) * heads <= FEW_TILES
    return {
        **_store_bands_constants(spec, heads, head_dim),
        "TILE_ROWS": 16 if small else 32,
        "TOGETHER": small and head_dim <= 128,
    }


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


def store_bands_warps(head_dim: int) -> int:
    """Warps of :func:`store_bands_kernel`: the fewest without spills."""
    return 4 if head_dim <= 128 else 8
