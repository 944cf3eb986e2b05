# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment, misc"
# ruff: noqa: RUF005, RET505, SIM300 - Triton compiles what follows a return, has no starred tuples, and DTYPE is not a constant
"""What all Triton kernels share: words to matrix operands, scales, Hadamard butterflies.

A matrix operand holds codes as exact small numbers. The **assembly body** turns one 32-bit register (the same bits of two
16-bit words) into two numbers with at most one shift and one ``lop3``: code bits become mantissa bits of a power of two, so an
operand reads, say, ``128 + code``; callers subtract that :func:`bias`, times the sum of the operand's factors.
The **plain body** computes codes with integer arithmetic; Triton's interpreter runs that one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvtuner_kernels import bands
from kvtuner_kernels.bands import STEPS
from kvtuner_kernels.planes import window

SCALES_AN_OCTAVE = tl.constexpr(bands.SCALES_AN_OCTAVE)
SCALE_MIDDLE = tl.constexpr(bands.SCALE_MIDDLE)
FIRST_MARK = tl.constexpr(bands.FIRST_MARK)
ASSEMBLY = not triton.knobs.runtime.interpret  # Triton's interpreter has no inline assembly
ASSEMBLY_BODY = tl.constexpr(ASSEMBLY)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def plane_bits(side, plane):
    """Bits of a plane's codes."""
    return side.bands[plane].bits if side.bands else side.bits


@triton.constexpr_function
def plane_run(side, plane):
    """Which run of ``side.words`` words holds a plane: its segment, or its band's word."""
    return side.bands[plane].word if side.bands else plane // side.planes


@triton.constexpr_function
def plane_start(side, plane):
    """Lowest bit of a plane's codes within a word."""
    return side.bands[plane].start if side.bands else plane % side.planes * side.bits


@triton.constexpr_function
def plane_step(side, plane):
    """Distance of two levels, in scales."""
    return STEPS[side.bands[plane].bits] if side.bands else 1.0


@triton.constexpr_function
def plane_half(side, plane):
    """The centre of a symmetric plane's codes: half of the largest code."""
    return (2 ** plane_bits(side, plane) - 1) / 2


@triton.constexpr_function
def runs(side):
    """Runs of words that a side's planes lie in, from :func:`first_run` on."""
    used = [place.word for place in side.bands if place.bits]
    return max(used) - min(used) + 1 if side.bands else side.segments


@triton.constexpr_function
def first_run(side):
    """The first of :func:`runs`."""
    return min(place.word for place in side.bands if place.bits) if side.bands else 0


@triton.constexpr_function
def power_of_2(number: int) -> int:
    """The least power of two that is no smaller. Triton's own is replaced by a plain function where SGLang is imported."""
    return 1 << (number - 1).bit_length()


