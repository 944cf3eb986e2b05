"""One side of a row as a kernel's compile-time constant, and what is checked before a kernel is launched."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from kvtuner_kernels.bands import EXTRA_ROWS
from kvtuner_kernels.layout import LayerSpec, LayoutError, TensorSpec
from kvtuner_kernels.places import BANDS, Digits, Place
from kvtuner_kernels.planes import Field, Plane, Tile, band_planes, digit_field, uniform_planes

HEAD_DIMS = (64, 80, 96, 128, 192, 256)  # the kernels are compiled and tested for these


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
    tiles: tuple[Tile, ...]
    fields: tuple[Plane, ...]  # of the tiles
    # For a banded side: the place of each band; it has one plane per band for kernels that process bands, one group, and no segments.
    bands: tuple[Place, ...] = ()
    digits: Field | None = None  # of its scale, in a head's first run

    @property
    def quantized(self) -> bool:
        """Whether rows hold codes with a scale, not raw numbers."""
        return self.bits < 16

    @property
    def count(self) -> int:
        """Planes of a head."""
        return len(self.bands) or self.segments * self.planes


@functools.cache  # prefill calls this for every layer, while the GPU waits
def sides(spec: LayerSpec, heads: int, head_dim: int) -> tuple[Side, Side]:
    """The key side and the value side of a layer.

    Raises:
        LayoutError: if the kernels do not cover ``head_dim``, or the layout cannot store it.
    """
    if head_dim not in HEAD_DIMS:
        raise LayoutError(f"the Triton kernels have no head_dim={head_dim}: use one of {HEAD_DIMS}, or the CPU path")
    row = spec.row(heads, head_dim)
    key, value = spec.places(head_dim)
    key_digits, value_digits = spec.digits(head_dim)
    key_at, value_at = (
        (row.key_codes, row.key_head, row.key_metadata),
        (row.value_codes, row.value_head, row.value_metadata),
    )
    return (
        _side(spec.key, head_dim, key_at, key, key_digits, True),
        _side(spec.value, head_dim, value_at, value, value_digits, not spec.key.banded),
    )


def _side(
    spec: TensorSpec,
    head_dim: int,
    offsets: tuple[int, int, int],
    places: tuple[Place, ...],
    digits: Digits | None,
    leads: bool,
) -> Side:
    codes, head_codes, metadata = offsets
    if spec.banded:
        unit = head_dim // BANDS
        tiles, fields = band_planes(places, unit, leads)
        assert digits is not None  # as of every banded side
        return Side(
            bits=0,
            groups=1,
            symmetric=True,
            centred=False,
            rotated=False,
            clip=1.0,
            codes=codes,
            head_codes=head_codes,
            metadata=metadata,
            segments=0,
            planes=0,
            planes_a_group=BANDS,
            words=unit,
            padded=max(16, triton.next_power_of_2(unit)),
            tiles=tiles,
            fields=fields,
            bands=places,
            digits=digit_field(digits),
        )
    segment = spec.segment(head_dim)
    words = segment * spec.bits // 16
    tiles, fields = uniform_planes(spec.bits, head_dim // segment, words)
    return Side(
        bits=spec.bits,
        groups=max(1, spec.groups(head_dim)),
        symmetric=spec.symmetric,
        centred=spec.centred,
        rotated=spec.rotated,
        clip=spec.clip,
        codes=codes,
        head_codes=head_codes,
        metadata=metadata,
        segments=head_dim // segment,
        planes=16 // spec.bits,
        planes_a_group=head_dim // words // max(1, spec.groups(head_dim)),
        words=words,
        padded=max(16, triton.next_power_of_2(words)),
        tiles=tiles,
        fields=fields,
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
    """Raise LayoutError unless ``centre`` is what ``side`` needs: dense fp32 [heads, head_dim], a basis, or nothing."""
    if (side.centred or bool(side.bands)) != (centre is not None):
        raise LayoutError(f"{side.bits}-bit side: it needs {'a' if centre is None else 'no'} centring vector or basis")
    shape = (heads, head_dim + EXTRA_ROWS, head_dim) if side.bands else (heads, head_dim)
    if centre is not None and not (centre.shape == shape and centre.dtype == torch.float32 and centre.is_contiguous()):
        raise LayoutError(
            f"the {'basis' if side.bands else 'centring vector'} is {centre.dtype} {list(centre.shape)}, expected dense float32 {list(shape)}"
        )


def within_reach(x: torch.Tensor, what: str) -> torch.Tensor:
    """``x``, or a dense copy if its last number is 2**31 numbers or more from the first: for kernels without a register for 64 bits.

    Raises:
        LayoutError: if it has more than 2**31 numbers.
    """
    if x.numel() > 2**31:
        raise LayoutError(f"{what} of {list(x.shape)} are more than 2**31 numbers: pass fewer at once")
    far = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) >= 2**31
    return x.contiguous() if far else x
