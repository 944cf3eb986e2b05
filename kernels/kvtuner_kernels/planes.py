# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""How decode reads a side: in tiles of neighbouring runs of words, and in planes that span the runs of a tile.

Loads of 64 bytes per token and head take half as long as twice as many of 32, and a matrix instruction uses the words of a tile in
order. So two runs of a banded side are one tile, and a plane takes from each of them the codes of one band: one shift and one mask a
register, as in a plane of uniform codes, but not the same in the registers of both runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton

from kvtuner_kernels.bands import SCALES_AN_OCTAVE, STEPS
from kvtuner_kernels.places import Digits, Place


class Field(NamedTuple):
    """The codes of one run that a plane takes."""

    bits: int  # 0: none
    start: int  # lowest bit within a word
    channel: int  # of the first word's code; the others' follow
    step: float  # distance of two levels, in scales
    shift: int  # to the right, that brings the bits into fp16's mantissa
    low: int  # lowest bit within the mantissa


class Plane(NamedTuple):
    """The content of one matrix operand."""

    tile: int
    fields: tuple[Field, ...]  # one a run of the tile


class Tile(NamedTuple):
    """Words that are read together."""

    run: int  # the first
    runs: int  # 1 or 2


@triton.constexpr_function
def window(bits, start):
    """Right shift that brings code bits into fp16's mantissa (10 bits), and their start within it.

    Nearly all codes need no shift or one of 6, which brings the upper ten bits there, so that planes share it.
    """
    shift = 0 if start + bits <= 10 else min(start, 6)
    return shift, start - shift


def field(bits: int, start: int, channel: int, step: float = 1.0) -> Field:
    """A field, with where its bits lie in a mantissa."""
    return Field(bits, start, channel, step, *window(bits, start))


def uniform_planes(bits: int, segments: int, words: int) -> tuple[tuple[Tile, ...], tuple[Plane, ...]]:
    """Tiles and planes of a uniform side, in the order of its channels; ``words`` are of a segment."""
    each = 16 // bits
    tiles = tuple(Tile(run, 1) for run in range(segments))
    planes = (Plane(x // each, (field(bits, x % each * bits, x * words),)) for x in range(segments * each))
    return tiles, tuple(planes)


def band_planes(places: Sequence[Place], words: int, leads: bool) -> tuple[tuple[Tile, ...], tuple[Plane, ...]]:
    """Tiles and planes of a banded side, whose runs have ``words`` words; for a side that ``leads`` the first run is read for the scales.

    Example:
        >>> band_planes([Place(0, 0, 8), Place(1, 0, 4), Place(0, 8, 7)], 16, True)[1][0].fields[1].channel
        16
    """
    used = [place.word for place in places if place.bits]
    first, end = 0 if leads else min(used), max(used) + 1
    tiles = tuple(Tile(run, min(2, end - run)) for run in range(first, end, 2))
    planes: list[Plane] = []
    for number, tile in enumerate(tiles):
        runs = [
            [
                field(place.bits, place.start, band * words, STEPS[place.bits])
                for band, place in enumerate(places)
                if place.bits and place.word == run
            ]
            for run in range(tile.run, tile.run + tile.runs)
        ]
        planes += [Plane(number, fields) for fields in (_paired(*runs) if tile.runs == 2 else [(f,) for f in runs[0]])]
    return tiles, tuple(planes)


def _paired(left: list[Field], right: list[Field]) -> list[tuple[Field, Field]]:
    """Each field of one run with one of the other, with the same shift if possible; the rest are paired in order, or stay single."""
    pairs = []
    for one in list(left):
        alike = [other for other in right if other.shift == one.shift]
        if alike:
            pairs.append((one, alike[0]))
            left.remove(one)
            right.remove(alike[0])
    count = max(len(left), len(right))
    left += [field(0, 0, 0)] * (count - len(left))
    right += [field(0, 0, 0)] * (count - len(right))
    return pairs + list(zip(left, right, strict=True))


def digit_field(digits: Digits) -> Field:
    """The digits of scales as a field, whose channel is the word of the lowest digit."""
    return field(digits.bits, digits.start, digits.word)


@triton.constexpr_function
def digit_fields(side, runs):
    """The digits in the first of ``runs`` runs, and nothing in the others."""
    return (side.digits,) + (side.digits._replace(bits=0),) * (runs - 1)


@triton.constexpr_function
def digit_unit(side, asm):
    """The value of a digit of one in an operand."""
    return 2.0 ** (side.digits.low - 24) if asm else 1.0


@triton.constexpr_function
def power_factor(side, asm):
    """Octaves a step of a scale's number, for numbers in units of :func:`digit_unit`."""
    return 1 / (SCALES_AN_OCTAVE * digit_unit(side, asm))


@triton.constexpr_function
def banded(side):
    """Whether a side is stored in a fitted basis."""
    return len(side.bands) > 0


@triton.constexpr_function
def plane_count(side):
    """Planes that hold codes."""
    return len(side.fields)


@triton.constexpr_function
def tile_count(side):
    """Tiles."""
    return len(side.tiles)


@triton.constexpr_function
def tile_run(side, tile):
    """A tile's first run."""
    return side.tiles[tile].run


@triton.constexpr_function
def tile_words(side, tile):
    """Words of a tile, each run padded to ``side.padded``."""
    return side.tiles[tile].runs * side.padded


@triton.constexpr_function
def plane_tile(side, plane):
    """The tile in which a plane lies."""
    return side.fields[plane].tile


@triton.constexpr_function
def plane_group(side, plane):
    """The group of channels whose scale a plane's codes have."""
    return 0 if side.bands else plane // side.planes_a_group


@triton.constexpr_function
def even(side, plane):
    """Whether a plane's codes lie at the same place in all runs."""
    return len({(f.bits, f.start) for f in side.fields[plane].fields}) == 1


@triton.constexpr_function
def bits(side, plane):
    """Bits of a plane's codes, by run."""
    return tuple(f.bits for f in side.fields[plane].fields)


@triton.constexpr_function
def starts(side, plane):
    """Lowest bits of a plane's codes within a word, by run."""
    return tuple(f.start for f in side.fields[plane].fields)


@triton.constexpr_function
def channels(side, plane):
    """First channels, by run."""
    return tuple(f.channel for f in side.fields[plane].fields)


@triton.constexpr_function
def steps(side, plane):
    """Distances of two levels in scales, by run."""
    return tuple(f.step for f in side.fields[plane].fields)


@triton.constexpr_function
def middles(side, plane):
    """The centres of a symmetric plane's codes, by run: half of the largest code."""
    return tuple((2**f.bits - 1) / 2 for f in side.fields[plane].fields)


@triton.constexpr_function
def units(side, plane, asm):
    """The value of a code of one in an operand, by run: code bits alone are a subnormal number in the assembly body."""
    return tuple(2.0 ** (f.low - 24) if asm and 0 < f.bits < 16 else 1.0 for f in side.fields[plane].fields)


@triton.constexpr_function
def least_unit(side, asm):
    """The least of all :func:`units`, to which operands are normalized."""
    held = [f for plane in side.fields for f in plane.fields if f.bits]
    return min(2.0 ** (f.low - 24) if asm and f.bits < 16 else 1.0 for f in held)


@triton.constexpr_function
def masks(side, plane):
    """Largest codes, by run."""
    return tuple(2**f.bits - 1 for f in side.fields[plane].fields)


@triton.constexpr_function
def fields(side, plane):
    """The fields, by run."""
    return side.fields[plane].fields
