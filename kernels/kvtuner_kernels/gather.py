# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Dequantize rows by slot (for FlashInfer's prefill, offload, export, debugging) and move rows."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtuner_kernels.basis_kernel import bases, dequantized, transform_heads
from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.operands import butterflies, rotation_shift
from kvtuner_kernels.planes import banded
from kvtuner_kernels.reference import NO_CENTRES, Centres, rotation_block
from kvtuner_kernels.rotation import rotate_heads
from kvtuner_kernels.sides import Side, check_centre, check_rows, sides

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
    values, marked = dequantized(row, head, channel, mask, SIDE, HEAD_DIM, tl.float16)  # raw sides have returned
    if banded(SIDE):
        values += tl.load(centre + head[:, None] * HEAD_DIM + channel[None, :], mask=mask & marked, other=0.0)
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
    """Grid: (tiles of token-and-head pairs, 2); the second axis is keys, then values.

    Banded sides are left in their basis, and take the points of first tokens instead of centring vectors.
    """
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
    plain = sides(spec, heads, head_dim)
    for side, centre in zip(plain, centres, strict=True):
        check_centre(side, centre, heads, head_dim)
    found_bases = bases(spec, centres)
    outputs, points = [], []
    for side, centre, found in zip(plain, centres, found_bases, strict=True):
        if side.bits == 16 and dtype.itemsize != 2:
            raise TypeError(f"a 16-bit side cannot be read as {dtype}: give the dtype that was stored")
        later = found is not None or _rotated_later(side, head_dim)  # transformed back by a second kernel
        out_dtype = torch.float32 if later else dtype
        out = torch.empty(len(slots), heads, head_dim, dtype=out_dtype, device=rows.device)
        outputs.append(out)
        points.append(centre if found is None else found.first)
    pairs = len(slots) * heads
    if pairs:
        constants = gather_constants(spec, heads, head_dim)
        gather_kernel[(triton.cdiv(pairs, constants["TILE_ROWS"]), 2)](
            *outputs, *points, slots, rows, pairs, rows.stride(0), **constants
        )
    for index, (side, centre, found) in enumerate(zip(plain, centres, found_bases, strict=True)):
        if found is not None:
            outputs[index] = transform_heads(outputs[index], found.inverse, heads, after=found.mean, dtype=dtype)
        elif _rotated_later(side, head_dim):
            outputs[index] = rotate_heads(outputs[index], inverse=True, dtype=dtype, centre=centre)
    return outputs[0], outputs[1]


@functools.cache
def gather_constants(spec: LayerSpec, heads: int, head_dim: int) -> dict[str, Any]:
    """Compile-time constants of :func:`gather_kernel`."""
    key_side, value_side = (
        replace(side, centred=False, rotated=False) if _rotated_later(side, head_dim) else side
        for side in sides(spec, heads, head_dim)
    )
    width = triton.next_power_of_2(head_dim)
    return {
        "KEY": key_side, "VALUE": value_side, "HEADS": heads, "HEAD_DIM": head_dim, "WIDTH": width,
        "TILE_ROWS": max(1, TILE // width),
    }  # fmt: skip


def _rotated_later(side: Side, head_dim: int) -> bool:
    """Whether a side is rotated back by a separate kernel: Hadamard blocks that do not line up with a tile."""
    return side.rotated and rotation_block(head_dim) < head_dim


def move(rows: Tensor, target: Tensor, source: Tensor) -> None:
    """Copy the rows at int64 slots ``source`` to ``target``; the two may overlap, a target may not occur twice."""
    rows[target] = rows[source]
