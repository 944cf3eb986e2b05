# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment, misc, var-annotated"
# ruff: noqa: RUF005, RET505 - see operands.py
"""What extend does with one side of a packed tile: operands, scores, and weighted values."""

from __future__ import annotations

import triton
import triton.language as tl

from kvtuner_kernels.operands import (
    ASSEMBLY_BODY,
    FIRST_MARK,
    codes,
    first_run,
    grid_of,
    log2,
    plane_bits,
    plane_half,
    plane_run,
    plane_start,
    plane_step,
    rounded,
    runs,
    scale_byte,
    scale_of,
)
from kvtuner_kernels.planes import banded

PIECE = tl.constexpr(32)  # channels


@triton.constexpr_function
def padded(side):
    """Columns of a tile that one plane takes."""
    return 1 << (side.words - 1).bit_length() if side.bands else side.padded


@triton.constexpr_function
def _step(side, plane):
    """Distance of two levels, in scales; any number but 0 without bits, because the only level is 0."""
    return plane_step(side, plane) or 1.0


@triton.jit
def band_steps(plane, SIDE: tl.constexpr):
    """fp32 distance of two levels of a banded side, in scales, for each of ``plane``."""
    step = tl.full(plane.shape, 1.0, tl.float32)
    PLANES: tl.constexpr = SIDE.planes_a_group
    for x in tl.static_range(PLANES):
        step = tl.where(plane == x, _step(SIDE, x), step)
    return step


@triton.jit
def column_channel(column, GROUP: tl.constexpr, SIDE: tl.constexpr):
    """Channel within the head of a column of :func:`_tile`, and whether it exists."""
    PLANES_A_GROUP: tl.constexpr = SIDE.planes_a_group
    word = column // PLANES_A_GROUP
    return (GROUP * PLANES_A_GROUP + column % PLANES_A_GROUP) * SIDE.words + word, word < SIDE.words


