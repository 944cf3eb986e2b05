"""The storage of one token: specs, row offsets, bytes and effective bits. Pure Python, no torch.

A **row** holds everything that one layer stores for one token and all local KV heads, in this order::

    K codes (head 0, head 1, ...) | V codes | K metadata | V metadata | padding to ROW_ALIGNMENT

* Codes of a head are stored in *segments* of ``L`` channels (:meth:`TensorSpec.segment`) and, within a segment, in *planes*
  of 16-bit little-endian words: with ``b`` bits a segment takes ``W = L*b/16`` words, and word ``j`` holds the codes of
  channels ``j, j + W, j + 2*W, ...`` from its low bits to its high bits. So the words of a segment are the tile that a
  16-bit matrix instruction loads, each plane is that tile with one shift and one mask, and a plane lies within one group.
* A **banded** side is stored in a fitted basis whose channels form :data:`BANDS` equal bands, each with its own bits. A band's
  ``U = head_dim / BANDS`` codes lie at one place of ``U`` consecutive 16-bit words, code ``j`` in word ``j``. Bands are packed into
  the fewest words (:func:`kvtuner_kernels.places.place_bands`). If keys and values are both banded they share the words of a head.
* Metadata of a head is, for each group of ``group_size`` consecutive channels, one fp16 scale, followed for an asymmetric
  spec by one fp16 minimum.
* A banded side has no metadata. Its scale is one byte a head (:mod:`kvtuner_kernels.bands`), whose digits lie in the top bits of the words
  of the head's first run, the lowest digit in the first word: one bit a word, or two if a run has fewer than 16 words. If keys and
  values are both banded, the keys' byte comes first. So a head is whole words, a row is aligned, and the words with codes include the scale.
* 16 bits means the model's own dtype, stored raw: two bytes a channel, no metadata.

The order of bytes is part of ``LAYOUT_VERSION``: a profile made for another version is refused. Version 2 added bands; everything
else is stored as in version 1.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvtuner_kernels.places import BANDS, MAX_BAND_BITS, SCALE_BITS, WORD_BITS, Digits, Place, digit_bits, place_bands

LAYOUT_VERSION: Final = 2
BITS: Final = (2, 4, 8, 16)  # rising; every list of bit-widths in the project is made from this one
CODE_BITS: Final = tuple(bits for bits in BITS if bits != 16)  # widths of quantized codes; 16 is stored raw
UNIFORM_BITS: Final = tuple(  # (key, value) of the usual uniform settings, dearest first: K8V8, K8V4, K4V4, K4V2, K2V2
    (key, value) for at, key in enumerate(CODE_BITS[::-1]) for value in CODE_BITS[::-1][at : at + 2]
)
GROUP_SIZES: Final = (32, 64, 128)  # channels; a group may also span the whole head
ROW_ALIGNMENT: Final = 4  # bytes
METADATA_BYTES: Final = 2  # one fp16 number
MIN_CLIP: Final = 0.3  # a narrower range would drop most of a group

_BANDED = re.compile(rf"b(?P<bands>[0-{MAX_BAND_BITS}]{{{BANDS}}})", re.ASCII)
_SPEC = re.compile(
    rf"(?P<bits>{'|'.join(map(str, CODE_BITS))})"
    r"-g(?P<group>[1-9]\d{0,3})-(?P<sign>asym|sym)(?P<centred>-c)?(?P<rotated>-r)?(-x(?P<clip>0\.\d{1,2}))?",
    re.ASCII,
)


class LayoutError(ValueError):
    """A spec that this layout cannot store; the message has the value, the reason and the remedy."""


@dataclass(frozen=True, order=True)
class TensorSpec:
    """How the keys, or the values, of one layer are stored.

    Raises:
        LayoutError: for a combination that cannot be stored.
    """

    bits: int = (
        16  # one of BITS; 16 is the model's own dtype, stored raw, and takes none of the fields below; 0 with bands
    )
    group_size: int = 0  # channels that share one scale; 0 only for 16 bits
    symmetric: bool = False  # the grid is centred on zero and only the scale is stored; else scale and minimum
    centred: bool = False  # a fixed vector per KV head is subtracted before quantization
    rotated: bool = False  # a Hadamard transform along head_dim is applied before quantization
    clip: float = 1.0  # fraction of the group's range that the grid spans, in steps of 0.01
    bands: tuple[int, ...] = ()  # a fitted basis: bits of each of BANDS bands; takes none of the fields above

    def __post_init__(self) -> None:
        if self.bands or self.bits == 0:
            self._check_bands()
            return
        if self.bits not in BITS:
            raise LayoutError(f"bits={self.bits!r} cannot be stored: use one of {BITS}")
        if self.bits == 16:
            if (self.group_size, self.symmetric, self.centred, self.rotated, self.clip) != (
                0,
                False,
                False,
                False,
                1.0,
            ):
                raise LayoutError(
                    "16 bits are stored raw: leave group_size, symmetric, centred, rotated and clip unset"
                )
            return
        if self.group_size < 1:
            raise LayoutError(
                f"group_size={self.group_size!r} with {self.bits} bits: use one of {GROUP_SIZES} or head_dim"
            )
        if not (math.isfinite(self.clip) and MIN_CLIP <= self.clip <= 1.0 and round(self.clip, 2) == self.clip):
            raise LayoutError(f"clip={self.clip!r} is not a multiple of 0.01 in [{MIN_CLIP}, 1.0]")

    def _check_bands(self) -> None:
        others = (self.bits, self.group_size, self.symmetric, self.centred, self.rotated, self.clip)
        if others != (0, 0, False, False, False, 1.0):
            raise LayoutError("a banded side has bits=0: leave group_size, symmetric, centred, rotated and clip unset")
        good = len(self.bands) == BANDS and all(type(b) is int and 0 <= b <= MAX_BAND_BITS for b in self.bands)
        if not good or not any(self.bands):
            raise LayoutError(
                f"bands={self.bands!r} cannot be stored: give {BANDS} numbers of bits from 0 to {MAX_BAND_BITS}, not all 0"
            )

    @property
    def raw(self) -> bool:
        """True for 16 bits: nothing is quantized."""
        return self.bits == 16

    @property
    def banded(self) -> bool:
        """True if the side is stored in a fitted basis, with separate bits for each band of channels."""
        return bool(self.bands)

    @property
    def fitted(self) -> bool:
        """True if the side needs a tensor of the transforms file: a centring vector, or a basis."""
        return self.centred or self.banded

    @property
    def mean_bits(self) -> float:
        """Bits of a code, averaged over the channels."""
        return sum(self.bands) / BANDS if self.bands else float(self.bits)

    def check(self, head_dim: int) -> None:
        """Raise LayoutError if a head of ``head_dim`` channels cannot be stored this way."""
        if self.raw:
            return
        if self.banded:
            if head_dim % BANDS:
                raise LayoutError(f"head_dim={head_dim} does not split into {BANDS} bands: store it without bands")
            return
        if self.group_size not in (*GROUP_SIZES, head_dim):
            raise LayoutError(f"group_size={self.group_size} is neither one of {GROUP_SIZES} nor head_dim={head_dim}")
        if head_dim % self.group_size:
            raise LayoutError(
                f"head_dim={head_dim} does not split into groups of {self.group_size}: use group_size={head_dim}"
            )
        if head_dim * self.bits % 16:
            raise LayoutError(
                f"head_dim={head_dim} does not fill whole 16-bit words with {self.bits}-bit codes: use more bits"
            )

    def groups(self, head_dim: int) -> int:
        """Number of groups (scales) in one head; 0 for a banded side, whose scale is not metadata."""
        return 0 if self.raw or self.banded else head_dim // self.group_size

    def segment(self, head_dim: int) -> int:
        """Channels that are packed together: the most groups (a power of two) for which a plane stays within one group.

        Not for a banded side.
        """
        groups = self.groups(head_dim)
        return self.group_size * min(16 // self.bits, groups & -groups) if groups else head_dim

    def code_bytes(self, head_dim: int) -> int:
        """Bytes of codes (or of raw channels) for one head of one token; for a banded side with its scale, if it does not share its words."""
        if self.banded:
            return place_bands(digit_bits(head_dim), self.bands)[1] * head_dim // BANDS * 2
        return head_dim * self.bits // 8

    def metadata_bytes(self, head_dim: int) -> int:
        """Bytes of scales and minima for one head of one token."""
        return self.groups(head_dim) * METADATA_BYTES * (1 if self.symmetric else 2)

    def effective_bits(self, head_dim: int) -> float:
        """Bits per channel including metadata; LayerSpec includes row padding."""
        return (self.code_bytes(head_dim) + self.metadata_bytes(head_dim)) * 8 / head_dim

    def __str__(self) -> str:
        """A short name that :meth:`parse` reads back: ``16``, ``b65443322`` (bits of each band), or ``4-g128-asym-c-r-x0.9``."""
        if self.raw:
            return "16"
        if self.banded:
            return "b" + "".join(map(str, self.bands))
        parts = [str(self.bits), f"g{self.group_size}", "sym" if self.symmetric else "asym"]
        parts += [flag for flag, on in (("c", self.centred), ("r", self.rotated)) if on]
        parts += [f"x{self.clip:g}"] if self.clip != 1.0 else []
        return "-".join(parts)

    @classmethod
    def parse(cls, text: str) -> TensorSpec:
        """The inverse of ``str``.

        Raises:
            LayoutError: if the text is not a spec.
        """
        if text == "16":
            return cls()
        banded = _BANDED.fullmatch(text)
        if banded is not None:
            return cls(bits=0, bands=tuple(map(int, banded["bands"])))
        match = _SPEC.fullmatch(text)
        if match is None:
            raise LayoutError(
                f"{text!r} is not a tensor spec: write 16, BITS-gGROUP-asym|sym[-c][-r][-xCLIP], e.g. 4-g64-asym-c, or b and the bits of"
                f" {BANDS} bands, e.g. b65443322"
            )
        return cls(
            bits=int(match["bits"]),
            group_size=int(match["group"]),
            symmetric=match["sign"] == "sym",
            centred=match["centred"] is not None,
            rotated=match["rotated"] is not None,
            clip=float(match["clip"] or 1.0),
        )


RAW: Final = TensorSpec()
_side = functools.lru_cache(4096)(TensorSpec.parse)  # many layers, few distinct sides


@dataclass(frozen=True, order=True)
class LayerSpec:
    """How one layer stores its keys and its values.

    Example:
        >>> spec = LayerSpec.parse("8-g64-asym/4-g64-asym")
        >>> spec.name, spec.bytes_per_token(kv_heads=2, head_dim=64), spec.effective_bits(2, 64)
        ('K8V4', 208, 6.5)
    """

    key: TensorSpec = RAW
    value: TensorSpec = RAW

    @property
    def name(self) -> str:
        """The bits alone, as in ``K8V4``, or ``K3.5V2.75`` for banded sides."""
        return f"K{self.key.mean_bits:g}V{self.value.mean_bits:g}"

    def __str__(self) -> str:
        """A short name that :meth:`parse` reads back: ``KEY/VALUE``."""
        return f"{self.key}/{self.value}"

    @classmethod
    def parse(cls, text: str) -> LayerSpec:
        """The inverse of ``str``.

        Raises:
            LayoutError: if the text is not a pair of specs.
        """
        key, slash, value = text.partition("/")
        if not slash:
            raise LayoutError(f"{text!r} is not a layer spec: write KEY/VALUE, e.g. 8-g64-asym/4-g64-asym")
        return cls(_side(key), _side(value))

    def places(self, head_dim: int) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
        """The places of the bands of keys and of values; empty for a side that is not banded."""
        key, value = place_bands(digit_bits(head_dim), self.key.bands, self.value.bands)[0]
        return key, value

    def digits(self, head_dim: int) -> tuple[Digits | None, Digits | None]:
        """The places of the scales of keys and of values; None for a side that is not banded."""
        bits = digit_bits(head_dim)
        key, value = (Digits(first, WORD_BITS - bits, bits) for first in (0, SCALE_BITS // bits * self.key.banded))
        return key if self.key.banded else None, value if self.value.banded else None

    @property
    def shares_words(self) -> bool:
        """Whether keys and values lie in the same words."""
        return self.key.banded and self.value.banded

    def row(self, kv_heads: int, head_dim: int) -> RowLayout:
        """The byte offsets of one token's parts.

        Raises:
            LayoutError: if a head of ``head_dim`` channels cannot be stored this way.
        """
        self.key.check(head_dim)
        self.value.check(head_dim)
        if self.shares_words:
            words = place_bands(digit_bits(head_dim), self.key.bands, self.value.bands)[1]
            key_head = value_head = words * head_dim // BANDS * 2
            value_codes, key_metadata = 0, kv_heads * key_head
        else:
            key_head, value_head = self.key.code_bytes(head_dim), self.value.code_bytes(head_dim)
            value_codes = kv_heads * key_head
            key_metadata = value_codes + kv_heads * value_head
        value_metadata = key_metadata + kv_heads * self.key.metadata_bytes(head_dim)
        used = value_metadata + kv_heads * self.value.metadata_bytes(head_dim)
        return RowLayout(
            key_codes=0,
            value_codes=value_codes,
            key_head=key_head,
            value_head=value_head,
            key_metadata=key_metadata,
            value_metadata=value_metadata,
            nbytes=-(-used // ROW_ALIGNMENT) * ROW_ALIGNMENT,
        )

    def bytes_per_token(self, kv_heads: int, head_dim: int) -> int:
        """Bytes that this layer stores for one token, including metadata and padding."""
        return self.row(kv_heads, head_dim).nbytes

    def effective_bits(self, kv_heads: int, head_dim: int) -> float:
        """Stored bits per cached number, including metadata and padding."""
        return self.bytes_per_token(kv_heads, head_dim) * 8 / (2 * kv_heads * head_dim)


@dataclass(frozen=True)
class RowLayout:
    """Byte offsets of the parts of one row, and its length."""

    key_codes: int
    value_codes: int  # the same as key_codes where keys and values share words
    key_head: int  # bytes from one head's codes to the next's
    value_head: int
    key_metadata: int
    value_metadata: int
    nbytes: int


def bytes_per_token(layers: Sequence[LayerSpec], kv_heads: int, head_dim: int) -> int:
    """Bytes that all given layers store for one token."""
    return sum(layer.bytes_per_token(kv_heads, head_dim) for layer in layers)


def effective_bits(layers: Sequence[LayerSpec], kv_heads: int, head_dim: int) -> float:
    """Stored bits per cached number over all given layers, including metadata and padding."""
    return bytes_per_token(layers, kv_heads, head_dim) * 8 / (2 * kv_heads * head_dim * len(layers))
