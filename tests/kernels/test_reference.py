"""The reference arithmetic: lossless packing, bounded error, refusals, attention over rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtuner_kernels.layout import CODE_BITS, RAW, LayerSpec, LayoutError, TensorSpec
from kvtuner_kernels.reference import (
    Centres,
    QuantizationError,
    as_stored,
    attend,
    dequantize,
    pack,
    pack_rows,
    quantize,
    rotate,
    transform,
    unpack,
    unpack_rows,
    unrotate,
)
from tests.kernels.drawn import HALF_ULP, KINDS, TINY, draw_values


@settings(deadline=None, max_examples=200)
@given(
    KINDS,
    st.sampled_from(CODE_BITS),
    st.booleans(),
    st.sampled_from([(64, 32), (64, 64), (96, 96), (128, 128), (80, 80)]),
    st.integers(0, 2**31),
)
def test_the_error_is_half_a_step_plus_rounding(
    kind: str, bits: int, symmetric: bool, shape: tuple[int, int], seed: int
) -> None:
    head_dim, group = shape
    spec = TensorSpec(bits, group, symmetric=symmetric)
    x = draw_values(kind, (3, 2, head_dim), seed)
    quantized = quantize(x, spec)
    error = (dequantize(quantized, spec) - x).abs().unflatten(-1, (-1, group))
    scale = quantized.scale.double().unsqueeze(-1)
    steps = 2**bits - 1
    rounding = steps / 2 * (scale * HALF_ULP + TINY)  # the scale is rounded, so the grid may fall short at both ends
    if quantized.minimum is not None:
        rounding = rounding + quantized.minimum.double().abs().unsqueeze(-1) * HALF_ULP + TINY
    rounding = rounding + x.abs().amax().double() * 2.0**-22  # fp32 arithmetic
    assert (error.double() <= scale / 2 + rounding).all()
    assert int(quantized.codes.max()) <= steps


def test_a_constant_group_is_restored_to_fp16() -> None:
    x = torch.full((1, 1, 64), 0.3)
    assert torch.equal(as_stored(x, TensorSpec(2, 64)), x.half().float())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e5])
def test_what_cannot_be_stored_is_refused(bad: float) -> None:
    x = torch.zeros(2, 1, 64)
    x[1, 0, 7] = bad
    with pytest.raises(QuantizationError) as caught:
        quantize(x, TensorSpec(4, 64))
    assert str(abs(bad)) in str(caught.value)


@given(
    st.sampled_from(CODE_BITS),
    st.integers(1, 5),
    st.sampled_from([(8, 0), (64, 32), (64, 0), (80, 0), (96, 32), (192, 64)]),
    st.integers(0, 2**31),
)
def test_packing_is_lossless(bits: int, tokens: int, shape: tuple[int, int], seed: int) -> None:
    head_dim, segment = shape
    codes = torch.randint(
        0, 2**bits, (tokens, head_dim), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = pack(codes, bits, segment)
    assert packed.shape == (tokens, head_dim * bits // 8)
    assert torch.equal(unpack(packed, bits, segment), codes)


def test_planes_are_where_the_layout_says() -> None:
    codes = torch.arange(8, dtype=torch.uint8)
    assert pack(codes, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert pack(codes, 4).tolist() == [0 | 2 << 4, 4 | 6 << 4, 1 | 3 << 4, 5 | 7 << 4]
    assert pack(codes & 3, 2).tolist() == [0b11_10_01_00, 0b11_10_01_00]
    assert pack(codes, 4, segment=4).tolist() == [0 | 1 << 4, 2 | 3 << 4, 4 | 5 << 4, 6 | 7 << 4]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_rotation_inverts_and_keeps_dot_products(head_dim: int) -> None:
    key, query = torch.randn(2, 5, head_dim, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(unrotate(rotate(key)), key, atol=1e-5)
    assert torch.allclose((unrotate(query) * rotate(key)).sum(-1), (query * key).sum(-1), atol=1e-4)


def test_clipping_narrows_the_grid_about_its_middle() -> None:
    x = torch.linspace(-1, 3, 64).view(1, 1, 64)
    full, clipped = (quantize(x, TensorSpec(4, 64, clip=clip)) for clip in (1.0, 0.5))
    assert clipped.scale.item() == pytest.approx(full.scale.item() / 2, rel=1e-3)
    assert clipped.minimum is not None
    assert clipped.minimum.item() == pytest.approx(0.0, abs=2e-3)
    assert clipped.codes.min() == 0
    assert clipped.codes.max() == 15


SIDES = [
    RAW,
    TensorSpec(8, 32),
    TensorSpec(4, 64, centred=True),
    TensorSpec(4, 64, symmetric=True, rotated=True),
    TensorSpec(2, 64, False, True, True, 0.75),
]


@pytest.mark.parametrize("key_spec", SIDES, ids=str)
@pytest.mark.parametrize("value_spec", SIDES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_hold_exactly_what_was_quantized(key_spec: TensorSpec, value_spec: TensorSpec, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(7, 3, 64, generator=generator).to(dtype) for _ in range(2))
    centres = Centres(
        *(torch.randn(3, 64, generator=generator) if side.centred else None for side in (key_spec, value_spec))
    )
    spec = LayerSpec(key_spec, value_spec)
    rows = pack_rows(key, value, spec, centres)
    assert rows.shape == (7, spec.bytes_per_token(3, 64))
    got = unpack_rows(rows, spec, 3, 64, centres, dtype)
    for x, side, centre, back in ((key, key_spec, centres.key, got[0]), (value, value_spec, centres.value, got[1])):
        expected = x if side.raw else dequantize(quantize(x, side, centre), side, centre)
        assert torch.equal(back, expected)


def test_attention_over_rows_is_attention_over_what_they_hold() -> None:
    generator = torch.Generator().manual_seed(2)
    key, value = torch.randn(2, 11, 2, 64, generator=generator)
    query = torch.randn(4, 6, 64, generator=generator)
    centre = key.mean(0) * 3
    spec = LayerSpec(TensorSpec(4, 64, centred=True, rotated=True), TensorSpec(8, 32))
    centres = Centres(key=centre)
    stored_key = as_stored(key, spec.key, centre)
    stored_value = as_stored(value, spec.value)
    mask = torch.ones(4, 11, dtype=torch.bool).tril(7)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        stored_key.transpose(0, 1)[None],
        stored_value.transpose(0, 1)[None],
        attn_mask=mask,
        enable_gqa=True,
    )[0].transpose(0, 1)
    got = attend(query, pack_rows(key, value, spec, centres), spec, 2, centres)
    assert torch.allclose(got, expected, atol=1e-5)


def test_centring_is_invisible_to_attention_but_not_to_the_error() -> None:
    generator = torch.Generator().manual_seed(3)
    key, value = torch.randn(2, 64, 1, 64, generator=generator).half()
    key[:, 0, :4] += 200.0  # an outlier that all keys share, as in Qwen2.5's first layer
    query = torch.randn(64, 1, 64, generator=generator).half()
    exact = attend(query, pack_rows(key, value, LayerSpec(), Centres()), LayerSpec(), 1)
    errors = {}
    for centred in (False, True):
        spec = LayerSpec(TensorSpec(4, 64, centred=centred))
        centres = Centres(key=key.float().mean(0) if centred else None)
        errors[centred] = (
            attend(query, pack_rows(key, value, spec, centres), spec, 1, centres) - exact
        ).norm() / exact.norm()
    assert errors[True] < 0.2 * errors[False]


def test_window_and_soft_cap() -> None:
    generator = torch.Generator().manual_seed(4)
    key, value = torch.randn(2, 9, 1, 64, generator=generator).half()
    query = torch.randn(1, 1, 64, generator=generator).half() * 3
    spec = LayerSpec()
    windowed = attend(query, pack_rows(key, value, spec), spec, 1, window=4)
    assert torch.allclose(windowed, attend(query, pack_rows(key[-4:], value[-4:], spec), spec, 1), atol=1e-6)
    scores = (query[0].float() @ key[:, 0].float().T) / 8
    capped = (2 * torch.tanh(scores / 2)).softmax(-1) @ value[:, 0].float()
    assert torch.allclose(attend(query, pack_rows(key, value, spec), spec, 1, soft_cap=2.0)[0], capped, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "centre"),
    [
        (TensorSpec(4, 64), torch.zeros(2, 64)),
        (TensorSpec(4, 64, centred=True), None),
        (TensorSpec(4, 64, centred=True), torch.zeros(1, 64)),
    ],
)
def test_a_centre_is_given_exactly_when_the_spec_asks(spec: TensorSpec, centre: torch.Tensor | None) -> None:
    with pytest.raises(LayoutError):
        transform(torch.zeros(3, 2, 64), spec, centre)


def test_full_precision_has_no_16_bit_row() -> None:
    with pytest.raises(LayoutError, match="float32"):
        pack_rows(torch.zeros(1, 1, 64), torch.zeros(1, 1, 64), LayerSpec())
