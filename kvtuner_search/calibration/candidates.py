"""The choices of the search: storage classes, and the ways to transform a tensor before quantization.

A **class** fixes the cost of a tensor: bits, group size, and whether a minimum is stored; or, for bands, the bits of all bands
together. Within a class the variants (plain, centred, centred and rotated, each with a clip; or the ways to spread bits over bands) cost
the same bytes, so each layer takes the best one, and the search chooses among classes only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from kvtuner_kernels.layout import LayoutError, TensorSpec
from kvtuner_kernels.places import BANDS, MAX_BAND_BITS
from kvtuner_search.errors import UsageError

_CLIPS: Final = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85), 2: (0.95, 0.85, 0.75, 0.65, 0.55)}
GRAIN: Final = 4  # bits by which the totals of banded classes differ
TRANSFORMS: Final = ("plain", "centred", "rotated")  # rotated implies centred
Transform = Literal["plain", "centred", "rotated"]


@dataclass(frozen=True, order=True)
class StorageClass:
    """What a tensor costs; written as a profile writes its plain spec, ``4-g64-asym``, ``2-g128-sym`` or ``16``, and with bands as
    ``3.5-bands``: the bits of a channel in the mean, which add up to 28 over the eight bands.

    >>> str(StorageClass.parse("3.5-bands"))
    '3.5-bands'
    """

    bits: int  # 0 with bands
    symmetric: bool = False
    group_size: int = 0
    total: int = 0  # most bits of all bands together

    @property
    def banded(self) -> bool:
        """Whether the side is stored in bands."""
        return self.total > 0

    def __str__(self) -> str:
        if self.banded:
            return f"{self.total / BANDS:g}-bands"
        return str(self.spec())

    @classmethod
    def parse(cls, text: str) -> StorageClass:
        """The inverse of ``str``.

        Raises:
            UsageError: if the text is not a class.
        """
        banded = re.fullmatch(r"(\d(?:\.\d{1,3})?)-bands", text, re.ASCII)
        with suppress(LayoutError):
            found = cls.of(TensorSpec.parse(text)) if banded is None else cls(0, total=round(float(banded[1]) * BANDS))
            if found.total <= BANDS * MAX_BAND_BITS and str(found) == text:
                return found
        raise UsageError(
            f"{text!r} is not a storage class: write 16, BITS-gGROUP-asym|sym, e.g. 4-g128-asym, or the mean bits of bands, e.g. 3.5-bands"
        )

    @classmethod
    def of(cls, spec: TensorSpec) -> StorageClass:
        """The class of a spec."""
        return cls(spec.bits, spec.symmetric, spec.group_size, sum(spec.bands))

    def spec(self, transform: Transform = "plain", clip: float = 1.0) -> TensorSpec:
        """One variant; for a banded class always the one with the most even bits."""
        if self.bits == 16:
            return TensorSpec()
        if self.banded:
            least, more = divmod(self.total, BANDS)
            return TensorSpec(bits=0, bands=(least + 1,) * more + (least,) * (BANDS - more))
        return TensorSpec(
            self.bits, self.group_size, self.symmetric, transform != "plain", transform == "rotated", clip
        )


RAW_CLASS: Final = StorageClass(16)
Pair = tuple[StorageClass, StorageClass]  # classes of key and value


def pair_name(pair: Pair) -> str:
    """For example ``4-g64-asym/2-g64-sym``."""
    return f"{pair[0]}/{pair[1]}"


def clips(bits: int) -> tuple[float, ...]:
    """Clips that are tried at a width; a width without its own has those of the next narrower one, or else of the narrowest."""
    return _CLIPS[max((width for width in _CLIPS if width <= bits), default=min(_CLIPS))]


def banded_classes() -> list[StorageClass]:
    """Every banded class, dearest first."""
    return [StorageClass(0, total=total) for total in range(BANDS * MAX_BAND_BITS, 0, -GRAIN)]


def storage_classes(
    bits: Sequence[int], group_sizes: Sequence[int], head_dim: int, symmetric: bool = True, bands: bool = False
) -> list[StorageClass]:
    """Every class that the search may choose, dearest first, those with bands last.

    Args:
        bits: subset of BITS.
        group_sizes: channels a group; 0 stands for the whole head.
        head_dim: channels of a head.
        symmetric: whether classes without a stored minimum are included.
        bands: whether banded classes are included, if the head splits into bands.

    Raises:
        UsageError: if a head cannot be stored that way.
    """
    found: list[StorageClass] = []
    for width in sorted(set(bits), reverse=True):
        if width == 16:
            found.append(RAW_CLASS)
            continue
        for group in sorted({size or head_dim for size in group_sizes}):
            for sign in (False, True) if symmetric else (False,):
                candidate = StorageClass(width, sign, group)
                try:
                    candidate.spec().check(head_dim)
                except LayoutError as error:
                    raise UsageError(str(error)) from error
                found.append(candidate)
    return found + (banded_classes() if bands and head_dim % BANDS == 0 else [])
