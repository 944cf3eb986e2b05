# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"
# ruff: noqa: RUF005 - see operands.py
"""Store banded sides: bring a tile of tokens to the basis, put it on the grid, and write whole words.

After the product with the matrix the arithmetic is :func:`kvtuner_kernels.bands.quantize_bands` step for step. Keys and values that
share words are made by one program, so that each word is written once.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kvtuner_kernels.bands import FP16_MAX
from kvtuner_kernels.basis_kernel import FEW_TILES, bases, product
from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.operands import (
    Side,
    plane_bits,
    plane_run,
    plane_start,
    plane_step,
    power_of_2,
    sides,
)
from kvtuner_kernels.reference import Centres

HIGHEST = tl.constexpr(FP16_MAX)


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
def _add_side(
    words, x, matrix, mean, point, first, row, token, live, head, token_stride, head_stride,
    SIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Write one side's scales, and add its codes to ``words``: int32 [R, words of a run] for each two runs of the head."""
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
    square = tl.sum(square * square, 1).to(tl.float32) * (1 / HEAD_DIM)
    scale16 = tl.sqrt_rn(square).to(tl.float16)
    scale = scale16.to(tl.float32)
    inverse = tl.where(
        scale > 0, tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(scale > 0, scale, 1.0)), 0.0
    )
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
    code = tl.floor((scaled * inverse[:, None]) * per_step[None, :]) + middle[None, :]
    code = tl.minimum(tl.maximum(code, 0.0), top[None, :]).to(tl.int32) << start[None, :]
    PAIRS: tl.constexpr = len(words)
    SHAPE: tl.constexpr = [code.shape[0], code.shape[1] // PLANES, PLANES]
    result = ()
    for pair in tl.static_range(PAIRS):
        if _holds(SIDE, pair):
            part = tl.where((pair_of == pair)[None, :], code, 0).reshape(SHAPE)
            result = result + (words[pair] + tl.sum(part, 2),)  # no two have a bit in common
        else:
            result = result + (words[pair],)

    sign = tl.zeros(scale.shape, tl.int16)
    if first is not None:
        sign = tl.where(first, -32768, 0).to(tl.int16)
    metadata = (row + SIDE.metadata).to(tl.pointer_type(tl.int16)) + head
    tl.store(metadata, scale16.to(tl.int16, bitcast=True) | sign, mask=live)
    return result


@triton.jit(do_not_specialize=["tokens"])
def store_bands_kernel(
    key, value, key_matrix, key_mean, key_point, value_matrix, value_mean, value_point, positions, slots, rows, tokens,
    row_stride, key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    KEY: tl.constexpr, VALUE: tl.constexpr, RUNS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of tokens, KV heads). A side that is None is none of this kernel's business."""
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
            words, key, key_matrix, key_mean, key_point, first, row, token, live, head, key_token_stride,
            key_head_stride, KEY, HEAD_DIM,
        )  # fmt: skip
    if VALUE is not None:
        words = _add_side(
            words, value, value_matrix, value_mean, value_point, first, row, token, live, head, value_token_stride,
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
    # 64 rows would be multiplied by another instruction on a Hopper: a token's codes must not depend on how many there are.
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
    """Warps of :func:`store_bands_kernel`: the fewest that spill nothing."""
    return 4 if head_dim <= 64 or (head_dim <= 128 and tile_rows == 16) else 8
