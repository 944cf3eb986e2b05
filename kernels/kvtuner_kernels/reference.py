"""The reference in plain torch: transform, quantize, pack, unpack, dequantize and attend. Also the CPU path.

Every step up to the codes is a fixed sequence of fp32 operations without a product that feeds a sum inexactly, so that a
kernel with or without fused multiply-add produces the same codes, scales and minima, bit for bit:

1. centre:  ``x - centre``
2. rotate:  Walsh-Hadamard butterflies with spans 1, 2, 4, ..., then a power of two
3. grid:    ``scale = fp16((hi - lo) * (clip / n))`` with ``n = 2**bits - 1``;
            ``minimum = fp16((lo + hi) / 2 - scale * n / 2)`` (the product is exact: 11 bits times 8 bits)
4. code:    ``clamp(rint((x - minimum) * (1 / scale)), 0, n)``, ties to even

A symmetric spec has ``scale = fp16(max|x| * (2 * clip / n))`` and the unrounded minimum ``-scale * n / 2``, so no code is wasted
and zero is not on the grid. A group of equal values has scale 0 and is restored to fp16 precision from its minimum.

A banded side uses another grid: :mod:`kvtuner_kernels.bands`.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from kvtuner_kernels.bands import (
    FP16_MAX,
    NOT_FINITE,
    BandCodes,
    basis,
    check_basis,
    dequantize_bands,
    from_basis,
    is_first,
    pack_bands,
    quantize_bands,
    to_basis,
    unpack_bands,
)
from kvtuner_kernels.layout import LayerSpec, LayoutError, TensorSpec
from kvtuner_kernels.sinks import check_sinks


class QuantizationError(ValueError):
    """A tensor holds a value that cannot be stored."""


class Quantized(NamedTuple):
    """Codes and grid of one tensor; D channels a head, G groups a head."""

    codes: Tensor  # uint8 [..., D], each below 2**bits
    scale: Tensor  # fp16 [..., G]
    minimum: Tensor | None  # fp16 [..., G]; None for a symmetric spec


def _split(x: Tensor, *sizes: int) -> Tensor:
    """[..., n] to [..., n / product(sizes), *sizes]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // math.prod(sizes), *sizes)


