# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Dequantize rows by slot (what FlashInfer attends to, offload, export, debugging) and move rows."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.operands import butterflies, check_centre, check_rows, rotation_shift, sides
from kvtuner_kernels.reference import NO_CENTRES, Centres, rotation_block
from kvtuner_kernels.rotation import rotate_heads

TILE = 2048  # channels a program


@triton.jit
def _gather_side(
    out, centre, slots, rows, pairs, row_stride,
    SIDE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    live = pair < pairs
    head = pair % HEADS
    channel = tl.arange(0, WIDTH)
    mask = live[:, None] & (channel < HEAD_DIM)[None, :]
    row = rows + tl.load(slots + pair // HEADS, mask=live, other=0).to(tl.int64) * row_stride
    codes = (row + SIDE.codes).to(tl.pointer_type(tl.uint16)) + head * (SIDE.head_codes // 2)
    target = out + pair.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
    if SIDE.bits == 16:
        words = tl.load(codes[:, None] + channel[None, :], mask=mask, other=0)
        tl.store(target.to(tl.pointer_type(tl.uint16)), words, mask=mask)
        return
    SEGMENT: tl.constexpr = SIDE.planes * SIDE.words
    plane = channel % SEGMENT // SIDE.words
    place = channel // SEGMENT * SIDE.words + channel % SIDE.words
    words = tl.load(codes[:, None] + place[None, :], mask=mask, other=0).to(tl.int32)
    code = (words >> (plane * SIDE.bits)[None, :]) & (2**SIDE.bits - 1)
    each: tl.constexpr = 1 if SIDE.symmetric else 2
    metadata = (row + SIDE.metadata).to(tl.pointer_type(tl.float16)) + head * (SIDE.groups * each)
    metadata = metadata[:, None] + (channel // (HEAD_DIM // SIDE.groups) * each)[None, :]
    scale = tl.load(metadata, mask=mask, other=0.0).to(tl.float32)
    if SIDE.symmetric:
        minimum = scale * (-(2**SIDE.bits - 1) / 2)
    else:
        minimum = tl.load(metadata + 1, mask=mask, other=0.0).to(tl.float32)
    values = code.to(tl.float32) * scale + minimum
    if SIDE.rotated:
        values = butterflies(values, TILE_ROWS, WIDTH, HEAD_DIM, rotation_shift(HEAD_DIM, True))
    if SIDE.centred:
        values += tl.load(centre + head[:, None] * HEAD_DIM + channel[None, :], mask=mask, other=0.0)
    tl.store(target, values.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pairs"])
def gather_kernel(
    key, value, key_centre, value_centre, slots, rows, pairs, row_stride,
    KEY: tl.constexpr, VALUE: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of token-and-head pairs, 2); the second axis is keys, then values."""
    if tl.program_id(1) == 0:
        _gather_side(key, key_centre, slots, rows, pairs, row_stride, KEY, HEADS, HEAD_DIM, WIDTH, TILE_ROWS)
    else:
        _gather_side(value, value_centre, slots, rows, pairs, row_stride, VALUE, HEADS, HEAD_DIM, WIDTH, TILE_ROWS)


def gather(
    rows: Tensor,
    slots: Tensor,
    spec: LayerSpec,
    heads: int,
    head_dim: int,
    centres: Centres = NO_CENTRES,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Keys and values of the rows at ``slots``, each ``dtype`` [N, H, D], in the model's own basis.

    Args:
        rows: the pool, uint8 [R, row bytes].
        slots: int64 [N].
        dtype: fp32, or a 16-bit type; 16-bit sides are copied, so it must be the type that was stored.

    Raises:
        LayoutError: for shapes, dtypes or strides that the kernel does not cover.
    """
    check_rows(rows, spec, heads, head_dim)
    outputs = []
    for side, centre in zip(sides(spec, heads, head_dim), centres, strict=True):
        check_centre(side, centre, heads, head_dim)
        later = side.rotated and rotation_block(head_dim) < head_dim  # undone by a second kernel
        out_dtype = torch.float32 if later else dtype
        if side.bits == 16 and dtype.itemsize != 2:
            raise TypeError(f"a 16-bit side cannot be read as {dtype}: give the dtype that was stored")
        out = torch.empty(len(slots), heads, head_dim, dtype=out_dtype, device=rows.device)
        outputs.append((out, replace(side, centred=False, rotated=False) if later else side, later))
    (key, key_side, _), (value, value_side, _) = outputs
    pairs = len(slots) * heads
    width = triton.next_power_of_2(head_dim)
    tile_rows = max(1, TILE // width)
    if pairs:
        gather_kernel[(triton.cdiv(pairs, tile_rows), 2)](
            key, value, centres.key, centres.value, slots, rows, pairs, rows.stride(0),
            KEY=key_side, VALUE=value_side, HEADS=heads, HEAD_DIM=head_dim, WIDTH=width, TILE_ROWS=tile_rows,
        )  # fmt: skip
    key, value = (
        rotate_heads(out, inverse=True, dtype=dtype, centre=centre) if later else out
        for (out, _, later), centre in zip(outputs, centres, strict=True)
    )
    return key, value


def move(rows: Tensor, target: Tensor, source: Tensor) -> None:
    """Copy the rows at int64 slots ``source`` to ``target``; the two may overlap, a target may not occur twice."""
    rows[target] = rows[source]
