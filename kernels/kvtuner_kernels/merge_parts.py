# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"

"""What the merges of decode share: a request's partial results, its first token, and its sinks."""

from __future__ import annotations

import triton
import triton.language as tl

from kvtuner_kernels.basis_kernel import dequantized
from kvtuner_kernels.decode_kernel import SPLIT_ALIGNMENT, bounds
from kvtuner_kernels.operands import LOG2E, power_of_2
from kvtuner_kernels.planes import banded


@triton.jit
def spans(
    kv_indptr, split_counts, request, batch, splits, WINDOW: tl.constexpr, FIRST: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Numbers of the first and behind the last partial result of ``request`` (one or several), and the end of its tokens."""
    low, high = bounds(kv_indptr, request, WINDOW, FIRST)
    if split_counts is not None:
        count = tl.load(split_counts + request)
        length = tl.cdiv(tl.cdiv(high - low, count), SPLIT_ALIGNMENT) * SPLIT_ALIGNMENT
        first = request * splits
        last = first + tl.cdiv(high - low, tl.maximum(length, 1))
    else:
        begin = tl.load(kv_indptr)
        length = tl.maximum(tl.cdiv(tl.cdiv(tl.load(kv_indptr + batch) - begin, splits), TILE) * TILE, 1)
        first = (low - begin) // length + request
        last = (high - 1 - begin) // length + 1 + request
    return first, tl.where(high == low, first, last), high


@triton.jit
def _first_number(row, head, channel, seen, point, SIDE: tl.constexpr, HEAD_DIM: tl.constexpr, RAW: tl.constexpr):
    """Numbers of ``row`` [R] in channels [W] of ``head`` [R], in the basis, as fp32 [R, W]; 0 where it is not ``seen`` [R, 1]."""
    exists = (channel < HEAD_DIM)[None, :] & seen
    number, marked = dequantized(row, head, channel, exists, SIDE, HEAD_DIM, RAW)
    if banded(SIDE):
        number += tl.load(point + head[:, None] * HEAD_DIM + channel[None, :], mask=exists & marked, other=0.0)
    return number


@triton.jit
def first_rows(
    rows, kv_indptr, kv_indices, request, kv_head, high, channel, key_point, value_point, row_stride,
    KEY: tl.constexpr, VALUE: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """First tokens of requests [R]: keys [R, D], values in channels [W] as [R, W], and whether they are seen [R, 1]."""
    begins = tl.load(kv_indptr + request)
    seen = (begins < high)[:, None]
    if WINDOW:
        seen = seen & (begins >= high - WINDOW)[:, None]
    slot = tl.load(kv_indices + begins, mask=begins < high, other=0)
    row = rows + slot.to(tl.int64) * row_stride
    every = tl.arange(0, power_of_2(HEAD_DIM))
    key = _first_number(row, kv_head, every, seen, key_point, KEY, HEAD_DIM, RAW)
    return key, _first_number(row, kv_head, channel, seen, value_point, VALUE, HEAD_DIM, RAW), seen


@triton.jit
def first_scores(
    key, query, query_shift, request, head, query_heads, token_stride, head_stride, softmax_scale,
    HEAD_DIM: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Scores of first keys [R, D] with the queries of ``request`` and ``head`` [R], to base 2, [R, 1]."""
    every = tl.arange(0, power_of_2(HEAD_DIM))[None, :]
    at = query + request.to(tl.int64)[:, None] * token_stride + head[:, None] * head_stride + every
    q = tl.load(at, mask=every < HEAD_DIM, other=0.0)
    score = tl.sum(q.to(tl.float32) * key, 1, keep_dims=True)
    if query_shift is not None:
        score += tl.load(query_shift + request * query_heads + head)[:, None]
    score *= softmax_scale
    if CAP != 0:
        score = CAP * (1 - 2 / (1 + tl.exp2(score * (2 / CAP * LOG2E))))
    return score * LOG2E


@triton.jit
def sink_logits(
    sinks, query, mean, request, head, kv_head, token_stride, head_stride, softmax_scale, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Sinks of ``head`` [R] to base 2, [R, 1], less what centring took from the scores of ``request`` [R] beside them."""
    sink = tl.load(sinks + head)[:, None]
    if mean is not None:
        every = tl.arange(0, power_of_2(HEAD_DIM))[None, :]
        at = query + request.to(tl.int64)[:, None] * token_stride + head[:, None] * head_stride + every
        q = tl.load(at, mask=every < HEAD_DIM, other=0.0).to(tl.float32)
        k = tl.load(mean + kv_head[:, None] * HEAD_DIM + every, mask=every < HEAD_DIM, other=0.0)
        sink -= tl.sum(q * k, 1, keep_dims=True) * softmax_scale
    return sink * LOG2E
