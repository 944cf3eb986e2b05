"""Storage in a fitted basis, in plain torch: the basis, the codes of its bands, and what they mean.

A side of a layer is ``y = matrix @ (x - mean)``, one matrix a KV head. Calibration fits it so that channels come in the order of what
they are worth, in :data:`~kvtuner_kernels.layout.BANDS` equal bands, and have a mean square of one in each band. What is stored:

1. number: ``y16 = fp16(y)``; the product with the matrix is a sum that hardware adds up in its own order, so that a code may turn
   where ``y`` lies between two codes. From here on everything is bit for bit the same everywhere.
2. scale:  ``fp16(sqrt(mean(y16 ** 2)))`` over the head, the sum in fp64, in which it is exact.
3. code:   ``clamp(floor(y16 / scale / step) + 2 ** (bits - 1), 0, 2 ** bits - 1)``; levels are uniform about zero, with the step that
   is best for a normal distribution of these bits (J. Max, Quantizing for Minimum Distortion, 1960).

The **first token** of a sequence is where attention goes when nothing else fits. Its keys and values depend on nothing but the token, and
from the third layer or so on little on that: they lie close to one point, far from all others. So they are stored about that point
(``first``), in the same codes, and the sign of the scale tells which point a row is about. This keeps what 16 bits for it would
keep, at no bytes (docs/decisions.md).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvtuner_kernels.layout import LayerSpec, LayoutError

FP16_MAX: Final = 65504.0
# Step of the best uniform quantizer of a standard normal variable, by bits.
STEPS: Final = (0.0, 1.5958, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
EXTRA_ROWS: Final = 2  # of a basis tensor: mean, and the first token's mean


class Basis(NamedTuple):
    """One side's basis; H heads of D channels, fp32."""

    matrix: Tensor  # [H, D, D]: y = matrix @ (x - mean)
    inverse: Tensor  # [H, D, D]
    mean: Tensor  # [H, D] of all tokens but the first
    first: Tensor  # [H, D] in the basis: where first tokens lie
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
    """What follows from a basis tensor fp32 [H, D + 2, D], worked out once for each tensor.

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
    scale: Tensor  # fp16 [..., H]; the sign bit marks first tokens


def _by_channel(numbers: list[float], head_dim: int, device: torch.device) -> Tensor:
    """One number a band to one a channel, fp32 [D]."""
    return torch.tensor(numbers, device=device).repeat_interleave(head_dim // len(numbers))


def quantize_bands(y: Tensor, bands: tuple[int, ...], first: Tensor | None = None) -> BandCodes:
    """Codes of fp32 ``y`` [..., H, D] in the basis; first tokens come less their point, and are marked.

    Args:
        first: bool [...], which tokens are the first of their sequence; none if not given.
    """
    head_dim, device = y.shape[-1], y.device
    rounded = y.clamp(-FP16_MAX, FP16_MAX).half().float()
    square = rounded.double().square().sum(-1).float() * (1 / head_dim)
    scale = square.sqrt().half()
    wide = scale.float().unsqueeze(-1)
    inverse = torch.where(wide > 0, 1 / wide, 0)
    per_step = _by_channel([1 / STEPS[b] if b else 0.0 for b in bands], head_dim, device)
    middle = _by_channel([2.0 ** (b - 1) if b else 0.0 for b in bands], head_dim, device)
    top = _by_channel([2.0**b - 1 for b in bands], head_dim, device)
    codes = ((rounded * inverse) * per_step).floor_() + middle
    codes = torch.minimum(codes.clamp_min_(0), top)
    if first is not None:
        scale = torch.where(first.unsqueeze(-1), -scale, scale)
    return BandCodes(codes.to(torch.uint8), scale)


def dequantize_bands(found: BandCodes, bands: tuple[int, ...]) -> Tensor:
    """fp32 [..., H, D] in the basis, first tokens less their point."""
    head_dim, device = found.codes.shape[-1], found.codes.device
    step = _by_channel([STEPS[b] for b in bands], head_dim, device)
    half = _by_channel([(2.0**b - 1) / 2 for b in bands], head_dim, device)
    return (found.codes.float() - half) * step * found.scale.float().abs().unsqueeze(-1)


def is_first(scale: Tensor) -> Tensor:
    """bool, shaped as the scales: whether they are of rows that hold first tokens."""
    return torch.signbit(scale)


def to_basis(x: Tensor, side: Basis, first: Tensor | None = None) -> Tensor:
    """``x`` [..., H, D] in the basis, fp32; first tokens (bool [...]) less their point."""
    y = torch.einsum("hij,...hj->...hi", side.matrix, x.float() - side.mean)
    return y if first is None else torch.where(first[..., None, None], y - side.first, y)


def from_basis(y: Tensor, side: Basis, first: Tensor | None = None) -> Tensor:
    """The inverse of :func:`to_basis`; ``first`` is bool [...] or, by head, [..., H]."""
    if first is not None:
        mask = first if first.dim() == y.dim() - 1 else first.unsqueeze(-1)
        y = torch.where(mask.unsqueeze(-1), y + side.first, y)
    return torch.einsum("hij,...hj->...hi", side.inverse, y) + side.mean


def pack_bands(spec: LayerSpec, key: Tensor | None, value: Tensor | None) -> Tensor:
    """Codes uint8 [N, H, D] of the banded sides that share words to bytes uint8 [N, H, bytes]."""
    given = [(codes, places) for codes, places in zip((key, value), spec.places(), strict=True) if codes is not None]
    tokens, heads, head_dim = given[0][0].shape
    unit = head_dim // len(given[0][1])
    count = 1 + max(place.word for _, places in given for place in places)
    words = torch.zeros(tokens, heads, count, unit, dtype=torch.int32, device=given[0][0].device)
    for codes, places in given:
        for codes_of_band, place in zip(torch.split(codes.int(), unit, -1), places, strict=True):
            words[:, :, place.word] |= codes_of_band << place.start
    return torch.stack((words & 255, words >> 8), -1).to(torch.uint8).flatten(2)


def unpack_bands(packed: Tensor, spec: LayerSpec, side: int, head_dim: int) -> Tensor:
    """Codes uint8 [N, H, D] of keys (``side`` 0) or values (1) from bytes uint8 [N, H, bytes]; inverse of :func:`pack_bands`."""
    places = spec.places()[side]
    unit = head_dim // len(places)
    halves = packed.reshape(*packed.shape[:2], packed.shape[2] // (2 * unit), unit, 2).int()
    words = halves[..., 0] | halves[..., 1] << 8
    return torch.cat([(words[:, :, p.word] >> p.start) & (2**p.bits - 1) for p in places], -1).to(torch.uint8)


def check_basis(joined: Tensor | None, heads: int, head_dim: int) -> None:
    """Raise LayoutError unless ``joined`` is a basis tensor for such heads."""
    shape = (heads, head_dim + EXTRA_ROWS, head_dim)
    if joined is None or joined.shape != shape:
        raise LayoutError(
            f"a banded side needs a basis of {list(shape)}, got {None if joined is None else list(joined.shape)}"
        )