def rotation_block(head_dim: int) -> int:
    """Width of the Hadamard blocks: the largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


def _butterflies(x: Tensor) -> Tensor:
    block = rotation_block(x.shape[-1])
    span = 1
    while span < block:
        left, right = _split(x, 2, span).unbind(-2)
        x = torch.stack((left + right, left - right), dim=-2).flatten(-3)
        span *= 2
    return x


def rotate(x: Tensor) -> Tensor:
    """Unnormalised Hadamard transform of fp32 [..., D] in blocks, times ``2**-ceil(log2(block) / 2)`` (exact)."""
    order = rotation_block(x.shape[-1]).bit_length() - 1
    return _butterflies(x) * 2.0 ** -math.ceil(order / 2)


def unrotate(x: Tensor) -> Tensor:
    """Inverse of :func:`rotate`. Apply it to queries too: ``q.k == unrotate(q).rotate(k)`` up to rounding."""
    order = rotation_block(x.shape[-1]).bit_length() - 1
    return _butterflies(x) * 2.0 ** -math.floor(order / 2)


def quantize(x: Tensor, spec: TensorSpec, centre: Tensor | None = None, *, check: bool = True) -> Quantized:
    """Quantize keys or values.

    Args:
        x: [..., H, D], floating point.
        spec: bits below 16, groups along D.
        centre: fp32 [H, D]; given exactly when ``spec.centred``.
        check: check for NaN, infinity and values beyond fp16 (a pass over the data).

    Raises:
        QuantizationError: if ``check`` finds a value that cannot be stored.
        LayoutError: if D does not split into the spec's groups, or the centre is missing, superfluous or misshapen.
    """
    x = transform(x, spec, centre)
    _check_peak(x, check)
    groups = _split(x, spec.group_size)
    top = 2**spec.bits - 1
    if spec.symmetric:
        scale = (groups.abs().amax(-1) * (2 * spec.clip / top)).to(torch.float16)
        minimum = None
        offset = scale.float() * (-top / 2)
    else:
        low, high = groups.aminmax(dim=-1)
        scale = ((high - low) * (spec.clip / top)).to(torch.float16)
        minimum = ((low + high) * 0.5 - scale.float() * (top / 2)).to(torch.float16)
        offset = minimum.float()
    wide = scale.float()
    inverse = torch.where(wide > 0, 1 / wide, 0)
    codes = ((groups - offset.unsqueeze(-1)) * inverse.unsqueeze(-1)).round_().clamp_(0, top)
    return Quantized(codes.flatten(-2).to(torch.uint8), scale, minimum)


def _check_peak(x: Tensor, check: bool) -> None:
    if check:
        peak = x.abs().amax().item() if x.numel() else 0.0
        if not peak <= FP16_MAX:  # NaN compares false
            raise QuantizationError(
                f"the tensor holds {peak} where at most {FP16_MAX} can be stored: look for NaN or overflow in the model,"
                " or store this tensor with 16 bits"
            )


def transform(x: Tensor, spec: TensorSpec, centre: Tensor | None) -> Tensor:
    """``x`` [..., H, D] as fp32, centred and rotated as the spec says, before quantization.

    Raises:
        LayoutError: as for :func:`quantize`.
    """
    spec.check(x.shape[-1])
    _check_centre(spec, centre, x.shape[-2:])
    x = x.float()
    if centre is not None:
        x = x - centre
    return rotate(x) if spec.rotated else x


def untransform(x: Tensor, spec: TensorSpec, centre: Tensor | None) -> Tensor:
    """Inverse of :func:`transform`, fp32 [..., H, D]."""
    _check_centre(spec, centre, x.shape[-2:])
    x = unrotate(x) if spec.rotated else x
    return x if centre is None else x + centre


def _check_centre(spec: TensorSpec, centre: Tensor | None, shape: torch.Size) -> None:
    if spec.centred != (centre is not None):
        raise LayoutError(f"spec {spec} needs {'a' if spec.centred else 'no'} centring vector")
    if centre is not None and (centre.shape != shape or centre.dtype != torch.float32):
        raise LayoutError(f"the centring vector is {centre.dtype} {list(centre.shape)}, expected float32 {list(shape)}")


def dequantize(quantized: Quantized, spec: TensorSpec, centre: Tensor | None = None) -> Tensor:
    """fp32 [..., H, D] in the model's own basis; the error is at most ``scale / 2`` a channel if nothing was clipped."""
    return untransform(on_grid(quantized, spec), spec, centre)


def on_grid(quantized: Quantized, spec: TensorSpec) -> Tensor:
    """fp32 [..., D]: ``code * scale + minimum`` (one rounding), still centred and rotated."""
    scale = quantized.scale.float().unsqueeze(-1)
    top = 2**spec.bits - 1
    offset = scale * (-top / 2) if quantized.minimum is None else quantized.minimum.float().unsqueeze(-1)
    return (_split(quantized.codes, spec.group_size).float() * scale + offset).flatten(-2)


def as_stored(
    x: Tensor, spec: TensorSpec, centre: Tensor | None = None, *, check: bool = False, first: Tensor | None = None
) -> Tensor:
    """``x`` [..., H, D] as attention reads it back from the cache, in ``x``'s dtype.

    Args:
        first: bool [...], which tokens are the first of their sequence (used by banded specs only).
    """
    if spec.raw:
        return x
    if spec.banded:
        check_basis(centre, *x.shape[-2:])
        assert centre is not None  # as just checked
        side = basis(centre)
        y = to_basis(x, side, first)
        _check_peak(y, check)
        return from_basis(dequantize_bands(quantize_bands(y, spec.bands), spec.bands), side, first).to(x.dtype)
    return dequantize(quantize(x, spec, centre, check=check), spec, centre).to(x.dtype)


def pack(codes: Tensor, bits: int, segment: int = 0) -> Tensor:
    """uint8 codes [..., D] to uint8 bytes [..., D * bits / 8], in planes of 16-bit words (see kvtuner_kernels.layout).

    ``segment`` is the number of channels that are packed together, ``TensorSpec.segment(D)``; 0 is all of them.
    """
    words = (segment or codes.shape[-1]) * bits // 16
    planes = _split(codes, 2, 8 // bits, words)  # the low byte of each word, then the high byte
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device).unsqueeze(-1)
    return (planes << shifts).sum(-2, dtype=torch.uint8).transpose(-1, -2).flatten(-3)


