"""Attention of new tokens over a packed prefix and their own chunk: the launch.

The kernel and its parts are in :mod:`kvtuner_kernels.extend_kernel`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtuner_kernels.basis_kernel import bases, first_rows, transform_heads
from kvtuner_kernels.extend_kernel import extend_kernel
from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_kernels.operands import ASSEMBLY
from kvtuner_kernels.reference import NO_CENTRES, Centres
from kvtuner_kernels.rotation import rotate_heads
from kvtuner_kernels.sides import check_centre, check_rows, sides, within_reach
from kvtuner_kernels.sinks import check_sinks
from kvtuner_kernels.tuning import LONG, ExtendLaunch, extend_launch, shared_memory


def extend(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    rows: Tensor,
    spec: LayerSpec,
    heads: int,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    max_new: int,
    out: Tensor | None = None,
    *,
    centres: Centres = NO_CENTRES,
    causal: bool = True,
    custom_mask: Tensor | None = None,
    mask_indptr: Tensor | None = None,
    skip_prefix_mask: bool = True,
    softmax_scale: float | None = None,
    soft_cap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    mask_offsets: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Attention of the new tokens of several requests over their packed prefixes and over each other.

    Args:
        query: [T, Hq, D] bf16 or fp16, all requests' new tokens in turn; query head ``h`` reads KV head ``h // (Hq // H)``.
        key, value: [T, H, D] of the new tokens, read unquantized; both None if ``kv_indices`` covers the new tokens too, which are
            then read as stored. If values are stored centred, rotated or banded, the chunk's are transformed to that basis in 16 bits.
        rows: the pool, uint8 [R, row bytes].
        spec: how the layer is stored.
        heads: local KV heads H.
        qo_indptr: int32 [B + 1], where a request's new tokens start.
        kv_indptr: int32 [B + 1], where a request's slots start in ``kv_indices``; a prefix may be empty.
        kv_indices: int64 slots in the order of tokens.
        max_new: the largest number of new tokens of a request.
        out: [T, Hq, D], written; made if not given.
        centres: centring vectors and basis tensors, given exactly where the spec asks for them.
        causal: a new token sees no later one. Without effect where a custom mask is given.
        custom_mask: bool or uint8, for each request [new tokens, prefix + new tokens] flattened, non-zero where visible.
        mask_indptr: int64 [B + 1], where a request's mask starts.
        skip_prefix_mask: the mask is applied to new tokens only. Without effect if key is None.
        softmax_scale: factor of the scores, above 0; ``D ** -0.5`` if not given.
        soft_cap: scores become ``cap * tanh(score / cap)``; 0 is off.
        window: number of latest tokens that a token sees, itself included; 0 is all. Tokens are counted by their place, in a mask's tree
            of drafted tokens too. Rows that no query of a tile sees are not read, except a banded layer's first.
        sinks: attention sinks, [Hq] as in :func:`kvtuner_kernels.sinks.check_sinks`; None is none.
        mask_offsets: int32 or int64 [B], tokens of each request that its mask has before its first slot, where ``kv_indices`` has
            only those of a window (SGLang's ``window_kv_offsets``). A row of the mask is then ``mask_offsets[b]`` longer. 0 if not given.
        batch_invariant: the tile does not depend on ``max_new``. Then a token's result depends, bit for bit, on its own
            request alone and, if only stored rows are read, not on how much of it is prefix.

    Returns:
        ``out``. A token that sees nothing gives zeros.

    Raises:
        LayoutError: for shapes, dtypes or strides that the kernel does not cover.

    Example::

        extend(query, key, value, rows, spec, 8, qo_indptr, kv_indptr, kv_indices, 512, window=128, sinks=layer.sinks)
    """
    tokens, query_heads, head_dim = query.shape
    check_rows(rows, spec, heads, head_dim)
    key_side, value_side = sides(spec, heads, head_dim)
    check_centre(key_side, centres.key, heads, head_dim)
    check_centre(value_side, centres.value, heads, head_dim)
    if query_heads % heads or query.stride(2) != 1:
        raise LayoutError(
            f"{query_heads} query heads, strides {query.stride()}: expected a dense multiple of {heads} heads"
        )
    if (key is None) != (value is None) or (custom_mask is None) != (mask_indptr is None):
        raise LayoutError("give both of key and value, and both of custom_mask and mask_indptr, or neither")
    if mask_offsets is not None and custom_mask is None:
        raise LayoutError(
            "mask_offsets without a mask: give them exactly where a custom mask has tokens that have no slot"
        )
    sinks = check_sinks(sinks, query_heads)
    if query.dtype == torch.float32 and ASSEMBLY:
        raise LayoutError("fp32 queries are for the interpreter only: convert to bf16 or fp16")
    out = torch.empty_like(query) if out is None else out
    if tokens == 0:
        return out
    query = within_reach(query, "queries")
    key, value = (x if x is None else within_reach(x, "keys or values of a chunk") for x in (key, value))
    as_stored = key is None or value is None
    key_basis, value_basis = bases(spec, centres)
    transformed = value_side.rotated or value_side.centred or value_basis is not None
    if key is None or value is None:
        key = value = query  # not read
    elif value_basis is not None:
        value = transform_heads(value, value_basis.matrix, heads, before=value_basis.mean, dtype=query.dtype)
    elif transformed:
        shift = None if centres.value is None else -centres.value
        value = rotate_heads(
            value if shift is None else value.float() + shift,
            inverse=False,
            dtype=query.dtype,
            rotated=value_side.rotated,
        )
    key_centre, prefix_query = centres.key, query
    if key_basis is not None:
        key_centre, prefix_query = key_basis.mean, transform_heads(query, key_basis.dual, heads)
    elif key_side.rotated:
        prefix_query = rotate_heads(query, inverse=True, dtype=query.dtype)
    first_key = first_value = None
    if spec.key.banded or spec.value.banded:
        first_key, first_value = first_rows(rows, kv_indptr, kv_indices, spec, heads, head_dim, centres, query.dtype)
    result = torch.empty(query.shape, dtype=torch.float32, device=query.device) if transformed else out
    shares = None
    if sinks is not None and transformed:
        shares = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    group = query_heads // heads
    longest = LONG if batch_invariant else max_new * group
    launch = extend_launch(spec, head_dim, longest, shared_memory(rows.device))
    options = {
        "CAP": soft_cap, "WINDOW": window, "CAUSAL": causal, "AS_STORED": as_stored,
        "SKIP_PREFIX_MASK": skip_prefix_mask and not as_stored,
    }  # fmt: skip
    extend_kernel[(triton.cdiv(max_new * group, launch.rows), heads, len(qo_indptr) - 1)](
        query, prefix_query, key, value, result, rows, qo_indptr, kv_indptr, kv_indices, custom_mask, mask_indptr, key_centre,
        first_key, first_value, sinks, shares, mask_offsets,
        query.stride(0), query.stride(1), prefix_query.stride(0), prefix_query.stride(1),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), result.stride(0), result.stride(1),
        head_dim**-0.5 if softmax_scale is None else softmax_scale,
        **extend_constants(spec, heads, group, head_dim, query.dtype, rows.stride(0), launch), **options,
        num_warps=launch.warps,
    )  # fmt: skip
    if value_basis is not None:
        transform_heads(result, value_basis.inverse, heads, after=value_basis.mean, out=out, shares=shares)
    elif transformed:
        centre = None if centres.value is None else centres.value.repeat_interleave(group, 0)
        dtype = out.dtype if shares is None else torch.float32
        turned = rotate_heads(result, inverse=True, dtype=dtype, rotated=value_side.rotated, centre=centre)
        out.copy_(turned if shares is None else turned.mul_(shares[..., None]))
    return out


@functools.cache
def extend_constants(
    spec: LayerSpec, heads: int, group: int, head_dim: int, dtype: torch.dtype, row_stride: int, launch: ExtendLaunch
) -> dict[str, Any]:
    """Compile-time constants of :func:`extend_kernel` that the layer and the launch decide; ``dtype`` is the query's."""
    key_side, value_side = sides(spec, heads, head_dim)
    model = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    return {
        "KEY": key_side, "VALUE": value_side, "ROW": row_stride, "HEADS": heads, "GROUP": group, "HEAD_DIM": head_dim,
        "DTYPE": model, "VALUE_DTYPE": model, "TILE_ROWS": launch.rows, "TOKENS": launch.tokens,
        "STAGES": launch.stages,
    }  # fmt: skip
