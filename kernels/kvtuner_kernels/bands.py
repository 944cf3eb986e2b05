"""Storage in a fitted basis, in plain torch: the basis, the codes of its bands, and their meaning.

A side of a layer is ``y = matrix @ (x - mean)``, one matrix per KV head. Calibration fits it so that channels are ordered by
worth, in :data:`~kvtuner_kernels.places.BANDS` equal bands, and have a mean square of one in each band. Stored are:

1. number: ``y16 = fp16(y)``; the product with the matrix is a sum that hardware adds up in its own order, so a code may change
   where ``y`` lies between two codes. Everything after that is bit-identical everywhere.
2. scale:  a power of ``2 ** (1 / 4)``, its exponent in 7 bits. The one next to the root mean square of ``y16`` over the head, one below and
   two above it are tried; the one whose errors, each in steps of its band, have the smallest sum of squares is taken. This is computed in
   integers and costs nothing to read: 5 to 15% less error than the root mean square itself in 16 bits (docs/log.md).
3. code:   ``clamp(floor(y16 / scale / step) + 2 ** (bits - 1), 0, 2 ** bits - 1)``; levels are uniform about zero, with the step that
   is best for a normal distribution of these bits (J. Max, Quantizing for Minimum Distortion, 1960).

The **first token** of a sequence is the attention sink. Its keys and values depend only on the token, and from about the third layer
on hardly even on that: they lie close to one point, far from all others. So they are stored relative to that point
(``first``), in the same codes, and the top bit of the scale's byte marks the row. This preserves them as well as 16 bits would,
without extra bytes (docs/decisions.md).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_kernels.places import BANDS, SCALE_BITS

FP16_MAX: Final = 65504.0
# Step of the best uniform quantizer of a standard normal variable, by bits.
STEPS: Final = (0.0, 1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
SCALES_AN_OCTAVE: Final = 4
SCALE_MIDDLE: Final = 64  # the number of the scale 1, of 128
FIRST_MARK: Final = 128  # of a scale's byte
# Scales that are tried, as distances of their numbers from the nearest's, the likeliest first; what numbers in steps of the nearest are in
# theirs, and what squared errors in their steps weigh.
TRIED: Final = (0, -1, 1, 2)
RATIOS: Final = tuple(2.0 ** (-by / SCALES_AN_OCTAVE) for by in TRIED)
WEIGHTS: Final = tuple(2.0 ** (2 * by / SCALES_AN_OCTAVE) for by in TRIED)
NOT_FINITE: Final = 127  # the scale number of a head that cannot be stored, if it is not refused: it reads back as NaN
ENDS: Final = (1, 124)  # limits of the nearest's number, so that all tried scales exist
# Mantissas, 23 bits, from which on a mean square is nearer to the next scale's square, and to the one after that.
THRESHOLDS: Final = tuple(round((2 ** (k / SCALES_AN_OCTAVE) - 1) * 2**23) for k in (1, 3))
ROOTS: Final = tuple(2 ** (k / SCALES_AN_OCTAVE) for k in range(SCALES_AN_OCTAVE))
FINE: Final = 64  # parts of a step in which errors are counted
FARTHEST: Final = 45 * FINE  # the greatest error: 256 squares of it fit in 32 bits
EXTRA_ROWS: Final = 2  # of a basis tensor: mean, and the first token's mean


class Basis(NamedTuple):
    """One side's basis; H heads of D channels, fp32."""

    matrix: Tensor  # [H, D, D]: y = matrix @ (x - mean)
    inverse: Tensor  # [H, D, D]
    mean: Tensor  # [H, D] of all tokens but the first
    first: Tensor  # [H, D] in the basis: the point of first tokens
    dual: Tensor  # [H, D, D], the inverse transposed: q . x == (dual @ q) . (matrix @ x)


class BasisError(ValueError):
    """A basis tensor that cannot be used; the message has the reason."""


def join_basis(matrix: Tensor, mean: Tensor, first_mean: Tensor) -> Tensor:
    """The tensor that a transforms file holds, fp32 [H, D + 2, D]: the matrix, the mean, and the mean of first tokens.

    Raises:
        BasisError: if it cannot be inverted, or is not finite.
    """
    joined = torch.cat([matrix, mean.unsqueeze(1), first_mean.unsqueeze(1)], dim=1).float().contiguous()
    basis(joined)
    return joined


