# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Hadamard transform of queries, outputs, and keys or values whose head is not a power of two."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtuner_kernels.operands import butterflies, rotation_shift
from kvtuner_kernels.reference import rotation_block

TILE = 2048  # channels a program


@triton.jit(do_not_specialize=["pairs"])
def rotate_kernel(
    x, out, centre, pairs, token_stride, head_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
    ROTATED: tl.constexpr, CENTRED: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """``out = transform(x) + centre`` for dense ``out``; grid: (tiles of token-and-head pairs,)."""
    pair = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    head = pair % HEADS
    channel = tl.arange(0, WIDTH)
    mask = (pair < pairs)[:, None] & (channel < HEAD_DIM)[None, :]
    at = (pair // HEADS).to(tl.int64) * token_stride + head * head_stride
    values = tl.load(x + at[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if ROTATED:
        values = butterflies(values, TILE_ROWS, WIDTH, BLOCK, SHIFT)
    if CENTRED:
        values += tl.load(centre + head[:, None] * HEAD_DIM + channel[None, :], mask=mask, other=0.0)
    tl.store(out + pair.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :], values.to(out.dtype.element_ty), mask=mask)


def rotate_heads(
    x: Tensor,
    *,
    inverse: bool,
    dtype: torch.dtype = torch.float32,
    rotated: bool = True,
    centre: Tensor | None = None,
) -> Tensor:
    """``reference.rotate`` (``unrotate`` if ``inverse``) of x [N, H, D] in fp32, plus ``centre`` [H, D], as a dense ``dtype`` tensor."""
    tokens, heads, head_dim = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    width = triton.next_power_of_2(head_dim)
    tile_rows = max(1, TILE // width)
    if tokens:
        rotate_kernel[(triton.cdiv(tokens * heads, tile_rows),)](
            x, out, centre, tokens * heads, x.stride(0), x.stride(1),
            HEADS=heads, HEAD_DIM=head_dim, WIDTH=width, BLOCK=rotation_block(head_dim),
            SHIFT=rotation_shift(head_dim, inverse), ROTATED=rotated, CENTRED=centre is not None, TILE_ROWS=tile_rows,
        )  # fmt: skip
    return out