def unpack(packed: Tensor, bits: int, segment: int = 0) -> Tensor:
    """Inverse of :func:`pack`."""
    halves = _split(packed, (segment or packed.shape[-1] * 8 // bits) * bits // 16, 2)  # [..., segments, words, 2]
    planes = [(halves >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(planes, dim=-1).movedim(-3, -1).flatten(-4)


class Centres(NamedTuple):
    """One layer's tensors of the transforms file; None for a side that is neither centred nor banded.

    A centring vector is fp32 [H, D], a basis fp32 [H, D + 2, D] (:func:`kvtuner_kernels.bands.basis`).
    """

    key: Tensor | None = None
    value: Tensor | None = None


NO_CENTRES: Final = Centres()


def pack_rows(
    key: Tensor,
    value: Tensor,
    spec: LayerSpec,
    centres: Centres = NO_CENTRES,
    first: Tensor | None = None,
    *,
    refuse: bool = True,
) -> Tensor:
    """Keys and values [N, H, D] of N tokens to uint8 rows [N, row bytes].

    Args:
        first: bool [N], which tokens are the first of their sequence; none if not given. Only banded specs use it.
        refuse: raise for a token that cannot be stored. Otherwise its row reads back as NaN in at least one of key and value, and all other
            rows are unaffected.

    Raises:
        QuantizationError: if ``refuse``, as for :func:`quantize`.
        LayoutError: as for :func:`quantize`.
    """
    try:
        return _pack_rows(key, value, spec, centres, first)
    except QuantizationError:
        if refuse:
            raise
    bad = ~(key.isfinite().flatten(1).all(1) & value.isfinite().flatten(1).all(1))
    for token in (~bad).nonzero().flatten().tolist():  # finite, but perhaps too large once centred and rotated
        one = slice(token, token + 1)
        try:
            _pack_rows(key[one], value[one], spec, centres, None if first is None else first[one])
        except QuantizationError:
            bad[token] = True
    key, value = (side.masked_fill(bad[:, None, None], 0) for side in (key, value))
    rows = _pack_rows(key, value, spec, centres, first, bad)
    row, (_, heads, head_dim) = spec.row(*key.shape[1:]), key.shape
    for side, at in ((spec.key, row.key_metadata), (spec.value, row.value_metadata)):
        if not (side.raw or side.banded):
            metadata = rows[bad, at : at + heads * side.metadata_bytes(head_dim)].view(torch.float16)
            rows[bad, at : at + heads * side.metadata_bytes(head_dim)] = metadata.fill_(math.nan).view(torch.uint8)
    return rows


def _pack_rows(
    key: Tensor, value: Tensor, spec: LayerSpec, centres: Centres, first: Tensor | None, bad: Tensor | None = None
) -> Tensor:
    """:func:`pack_rows`; scales of banded sides mark the tokens ``bad`` as not finite."""
    tokens, heads, head_dim = key.shape
    row = spec.row(heads, head_dim)
    rows = torch.zeros(tokens, row.nbytes, dtype=torch.uint8, device=key.device)
    banded: list[BandCodes | None] = []
    for x, side, centre, codes_at, metadata_at in (
        (key, spec.key, centres.key, row.key_codes, row.key_metadata),
        (value, spec.value, centres.value, row.value_codes, row.value_metadata),
    ):
        banded.append(None)
        if side.raw:
            if x.element_size() != 2:
                raise LayoutError(f"{x.dtype} cannot be stored raw in 16 bits: convert it to bfloat16 or float16 first")
            codes = x.contiguous().view(torch.uint8).flatten(1)
        elif side.banded:
            check_basis(centre, heads, head_dim)
            assert centre is not None  # as just checked
            y = to_basis(x, basis(centre), first)
            _check_peak(y, True)
            found = quantize_bands(y, side.bands, first)
            scale = found.scale if bad is None else found.scale.masked_fill(bad[:, None], NOT_FINITE)
            banded[-1] = BandCodes(found.codes, scale)
            continue
        else:
            quantized = quantize(x, side, centre)
            codes = pack(quantized.codes, side.bits, side.segment(head_dim)).flatten(1)
            grid = quantized.scale.unsqueeze(-1)
            if quantized.minimum is not None:
                grid = torch.stack((quantized.scale, quantized.minimum), dim=-1)
            metadata = grid.flatten(1).contiguous().view(torch.uint8)
            rows[:, metadata_at : metadata_at + metadata.shape[1]] = metadata
        rows[:, codes_at : codes_at + codes.shape[1]] = codes
    for at, pair in (
        [(0, tuple(banded))]
        if spec.shares_words
        else [(row.key_codes, (banded[0], None)), (row.value_codes, (None, banded[1]))]
    ):
        if any(side is not None for side in pair):
            packed = pack_bands(spec, head_dim, *pair).flatten(1)
            rows[:, at : at + packed.shape[1]] = packed
    return rows


def unpack_rows(
    rows: Tensor,
    spec: LayerSpec,
    heads: int,
    head_dim: int,
    centres: Centres = NO_CENTRES,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Rows [N, row bytes] back to keys and values, [N, H, D] each, in the model's own basis.

    Quantized sides come back as fp32; a 16-bit side comes back in ``dtype``, which must be the dtype that was stored.
    """
    row = spec.row(heads, head_dim)
    sides: list[Tensor] = []
    for side, centre, codes_at, nbytes, metadata_at in (
        (spec.key, centres.key, row.key_codes, row.key_head, row.key_metadata),
        (spec.value, centres.value, row.value_codes, row.value_head, row.value_metadata),
    ):
        codes = rows[:, codes_at : codes_at + heads * nbytes].reshape(len(rows), heads, nbytes)
        if side.raw:
            sides.append(codes.contiguous().view(dtype))
            continue
        if side.banded:
            check_basis(centre, heads, head_dim)
            assert centre is not None  # as just checked
            found = unpack_bands(codes, spec, len(sides), head_dim)
            sides.append(from_basis(dequantize_bands(found, side.bands), basis(centre), is_first(found.scale)))
            continue
        metadata = (
            rows[:, metadata_at : metadata_at + heads * side.metadata_bytes(head_dim)].contiguous().view(torch.float16)
        )
        grid = metadata.view(len(rows), heads, side.groups(head_dim), 1 if side.symmetric else 2)
        minimum = None if side.symmetric else grid[..., 1]
        plain = unpack(codes, side.bits, side.segment(head_dim))
        sides.append(dequantize(Quantized(plain, grid[..., 0], minimum), side, centre))
    return sides[0], sides[1]


def attend(
    query: Tensor,
    rows: Tensor,
    spec: LayerSpec,
    heads: int,
    centres: Centres = NO_CENTRES,
    *,
    softmax_scale: float | None = None,
    soft_cap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Causal attention of the last T tokens over all S packed rows, in fp32.

    Example::

        attend(query, pack_rows(key, value, spec), spec, heads=8, window=128, sinks=layer.sinks)  # a sliding layer of gpt-oss

    Args:
        query: [T, Hq, D], floating point, after rotary embedding. Query ``t`` sees rows
            up to ``S - T + t``, itself included.
        rows: uint8 [S, row bytes], S >= T.
        spec: how the rows are stored.
        heads: KV heads H; Hq is a multiple of H and query head ``h`` reads KV head ``h // (Hq // H)``.
        centres: the layer's tensors of the transforms file.
        softmax_scale: factor of the scores; ``D ** -0.5`` if not given.
        soft_cap: scores become ``cap * tanh(score / cap)``; 0 is off.
        window: number of latest rows that a query sees, itself included; 0 is all.
        sinks: attention sinks (gpt-oss), [Hq] as in :func:`kvtuner_kernels.sinks.check_sinks`; None is none.
        dtype: dtype of 16-bit sides; the query's if not given.

    Returns:
        fp32 [T, Hq, D].

    Raises:
        LayoutError: for sinks of another shape.
    """
    tokens, query_heads, head_dim = query.shape
    sinks = check_sinks(sinks, query_heads)
    key, value = (side.float() for side in unpack_rows(rows, spec, heads, head_dim, centres, dtype or query.dtype))
    folded = query.float().reshape(tokens, heads, query_heads // heads, head_dim)
    scores = torch.einsum("thgd,shd->hgts", folded, key) * (head_dim**-0.5 if softmax_scale is None else softmax_scale)
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    last = torch.arange(rows.shape[0] - tokens, rows.shape[0], device=rows.device).unsqueeze(1)
    column = torch.arange(rows.shape[0], device=rows.device)
    visible = column <= last
    if window:
        visible &= column > last - window
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        logits = sinks.to(scores.device).reshape(*scores.shape[:2], 1, 1).expand(*scores.shape[:-1], 1)
        probabilities = torch.cat((scores, logits), -1).softmax(-1)[..., :-1]
    else:
        probabilities = scores.softmax(-1)
    return torch.einsum("hgts,shd->thgd", probabilities, value).flatten(1, 2)
