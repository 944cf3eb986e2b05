"""Launch parameters of the kernels: a small table, measured once, so that serving never tunes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from kvtuner_kernels.layout import BITS, LayerSpec, TensorSpec

HOPPER_SHARED = 232448  # bytes of shared memory that a program may take on sm_90 and sm_100
LONG = 4096  # rows of a request from which extend uses its largest tile
INTERPRETED_MULTIPROCESSORS = 3  # for tensors on the CPU: small, and odd, so that tests see runs that cross requests


@dataclass(frozen=True)
class DecodeLaunch:
    """How :func:`kvtuner_kernels.decode.decode` is launched."""

    batch: int  # entries of a tile's first axis: KV heads times runs of tokens; a multiple of warps
    runs: int  # neighbouring runs of tokens a tile; fills the warps if there are few KV heads
    tokens: int  # a run
    columns: int  # query heads of a group in one program; a multiple of 8
    stages: int  # software pipelining: tiles in flight, plus two for the indirect load of slots
    warps: int
    programs: int  # for each multiprocessor
    registers: int = 0  # upper bound for a thread; 0 leaves it to the compiler

    def options(self) -> dict[str, int]:
        """Compiler options that are not left at their defaults."""
        return {"maxnreg": self.registers} if self.registers else {}


def decode_launch(
    spec: LayerSpec,
    heads: int,
    group: int,
    head_dim: int,
    shared: int = HOPPER_SHARED,
) -> DecodeLaunch:
    """Launch parameters for one layer.

    Measured for head_dim 128, groups of 7 and ``shared`` of an H200 (docs/log.md); the rest is chosen so that nothing spills.

    Args:
        heads: local KV heads, with ``group`` query heads each.
        shared: bytes of shared memory that a program may take.
    """
    batch = 4
    runs = max(1, batch // (1 << (heads - 1).bit_length()))
    columns = 8 if group <= 8 or head_dim > 128 else 16
    plain = _plain(spec, head_dim)
    wide = max(_width(spec.key), _width(spec.value))
    tokens = 64 if head_dim <= 128 and columns == 8 and plain else 32 if head_dim * columns <= 2048 and plain else 16
    if head_dim == 128 and tokens == 64 and wide == 2:
        tokens = 128
    if spec.key.banded or spec.value.banded:
        if head_dim > 128:
            tokens = 16  # two runs of wide words are one tile
        elif head_dim == 80:
            tokens = min(tokens, 32)  # words of 10, padded to 16, spill otherwise
    # Deeper pipelines pay for short rows; with 8-bit codes they cost occupancy.
    stages = 5 if tokens == 64 and wide == 4 else 4
    if shared < HOPPER_SHARED:
        tokens, stages = min(tokens, 32), 4
    # Left to itself, the compiler for sm_100 takes 168 registers here and spills.
    registers = 184 if {_width(spec.key), _width(spec.value)} == {2, 8} and tokens == 64 else 0
    return DecodeLaunch(batch, runs, tokens, columns, stages, 4, 2, registers)


@dataclass(frozen=True)
class ExtendLaunch:
    """How :func:`kvtuner_kernels.extend.extend` is launched."""

    rows: int  # of a tile: new tokens times query heads of a group
    tokens: int  # stored tokens of a tile
    stages: int
    warps: int


def extend_launch(
    spec: LayerSpec, head_dim: int, rows: int, shared: int = HOPPER_SHARED, masked: bool = False
) -> ExtendLaunch:
    """Launch parameters for one layer, chosen so that nothing spills.

    Args:
        rows: the largest number of rows of a request.
        shared: bytes of shared memory that a program may take.
        masked: whether there is a mask of drafted tokens.
    """
    if shared < HOPPER_SHARED:
        tokens = 32 if head_dim <= 128 else 16
        if rows <= 16:
            return ExtendLaunch(16, tokens, 3, 4)
        return ExtendLaunch(32, 32, 2, 8) if head_dim > 192 else ExtendLaunch(64, tokens, 2, 8)  # 64 rows of 256 spill
    if head_dim > 128:
        return ExtendLaunch(64, 16 if masked and head_dim > 192 else 32, 2, 8)
    # Triton 3.6 multiplies wrongly on sm_90 where a group of values has fewer channels than the tile has tokens.
    narrow = any(0 < side.group_size < 64 for side in (spec.key, spec.value))
    if narrow or not _plain(spec, head_dim):
        return ExtendLaunch(128 if rows > 64 else 64 if rows > 16 else 16, 32, 2, 8 if rows > 64 else 4)
    if rows <= 16:
        return ExtendLaunch(16, 32, 3, 4) if head_dim & (head_dim - 1) else ExtendLaunch(16, 64, 3, 8)
    return ExtendLaunch(128, 64, 3, 8) if rows > 64 else ExtendLaunch(64, 32, 3, 4)


def _width(side: TensorSpec) -> int:
    """Bits of uniform codes with about the same row length as the side."""
    return next(bits for bits in BITS if side.mean_bits <= bits)


def _plain(spec: LayerSpec, head_dim: int) -> bool:
    """Whether a head has few groups: each needs its own accumulators and scales."""
    return max(spec.key.groups(head_dim), spec.value.groups(head_dim)) <= 2


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a small odd number for the CPU, where only the interpreter runs."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel's launch may overlap the end of the kernel before it (programmatic dependent launch, from sm_90 on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take on ``device``."""
    if device.type != "cuda":
        return HOPPER_SHARED
    return shared_memory_of(*torch.cuda.get_device_capability(device))


def shared_memory_of(major: int, minor: int) -> int:
    """Bytes of shared memory that a program may take on a GPU of this compute capability (CUDA C Programming Guide)."""
    if (major, minor) in ((8, 6), (8, 9)) or major == 12:
        return 101376
    return 166912 if major == 8 else HOPPER_SHARED