_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def basis(joined: Tensor) -> Basis:
    """The matrices and points of a basis tensor fp32 [H, D + 2, D], computed once for each tensor.

    Raises:
        BasisError: if it has another shape, cannot be inverted, or is not finite.
    """
    known: Basis | None = _KNOWN.get(joined)  # type: ignore[no-untyped-call]
    if known is not None:
        return known
    if joined.dim() != 3 or joined.shape[1] != joined.shape[2] + EXTRA_ROWS or joined.dtype != torch.float32:
        raise BasisError(f"a basis is float32 [heads, D + {EXTRA_ROWS}, D], not {joined.dtype} {list(joined.shape)}")
    exact = joined.detach().cpu().double()
    if not exact.isfinite().all():
        raise BasisError("the basis has a number that is not finite")
    matrix, mean, first_mean = exact[:, :-2], exact[:, -2], exact[:, -1]
    inverse, info = torch.linalg.inv_ex(matrix)
    error = (matrix @ inverse - torch.eye(matrix.shape[-1], dtype=torch.float64)).abs().amax()
    if bool(info.any()) or not error < 1e-6:
        raise BasisError(f"the basis cannot be inverted (error {float(error):.1e})")
    first = torch.einsum("hij,hj->hi", matrix, first_mean - mean)
    found = Basis(*(t.float().contiguous().to(joined.device) for t in (matrix, inverse, mean, first, inverse.mT)))
    _KNOWN[joined] = found
    return found


class BandCodes(NamedTuple):
    """Codes and scale of a banded side."""

    codes: Tensor  # uint8 [..., H, D], each below 2 ** the bits of its band
    scale: Tensor  # uint8 [..., H]: the scale's number; the top bit marks first tokens