@triton.jit
def load_query(query, at, live, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Per group of the keys one [M, columns] operand, columns as in :func:`_tile`, and the sum of q [M, 1].

    If keys are banded, the operand includes the steps of their bands.
    """
    GROUPS: tl.constexpr = SIDE.groups
    PLANES: tl.constexpr = SIDE.planes_a_group
    PADDED: tl.constexpr = padded(SIDE)
    column = tl.arange(0, PADDED * PLANES)[None, :]
    operands = ()
    sums = ()
    for group in tl.static_range(GROUPS):
        if banded(
            SIDE
        ):  # read in stored order; neighbouring planes would need an address and registers for each number
            channel = column // PADDED * SIDE.words + column % PADDED
            exists = column % PADDED < SIDE.words
        else:
            channel, exists = column_channel(column, group, SIDE)
        part = tl.load(query + at + channel, mask=live & exists, other=0.0)
        if banded(SIDE):
            part = (part.to(tl.float32) * band_steps(column // PADDED, SIDE)).to(DTYPE)
            part = part.reshape([part.shape[0], PLANES, PADDED]).permute(0, 2, 1).reshape(part.shape)
        part = part.to(DTYPE)
        operands = operands + (part,)
        sums = sums + (tl.sum(part.to(tl.float32), 1, keep_dims=True),)
    return operands, sums


@triton.jit
def times(query, live, vector, HEAD_DIM: tl.constexpr):
    """Query rows at pointers ``query`` [M, 1] times one fp32 vector of a head, [M, 1], in pieces that leave registers free."""
    score = tl.zeros(live.shape, tl.float32)
    for start in tl.range(0, HEAD_DIM, PIECE, num_stages=1):
        channel = start + tl.arange(0, PIECE)[None, :]
        part = tl.load(query + channel, mask=live & (channel < HEAD_DIM), other=0.0).to(tl.float32)
        part *= tl.load(vector + channel, mask=channel < HEAD_DIM, other=0.0)
        score += tl.sum(part, 1, keep_dims=True)
    return score


@triton.jit
def _words(rows, slot, head, RUN: tl.constexpr, SIDE: tl.constexpr, ROW: tl.constexpr):
    """uint16 [N, words] of one run of words: a segment's, or some bands'."""
    word = tl.arange(0, padded(SIDE))[None, :]
    pointer = rows.to(tl.pointer_type(tl.uint16)) + (SIDE.codes // 2 + RUN * SIDE.words) + word
    pointer = pointer + slot[:, None] * (ROW // 2) + head * (SIDE.head_codes // 2)
    if SIDE.words == padded(SIDE):
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=word < SIDE.words, other=0)


@triton.jit
def _tile(words, GROUP: tl.constexpr, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Codes of one group as [N, words * planes]; planes of a word are neighbours, so that no thread passes codes to another."""
    FIRST: tl.constexpr = GROUP * SIDE.planes_a_group % SIDE.planes
    PLANES: tl.constexpr = SIDE.planes_a_group
    BITS: tl.constexpr = SIDE.bits
    planes = ()
    for y in tl.static_range(PLANES):
        planes = planes + (codes(words, BITS, FIRST + y, DTYPE, ASSEMBLY_BODY),)
    return _joined(planes)


@triton.jit
def _joined(planes):
    """A power of two of planes [N, words] as [N, words * planes], planes of a word neighbours."""
    PLANES: tl.constexpr = len(planes)
    SHAPE: tl.constexpr = [planes[0].shape[0], planes[0].shape[1] * PLANES]
    for step in tl.static_range(log2(PLANES)):
        joined = ()
        for y in tl.static_range(PLANES >> (step + 1)):
            joined = joined + (tl.join(planes[y], planes[y + (PLANES >> (step + 1))]),)
        planes = joined
    return planes[0].reshape(SHAPE)


@triton.jit
def _levels(words, factor, SIDE: tl.constexpr, PLANE: tl.constexpr, DTYPE: tl.constexpr):
    """Levels of one band in units of its step, times ``factor`` [N, 1] if there is one, from int32 ``words`` [N, words]."""
    BITS: tl.constexpr = plane_bits(SIDE, PLANE)
    START: tl.constexpr = plane_start(SIDE, PLANE)
    # Code bits under 2**22, whose last place is a half, from where they are: no conversion from integers.
    bits = words << 1 if START == 0 else words >> (START - 1)
    bits = (bits & (2 ** (BITS + 1) - 2)) | 0x4A800000
    level = bits.to(tl.float32, bitcast=True) - (4194304.0 + plane_half(SIDE, PLANE))
    if factor is not None:
        level *= factor
    return rounded(level, DTYPE, ASSEMBLY_BODY)


@triton.jit
def _band_tile(rows, slot, head, factor, SIDE: tl.constexpr, ROW: tl.constexpr, DTYPE: tl.constexpr):
    """:func:`_levels` of all bands as [N, words * planes], columns as in :func:`_tile`."""
    FIRST: tl.constexpr = first_run(SIDE)
    RUNS: tl.constexpr = runs(SIDE)
    PLANES: tl.constexpr = SIDE.planes_a_group
    tiles = ()
    for run in tl.static_range(RUNS):
        tiles = tiles + (_words(rows, slot, head, FIRST + run, SIDE, ROW).to(tl.int32),)
    planes = ()
    for y in tl.static_range(PLANES):
        if plane_bits(SIDE, y) > 0:
            planes = planes + (_levels(tiles[plane_run(SIDE, y) - FIRST], factor, SIDE, y, DTYPE),)
        else:
            planes = planes + (tl.zeros([slot.shape[0], padded(SIDE)], DTYPE),)
    return _joined(planes)


@triton.jit
def _band_scale(rows, slot, head, SIDE: tl.constexpr, ROW: tl.constexpr):
    """fp32 scales [N] of a banded side; finite for the first token too, whose row is read but hidden."""
    return scale_of(scale_byte(_words(rows, slot, head, 0, SIDE, ROW), SIDE) & (FIRST_MARK - 1))


@triton.jit
def packed_scores(rows, slot, head, operands, sums, SIDE: tl.constexpr, ROW: tl.constexpr, DTYPE: tl.constexpr):
    """q . k as [M, N] without the softmax scale."""
    GROUPS: tl.constexpr = SIDE.groups
    if banded(SIDE):
        scale = _band_scale(rows, slot, head, SIDE, ROW)
        return tl.dot(operands[0], tl.trans(_band_tile(rows, slot, head, None, SIDE, ROW, DTYPE))) * scale[None, :]
    else:
        for group in tl.static_range(GROUPS):
            if group * SIDE.planes_a_group % SIDE.planes == 0:
                words = _words(rows, slot, head, group * SIDE.planes_a_group // SIDE.planes, SIDE, ROW)
            part = tl.dot(operands[group], tl.trans(_tile(words, group, SIDE, DTYPE)))
            if SIDE.bits < 16:
                scale, minimum = grid_of(rows, slot, head, group, SIDE, ROW)
                part = part * scale[None, :] + minimum[None, :] * sums[group]
            if group == 0:
                scores = part
            else:
                scores += part
        return scores


@triton.jit
def add_packed(rows, slot, head, p, decay, acc, SIDE: tl.constexpr, ROW: tl.constexpr, DTYPE: tl.constexpr):
    """Decay the accumulators and add a packed tile's values, weighted with ``p`` [M, N].

    Values are put on their grid in registers: unlike in decode, a tile of them is multiplied with many rows. Values of a banded side
    lack the steps of their bands.
    """
    GROUPS: tl.constexpr = SIDE.groups
    weights = rounded(p, DTYPE, ASSEMBLY_BODY)
    if banded(SIDE):
        scale = _band_scale(rows, slot, head, SIDE, ROW)
        values = _band_tile(rows, slot, head, scale[:, None], SIDE, ROW, DTYPE)
        return (tl.dot(weights, values, acc[0] * decay),)
    else:
        new_acc = ()
        for group in tl.static_range(GROUPS):
            if group * SIDE.planes_a_group % SIDE.planes == 0:
                words = _words(rows, slot, head, group * SIDE.planes_a_group // SIDE.planes, SIDE, ROW)
            values = _tile(words, group, SIDE, DTYPE)
            if SIDE.bits < 16:
                scale, minimum = grid_of(rows, slot, head, group, SIDE, ROW)
                values = rounded(values.to(tl.float32) * scale[:, None] + minimum[:, None], DTYPE, ASSEMBLY_BODY)
            new_acc = new_acc + (tl.dot(weights, values, acc[group] * decay),)
        return new_acc


@triton.jit
def first_values(first_value, weight, SIDE: tl.constexpr):
    """Accumulators that begin with one token's values, weighted with ``weight`` [M, 1], in units of :func:`add_packed`."""
    GROUPS: tl.constexpr = SIDE.groups
    PLANES: tl.constexpr = SIDE.planes_a_group
    column = tl.arange(0, padded(SIDE) * PLANES)[None, :]
    acc = ()
    for group in tl.static_range(GROUPS):
        channel, exists = column_channel(column, group, SIDE)
        number = tl.load(first_value + channel, mask=exists, other=0.0)
        if banded(SIDE):
            number /= band_steps(column % PLANES, SIDE)
        acc = acc + (weight * number,)
    return acc
