# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: RUF005, RET505 - Triton compiles what follows a return and has no starred tuples
"""Split-KV decode attention over packed rows, and the merge of the splits.

One program reads whole rows: all local KV heads (up to ``BATCH``) of a run of tokens. The tile is three-dimensional and a warp
owns one entry of its first axis, a KV head (or, with fewer heads, every other run of tokens of one), so that softmax and both
products stay inside a warp. Keys are the left operand, so a query group of 7 pads to 8 columns and not to 16 rows. Codes go
from shared memory to registers in the layout of the matrix instruction and are turned into operands there.

Scores are ``scale * (q . code) + minimum * sum(q)``; for values, scales are multiplied into the probabilities and minima
are summed with them. Nothing is dequantized.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_kernels.operands import (
    ASSEMBLY,
    bias,
    butterflies,
    check_centre,
    check_rows,
    fill,
    grid_of,
    inverse_power,
    operand,
    pieces,
    power_below,
    rotation_shift,
    rounded,
    sides,
)
from kvtuner_kernels.reference import NO_CENTRES, Centres, rotation_block
from kvtuner_kernels.rotation import rotate_heads
from kvtuner_kernels.tuning import DecodeLaunch, decode_launch, multiprocessors

SPLIT_ALIGNMENT = tl.constexpr(32)  # tokens; SGLang's _MIN_BLOCK_KV
LOG2E = tl.constexpr(1.4426950408889634)
ASSEMBLY_BODY = tl.constexpr(ASSEMBLY)


@triton.jit
def _query_operands(
    query, heads, columns, mask,
    SIDE: tl.constexpr, HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Per plane one [BATCH, words, N] operand, per group the sum of q and of q times the operands' bias, and q's unit [BATCH, 1, N].

    Operands and sums are in units of a power of two, so that a query of any magnitude is exact in fp16.
    """
    word = tl.arange(0, SIDE.padded)[None, :, None]
    operands = ()
    sums = ()
    biases = ()
    PLANES: tl.constexpr = SIDE.segments * SIDE.planes
    PLANES_A_GROUP: tl.constexpr = SIDE.planes_a_group
    peak = tl.full([1, 1, 1], 0.0, tl.float32)
    for x in tl.static_range(PLANES):
        part = tl.load(query + columns + x * SIDE.words + word, mask=mask & (word < SIDE.words), other=0.0)
        peak = tl.maximum(peak, tl.max(tl.abs(part.to(tl.float32)), 1, keep_dims=True))
    unit = tl.maximum(power_below(peak), 2.0**-60) * 2.0**-7  # the largest channel becomes 2**7 or more
    for x in tl.static_range(PLANES):
        part = tl.load(query + columns + x * SIDE.words + word, mask=mask & (word < SIDE.words), other=0.0)
        part = (part.to(tl.float32) * inverse_power(unit)).to(DTYPE)
        total = tl.sum(part.to(tl.float32), 1, keep_dims=True)
        if x % PLANES_A_GROUP == 0:
            group_sum = total
            group_bias = total * bias(SIDE.bits, x % SIDE.planes, DTYPE, ASSEMBLY_BODY)
        else:
            group_sum += total
            group_bias += total * bias(SIDE.bits, x % SIDE.planes, DTYPE, ASSEMBLY_BODY)
        if x % PLANES_A_GROUP == PLANES_A_GROUP - 1:
            sums = sums + (group_sum,)
            biases = biases + (group_bias,)
        operands = operands + (part,)
    return operands, sums, biases, unit