def _by_channel(numbers: list[float], head_dim: int, device: torch.device) -> Tensor:
    """One number a band to one a channel, fp32 [D]."""
    return torch.tensor(numbers, device=device).repeat_interleave(head_dim // len(numbers))


def quantize_bands(y: Tensor, bands: tuple[int, ...], first: Tensor | None = None) -> BandCodes:
    """Codes of fp32 ``y`` [..., H, D] in the basis; first tokens come relative to their point, and are marked.

    Args:
        first: bool [...], which tokens are the first of their sequence; none if not given.
    """
    head_dim, device = y.shape[-1], y.device
    rounded = y.clamp(-FP16_MAX, FP16_MAX).half().float()
    nearest = scale_number(rounded.double().square().sum(-1).float() * (1 / head_dim)).clamp_(*ENDS)
    per_step = _by_channel([1 / STEPS[b] if b else 0.0 for b in bands], head_dim, device)
    middle = _by_channel([2.0 ** (b - 1) if b else 0.0 for b in bands], head_dim, device)
    highest = _by_channel([2.0 ** (b - 1) - 1 if b else 0.0 for b in bands], head_dim, device)
    centre = _by_channel([float(FINE // 2 * (b > 0)) for b in bands], head_dim, device)
    steps = (rounded * _quarters(SCALE_MIDDLE - nearest).unsqueeze(-1)).mul_(per_step)  # at the nearest scale

    costs = []
    for ratio, weight in zip(RATIOS, WEIGHTS, strict=True):
        these = steps * ratio
        level = torch.clamp(these.floor(), -middle, highest)
        wrong = (
            these.mul_(FINE).floor_().sub_(level, alpha=FINE).sub_(centre).clamp_(-FARTHEST, FARTHEST)
        )  # integers, all exact
        costs.append(wrong.square_().sum(-1, dtype=torch.float64).float() * weight)
    best = torch.stack(costs).argmin(0)
    number = nearest + torch.tensor(TRIED, dtype=torch.int32, device=device)[best]
    steps.mul_(torch.tensor(RATIOS, device=device)[best].unsqueeze(-1))
    codes = torch.clamp(steps.floor_(), -middle, highest).add_(middle)
    if first is not None:
        number = number + first.unsqueeze(-1) * FIRST_MARK
    return BandCodes(codes.to(torch.uint8), number.to(torch.uint8))


def scale_number(mean_square: Tensor) -> Tensor:
    """Number of the scale next to the root of fp32 ``mean_square``, int32 of its shape."""
    bits = mean_square.contiguous().view(torch.int32)
    mantissa = bits & (2**23 - 1)
    above = (mantissa >= THRESHOLDS[0]).int() + (mantissa >= THRESHOLDS[1]).int()
    return ((bits >> 23) - 127) * (SCALES_AN_OCTAVE // 2) + SCALE_MIDDLE + above


def _quarters(power: Tensor) -> Tensor:
    """fp32 ``2 ** (power / 4)`` of int32 ``power``: a root in fp32, times a power of two."""
    octave = torch.div(power, SCALES_AN_OCTAVE, rounding_mode="floor")
    roots = torch.tensor(ROOTS, device=power.device)
    return torch.ldexp(roots[(power - octave * SCALES_AN_OCTAVE).long()], octave)


def scale_values(stored: Tensor) -> Tensor:
    """fp32 scales of stored bytes, uint8 or int32 of any shape."""
    number = stored.int() & (FIRST_MARK - 1)
    return torch.where(number == NOT_FINITE, torch.nan, _quarters(number - SCALE_MIDDLE))


def dequantize_bands(found: BandCodes, bands: tuple[int, ...]) -> Tensor:
    """fp32 [..., H, D] in the basis, first tokens relative to their point."""
    head_dim, device = found.codes.shape[-1], found.codes.device
    step = _by_channel([STEPS[b] for b in bands], head_dim, device)
    half = _by_channel([(2.0**b - 1) / 2 for b in bands], head_dim, device)
    scale = scale_values(found.scale)
    return (found.codes.float() - half) * step * scale.unsqueeze(-1)


def is_first(scale: Tensor) -> Tensor:
    """bool, shaped as the scales: whether their rows hold first tokens."""
    return scale >= FIRST_MARK


def to_basis(x: Tensor, side: Basis, first: Tensor | None = None) -> Tensor:
    """``x`` [..., H, D] in the basis, fp32; first tokens (bool [...]) relative to their point."""
    y = torch.einsum("hij,...hj->...hi", side.matrix, x.float() - side.mean)
    return y if first is None else torch.where(first[..., None, None], y - side.first, y)


def from_basis(y: Tensor, side: Basis, first: Tensor | None = None) -> Tensor:
    """The inverse of :func:`to_basis`; ``first`` is bool [...] or, by head, [..., H]."""
    if first is not None:
        mask = first if first.dim() == y.dim() - 1 else first.unsqueeze(-1)
        y = torch.where(mask.unsqueeze(-1), y + side.first, y)
    return torch.einsum("hij,...hj->...hi", side.inverse, y) + side.mean


def pack_bands(spec: LayerSpec, head_dim: int, key: BandCodes | None, value: BandCodes | None) -> Tensor:
    """The banded sides that share words, [N, H, D] each, to bytes uint8 [N, H, bytes]."""
    sides = zip((key, value), spec.places(head_dim), spec.digits(head_dim), strict=True)
    given = [(found, places, digits) for found, places, digits in sides if found is not None]
    shape, device = given[0][0].scale.shape, given[0][0].scale.device
    unit = head_dim // BANDS
    count = 1 + max(place.word for _, places, _ in given for place in places)
    words = torch.zeros(*shape, count, unit, dtype=torch.int32, device=device)
    for found, places, digits in given:
        for codes, place in zip(torch.split(found.codes.int(), unit, -1), places, strict=True):
            words[:, :, place.word] |= codes << place.start
        assert digits is not None  # as of every banded side
        shifts = torch.arange(0, SCALE_BITS, digits.bits, device=device)
        digit = (found.scale.int().unsqueeze(-1) >> shifts) & (2**digits.bits - 1)
        words[:, :, 0, digits.word : digits.word + len(shifts)] |= digit.int() << digits.start
    return torch.stack((words & 255, words >> 8), -1).to(torch.uint8).flatten(2)


def unpack_bands(packed: Tensor, spec: LayerSpec, side: int, head_dim: int) -> BandCodes:
    """Codes and scales of keys (``side`` 0) or values (1) from bytes uint8 [N, H, bytes]; inverse of :func:`pack_bands`."""
    places, digits = spec.places(head_dim)[side], spec.digits(head_dim)[side]
    assert digits is not None  # as of every banded side
    unit = head_dim // BANDS
    halves = packed.reshape(*packed.shape[:2], packed.shape[2] // (2 * unit), unit, 2).int()
    words = halves[..., 0] | halves[..., 1] << 8
    codes = torch.cat([(words[:, :, p.word] >> p.start) & (2**p.bits - 1) for p in places], -1).to(torch.uint8)
    shifts = torch.arange(0, SCALE_BITS, digits.bits, device=packed.device)
    digit = (words[:, :, 0, digits.word : digits.word + len(shifts)] >> digits.start) & (2**digits.bits - 1)
    return BandCodes(codes, (digit << shifts).sum(-1).to(torch.uint8))


def check_basis(joined: Tensor | None, heads: int, head_dim: int) -> None:
    """Raise LayoutError unless ``joined`` is a basis tensor for such heads."""
    shape = (heads, head_dim + EXTRA_ROWS, head_dim)
    if joined is None or joined.shape != shape:
        raise LayoutError(
            f"a banded side needs a basis of {list(shape)}, got {None if joined is None else list(joined.shape)}"
        )
