# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Quantize and store: one launch writes the keys and values of a layer's new tokens into their rows.

The arithmetic is :func:`kvtuner_kernels.reference.quantize` step for step, so codes, scales and minima are the same bits. Banded sides
have a separate launch (:mod:`kvtuner_kernels.band_kernel`).
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtuner_kernels.band_kernel import store_bands
from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_kernels.operands import butterflies, power_of_2, rotation_shift
from kvtuner_kernels.reference import NO_CENTRES, Centres, rotation_block
from kvtuner_kernels.rotation import rotate_heads
from kvtuner_kernels.sides import Side, check_centre, check_rows, sides

TILE = 2048  # channels a program, so that a decode step of 64 tokens still spreads over the chip
STORE_WARPS = 2  # on an H200 3 to 9 % faster for 8,192 tokens than 4; 64 tokens take 1.9 us instead of 1.8
ROUND = tl.constexpr(
    12582912.0
)  # 1.5 * 2**23: adding and subtracting it rounds a small fp32 to an integer, ties to even


@triton.jit
def _store_side(
    x, centre, slots, rows, pairs, token_stride, head_stride, row_stride,
    SIDE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = SIDE.groups
    SEGMENTS: tl.constexpr = SIDE.segments
    PLANES: tl.constexpr = SIDE.planes
    PADDED: tl.constexpr = power_of_2(SIDE.words)
    SEGMENTS_PADDED: tl.constexpr = power_of_2(SEGMENTS)
    GROUPS_A_SEGMENT: tl.constexpr = GROUPS // SEGMENTS
    PLANES_A_GROUP: tl.constexpr = SIDE.planes_a_group
    WIDTH: tl.constexpr = SEGMENTS_PADDED * PLANES * PADDED

    pair = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)  # token and head in one number
    live = pair < pairs
    token = pair // HEADS
    head = pair % HEADS
    # The order of `column` is segment, plane, word: the order of channels wherever there is no padding.
    column = tl.arange(0, WIDTH)
    word = column % PADDED
    plane = column // PADDED % PLANES
    segment = column // (PADDED * PLANES)
    channel = (segment * PLANES + plane) * SIDE.words + word
    real = (word < SIDE.words) & (segment < SEGMENTS)
    at = token.to(tl.int64) * token_stride + head * head_stride
    mask = live[:, None] & real[None, :]
    values = tl.load(x + at[:, None] + channel[None, :], mask=mask, other=0.0)

    slot = tl.load(slots + token, mask=live, other=0).to(tl.int64)
    row = rows + slot * row_stride
    codes = (row + SIDE.codes).to(tl.pointer_type(tl.uint16)) + head * (SIDE.head_codes // 2)
    if SIDE.bits == 16:
        tl.store(codes[:, None] + channel[None, :], values.to(tl.uint16, bitcast=True), mask=mask)
        return

    values = values.to(tl.float32)
    if SIDE.centred:
        values -= tl.load(centre + head[:, None] * HEAD_DIM + channel[None, :], mask=mask, other=0.0)
    if SIDE.rotated:
        values = butterflies(values, TILE_ROWS, WIDTH, HEAD_DIM, rotation_shift(HEAD_DIM, False))

    TOP: tl.constexpr = 2**SIDE.bits - 1
    SHAPE: tl.constexpr = [TILE_ROWS, SEGMENTS_PADDED * GROUPS_A_SEGMENT, PLANES_A_GROUP * PADDED]
    grouped = values.reshape(SHAPE)
    inside = tl.broadcast_to(real[None, :], [TILE_ROWS, WIDTH]).reshape(SHAPE)
    if SIDE.symmetric:
        peak = tl.max(tl.abs(grouped), 2)  # padding is 0
        scale16 = (peak * (2 * SIDE.clip / TOP)).to(tl.float16)
        scale = scale16.to(tl.float32)
        offset = scale * (-TOP / 2)
    else:
        low = tl.min(tl.where(inside, grouped, float("inf")), 2)
        high = tl.max(tl.where(inside, grouped, float("-inf")), 2)
        scale16 = ((high - low) * (SIDE.clip / TOP)).to(tl.float16)
        scale = scale16.to(tl.float32)
        minimum16 = ((low + high) * 0.5 - scale * (TOP / 2)).to(tl.float16)
        offset = minimum16.to(tl.float32)
    inverse = tl.where(
        scale > 0, tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(scale > 0, scale, 1.0)), 0.0
    )
    # Clamping first keeps the rounding trick in its range; the order does not matter, because the bounds are integers.
    scaled = (grouped - offset[:, :, None]) * inverse[:, :, None]
    code = (tl.minimum(tl.maximum(scaled, 0.0), TOP * 1.0) + ROUND) - ROUND
    planes = code.to(tl.int32).reshape([TILE_ROWS, SEGMENTS_PADDED, PLANES, PADDED])
    shifts = tl.arange(0, PLANES) * SIDE.bits
    words = tl.sum(planes << shifts[None, None, :, None], 2).reshape([TILE_ROWS, SEGMENTS_PADDED * PADDED])
    out = tl.arange(0, SEGMENTS_PADDED * PADDED)
    filled = (out % PADDED < SIDE.words) & (out // PADDED < SEGMENTS)
    place = out // PADDED * SIDE.words + out % PADDED
    tl.store(codes[:, None] + place[None, :], words.to(tl.uint16), mask=live[:, None] & filled[None, :])

    group = tl.arange(0, SEGMENTS_PADDED * GROUPS_A_SEGMENT)
    each: tl.constexpr = 1 if SIDE.symmetric else 2
    metadata = (row + SIDE.metadata).to(tl.pointer_type(tl.float16)) + head * (GROUPS * each)
    metadata = metadata[:, None] + group[None, :] * each
    kept = live[:, None] & (group < GROUPS)[None, :]
    tl.store(metadata, scale16, mask=kept)
    if not SIDE.symmetric:
        tl.store(metadata + 1, minimum16, mask=kept)


@triton.jit(do_not_specialize=["pairs"])
def store_kernel(
    key, value, key_centre, value_centre, slots, rows, pairs, row_stride,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    KEY: tl.constexpr, VALUE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of token-and-head pairs, sides); the second axis is keys, then values, without a side that is None."""
    if VALUE is None or (KEY is not None and tl.program_id(1) == 0):
        _store_side(
            key, key_centre, slots, rows, pairs, key_token_stride, key_head_stride, row_stride,
            KEY, HEADS, HEAD_DIM, TILE_ROWS,
        )  # fmt: skip
    else:
        _store_side(
            value, value_centre, slots, rows, pairs, value_token_stride, value_head_stride, row_stride,
            VALUE, HEADS, HEAD_DIM, TILE_ROWS,
        )  # fmt: skip


def store(
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    slots: Tensor,
    spec: LayerSpec,
    centres: Centres = NO_CENTRES,
    positions: Tensor | None = None,
) -> None:
    """Quantize ``key`` and ``value`` and write each token's row.

    Args:
        key, value: [N, H, D] bf16 or fp16, contiguous along D. Values beyond fp16, NaN and infinities are not checked.
        rows: the pool, uint8 [R, row bytes].
        slots: int64 [N], the row of each token; no slot occurs twice. Not checked.
        spec: how the layer is stored.
        centres: centring vectors and basis tensors, given exactly where the spec asks for them.
        positions: int64 [N], of each token in its sequence; tokens at 0 are stored as first tokens in banded sides. If not given,
            no token is first.

    Raises:
        LayoutError: for shapes, dtypes or strides that the kernel does not cover.
    """
    tokens, heads, head_dim = key.shape
    check_rows(rows, spec, heads, head_dim)
    if positions is not None and (positions.shape != (tokens,) or positions.dtype != torch.int64):
        raise LayoutError(f"positions are {positions.dtype} {list(positions.shape)}, expected int64 {[tokens]}")
    inputs = []
    for name, x, side, centre in zip(
        ("key", "value"), (key, value), sides(spec, heads, head_dim), centres, strict=True
    ):
        if x.shape != key.shape or x.element_size() != 2 or x.stride(2) != 1:
            raise LayoutError(
                f"the {name} is {x.dtype} {list(x.shape)}, strides {x.stride()}: expected 16-bit {list(key.shape)}, dense along head_dim"
            )
        check_centre(side, centre, heads, head_dim)
        inputs.append(
            rotate_heads(x if centre is None else x.float() - centre, inverse=False)
            if _goes_first(side, head_dim)
            else x
        )
    if tokens == 0:
        return
    if spec.key.banded or spec.value.banded:
        store_bands(key, value, rows, slots, spec, centres, positions)
    if spec.shares_words:
        return
    key, value = inputs
    constants = store_constants(spec, heads, head_dim)
    count = 2 - (spec.key.banded or spec.value.banded)
    store_kernel[(triton.cdiv(tokens * heads, constants["TILE_ROWS"]), count)](
        key, value, centres.key, centres.value, slots, rows, tokens * heads, rows.stride(0),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), **constants, num_warps=STORE_WARPS,
    )  # fmt: skip


@functools.cache
def store_constants(spec: LayerSpec, heads: int, head_dim: int) -> dict[str, Any]:
    """Compile-time constants of :func:`store_kernel`; a banded side is None, because it has its own kernel."""
    key_side, value_side = (
        None if side.bands else replace(side, centred=False, rotated=False) if _goes_first(side, head_dim) else side
        for side in sides(spec, heads, head_dim)
    )
    tile_rows = max(1, TILE // triton.next_power_of_2(head_dim))
    return {"KEY": key_side, "VALUE": value_side, "HEADS": heads, "HEAD_DIM": head_dim, "TILE_ROWS": tile_rows}


def _goes_first(side: Side, head_dim: int) -> bool:
    """Whether a side is centred and rotated by a separate kernel: Hadamard blocks that do not line up with words."""
    return side.rotated and rotation_block(head_dim) < head_dim
