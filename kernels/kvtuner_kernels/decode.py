# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Split-KV decode attention over packed rows, and the merge of the splits.

One program reads whole rows: all local KV heads (up to ``BATCH``) of a run of tokens. The tile is three-dimensional and a warp
owns one entry of its first axis, a KV head (or, with fewer heads, every other run of tokens of one), so that softmax and both
products stay inside a warp. Keys are the left operand, so a query group of 7 pads to 8 columns and not to 16 rows. Codes go
from shared memory to registers in the layout of the matrix instruction and are turned into operands there.

Scores are ``scale * (q . code) + minimum * sum(q)``; for values, scales are multiplied into the probabilities and minima
are summed with them. Nothing is dequantized.
"""

from __future__ import annotations

from typing import NamedTuple

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
    grid_of,
    operand,
    pieces,
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
    """Per plane one [BATCH, words, N] operand, and per group the sum of q and of q times the operands' bias."""
    word = tl.arange(0, SIDE.padded)[None, :, None]
    operands = ()
    sums = ()
    biases = ()
    PLANES: tl.constexpr = SIDE.segments * SIDE.planes
    PLANES_A_GROUP: tl.constexpr = SIDE.planes_a_group
    for x in tl.static_range(PLANES):
        part = tl.load(query + columns + x * SIDE.words + word, mask=mask & (word < SIDE.words), other=0.0).to(DTYPE)
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
    return operands, sums, biases