@triton.constexpr_function
def rotation_shift(head_dim: int, inverse: bool) -> int:
    """Power of two that normalises the butterflies, as in ``reference.rotate`` and ``reference.unrotate``."""
    order = (head_dim & -head_dim).bit_length() - 1
    return -(order // 2) if inverse else order // 2 - order


@triton.constexpr_function
def pieces(bits, dtype):
    """Operands for one plane: 2 for bytes in a type that cannot hold a byte exactly, one for each half, otherwise 1."""
    return 2 if bits == 8 and dtype != tl.float16 else 1


@triton.constexpr_function
def _place(bits, plane, piece, dtype):
    """Right shift that brings a plane's bits into the mantissa, and where they then start in it.

    As many planes as fit side by side (10 bits in fp16, 7 in bf16) share a shift.
    """
    if pieces(bits, dtype) == 2:
        return 8 * plane + 4 * piece, 0
    shared = max(1, (10 if dtype == tl.float16 else 7) // bits)
    return bits * shared * (plane // shared), bits * (plane % shared)


@triton.constexpr_function
def _assembly(bits, plane, piece, dtype):
    """The code bits become mantissa bits of the power of two whose last place makes them count as they should."""
    shift, start = _place(bits, plane, piece, dtype)
    field, one = (10, 0x6400) if dtype == tl.float16 else (7, 0x4300)  # 2**field: the mantissa counts in ones
    magic = (one + ((4 * piece - start) << field)) * 0x10001
    mask = ((15 if pieces(bits, dtype) == 2 else 2**bits - 1) << start) * 0x10001
    if not shift:
        return f"lop3.b32 $0, $1, {mask}, {magic}, 0xea;"
    return f"{{ .reg .b32 t; shr.b32 t, $1, {shift}; lop3.b32 $0, t, {mask}, {magic}, 0xea; }}"


@triton.constexpr_function
def _subnormal(bits, start):
    shift, low = window(bits, start)
    mask = ((2**bits - 1) << low) * 0x10001
    return f"{{ .reg .b32 t; shr.b32 t, $1, {shift}; and.b32 $0, t, {mask}; }}" if shift else f"and.b32 $0, $1, {mask};"


@triton.constexpr_function
def piece_bias(bits, plane, piece, dtype, asm):
    """Excess of an operand over its part of the code."""
    if bits == 16 or not asm:
        return 0.0
    return (1024.0 if dtype == tl.float16 else 128.0) * 2.0 ** (4 * piece - _place(bits, plane, piece, dtype)[1])


@triton.constexpr_function
def bias(bits, plane, dtype, asm):
    """Excess of the sum of a plane's operands over the code."""
    return sum(piece_bias(bits, plane, piece, dtype, asm) for piece in range(pieces(bits, dtype)))


@triton.jit
def operand(
    words, BITS: tl.constexpr, PLANE: tl.constexpr, PIECE: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr
):
    """One plane of uint16 ``words`` as numbers of DTYPE. A plane's pieces sum to the code plus :func:`bias`."""
    if BITS == 16:
        return words.to(DTYPE, bitcast=True)
    elif not ASM:
        if pieces(BITS, DTYPE) == 2:
            return ((words >> (8 * PLANE + 4 * PIECE)) & 15).to(DTYPE) * (16.0**PIECE)
        else:
            return ((words >> (BITS * PLANE)) & (2**BITS - 1)).to(DTYPE)
    elif DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            _assembly(BITS, PLANE, PIECE, DTYPE), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            _assembly(BITS, PLANE, PIECE, DTYPE), "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def small(words, BITS: tl.constexpr, START: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Codes of BITS bits from bit START of uint16 ``words``, as numbers of DTYPE times a power of two (:func:`kvtuner_kernels.planes.units`).

    In the assembly body DTYPE is fp16: code bits alone are a subnormal number, which matrix instructions multiply exactly.
    """
    if BITS == 16:
        return words.to(DTYPE, bitcast=True)
    elif ASM:
        tl.static_assert(DTYPE == tl.float16)
        return tl.inline_asm_elementwise(
            _subnormal(BITS, START), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return ((words >> START) & (2**BITS - 1)).to(DTYPE)


@triton.constexpr_function
def _by_position(fields, registers):
    """Assembly that extracts codes from words: for each group of ``registers`` registers in turn, the codes of one of ``fields``."""
    count = registers * len(fields)
    lines = []
    for i in range(count):
        f = fields[i // registers]
        mask = ((2**f.bits - 1) << f.low) * 0x10001
        if f.shift and f.bits:
            lines.append(f"shr.b32 t, ${count + i}, {f.shift}; and.b32 ${i}, t, {mask};")
        else:
            lines.append(f"and.b32 ${i}, ${count + i}, {mask};")
    return "{ .reg .b32 t; " + " ".join(lines) + " }"


@triton.constexpr_function
def _registers(count):
    return ",".join(["=&r"] * count + ["r"] * count)


@triton.jit
def small_by_position(words, FIELDS: tl.constexpr, EACH: tl.constexpr):
    """:func:`small` for words of several runs, of which a thread alternately holds EACH words of each (assembly body).

    This depends on which words a thread holds: they must be in the layout of a matrix instruction's left operand. They are,
    because nothing else uses them; a test and the comparison before serving verify it.
    """
    return tl.inline_asm_elementwise(
        _by_position(FIELDS, EACH // 2),
        _registers(EACH // 2 * len(FIELDS)),
        [words],
        dtype=tl.float16,
        is_pure=True,
        pack=EACH * len(FIELDS),
    )


@triton.jit
def codes(words, BITS: tl.constexpr, PLANE: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """One plane of uint16 ``words`` as plain codes in DTYPE, for kernels in which conversion does not dominate the time."""
    result = operand(words, BITS, PLANE, 0, DTYPE, ASM)
    if BITS < 16:
        result -= piece_bias(BITS, PLANE, 0, DTYPE, ASM)
        if pieces(BITS, DTYPE) == 2:
            result += operand(words, BITS, PLANE, 1, DTYPE, ASM) - piece_bias(BITS, PLANE, 1, DTYPE, ASM)
    return result


@triton.constexpr_function
def log2(number):
    """Exponent of a power of two."""
    return int(number).bit_length() - 1


@triton.jit
def power_below(x):
    """The largest power of two up to a positive fp32 ``x``; 0 for 0."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power(x):
    """Exact inverse of a power of two, without a division."""
    return (0x7F000000 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def approximate_log2(x, ASM: tl.constexpr):
    """fp32 logarithm to base 2 of a normal number, one instruction where the hardware has it (absolute error 2**-22)."""
    if ASM:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """fp32 to DTYPE, to nearest even; two numbers an instruction where the hardware can."""
    if ASM and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return x.to(DTYPE)


@triton.jit
def grid_of(rows, slot, heads, GROUP: tl.constexpr, SIDE: tl.constexpr, ROW: tl.constexpr):
    """fp32 scale and minimum of one group, for int64 ``slot`` and KV heads ``heads`` (broadcast to the result's shape).

    A symmetric side has its minimum at ``-scale * n / 2``.
    """
    if SIDE.symmetric:
        # Two bytes cannot be copied asynchronously: load the four in which the scale lies, which a row holds whole.
        words = rows.to(tl.pointer_type(tl.uint32))
        place = SIDE.metadata // 2 + heads * SIDE.groups + GROUP
        pair = tl.load(words + place // 2 + slot * (ROW // 4))
        scale = (pair >> (place % 2 * 16).to(tl.uint32)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return scale, scale * (-(2**SIDE.bits - 1) / 2)
    elif SIDE.metadata % 4 == 0:  # scale and minimum in one load
        pointer = rows.to(tl.pointer_type(tl.uint32)) + SIDE.metadata // 4 + heads * SIDE.groups + GROUP
        pair = tl.load(pointer + slot * (ROW // 4))
        scale = pair.to(tl.uint16).to(tl.float16, bitcast=True)
        minimum = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        return scale.to(tl.float32), minimum.to(tl.float32)
    else:
        pointer = rows.to(tl.pointer_type(tl.float16)) + SIDE.metadata // 2 + (heads * SIDE.groups + GROUP) * 2
        pointer += slot * (ROW // 2)
        return tl.load(pointer).to(tl.float32), tl.load(pointer + 1).to(tl.float32)


@triton.jit
def scale_of(number):
    """The scale of ``number``, int32 or fp32, to the accuracy of the exponential (:func:`kvtuner_kernels.bands.scale_values`)."""
    power = number.to(tl.float32) * (1 / SCALES_AN_OCTAVE) - SCALE_MIDDLE // SCALES_AN_OCTAVE
    if ASSEMBLY_BODY:  # never near the subnormal numbers, which the compiler would handle
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [power], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(power)


@triton.jit
def scale_byte(words, SIDE: tl.constexpr):
    """A banded side's stored scale, int32 [N], from the words of a head's first run, integers [N, words or more]."""
    BITS: tl.constexpr = SIDE.digits.bits
    digit = tl.arange(0, words.shape[1])[None, :] - SIDE.digits.channel
    mine = (digit >= 0) & (digit < 8 // BITS)
    value = (words.to(tl.int32) >> SIDE.digits.start) & (2**BITS - 1)
    return tl.sum(tl.where(mine, value << tl.where(mine, digit * BITS, 0), 0), 1)


@triton.jit
def fill(COUNT: tl.constexpr, SHAPE: tl.constexpr, VALUE: tl.constexpr):
    """A tuple of COUNT fp32 tensors."""
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (tl.full(SHAPE, VALUE, tl.float32),)
    return result


@triton.jit
def butterflies(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """Walsh-Hadamard transform of fp32 ``x`` [ROWS, WIDTH] in blocks of BLOCK, spans 1, 2, 4, ..., then times 2**SHIFT."""
    for step in tl.static_range(log2(BLOCK)):
        pairs = x.reshape([ROWS, WIDTH >> (step + 1), 2, 1 << step]).permute(0, 1, 3, 2)
        left, right = tl.split(pairs)
        x = tl.join(left + right, left - right).permute(0, 1, 3, 2).reshape([ROWS, WIDTH])
    return x * 2.0**SHIFT


@triton.jit
def share_beside(sink, top, total):
    """Share of a softmax that what is visible keeps beside a ``sink``; 0 where nothing is visible (``total`` 0).

    ``sink`` and ``top`` are to base 2; ``total`` is the sum of the visible weights, relative to ``top``.
    """
    return total / tl.where(total > 0, total + tl.exp2(sink - top), 1.0)
