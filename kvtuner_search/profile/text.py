"""Small helpers for what is printed: figures with units, and text from files made harmless."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, Final

from kvtuner_kernels.layout import LayerSpec

_BINARY: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_DROPPED: Final = (
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Cn",
    "Zl",
    "Zp",
)  # controls, directional overrides, surrogates, line separators


def printable(text: object) -> str:
    """The text with control characters replaced, so that a file's content cannot steer the terminal or a log parser."""
    content = str(text)
    if content.isascii() and content.isprintable():
        return content
    return "".join("�" if unicodedata.category(character) in _DROPPED else character for character in content)


def size(nbytes: int) -> str:
    """Bytes in the largest binary unit that leaves at least one, e.g. ``40 GiB``."""
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_BINARY) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.4g} {_BINARY[unit]}"


def signed(value: float) -> str:
    """A change with its sign and four digits."""
    return f"{value:+.4g}"


def percent(old: float, new: float) -> str:
    """The relative change, or a dash where there is none to give."""
    return f"{(new - old) / old:+.1%}" if old else "-"


def ranges(indices: Sequence[int]) -> str:
    """``0-3, 7`` for ``[0, 1, 2, 3, 7]``; the indices rise."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def runs(items: Sequence[Any]) -> list[tuple[list[int], Any]]:
    """Equal items together with their indices, in order of first appearance."""
    groups: dict[Any, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item, []).append(index)
    return [(indices, item) for item, indices in groups.items()]


def specs_by_layer(layers: Sequence[LayerSpec]) -> list[tuple[str, LayerSpec]]:
    """Each distinct spec with the layers that have it, e.g. ``("0-3, 7", spec)``."""
    return [(ranges(indices), spec) for indices, spec in runs(layers)]


def banded_sides(layers: Sequence[LayerSpec]) -> str:
    """``keys of layers 0-3, values of layers 1`` for what is stored in bands; empty if nothing is."""
    sides = {
        "keys": [index for index, layer in enumerate(layers) if layer.key.banded],
        "values": [index for index, layer in enumerate(layers) if layer.value.banded],
    }
    return ", ".join(f"{name} of layers {ranges(found)}" for name, found in sides.items() if found)
