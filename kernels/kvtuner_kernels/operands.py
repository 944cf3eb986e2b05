# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""What all Triton kernels share: one side of a row as constants, words to matrix operands, Hadamard butterflies.

A matrix operand holds codes as exact small integers. The **assembly body** turns one 32-bit register (the same bits of two
16-bit words) into two numbers with one shift and one ``lop3``: the code bits are placed in the mantissa of a power of two, so
bf16 operands read ``128 + code`` (:func:`bias`; callers subtract it, times the operands' sum) and fp16 operands are freed of
their 1024 by one exact subtraction. The **plain body** computes codes with integer arithmetic; Triton's interpreter and other
back ends run that one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvtuner_kernels.layout import LayerSpec, LayoutError, TensorSpec

HEAD_DIMS = (64, 80, 96, 128, 192, 256)  # what the kernels are compiled and tested for
ASSEMBLY = not triton.knobs.runtime.interpret  # Triton's interpreter has no inline assembly


@dataclass(frozen=True)
class Side:
    """The keys or the values of a row, as a kernel's compile-time constant."""

    bits: int
    groups: int  # scales a head; 1 for 16 bits, whose scale is 1
    symmetric: bool
    centred: bool
    rotated: bool
    clip: float
    codes: int  # byte offset of the first head's codes in a row
    head_codes: int  # bytes of codes a head
    metadata: int  # byte offset of the first head's metadata in a row
    segments: int  # a head
    planes: int  # a segment
    planes_a_group: int
    words: int  # 16-bit words a segment
    padded: int  # the power of two that holds `words`; at least 16, the depth of a matrix instruction


def sides(spec: LayerSpec, heads: int, head_dim: int) -> tuple[Side, Side]:
    """The key side and the value side of a layer.

    Raises:
        LayoutError: if the kernels do not cover ``head_dim``, or the layout cannot store it.
    """
    if head_dim not in HEAD_DIMS:
        raise LayoutError(f"the Triton kernels have no head_dim={head_dim}: use one of {HEAD_DIMS}, or the CPU path")
    row = spec.row(heads, head_dim)
    return (
        _side(spec.key, head_dim, row.key_codes, row.key_metadata),
        _side(spec.value, head_dim, row.value_codes, row.value_metadata),
    )


def _side(spec: TensorSpec, head_dim: int, codes: int, metadata: int) -> Side:
    segment = spec.segment(head_dim)
    words = segment * spec.bits // 16
    return Side(
        bits=spec.bits,
        groups=max(1, spec.groups(head_dim)),
        symmetric=spec.symmetric,
        centred=spec.centred,
        rotated=spec.rotated,
        clip=spec.clip,
        codes=codes,
        head_codes=spec.code_bytes(head_dim),
        metadata=metadata,
        segments=head_dim // segment,
        planes=16 // spec.bits,
        planes_a_group=head_dim // words // max(1, spec.groups(head_dim)),
        words=words,
        padded=max(16, triton.next_power_of_2(words)),
    )


def check_rows(rows: torch.Tensor, spec: LayerSpec, heads: int, head_dim: int) -> None:
    """Raise LayoutError unless ``rows`` is uint8 [R, >= row bytes], each row contiguous and 4-byte aligned."""
    nbytes = spec.bytes_per_token(heads, head_dim)
    if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != nbytes or rows.stride(1) != 1:
        raise LayoutError(
            f"the pool is {rows.dtype} {list(rows.shape)}, strides {rows.stride()}: expected uint8 [rows, {nbytes}], rows contiguous"
        )
    if rows.stride(0) % 4 or rows.data_ptr() % 16:
        raise LayoutError(
            f"rows lie {rows.stride(0)} bytes apart from address {rows.data_ptr():#x}: align rows to 4 and the pool to 16 bytes"
        )


def check_centre(side: Side, centre: torch.Tensor | None, heads: int, head_dim: int) -> None:
    """Raise LayoutError unless ``centre`` is dense fp32 [heads, head_dim] exactly where ``side`` is centred."""
    if side.centred != (centre is not None):
        raise LayoutError(f"{side.bits}-bit side: it needs {'a' if side.centred else 'no'} centring vector")
    if centre is not None and not (
        centre.shape == (heads, head_dim) and centre.dtype == torch.float32 and centre.is_contiguous()
    ):
        raise LayoutError(
            f"the centring vector is {centre.dtype} {list(centre.shape)}, expected dense float32 {[heads, head_dim]}"
        )


@triton.constexpr_function
def rotation_shift(head_dim: int, inverse: bool) -> int:
    """Power of two that normalises the butterflies, as in ``reference.rotate`` and ``reference.unrotate``."""
    order = (head_dim & -head_dim).bit_length() - 1
    return -(order // 2) if inverse else order // 2 - order


@triton.constexpr_function
def pieces(bits, dtype):
    """Operands that one plane takes: 2 for bytes in a type that holds no byte exactly, the halves of each, else 1."""
    return 2 if bits == 8 and dtype != tl.float16 else 1


@triton.constexpr_function
def _shift_and_mask(bits, plane, piece, dtype):
    """Where a plane lies in a word. Three 2-bit planes fit a mantissa side by side, so they share a shift."""
    if bits == 2:
        return 6 * (plane // 3), 3 << 2 * (plane % 3)
    return (8 * plane + 4 * piece, 15) if pieces(bits, dtype) == 2 else (bits * plane, 2**bits - 1)


@triton.constexpr_function
def _exponent(bits, plane, piece):
    """Power of two that the masked bits are multiplied with to give the code, or the piece's part of it."""
    return -2 * (plane % 3) if bits == 2 else 4 * piece


@triton.constexpr_function
def _assembly(bits, plane, piece, dtype):
    """The code bits become the low mantissa bits of ``2**mantissa``, whose exponent field also carries the multiplier."""
    shift, mask = _shift_and_mask(bits, plane, piece, dtype)
    field, start = (10, 0x6400) if dtype == tl.float16 else (7, 0x4300)
    magic = (start + (_exponent(bits, plane, piece) << field)) * 0x10001
    source, lines = "$1", []
    if shift:
        lines, source = [f"shr.b32 t, $1, {shift};"], "t"
    if dtype == tl.float16:
        lines += [f"mov.b32 m, {magic};", f"lop3.b32 t, {source}, {mask * 0x10001}, m, 0xea;", "sub.f16x2 $0, t, m;"]
    else:
        lines += [f"lop3.b32 $0, {source}, {mask * 0x10001}, {magic}, 0xea;"]
    return " ".join(["{", ".reg .b32 t, m;", *lines, "}"])


@triton.constexpr_function
def bias(bits, plane, dtype, asm):
    """What the sum of a plane's operands exceeds the code by."""
    if bits == 16 or not asm or dtype != tl.bfloat16:
        return 0.0
    return sum(128.0 * 2.0 ** _exponent(bits, plane, piece) for piece in range(pieces(bits, dtype)))


@triton.jit
def operand(words, BITS: tl.constexpr, PLANE: tl.constexpr, PIECE: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """One plane of uint16 ``words`` as numbers of DTYPE. A plane's pieces sum to the code plus :func:`bias`."""
    if BITS == 16:
        return words.to(DTYPE, bitcast=True)
    if ASM and tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            _assembly(BITS, PLANE, PIECE, DTYPE), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    if ASM:
        return tl.inline_asm_elementwise(
            _assembly(BITS, PLANE, PIECE, DTYPE), "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    SHIFT: tl.constexpr = _shift_and_mask(BITS, PLANE, PIECE, DTYPE)[0]
    MASK: tl.constexpr = _shift_and_mask(BITS, PLANE, PIECE, DTYPE)[1]
    return ((words >> SHIFT) & MASK).to(DTYPE) * 2.0 ** _exponent(BITS, PLANE, PIECE)


@triton.constexpr_function
def log2(number):
    """Exponent of a power of two."""
    return int(number).bit_length() - 1


@triton.jit
def rounded(x, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """fp32 to DTYPE, to nearest even; two numbers an instruction where the hardware can."""
    if ASM and tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return x.to(DTYPE)


@triton.jit
def grid_of(base, heads, GROUP: tl.constexpr, SIDE: tl.constexpr):
    """fp32 scale and minimum of one group, for byte pointers ``base`` to rows and KV heads ``heads`` (broadcast).

    A symmetric side has its minimum at ``-scale * n / 2``.
    """
    if SIDE.symmetric:
        pointer = (base + SIDE.metadata).to(tl.pointer_type(tl.float16)) + heads * SIDE.groups + GROUP
        scale = tl.load(pointer).to(tl.float32)
        return scale, scale * (-(2**SIDE.bits - 1) / 2)
    if SIDE.metadata % 4 == 0:  # scale and minimum in one load
        pointer = (base + SIDE.metadata).to(tl.pointer_type(tl.uint32)) + heads * SIDE.groups + GROUP
        pair = tl.load(pointer)
        scale = pair.to(tl.uint16).to(tl.float16, bitcast=True)
        minimum = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        pointer = (base + SIDE.metadata).to(tl.pointer_type(tl.float16)) + (heads * SIDE.groups + GROUP) * 2
        scale = tl.load(pointer)
        minimum = tl.load(pointer + 1)
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def butterflies(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """Walsh-Hadamard transform of fp32 ``x`` [ROWS, WIDTH] in blocks of BLOCK, spans 1, 2, 4, ..., then times 2**SHIFT."""
    for step in tl.static_range(log2(BLOCK)):
        pairs = x.reshape([ROWS, WIDTH >> (step + 1), 2, 1 << step]).permute(0, 1, 3, 2)
        left, right = tl.split(pairs)
        x = tl.join(left + right, left - right).permute(0, 1, 3, 2).reshape([ROWS, WIDTH])
    return x * 2.0**SHIFT
