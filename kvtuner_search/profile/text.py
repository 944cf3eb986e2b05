"""Small helpers for what is printed: figures with units, and text from files made harmless."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Final

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.profile.fields import Measure
from kvtuner_search.profile.kinds import LayerKind

MAX_MESSAGE: Final = 4000  # characters of an error; a path has up to 4096 bytes, quoted texts are shorter
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


_BRACKET: Final = re.compile(r"(##\w{0,32})\[")  # what CI services take for a command wherever it stands in a line


def printable(text: object) -> str:
    """The text with control characters replaced, so that a file's content cannot control the terminal or a log parser.

    Commands that need the start of a line are left to ``kvtuner_search.output``, which sees the lines.
    """
    content = str(text)
    if "##" in content:
        content = _BRACKET.sub("\\1�", content)
    if content.isascii() and content.isprintable():
        return content
    dropped = {ord(character): "�" for character in set(content) if unicodedata.category(character) in _DROPPED}
    return content.translate(dropped) if dropped else content


def one_line(error: object) -> str:
    """An error's message as it is printed."""
    return shortened(printable(error), MAX_MESSAGE)


def shortened(text: object, limit: int = 60) -> str:
    """The text, cut to ``limit`` characters of which the last is then an ellipsis."""
    content = str(text)
    return content if len(content) <= limit else content[: limit - 1] + "…"


def quoted(value: object, limit: int = 60) -> str:
    """A value from a file as an error quotes it: its ``repr``, shortened."""
    if isinstance(value, str | bytes) and len(value) > limit:
        value = value[:limit]  # the repr of a long text is as long
        return shortened(repr(value)[:-1] + "…", limit)
    try:
        return shortened(repr(value), limit)
    except ValueError:
        return "a number with too many digits"  # more digits than Python writes


def bounded(lines: Sequence[str], count: int, length: int = 4096) -> list[str]:
    """At most ``count`` texts of at most ``length`` characters; the last says how many were left out."""
    kept = [shortened(line, length) for line in lines]
    return kept if len(kept) <= count else [*kept[: count - 1], f"and {len(kept) - count + 1} more"]


def size(nbytes: int) -> str:
    """Bytes in the largest binary unit that leaves at least one, e.g. ``40 GiB``."""
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_BINARY) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.4g} {_BINARY[unit]}"


def signed(value: float) -> str:
    """A change with its sign and four digits."""
    return f"{value:+.4g}"


def interval_of(measure: Measure) -> str:
    """The interval of a measure's change, or a note that it has none."""
    if not measure.has_interval:
        return "(one sample, no interval)"
    return f"[{signed(measure.ci_low)}, {signed(measure.ci_high)}]"


def percent(old: float, new: float) -> str:
    """The relative change, or a dash if it is undefined."""
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


def specs_by_layer(layers: Sequence[LayerSpec], kinds: Sequence[LayerKind]) -> list[tuple[str, LayerSpec, LayerKind]]:
    """Each distinct pair of spec and kind with the layers that have it, e.g. ``("0-3, 7", spec, kind)``."""
    pairs = list(zip(layers, kinds, strict=True))
    return [(ranges(indices), spec, kind) for indices, (spec, kind) in runs(pairs)]


def banded_sides(layers: Sequence[LayerSpec]) -> str:
    """``keys of layers 0-3, values of layers 1`` for the sides stored in bands; empty if there are none."""
    sides = {
        "keys": [index for index, layer in enumerate(layers) if layer.key.banded],
        "values": [index for index, layer in enumerate(layers) if layer.value.banded],
    }
    return ", ".join(f"{name} of layers {ranges(found)}" for name, found in sides.items() if found)