@triton.jit
def _load_words(base, heads, word, live, SEGMENT: tl.constexpr, SIDE: tl.constexpr, MASKED_HEADS: tl.constexpr):
    """uint16 words of one segment; ``base``, ``heads``, ``word`` and ``live`` broadcast to the tile."""
    pointer = (base + SIDE.codes).to(tl.pointer_type(tl.uint16)) + heads * (SIDE.head_codes // 2)
    pointer = pointer + (SEGMENT * SIDE.words + word)
    if SIDE.words != SIDE.padded:
        if MASKED_HEADS:
            return tl.load(pointer, mask=live & (word < SIDE.words), other=0)
        return tl.load(pointer, mask=word < SIDE.words, other=0)
    if MASKED_HEADS:
        return tl.load(pointer, mask=live, other=0)
    return tl.load(pointer)


@triton.jit
def _scores(
    base, heads, live, operands, sums, biases,
    SIDE: tl.constexpr, MASKED_HEADS: tl.constexpr, DTYPE: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """q . k as [BATCH, TOKENS, N] without the softmax scale; ``base`` [1 or BATCH, TOKENS], ``heads``, ``live`` [BATCH, 1]."""
    word = tl.arange(0, SIDE.padded)[None, None, :]
    PIECES: tl.constexpr = pieces(SIDE.bits, DTYPE)
    if SIDE.bits == 16:
        words = _load_words(base[:, :, None], heads[:, :, None], word, live[:, :, None], 0, SIDE, MASKED_HEADS)
        return tl.dot(operand(words, 16, 0, 0, DTYPE, ASSEMBLY_BODY), operands[0])
    GROUPS: tl.constexpr = SIDE.groups
    PLANES_A_GROUP: tl.constexpr = SIDE.planes_a_group
    scores = tl.zeros(SHAPE, tl.float32)
    for group in tl.static_range(GROUPS):
        part = tl.broadcast_to(-biases[group], SHAPE)
        for x in tl.static_range(group * PLANES_A_GROUP, (group + 1) * PLANES_A_GROUP):
            if x % SIDE.planes == 0:
                words = _load_words(
                    base[:, :, None], heads[:, :, None], word, live[:, :, None], x // SIDE.planes, SIDE, MASKED_HEADS
                )
            for piece in tl.static_range(PIECES):
                codes = operand(words, SIDE.bits, x % SIDE.planes, piece, DTYPE, ASSEMBLY_BODY)
                part = tl.dot(codes, operands[x], part)
        scale, minimum = grid_of(base, heads, group, SIDE)
        scores += part * scale[:, :, None] + minimum[:, :, None] * sums[group]
    return scores


@triton.jit
def _add_values(
    base, heads, live, p, decay, acc, code_sums, minimum_sums,
    SIDE: tl.constexpr, MASKED_HEADS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Decay the accumulators and add the tile's values, weighted with ``p`` [BATCH, TOKENS, N]."""
    word = tl.arange(0, SIDE.padded)[None, :, None]
    base3 = base[:, None, :]
    heads3 = heads[:, :, None]
    live3 = live[:, :, None]
    new_acc = ()
    if SIDE.bits == 16:
        words = _load_words(base3, heads3, word, live3, 0, SIDE, MASKED_HEADS)
        values = operand(words, 16, 0, 0, DTYPE, ASSEMBLY_BODY)
        return (tl.dot(values, rounded(p, DTYPE, ASSEMBLY_BODY), acc[0] * decay),), code_sums, minimum_sums
    GROUPS: tl.constexpr = SIDE.groups
    PLANES_A_GROUP: tl.constexpr = SIDE.planes_a_group
    new_codes = ()
    new_minima = ()
    for group in tl.static_range(GROUPS):
        scale, minimum = grid_of(base, heads, group, SIDE)
        weighted = rounded(p * scale[:, :, None], DTYPE, ASSEMBLY_BODY)
        # The biases are taken off the same rounded weights that the products use, so that they cancel exactly.
        new_codes = new_codes + (code_sums[group] * decay + tl.sum(weighted.to(tl.float32), 1, keep_dims=True),)
        if SIDE.symmetric:
            new_minima = new_minima + (minimum_sums[group],)
        else:
            new_minima = new_minima + (
                minimum_sums[group] * decay + tl.sum(p * minimum[:, :, None], 1, keep_dims=True),
            )
        for x in tl.static_range(group * PLANES_A_GROUP, (group + 1) * PLANES_A_GROUP):
            if x % SIDE.planes == 0:
                words = _load_words(base3, heads3, word, live3, x // SIDE.planes, SIDE, MASKED_HEADS)
            total = acc[x] * decay
            for piece in tl.static_range(pieces(SIDE.bits, DTYPE)):
                codes = operand(words, SIDE.bits, x % SIDE.planes, piece, DTYPE, ASSEMBLY_BODY)
                total = tl.dot(codes, weighted, total)
            new_acc = new_acc + (total,)
    return new_acc, new_codes, new_minima


@triton.jit
def _zeros(COUNT: tl.constexpr, SHAPE: tl.constexpr):
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (tl.zeros(SHAPE, tl.float32),)
    return result


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
    MASKED_HEADS: tl.constexpr = HEADS % (BATCH // RUNS) != 0
    QUERY_HEADS: tl.constexpr = HEADS * GROUP
    PLANES: tl.constexpr = VALUE.segments * VALUE.planes
    WORDS: tl.constexpr = VALUE.padded
    GROUPS: tl.constexpr = VALUE.groups
    program = tl.program_id(0)
    entry = tl.arange(0, BATCH)[:, None]
    heads = tl.program_id(1) * (BATCH // RUNS) + entry // RUNS
    live = heads < HEADS
    run = entry % RUNS if RUNS > 1 else tl.full([1, 1], 0, tl.int32)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    query_heads = heads[:, :, None] * GROUP + column
    mask = live[:, :, None] & (column < GROUP)

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
        operands, sums, biases = _query_operands(query, heads, columns, mask, KEY, HEAD_DIM, KEY_DTYPE)
        top = tl.full([BATCH, 1, COLUMNS], -1.0e30, tl.float32)
        total = tl.zeros([BATCH, 1, COLUMNS], tl.float32)
        acc = _zeros(PLANES, [BATCH, WORDS, COLUMNS])
        code_sums = _zeros(GROUPS, [BATCH, 1, COLUMNS])
        minimum_sums = _zeros(GROUPS, [BATCH, 1, COLUMNS])
        for tile in tl.range(low, high, TILE, num_stages=STAGES):
            token = tile + run * TOKENS + tl.arange(0, TOKENS)[None, :]
            # Beyond the end the last token is read again and weighted with 0: no mask, and no row that is not in use.
            slot = tl.load(kv_indices + tl.minimum(token, high - 1)).to(tl.int64)
            base = rows + slot * ROW
            scores = _scores(
                base, heads, live, operands, sums, biases, KEY, MASKED_HEADS, KEY_DTYPE, [BATCH, TOKENS, COLUMNS]
            )
            if CAP != 0:
                # tanh(x) = 1 - 2 / (1 + exp(2 x)), scores in units of log2
                scores = 1 - 2 / (1 + tl.exp2(scores * (softmax_scale * (2 / CAP * LOG2E))))
                factor = CAP * LOG2E
            else:
                factor = softmax_scale * LOG2E
            scores = tl.where((token < high)[:, :, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1, keep_dims=True) * factor)
            decay = tl.exp2(top - new_top)
            p = tl.exp2(scores * factor - new_top)
            top = new_top
            total = total * decay + tl.sum(p, 1, keep_dims=True)
            acc, code_sums, minimum_sums = _add_values(
                base, heads, live, p, decay, acc, code_sums, minimum_sums, VALUE, MASKED_HEADS, VALUE_DTYPE
            )

        found = mask & (column < tl.where(low < high, GROUP, 0))
        partial_rows = (part.to(tl.int64) * RUNS + run[:, :, None]) * QUERY_HEADS + query_heads
        tl.store(
            lse + partial_rows, tl.where(total > 0, top + tl.log2(total), float("-inf")), mask=found
        )
        inverse = 1 / tl.where(total > 0, total, 1.0)
        word = tl.arange(0, WORDS)[None, :, None]
        for x in tl.static_range(PLANES):
            out = acc[x]
            if VALUE.bits < 16:
                # What a weight of 1 would have added: the operand's bias and, if symmetric, the codes' middle.
                shift = bias(VALUE.bits, x % VALUE.planes, VALUE_DTYPE, ASSEMBLY_BODY)
                if VALUE.symmetric:
                    out = out - code_sums[x * GROUPS // PLANES] * (shift + (2**VALUE.bits - 1) / 2)
                else:
                    out = out - code_sums[x * GROUPS // PLANES] * shift + minimum_sums[x * GROUPS // PLANES]
            tl.store(
                partial + partial_rows * HEAD_DIM + x * VALUE.words + word,
                out * inverse,
                mask=found & (word < VALUE.words),
            )


@triton.jit(do_not_specialize=["batch", "splits"])
def merge_kernel(
    partial, lse, kv_indptr, split_counts, centre, out, batch, splits, out_token_stride, out_head_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, ROTATION: tl.constexpr, CENTRED: tl.constexpr,
    WINDOW: tl.constexpr, RUNS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted mean of a request's partial results. Grid: (batch, query heads). A request without tokens gives 0."""
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
    channel = tl.arange(0, WIDTH)[None, :]
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
    if ROTATION:
        result = butterflies(result, 1, WIDTH, ROTATION, rotation_shift(HEAD_DIM, True))
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
    dtype = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[query.dtype]
    # fp16 weights would underflow once a value's scale is multiplied in; bf16 has the range, whatever the model's dtype.
    value_dtype = dtype if value_side.bits == 16 else tl.bfloat16 if ASSEMBLY else tl.float32
    head_blocks = triton.cdiv(heads, launch.batch // launch.runs)
    programs = batch * splits if max_kv_splits else splits
    decode_kernel[(programs, head_blocks, triton.cdiv(group, launch.columns))](
        query, rows, kv_indptr, kv_indices, num_kv_splits, workspace.partial, workspace.lse, batch, splits,
        query.stride(0), query.stride(1), head_dim**-0.5 if softmax_scale is None else softmax_scale,
        KEY=key_side, VALUE=value_side, ROW=rows.stride(0), HEADS=heads, GROUP=group, HEAD_DIM=head_dim,
        CAP=soft_cap, WINDOW=window, KEY_DTYPE=dtype, VALUE_DTYPE=value_dtype,
        BATCH=launch.batch, RUNS=launch.runs, TOKENS=launch.tokens, COLUMNS=launch.columns, STAGES=launch.stages,
        num_warps=launch.warps,
    )  # fmt: skip
    later = value_side.rotated and rotation_block(head_dim) < head_dim  # undone by a kernel of its own
    merged = torch.empty(query.shape, dtype=torch.float32, device=query.device) if later else out
    merge_kernel[(batch, query_heads)](
        workspace.partial, workspace.lse, kv_indptr, num_kv_splits, centres.value, merged, batch, splits,
        merged.stride(0), merged.stride(1),
        GROUP=group, HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim),
        ROTATION=head_dim if value_side.rotated and not later else 0, CENTRED=value_side.centred and not later,
        WINDOW=window, RUNS=launch.runs, TILE=launch.runs * launch.tokens, PARTS=16, num_warps=4,
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
