"""Storage in a fitted basis: lossless packing, bounded error, first tokens, rows and attention over them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtuner_kernels.bands import (
    STEPS,
    BandCodes,
    BasisError,
    basis,
    dequantize_bands,
    from_basis,
    is_first,
    join_basis,
    pack_bands,
    quantize_bands,
    scale_number,
    scale_values,
    to_basis,
    unpack_bands,
)
from kvtuner_kernels.layout import RAW, LayerSpec, LayoutError, TensorSpec
from kvtuner_kernels.places import BANDS
from kvtuner_kernels.reference import (
    Centres,
    QuantizationError,
    as_stored,
    attend,
    dequantize,
    pack_rows,
    quantize,
    unpack_rows,
)
from tests.kernels.drawn import HALF_ULP, KINDS, TINY, draw_values
from tests.kernels.fitted import made_up

BITS_OF_BANDS = st.lists(st.integers(0, 8), min_size=BANDS, max_size=BANDS).filter(any).map(tuple)
HEAD_DIMS = st.sampled_from([64, 80, 96, 128, 192, 256])


def banded(bands: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(bits=0, bands=bands)


@given(BITS_OF_BANDS, st.one_of(st.none(), BITS_OF_BANDS), st.booleans(), HEAD_DIMS, st.integers(0, 2**31))
def test_packing_bands_is_lossless(
    one: tuple[int, ...], other: tuple[int, ...] | None, swapped: bool, head_dim: int, seed: int
) -> None:
    sides = [one, other][:: -1 if swapped else 1]
    spec = LayerSpec(*(RAW if bands is None else banded(bands) for bands in sides))
    generator = torch.Generator().manual_seed(seed)
    codes = [
        None
        if bands is None
        else BandCodes(
            torch.cat([torch.randint(0, 2**b, (3, 2, head_dim // BANDS), generator=generator) for b in bands], -1).to(
                torch.uint8
            ),
            torch.randint(0, 256, (3, 2), generator=generator).to(torch.uint8),
        )
        for bands in sides
    ]
    packed = pack_bands(spec, head_dim, *codes)
    row = spec.row(2, head_dim)
    assert packed.shape == (3, 2, row.value_head if codes[0] is None else row.key_head)
    for side, expected in enumerate(codes):
        if expected is not None:
            found = unpack_bands(packed, spec, side, head_dim)
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scale, expected.scale)


def test_bands_are_where_the_layout_says() -> None:
    spec = LayerSpec(banded((8, 5, 1, 0, 0, 0, 0, 1)), banded((4, 0, 0, 0, 0, 0, 0, 8)))
    key = torch.zeros(1, 1, 64, dtype=torch.uint8)
    value = torch.zeros(1, 1, 64, dtype=torch.uint8)
    key[..., 0], key[..., 9], key[..., 18], key[..., 57] = 200, 17, 1, 1
    value[..., 2], value[..., 59] = 9, 255
    scales = torch.tensor([[0b10_01_11_00]], dtype=torch.uint8), torch.tensor([[0b01_00_00_10]], dtype=torch.uint8)
    packed = pack_bands(spec, 64, BandCodes(key, scales[0]), BandCodes(value, scales[1]))
    # Runs of eight words: 8 + 5 + 1 bits and two for digits of the scales, the keys' and then the values'; then 1 + 8 + 4.
    digits = [0b00, 0b11, 0b01, 0b10, 0b10, 0b00, 0b00, 0b01]
    words = [digit << 14 for digit in digits] + [0] * 8
    words[0] |= 200
    words[1] |= 17 << 8
    words[2] |= 1 << 13
    words[9] |= 1
    words[10] |= 9 << 9
    words[11] |= 255 << 1
    assert (packed.flatten().view(torch.int16).int() & 0xFFFF).tolist() == words


@settings(deadline=None, max_examples=200)
@given(KINDS, BITS_OF_BANDS, HEAD_DIMS, st.integers(0, 2**31))
def test_the_error_of_a_band_is_half_a_step_plus_rounding(
    kind: str, bands: tuple[int, ...], head_dim: int, seed: int
) -> None:
    y = draw_values(kind, (3, 2, head_dim), seed)
    found = quantize_bands(y, bands)
    assert not is_first(found.scale).any()
    read = dequantize_bands(found, bands)
    scale = scale_values(found.scale).double().unsqueeze(-1)
    nearest, head = scale_values(scale_number(y.square().mean(-1)).clamp(1, 124)), y.abs().amax(-1)
    assert (scale[..., 0] / nearest).log2().abs().max() <= 0.5 + 1e-6
    kept = (head > 2.0**-15) & (head < 2.0**15)  # beyond, scales end
    for b, part, codes, back in zip(
        bands, y.chunk(BANDS, -1), found.codes.chunk(BANDS, -1), read.chunk(BANDS, -1), strict=True
    ):
        if b == 0:
            assert not back.any()
            continue
        assert int(codes.max()) < 2**b
        reach = 2 ** (b - 1) * STEPS[b] * scale  # of the outermost levels' cells
        rounding = part.double().abs() * (HALF_ULP + 2.0**-20) + TINY + scale * 2.0**-20
        error = (back.double() - part.double()).abs()
        bound = scale * STEPS[b] / 2 + (part.double().abs() - reach).clamp_min(0) + rounding
        assert (error <= bound)[kept].all()


def test_the_nearest_scale_is_next_to_the_root_mean_square() -> None:
    root = torch.logspace(-4, 4, 9001)
    found = scale_values(scale_number(root.square()))
    assert (found / root).log2().abs().max() < 1 / 8 + 1e-4
    every = torch.arange(127, dtype=torch.uint8)
    assert scale_values(torch.tensor([127, 255])).isnan().all()
    assert torch.allclose(scale_values(every).log2(), (every.double() - 64).float() / 4, atol=1e-6)
    assert torch.equal(scale_values(every + 128), scale_values(every))  # of a first token
    assert torch.equal(scale_number(scale_values(every).square()), every.int())


@pytest.mark.parametrize("bands", [(4,) * 8, (6, 5, 5, 4, 4, 3, 3, 0), (8, 0, 0, 0, 0, 0, 0, 1)])
def test_no_other_of_the_four_scales_has_less_error_in_steps(bands: tuple[int, ...]) -> None:
    y = draw_values("normal", (200, 2, 64), 0)
    y[::3] *= torch.linspace(0.2, 3, 64)
    found = quantize_bands(y, bands)
    step = torch.tensor([STEPS[b] or 1.0 for b in bands]).repeat_interleave(8)
    stored = torch.tensor(bands).repeat_interleave(8) > 0

    def error(numbers: torch.Tensor) -> torch.Tensor:
        """Sum of squares, in steps at a scale of one."""
        scale = scale_values(numbers).unsqueeze(-1)
        half = torch.tensor([2.0 ** (b - 1) for b in bands]).repeat_interleave(8)
        level = (y.half().float() / scale / step).floor().clamp(-half, half - 1) + 0.5
        return ((level * scale - y.half().float() / step) ** 2 * stored).sum(-1)

    nearest = scale_number(y.half().double().square().sum(-1).float() / 64)
    tried = torch.stack([error(nearest + by) for by in (-1, 0, 1, 2)])
    assert (error(found.scale) <= tried.amin(0) * 1.05).all()  # errors are counted in parts of a step
    assert len(found.scale.int().sub(nearest).unique()) > 2  # the root mean square itself is not always the best


@pytest.mark.parametrize("bits", range(1, 9))
def test_steps_are_the_best_for_a_normal_distribution(bits: int) -> None:
    quantiles = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    x = torch.special.ndtri(quantiles)

    def distortion(step: float) -> float:
        level = (x / step).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5
        return float((level * step - x).square().mean())

    assert distortion(STEPS[bits]) < min(distortion(STEPS[bits] * 1.03), distortion(STEPS[bits] * 0.97))


@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_a_basis_inverts_and_keeps_dot_products(head_dim: int) -> None:
    torch.manual_seed(0)
    centres = made_up(LayerSpec(banded((4,) * BANDS)), 3, head_dim)
    assert centres.key is not None
    side = basis(centres.key)
    assert basis(centres.key) is side
    x, first = torch.randn(5, 3, head_dim), torch.tensor([True, False, False, True, False])
    for marked in (None, first, first.unsqueeze(1).expand(5, 3)):
        y = to_basis(x, side, None if marked is None else first)
        assert torch.allclose(from_basis(y, side, marked), x, atol=1e-4)
    query = torch.randn(5, 3, head_dim)
    turned = torch.einsum("hij,nhj->nhi", side.dual, query)
    expected = (query * (x - side.mean)).sum(-1)
    assert torch.allclose((turned * to_basis(x, side)).sum(-1), expected, atol=1e-3)
    assert torch.allclose(to_basis(centres.key[:, -1].unsqueeze(0), side, first[:1]), torch.zeros(1), atol=1e-5)


def test_a_basis_that_cannot_be_used_is_refused() -> None:
    matrix, mean = torch.eye(64).repeat(2, 1, 1), torch.zeros(2, 64)
    singular = matrix.clone()
    singular[1, 5] = singular[1, 6]
    with pytest.raises(BasisError, match="cannot be inverted"):
        join_basis(singular, mean, mean)
    with pytest.raises(BasisError, match="not finite"):
        join_basis(matrix, mean, mean + math.nan)
    with pytest.raises(BasisError, match="float32"):
        basis(torch.zeros(2, 65, 64))
    spec = LayerSpec(banded((4,) * BANDS))
    with pytest.raises(LayoutError, match="needs a basis"):
        pack_rows(torch.zeros(1, 2, 64).half(), torch.zeros(1, 2, 64).half(), spec)


BANDED_PAIRS = [
    "b65443322/b54433221",
    "b88888888/b00000001",
    "b76543210/4-g32-asym-c-r",
    "16/b11111111",
    "b30000000/16",
]


@pytest.mark.parametrize("text", BANDED_PAIRS)
def test_no_rows_hold_no_tokens(text: str) -> None:
    spec = LayerSpec.parse(text)
    centres, nothing = made_up(spec, 3, 64), torch.zeros(0, 3, 64, dtype=torch.float16)
    rows = pack_rows(nothing, nothing, spec, centres, torch.zeros(0, dtype=torch.bool))
    assert rows.shape == (0, spec.bytes_per_token(3, 64))
    for side in unpack_rows(rows, spec, 3, 64, centres, torch.float16):
        assert side.shape == (0, 3, 64)


@pytest.mark.parametrize("text", BANDED_PAIRS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_banded_rows_hold_exactly_what_was_quantized(text: str, head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    spec = LayerSpec.parse(text)
    centres = made_up(spec, 3, head_dim)
    key, value = torch.randn(2, 7, 3, head_dim).to(dtype)
    first = torch.arange(7) % 3 == 0
    rows = pack_rows(key, value, spec, centres, first)
    assert rows.shape == (7, spec.bytes_per_token(3, head_dim))
    got = unpack_rows(rows, spec, 3, head_dim, centres, dtype)
    for x, side, centre, back in ((key, spec.key, centres.key, got[0]), (value, spec.value, centres.value, got[1])):
        if not side.banded:
            assert torch.equal(back, x if side.raw else dequantize(quantize(x, side, centre), side, centre))
            continue
        assert centre is not None
        found = basis(centre)
        quantized = quantize_bands(to_basis(x, found, first), side.bands, first)
        assert torch.equal(is_first(quantized.scale), first.unsqueeze(1).expand(7, 3))
        assert torch.equal(back, from_basis(dequantize_bands(quantized, side.bands), found, first))
        assert torch.equal(as_stored(x, side, centre, first=first), back.to(dtype))


def test_a_first_token_is_stored_about_its_own_point() -> None:
    torch.manual_seed(2)
    spec = TensorSpec.parse("b44433332")
    centre = made_up(LayerSpec(spec), 2, 64).key
    assert centre is not None
    point = centre[:, -1].unsqueeze(0)
    x = point + torch.randn(1, 2, 64) * 0.1
    marked, plain = (
        (as_stored(x, spec, centre, first=torch.tensor([flag])) - x).norm() / x.norm() for flag in (True, False)
    )
    assert marked < 0.2 * plain


def test_a_first_token_on_its_point_is_marked_at_the_least_scale() -> None:
    side = basis(join_basis(torch.eye(64).unsqueeze(0), torch.zeros(1, 64), torch.full((1, 64), 3.0)))
    first = torch.tensor([True, False])
    y = to_basis(torch.tensor([3.0, 0.0]).view(2, 1, 1).expand(2, 1, 64), side, first)
    found = quantize_bands(y, (2,) * BANDS, first)
    assert found.scale.flatten().tolist() == [128, 0]
    back = from_basis(dequantize_bands(found, (2,) * BANDS), side, is_first(found.scale))
    assert torch.allclose(back[:, 0, 0], torch.tensor([3.0, 0.0]), atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_what_a_basis_makes_too_large_is_refused(bad: float) -> None:
    centre = join_basis(torch.eye(64).unsqueeze(0), torch.zeros(1, 64), torch.zeros(1, 64))
    x = torch.zeros(2, 1, 64, dtype=torch.bfloat16)
    x[1, 0, 7] = bad
    with pytest.raises(QuantizationError):
        pack_rows(x, x, LayerSpec(banded((4,) * BANDS)), Centres(centre))


def test_attention_over_banded_rows_is_attention_over_what_they_hold() -> None:
    torch.manual_seed(3)
    spec = LayerSpec.parse("b65443322/b54433221")
    centres = made_up(spec, 2, 64)
    key, value = torch.randn(2, 11, 2, 64)
    query, first = torch.randn(4, 6, 64), torch.arange(11) == 0
    stored_key = as_stored(key, spec.key, centres.key, first=first)
    stored_value = as_stored(value, spec.value, centres.value, first=first)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        stored_key.transpose(0, 1)[None],
        stored_value.transpose(0, 1)[None],
        attn_mask=torch.ones(4, 11, dtype=torch.bool).tril(7),
        enable_gqa=True,
    )[0].transpose(0, 1)
    got = attend(query, pack_rows(key, value, spec, centres, first), spec, 2, centres)
    assert torch.allclose(got, expected, atol=1e-5)


def test_levels_of_a_band_lie_about_zero() -> None:
    codes = torch.arange(8, dtype=torch.uint8).view(1, 1, 8)
    read = dequantize_bands(BandCodes(codes, torch.tensor([[128 + 64 + 4]], dtype=torch.uint8)), (3,) * BANDS)
    assert torch.allclose(read.flatten(), (torch.arange(8) - 3.5) * STEPS[3] * 2)