@triton.jit
def _load_words(
    rows, slot, heads, word, SEGMENT: tl.constexpr, SIDE: tl.constexpr, ROW: tl.constexpr, CONTIGUOUS: tl.constexpr
):  # fmt: skip
    """uint16 words of one segment; ``slot``, ``heads`` and ``word`` broadcast to the tile."""
    # Neighbouring tokens are declared contiguous, which is not true and has one effect: lanes are laid over tokens before
    # heads. A thread then has few tokens to address, one multiply-add each, and its heads lie at constant offsets from there.
    token = tl.max_contiguous(slot * (ROW // 2), CONTIGUOUS)
    pointer = rows.to(tl.pointer_type(tl.uint16)) + (SIDE.codes // 2 + SEGMENT * SIDE.words) + word
    pointer = (pointer + token) + heads * (SIDE.head_codes // 2)
    if SIDE.words == SIDE.padded:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=word < SIDE.words, other=0)


@triton.jit
def _scores(
    rows, slot, heads, operands, sums, biases,
    SIDE: tl.constexpr, ROW: tl.constexpr, DTYPE: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """q . k as [BATCH, TOKENS, N] without the softmax scale; ``slot`` int64 [1 or BATCH, TOKENS], ``heads`` [BATCH, 1]."""
    word = tl.arange(0, SIDE.padded)[None, None, :]
    slot3 = slot[:, :, None]
    heads3 = heads[:, :, None]
    GROUPS: tl.constexpr = SIDE.groups
    PLANES_A_GROUP: tl.constexpr = SIDE.planes_a_group
    for group in tl.static_range(GROUPS):
        part = tl.broadcast_to(-biases[group], SHAPE)
        for x in tl.static_range(group * PLANES_A_GROUP, (group + 1) * PLANES_A_GROUP):
            if x % SIDE.planes == 0:
                words = _load_words(rows, slot3, heads3, word, x // SIDE.planes, SIDE, ROW, [1, 2, 1])
            for piece in tl.static_range(pieces(SIDE.bits, DTYPE)):
                codes = operand(words, SIDE.bits, x % SIDE.planes, piece, DTYPE, ASSEMBLY_BODY)
                part = tl.dot(codes, operands[x], part)
        if SIDE.bits < 16:
            scale, minimum = grid_of(rows, slot, heads, group, SIDE, ROW)
            part = part * scale[:, :, None] + minimum[:, :, None] * sums[group]
        if group == 0:
            scores = part
        else:
            scores += part
    return scores


@triton.jit
def _add_values(
    rows, slot, heads, p, decay, acc, middles, units, SIDE: tl.constexpr, ROW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Decay the accumulators and add the tile's values, weighted with ``p`` [BATCH, TOKENS, N].

    A value is ``scale * (code - n / 2) + middle``: what is rounded, ``p * scale``, meets numbers centred on zero. Likewise an
    operand's bias is taken off tile by tile, so that sums stay as small as what they sum. Bytes need fp16 operands, hence
    fp16 weights: these, and their sums, are in ``units``, the power of two of the largest scale so far, and cannot overflow.
    """
    BATCH: tl.constexpr = p.shape[0]
    TOKENS: tl.constexpr = p.shape[1]
    COLUMNS: tl.constexpr = p.shape[2]
    word = tl.arange(0, SIDE.padded)[None, :, None]
    slot3 = slot[:, None, :]
    heads3 = heads[:, :, None]
    GROUPS: tl.constexpr = SIDE.groups
    PLANES_A_GROUP: tl.constexpr = SIDE.planes_a_group
    SHAPE: tl.constexpr = [BATCH, SIDE.padded, COLUMNS]
    BLOCKS: tl.constexpr = [BATCH, SIDE.padded // 16, 16, COLUMNS]
    new_acc = ()
    new_middles = ()
    new_units = ()
    for group in tl.static_range(GROUPS):
        if SIDE.bits == 16:
            weights = rounded(p, DTYPE, ASSEMBLY_BODY)
            acc_decay = decay
            new_units = new_units + (units[group],)
        else:
            scale, minimum = grid_of(rows, slot, heads, group, SIDE, ROW)
            if SIDE.bits == 8:
                unit = tl.maximum(units[group], power_below(tl.max(scale, 1, keep_dims=True)[:, :, None]))
                inverse = inverse_power(unit)
                weights = rounded(p * (scale[:, :, None] * inverse), DTYPE, ASSEMBLY_BODY)
                acc_decay = decay * (units[group] * inverse)
                new_units = new_units + (unit,)
            else:
                weights = rounded(p * scale[:, :, None], DTYPE, ASSEMBLY_BODY)
                acc_decay = decay
                new_units = new_units + (units[group],)
            ones = tl.full([BATCH, 16, TOKENS], 1.0, DTYPE)
            total = tl.dot(ones, weights)[:, None, :, :]  # in all of 16 rows, as the accumulators have them
        if SIDE.symmetric or SIDE.bits == 16:
            new_middles = new_middles + (middles[group],)
        else:
            middle = minimum + scale * ((2**SIDE.bits - 1) / 2)
            new_middles = new_middles + (middles[group] * decay + lane_sums(p * middle[:, :, None]),)
        for x in tl.static_range(group * PLANES_A_GROUP, (group + 1) * PLANES_A_GROUP):
            if x % SIDE.planes == 0:
                words = _load_words(rows, slot3, heads3, word, x // SIDE.planes, SIDE, ROW, [1, 1, 2])
            out = acc[x] * acc_decay
            if SIDE.bits < 16:
                excess = total * (bias(SIDE.bits, x % SIDE.planes, DTYPE, ASSEMBLY_BODY) + (2**SIDE.bits - 1) / 2)
                out -= tl.broadcast_to(excess, BLOCKS).reshape(SHAPE)
            for piece in tl.static_range(pieces(SIDE.bits, DTYPE)):
                out = tl.dot(operand(words, SIDE.bits, x % SIDE.planes, piece, DTYPE, ASSEMBLY_BODY), weights, out)
            new_acc = new_acc + (out,)
    return new_acc, new_middles, new_units


@triton.jit
def lane_sums(x):
    """[BATCH, TOKENS, N] to [BATCH, 8, N], the sums of every eighth token: those that one thread holds anyway."""
    return tl.sum(x.reshape([x.shape[0], x.shape[1] // 8, 8, x.shape[2]]), 1)


@triton.jit(do_not_specialize=["batch", "splits"])
def decode_kernel(
    query, rows, kv_indptr, kv_indices, split_counts, partial, lse, batch, splits,
    query_token_stride, query_head_stride, softmax_scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, ROW: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
    KEY_DTYPE: tl.constexpr, VALUE_DTYPE: tl.constexpr, BATCH: tl.constexpr, RUNS: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (programs, blocks of BATCH // RUNS KV heads, blocks of COLUMNS query heads of a group).

    With ``split_counts`` (int32 [batch]), program ``b * splits + s`` takes split ``s`` of request ``b`` by SGLang's rule.
    Without, all requests' tokens are cut into ``splits`` equal runs, whatever request they belong to. The part of program ``i``
    that belongs to request ``b`` is partial result ``i + b``; neighbours differ in one or both, so the numbers are unique.
    """
    TILE: tl.constexpr = RUNS * TOKENS
    QUERY_HEADS: tl.constexpr = HEADS * GROUP
    PLANES: tl.constexpr = VALUE.segments * VALUE.planes
    WORDS: tl.constexpr = VALUE.padded
    GROUPS: tl.constexpr = VALUE.groups
    program = tl.program_id(0)
    entry = tl.arange(0, BATCH)[:, None]
    heads = entry // RUNS
    if HEADS > BATCH // RUNS:
        heads += tl.program_id(1) * (BATCH // RUNS)
    if HEADS % (BATCH // RUNS) == 0:
        stored_heads = heads
    else:
        stored_heads = tl.minimum(heads, HEADS - 1)  # where heads are padded, the last is read again
    slots = kv_indices.to(tl.pointer_type(tl.int32))  # low halves: a slot's number fits in 32 bits, its address does not
    run = entry % RUNS if RUNS > 1 else tl.full([1, 1], 0, tl.int32)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    query_heads = heads[:, :, None] * GROUP + column
    mask = (heads[:, :, None] < HEADS) & (column < GROUP)

    if split_counts is not None:
        first = program // splits
        last = first + 1
        start = 0
        end = 0
    else:
        begin = tl.load(kv_indptr)
        length = tl.cdiv(tl.cdiv(tl.load(kv_indptr + batch) - begin, splits), TILE) * TILE
        start = begin + program * length
        end = start + length
        first = 0
        last = 0
        for block in range(0, batch, 128):
            bound = block + tl.arange(0, 128)
            indptr = tl.load(kv_indptr + 1 + bound, mask=bound < batch, other=2147483647)
            first += tl.sum((indptr <= start).to(tl.int32))
            last += tl.sum((indptr < end).to(tl.int32))
        last = tl.minimum(last + 1, batch)

    for request in range(first, last):
        low = tl.load(kv_indptr + request)
        high = tl.load(kv_indptr + request + 1)
        if WINDOW:
            low = tl.maximum(low, high - WINDOW)
        if split_counts is not None:
            count = tl.load(split_counts + request)
            length = tl.cdiv(tl.cdiv(high - low, count), SPLIT_ALIGNMENT) * SPLIT_ALIGNMENT
            low += (program % splits) * length
            high = tl.minimum(low + length, high)
            part = program
        else:
            low = tl.maximum(low, start)
            high = tl.minimum(high, end)
            part = program + request

        columns = request * query_token_stride + query_heads * query_head_stride
        operands, sums, biases, unit = _query_operands(query, heads, columns, mask, KEY, HEAD_DIM, KEY_DTYPE)
        top = tl.full([BATCH, 1, COLUMNS], -1.0e30, tl.float32)
        lane_total = tl.zeros([BATCH, 8, COLUMNS], tl.float32)
        acc = fill(PLANES, [BATCH, WORDS, COLUMNS], 0.0)
        lane_middles = fill(GROUPS, [BATCH, 8, COLUMNS], 0.0)
        units = fill(GROUPS, [BATCH, 1, 1], 2.0**-60)
        for tile in tl.range(low, high, TILE, num_stages=STAGES):
            token = tile + run * TOKENS + tl.arange(0, TOKENS)[None, :]
            # Beyond the end the last token is read again and weighted with 0: no mask, and no row that is not in use.
            slot = tl.load(slots + tl.minimum(token, high - 1) * 2).to(tl.int64)
            scores = _scores(
                rows, slot, stored_heads, operands, sums, biases, KEY, ROW, KEY_DTYPE, [BATCH, TOKENS, COLUMNS]
            )
            if CAP != 0:
                # tanh(x) = 1 - 2 / (1 + exp(2 x)), scores in units of log2
                scores = 1 - 2 / (1 + tl.exp2(scores * (unit * softmax_scale * (2 / CAP * LOG2E))))
                factor = tl.full([1, 1, 1], CAP * LOG2E, tl.float32)
            else:
                factor = unit * softmax_scale * LOG2E
            scores = tl.where((token < high)[:, :, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1, keep_dims=True) * factor)
            decay = tl.exp2(top - new_top)
            p = tl.exp2(scores * factor - new_top)
            top = new_top
            lane_total = lane_total * decay + lane_sums(p)
            acc, lane_middles, units = _add_values(
                rows, slot, stored_heads, p, decay, acc, lane_middles, units, VALUE, ROW, VALUE_DTYPE
            )

        total = tl.sum(lane_total, 1, keep_dims=True)
        found = mask & (column < tl.where(low < high, GROUP, 0))
        partial_rows = (part.to(tl.int64) * RUNS + run[:, :, None]) * QUERY_HEADS + query_heads
        tl.store(
            lse + partial_rows, tl.where(total > 0, top + tl.log2(total), float("-inf")), mask=found
        )
        inverse = 1 / tl.where(total > 0, total, 1.0)
        word = tl.arange(0, WORDS)[None, :, None]
        for x in tl.static_range(PLANES):
            out = acc[x]
            if VALUE.bits == 8:
                out = out * units[x * GROUPS // PLANES]
            out += tl.sum(lane_middles[x * GROUPS // PLANES], 1, keep_dims=True)
            tl.store(
                partial + partial_rows * HEAD_DIM + x * VALUE.words + word,
                out * inverse,
                mask=found & (word < VALUE.words),
            )


@triton.jit(do_not_specialize=["batch", "splits"])
def merge_kernel(
    partial, lse, kv_indptr, split_counts, centre, out, batch, splits, out_token_stride, out_head_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROTATED: tl.constexpr, CENTRED: tl.constexpr,
    WINDOW: tl.constexpr, RUNS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted mean of a request's partial results; a request without tokens gives 0.

    Grid: (batch, query heads, blocks of WIDTH channels); to rotate back, one block has all channels.
    """
    request = tl.program_id(0)
    head = tl.program_id(1)
    query_heads = tl.num_programs(1)
    low = tl.load(kv_indptr + request)
    high = tl.load(kv_indptr + request + 1)
    if WINDOW:
        low = tl.maximum(low, high - WINDOW)
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
    if high == low:
        last = first
    channel = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)[None, :]
    top = tl.full([1, 1], -1.0e30, tl.float32)
    total = tl.zeros([1, 1], tl.float32)
    acc = tl.zeros([1, WIDTH], tl.float32)
    for block in tl.range(first * RUNS, last * RUNS, PARTS, num_stages=2):
        part = (block + tl.arange(0, PARTS))[:, None]
        live = part < last * RUNS
        row = part.to(tl.int64) * query_heads + head
        log = tl.load(lse + row, mask=live, other=float("-inf"))
        values = tl.load(partial + row * HEAD_DIM + channel, mask=live & (channel < HEAD_DIM), other=0.0)
        new_top = tl.maximum(top, tl.max(log, 0, keep_dims=True))
        decay = tl.exp2(top - new_top)
        p = tl.exp2(log - new_top)
        top = new_top
        total = total * decay + tl.sum(p, 0, keep_dims=True)
        acc = acc * decay + tl.sum(values * p, 0, keep_dims=True)
    result = acc / tl.where(total > 0, total, 1.0)
    if ROTATED:
        result = butterflies(result, 1, WIDTH, HEAD_DIM, rotation_shift(HEAD_DIM, True))
    if CENTRED:
        shift = tl.load(centre + head // GROUP * HEAD_DIM + channel, mask=channel < HEAD_DIM, other=0.0)
        result += tl.where(total > 0, shift, 0.0)
    target = out + request.to(tl.int64) * out_token_stride + head * out_head_stride + channel
    tl.store(target, result.to(out.dtype.element_ty), mask=channel < HEAD_DIM)


class Workspace(NamedTuple):
    """Partial results of one decode call; may be shared by all layers of a model and kept across CUDA-graph replays."""

    partial: Tensor  # fp32 [parts, runs, query heads, D]
    lse: Tensor  # fp32 [parts, runs, query heads], logarithms to base 2


def decode_parts(batch: int, splits: int, per_request: bool) -> int:
    """Partial results that a decode call may write."""
    return batch * splits if per_request else batch + splits


def decode(
    query: Tensor,
    rows: Tensor,
    spec: LayerSpec,
    heads: int,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    out: Tensor | None = None,
    *,
    centres: Centres = NO_CENTRES,
    softmax_scale: float | None = None,
    soft_cap: float = 0.0,
    window: int = 0,
    num_kv_splits: Tensor | None = None,
    max_kv_splits: int = 0,
    launch: DecodeLaunch | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Attention of one new token of each request over its packed rows.

    Safe under CUDA-graph capture: the grid depends on the batch size alone, and lengths are read on the device.

    Args:
        query: [B, Hq, D] bf16 or fp16, after rotary embedding, contiguous along D. Query head ``h`` reads KV head ``h // (Hq // H)``.
        rows: the pool, uint8 [R, row bytes].
        spec: how the layer is stored.
        heads: local KV heads H.
        kv_indptr: int32 [B + 1]; request ``b`` has the slots ``kv_indices[kv_indptr[b]:kv_indptr[b + 1]]``.
        kv_indices: int64, slots (rows) in the order of tokens; the query's own token is among them.
        out: [B, Hq, D], written; made if not given.
        centres: centring vectors, given exactly where the spec asks for them.
        softmax_scale: factor of the scores, above 0; ``D ** -0.5`` if not given.
        soft_cap: scores become ``cap * tanh(score / cap)``; 0 is off.
        window: number of latest tokens that are seen; 0 is all.
        num_kv_splits: int32 [B], splits of each request as SGLang counts them (multiples of 32 tokens); needs ``max_kv_splits``.
            If not given, all tokens of the batch are spread evenly over the chip.
        launch: launch parameters instead of the tuned ones.
        workspace: space for partial results, ``decode_workspace``; made if not given.

    Returns:
        ``out``. A request without tokens gives zeros.

    Raises:
        LayoutError: for shapes, dtypes or strides that the kernel does not cover.
    """
    batch, query_heads, head_dim = query.shape
    check_rows(rows, spec, heads, head_dim)
    key_side, value_side = sides(spec, heads, head_dim)
    check_centre(key_side, centres.key, heads, head_dim)
    check_centre(value_side, centres.value, heads, head_dim)
    if query_heads % heads or query.stride(2) != 1:
        raise LayoutError(f"{query_heads} query heads, strides {query.stride()}: expected a dense multiple of {heads} heads")
    if (num_kv_splits is not None) != bool(max_kv_splits):
        raise LayoutError(f"max_kv_splits={max_kv_splits}: give it exactly when num_kv_splits is given")
    if query.dtype == torch.float32 and ASSEMBLY:
        raise LayoutError("fp32 queries are for the interpreter alone: convert to bf16 or fp16")
    out = torch.empty_like(query) if out is None else out
    if batch == 0:
        return out
    group = query_heads // heads
    launch = launch or decode_launch(spec, heads, group, head_dim)
    splits = max_kv_splits or multiprocessors(rows.device) * launch.programs
    workspace = workspace or decode_workspace(batch, splits, query_heads, head_dim, launch, rows.device, bool(max_kv_splits))
    if key_side.rotated:
        query = rotate_heads(query, inverse=True, dtype=query.dtype)
    programs = batch * splits if max_kv_splits else splits
    blocks = triton.cdiv(heads, launch.batch // launch.runs), triton.cdiv(group, launch.columns)
    decode_kernel[(programs, *blocks)](
        query, rows, kv_indptr, kv_indices, num_kv_splits, workspace.partial, workspace.lse, batch, splits,
        query.stride(0), query.stride(1), head_dim**-0.5 if softmax_scale is None else softmax_scale,
        **decode_constants(spec, heads, group, head_dim, query.dtype, rows.stride(0), launch, soft_cap, window),
        num_warps=launch.warps, **launch.options(),
    )  # fmt: skip
    later = value_side.rotated and rotation_block(head_dim) < head_dim  # undone by a kernel of its own
    merged = torch.empty(query.shape, dtype=torch.float32, device=query.device) if later else out
    constants = merge_constants(spec, batch, splits, group, head_dim, launch, window)
    merge_kernel[(batch, query_heads, triton.cdiv(head_dim, constants["WIDTH"]))](
        workspace.partial, workspace.lse, kv_indptr, num_kv_splits, centres.value, merged, batch, splits,
        merged.stride(0), merged.stride(1), **constants, num_warps=1 if constants["WIDTH"] >= head_dim else 4,
    )  # fmt: skip
    if later:
        centre = None if centres.value is None else centres.value.repeat_interleave(group, 0)
        out.copy_(rotate_heads(merged, inverse=True, dtype=out.dtype, centre=centre))
    return out


def decode_workspace(
    batch: int,
    splits: int,
    query_heads: int,
    head_dim: int,
    launch: DecodeLaunch,
    device: torch.device,
    per_request: bool = False,
) -> Workspace:
    """Space for the partial results of :func:`decode` with these parameters."""
    parts = decode_parts(batch, splits, per_request)
    shape = (parts, launch.runs, query_heads)
    return Workspace(
        torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
    )


def decode_constants(
    spec: LayerSpec,
    heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    row_stride: int,
    launch: DecodeLaunch,
    soft_cap: float = 0.0,
    window: int = 0,
) -> dict[str, Any]:
    """Compile-time constants of :func:`decode_kernel`; ``dtype`` is the query's."""
    key_side, value_side = sides(spec, heads, head_dim)
    model = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    # fp16 has room for more planes without a shift, and for bytes. Values of less than 8 bits take bf16 all the same: it
    # needs no unit, and its smaller bias keeps the sums more exact.
    key_dtype = tl.float16 if ASSEMBLY and key_side.bits < 16 else model
    value_dtype = model if value_side.bits == 16 or not ASSEMBLY else tl.float16 if value_side.bits == 8 else tl.bfloat16
    return {
        "KEY": key_side, "VALUE": value_side, "ROW": row_stride, "HEADS": heads, "GROUP": group, "HEAD_DIM": head_dim,
        "CAP": soft_cap, "WINDOW": window, "KEY_DTYPE": key_dtype, "VALUE_DTYPE": value_dtype, "BATCH": launch.batch,
        "RUNS": launch.runs, "TOKENS": launch.tokens, "COLUMNS": launch.columns, "STAGES": launch.stages,
    }  # fmt: skip


def merge_constants(
    spec: LayerSpec, batch: int, splits: int, group: int, head_dim: int, launch: DecodeLaunch, window: int = 0
) -> dict[str, Any]:
    """Compile-time constants of :func:`merge_kernel`.

    Few partial results: one warp merges a head. Many: its channels are spread over several programs.
    """
    rotated = spec.value.rotated and rotation_block(head_dim) == head_dim
    few = splits * launch.runs <= 12 * batch or rotated
    width, parts = (triton.next_power_of_2(head_dim), 8) if few else (32, 128)
    return {
        "GROUP": group, "HEAD_DIM": head_dim, "WIDTH": width, "ROTATED": rotated,
        "CENTRED": spec.value.centred and (rotated or not spec.value.rotated),
        "WINDOW": window, "RUNS": launch.runs, "TILE": launch.runs * launch.tokens, "PARTS": parts,
    }  # fmt: skip
