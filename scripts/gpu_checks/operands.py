"""How codes become operands of products, for every word of 16 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_checks import DEVICE
from kvtuner_kernels.layout import CODE_BITS
from kvtuner_kernels.operands import bias, operand, pieces, small
from kvtuner_kernels.places import MAX_BAND_BITS
from kvtuner_kernels.planes import window


@triton.jit
def _operands(words, out, BITS: tl.constexpr, PLANE: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    loaded = tl.load(words + at)
    total = tl.full([1024], -bias(BITS, PLANE, DTYPE, ASM), tl.float32)
    for piece in tl.static_range(pieces(BITS, DTYPE)):
        total += operand(loaded, BITS, PLANE, piece, DTYPE, ASM).to(tl.float32)
    tl.store(out + at, total)


@triton.jit
def _small(words, out, BITS: tl.constexpr, START: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    number = small(tl.load(words + at), BITS, START, tl.float16, True).to(tl.float32)
    tl.store(out + at, number * 2.0 ** (24 - window(BITS, START)[1]))


def check_operands() -> int:
    """The assembly bodies give the code of every plane of all 65,536 words."""
    words = torch.arange(65536, dtype=torch.int32, device=DEVICE).to(torch.uint16)
    cases = 0
    for dtype in (tl.bfloat16, tl.float16):
        for bits in CODE_BITS:
            for plane in range(16 // bits):
                out = torch.full((65536,), float("nan"), device=DEVICE)
                _operands[(64,)](words, out, BITS=bits, PLANE=plane, DTYPE=dtype, ASM=True)
                codes = (words.int() >> (plane * bits)) & (2**bits - 1)
                assert torch.equal(out, codes.float()), f"operand: {bits} bits, plane {plane}, {dtype}"
                cases += 1
    for bits in range(1, MAX_BAND_BITS + 1):
        for start in range(17 - bits):
            out = torch.full((65536,), float("nan"), device=DEVICE)
            _small[(64,)](words, out, BITS=bits, START=start)
            codes = (words.int() >> start) & (2**bits - 1)
            assert torch.equal(out, codes.float()), f"small: {bits} bits from bit {start}"
            cases += 1
    return cases
