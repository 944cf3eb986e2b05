"""Where the bands of a head lie in its 16-bit words, and the digits of its scales. Pure Python; :mod:`kvtuner_kernels.layout` describes the row."""

from __future__ import annotations

import functools
import itertools
from typing import Final, NamedTuple

BANDS: Final = 8  # equal bands of a head in a fitted basis
MAX_BAND_BITS: Final = 8
WORD_BITS: Final = 16
SCALE_BITS: Final = 8  # of a banded side's scale


class Place(NamedTuple):
    """The place of a band's codes within the words of a head."""

    word: int  # which run of U words
    start: int  # lowest bit within each word
    bits: int  # 0 is stored nowhere


class Digits(NamedTuple):
    """The place of a banded side's scale: its digits, the lowest first, in one word each of a head's first run."""

    word: int  # the lowest digit's
    start: int  # lowest bit within each word
    bits: int  # a digit


def digit_bits(head_dim: int) -> int:
    """Bits of a digit of a scale: as few as fit two scales into the words of one run."""
    return -(-2 * SCALE_BITS // (head_dim // BANDS))


@functools.cache
def place_bands(digit: int, *sides: tuple[int, ...]) -> tuple[tuple[tuple[Place, ...], ...], int]:
    """Pack bands into 16-bit words: as few words as a side needs, then so that decode reads it in few planes.

    The top ``digit`` bits of the first word are left to the scales. A side begins in the last word of the side before it, so that both lie in neighbouring words, which are read at once. Within a word
    a side's bands lie in the order of their bits, the most first.

    Args:
        digit: bits of a word that hold scales.
        sides: bits of each band.

    Returns:
        the place of each side's bands, and the number of runs of words.

    Example:
        >>> place_bands(1, (8, 7, 4, 0))
        (((Place(word=1, start=0, bits=8), Place(word=1, start=8, bits=7), Place(word=0, start=0, bits=4), Place(word=0, start=0, bits=0)),), 2)
    """
    words, room, used = 1, WORD_BITS - digit, 0  # runs in use, free bits of the last, and where they start
    placed = []
    for number, side in enumerate(sides):
        bits = tuple(sorted((b for b in side if b), reverse=True))
        if not bits:
            placed.append((Place(0, 0, 0),) * len(side))
            continue
        chosen = _best_way(bits, room, not any(map(any, sides[number + 1 :])))
        begin = words - 1 if room else words
        starts: dict[int, list[Place]] = {}
        for at, word in enumerate(chosen, start=begin):
            if at >= words and word:
                words, room, used = at + 1, WORD_BITS, 0
            for b in word:
                starts.setdefault(b, []).append(Place(at, used, b))
                used += b
                room -= b
        placed.append(tuple(starts[b].pop(0) if b else Place(0, 0, 0) for b in side))
    return tuple(placed), words


@functools.cache
def _best_way(bits: tuple[int, ...], room: int, last: bool) -> tuple[tuple[int, ...], ...]:
    """The way with the fewest bits in the last word, if a side follows that can use the room, and among those one with few planes."""
    return min(_ways(bits, room), key=lambda way: (0 if last else sum(way[-1]), _planes(way), way))


def _ways(bits: tuple[int, ...], room: int) -> frozenset[tuple[tuple[int, ...], ...]]:
    """Every way to put ``bits`` into the fewest words, of which the first has ``room`` bits if that is not 0; equal bits are alike."""
    for count in itertools.count(1 if room else -(-sum(bits) // WORD_BITS)):
        rooms = (room,) * bool(room) + (WORD_BITS,) * (count - bool(room))
        found = _fill(bits, rooms)
        if found:
            return found
    raise AssertionError


@functools.cache
def _fill(bits: tuple[int, ...], rooms: tuple[int, ...]) -> frozenset[tuple[tuple[int, ...], ...]]:
    """Every way to put ``bits`` into words with this room."""
    if not rooms:
        return frozenset() if bits else frozenset({()})
    least = sum(bits) - sum(rooms[1:])  # bits that do not fit into the other words
    return frozenset(
        (word, *others)
        for word, held, rest in _parts(bits)
        if least <= held <= rooms[0]
        for others in _fill(rest, rooms[1:])
    )


@functools.cache
def _parts(bits: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], int, tuple[int, ...]], ...]:
    """Every part of ``bits``, its sum, and the rest; all in falling order, and equal bits are interchangeable."""
    if not bits:
        return (((), 0, ()),)
    same = bits.count(bits[0])
    return tuple(
        ((bits[0],) * taken + word, bits[0] * taken + held, (bits[0],) * (same - taken) + rest)
        for word, held, rest in _parts(bits[same:])
        for taken in range(same + 1)
    )


def _planes(way: tuple[tuple[int, ...], ...]) -> int:
    """Planes in which words are read, two runs at once."""
    words = way if way[0] else way[1:]
    return sum(max(map(len, words[at : at + 2])) for at in range(0, len(words), 2))
