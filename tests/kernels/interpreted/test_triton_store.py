"""Quantize-and-store and gather: the same bytes, and the same numbers, as the reference."""

import pytest
import torch

from kvtuner_kernels import band_kernel
from kvtuner_kernels.band_kernel import store_bands_constants
from kvtuner_kernels.bands import is_first, join_basis, unpack_bands
from kvtuner_kernels.basis_kernel import transform_constants
from kvtuner_kernels.gather import gather, move
from kvtuner_kernels.layout import CODE_BITS, RAW, LayerSpec, LayoutError, TensorSpec
from kvtuner_kernels.quantize import store
from kvtuner_kernels.reference import Centres, pack_rows, unpack_rows
from tests.kernels.fitted import made_up

SIDES = [
    TensorSpec(4, 64),
    TensorSpec(2, 32, symmetric=True, centred=True),
    TensorSpec(8, 64, rotated=True, clip=0.8),
    TensorSpec(4, 32, centred=True, rotated=True),
    TensorSpec(8, 32, symmetric=True),
    RAW,
]


def draw(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(tokens, heads, head_dim)
    x[..., 3] += 40.0
    x[::5, ..., 8:] = 0.25  # constant groups
    return x.to(dtype)


def check(spec: LayerSpec, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens + heads)
    centres = Centres(*(torch.randn(heads, head_dim) if s.centred else None for s in (spec.key, spec.value)))
    key, value = (draw(tokens, heads, head_dim, dtype) for _ in range(2))
    fused = torch.cat((key, value), dim=-1)  # strided inputs, as from one projection
    key, value = fused[..., :head_dim], fused[..., head_dim:]
    pool = torch.full((tokens + 9, spec.bytes_per_token(heads, head_dim)), 0xA5, dtype=torch.uint8)
    slots = torch.randperm(tokens + 9)[:tokens]
    packed = pack_rows(key, value, spec, centres)
    row = spec.row(heads, head_dim)
    used = max(
        row.value_codes + heads * spec.value.code_bytes(head_dim),
        row.value_metadata + heads * spec.value.metadata_bytes(head_dim),
    )
    expected = pool.clone()
    expected[slots, :used] = packed[:, :used]
    store(key, value, pool, slots, spec, centres)
    assert torch.equal(pool, expected)
    # fp16: the interpreter rounds wrongly to bf16.
    got = gather(pool, slots, spec, heads, head_dim, centres, dtype if RAW in (spec.key, spec.value) else torch.float16)
    for side, mine, plain in zip(
        (spec.key, spec.value), got, unpack_rows(packed, spec, heads, head_dim, centres, dtype), strict=True
    ):
        if side.raw or mine.dtype == torch.float16:
            assert torch.equal(mine, plain.to(mine.dtype))


@pytest.mark.parametrize("key", SIDES, ids=str)
@pytest.mark.parametrize("value", SIDES, ids=str)
def test_rows_are_the_reference_bit_for_bit(key: TensorSpec, value: TensorSpec) -> None:
    check(LayerSpec(key, value), 7, 3, 64, torch.bfloat16)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("rotated", [False, True])
def test_every_head_dim(head_dim: int, bits: int, rotated: bool) -> None:
    whole = TensorSpec(bits, head_dim, rotated=rotated)
    grouped = TensorSpec(bits, 32 if head_dim % 32 == 0 else head_dim, symmetric=rotated)
    check(LayerSpec(whole, grouped), 3, 2, head_dim, torch.float16)


@pytest.mark.parametrize("tokens", [0, 1, 63, 257])
def test_odd_numbers_of_tokens(tokens: int) -> None:
    check(LayerSpec(TensorSpec(4, 128), TensorSpec(8, 64)), tokens, 1, 128, torch.float16)


BANDED = [
    "b65443322/b54433221",  # words of keys, of values, and shared
    "b88888888/b88888888",
    "b30000000/b00000004",
    "b76543210/4-g32-asym-c-r",
    "8-g64-sym/b43332222",
    "16/b11111111",
    "b22222222/16",
]


def exact_basis(heads: int, head_dim: int) -> torch.Tensor:
    """A basis in which sums of few integers are exact: channels in another order, turned round and in other units."""
    order = torch.stack([torch.randperm(head_dim) for _ in range(heads)])
    sizes = 2.0 ** torch.randint(-2, 3, (heads, head_dim, 1)) * (torch.rand(heads, head_dim, 1) - 0.5).sign()
    mean, first = torch.randint(-9, 10, (2, heads, head_dim)).float()
    return join_basis(torch.eye(head_dim)[order] * sizes, mean, 5 * first)


def check_bands(spec: LayerSpec, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, positions: bool) -> None:
    """Bit for bit, where the product is exact."""
    torch.manual_seed(tokens + heads)
    centres = Centres(
        *(
            exact_basis(heads, head_dim) if side.banded else torch.randn(heads, head_dim) if side.centred else None
            for side in (spec.key, spec.value)
        )
    )
    key, value = torch.randint(-20, 21, (2, tokens, heads, head_dim)).to(dtype)
    at = torch.randint(0, 3, (tokens,))
    if spec.key.banded and centres.key is not None:  # on the mean, or on the point of first tokens: scale 0, or -0
        key[::3] = torch.where((at[::3] == 0)[:, None, None], centres.key[:, -1], centres.key[:, -2]).to(dtype)
    fused = torch.cat((key, value), dim=-1)  # strided inputs, as from one projection
    key, value = fused[..., :head_dim], fused[..., head_dim:]
    pool = torch.full((tokens + 9, spec.bytes_per_token(heads, head_dim)), 0xA5, dtype=torch.uint8)
    slots = torch.randperm(tokens + 9)[:tokens]
    packed = pack_rows(key, value, spec, centres, at == 0 if positions else None)
    row = spec.row(heads, head_dim)
    used = row.value_metadata + heads * spec.value.metadata_bytes(head_dim)
    expected = pool.clone()
    expected[slots, :used] = packed[:, :used]
    store(key, value, pool, slots, spec, centres, at if positions else None)
    assert torch.equal(pool, expected)
    got = gather(pool, slots, spec, heads, head_dim, centres, dtype if "16" in str(spec).split("/") else torch.float32)
    for side, mine, plain in zip(
        (spec.key, spec.value), got, unpack_rows(packed, spec, heads, head_dim, centres, dtype), strict=True
    ):
        if side.banded or side.raw:
            assert torch.equal(mine, plain.to(mine.dtype))


@pytest.mark.parametrize("spec", BANDED)
@pytest.mark.parametrize("positions", [False, True])
def test_bands_are_the_reference_bit_for_bit(spec: str, positions: bool) -> None:
    check_bands(LayerSpec.parse(spec), 37, 3, 64, torch.float16, positions)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("spec", ["b65443322/b54433221", "b77000000/16"])
def test_bands_of_every_head_dim(head_dim: int, spec: str) -> None:
    check_bands(LayerSpec.parse(spec), 5, 2, head_dim, torch.float16, True)


@pytest.mark.parametrize("tokens", [0, 1, 63, 257])
def test_bands_of_odd_numbers_of_tokens(tokens: int) -> None:
    check_bands(LayerSpec.parse("b65443322/b54433221"), tokens, 1, 64, torch.bfloat16, True)


def test_bands_in_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(band_kernel, "FEW_TILES", 0)
    spec = LayerSpec.parse("b65443322/b54433221")
    assert store_bands_constants(spec, 3, 64, 70)["TILE_ROWS"] == 32
    check_bands(spec, 70, 3, 64, torch.float16, True)


@pytest.mark.parametrize("tokens", [1, 64, 2048, 8192, 1 << 20])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_stay_below_what_a_hopper_multiplies_otherwise(tokens: int, head_dim: int) -> None:
    """A token's codes must not depend on how many are stored with it; the interpreter knows one product alone."""
    assert store_bands_constants(LayerSpec.parse("b44444444/16"), 4, head_dim, tokens)["TILE_ROWS"] in (16, 32)
    assert transform_constants(tokens, 4, 7, head_dim)["TILE_ROWS"] in (16, 32)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_few_codes_turn_in_any_basis(head_dim: int) -> None:
    torch.manual_seed(head_dim)
    tokens, heads, spec = 150, 2, LayerSpec.parse("b65443322/b54433221")
    centres = made_up(spec, heads, head_dim)
    key, value = torch.randn(2, tokens, heads, head_dim).half()
    at = torch.arange(tokens) % 40
    pool = torch.full((tokens, spec.bytes_per_token(heads, head_dim)), 0xA5, dtype=torch.uint8)
    store(key, value, pool, torch.arange(tokens), spec, centres, at)
    packed = pack_rows(key, value, spec, centres, at == 0)
    row = spec.row(heads, head_dim)
    for index in (0, 1):
        mine, plain = (
            unpack_bands(rows[:, : heads * row.key_head].unflatten(1, (heads, -1)), spec, index, head_dim)
            for rows in (pool, packed)
        )
        assert torch.equal(is_first(mine.scale), is_first(plain.scale))
        same = mine.scale == plain.scale
        assert (~same).sum() <= 1  # where a number turned, another scale may have less error
        turned = (mine.codes.int() - plain.codes.int()).abs()[same]
        assert int(turned.max()) <= 1
        assert int(turned.sum()) <= 5e-4 * turned.numel()
    got = gather(pool, torch.arange(tokens), spec, heads, head_dim, centres, torch.float32)
    for mine, stored in zip(got, unpack_rows(pool, spec, heads, head_dim, centres), strict=True):
        assert torch.allclose(mine, stored, atol=2e-5, rtol=1e-5)


def test_bands_beyond_two_gigabytes() -> None:
    spec, centres = LayerSpec.parse("b65443322/b54433221"), Centres(exact_basis(4, 128), exact_basis(4, 128))
    rows = 2**31 // spec.bytes_per_token(4, 128) + 10
    pool = torch.empty(rows, spec.bytes_per_token(4, 128), dtype=torch.uint8)
    slots = torch.tensor([rows - 1, 5])
    key, value = torch.randint(-20, 21, (2, 2, 4, 128)).half()
    store(key, value, pool, slots, spec, centres)
    assert torch.equal(pool[slots], pack_rows(key, value, spec, centres))
    got = gather(pool, slots, spec, 4, 128, centres, dtype=torch.float32)
    assert torch.equal(got[1], unpack_rows(pool[slots], spec, 4, 128, centres)[1])


def test_rows_beyond_two_gigabytes() -> None:
    spec = LayerSpec(TensorSpec(4, 128), TensorSpec(4, 128))
    rows = 2**31 // spec.bytes_per_token(4, 128) + 10
    pool = torch.empty(
        rows, spec.bytes_per_token(4, 128), dtype=torch.uint8
    )  # pages that are not touched take no memory
    slots = torch.tensor([rows - 1, 5])
    key, value = torch.randn(2, 2, 4, 128).half()
    store(key, value, pool, slots, spec)
    assert torch.equal(pool[slots], pack_rows(key, value, spec))
    got = gather(pool, slots, spec, 4, 128, dtype=torch.float32)
    assert torch.equal(got[0], unpack_rows(pool[slots], spec, 4, 128)[0])


def test_rows_move_even_where_source_and_target_overlap() -> None:
    pool = torch.arange(5, dtype=torch.uint8).repeat_interleave(8).view(5, 8)
    move(pool, torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert pool[:, 0].tolist() == [0, 0, 1, 3, 4]


def test_what_does_not_fit_is_refused() -> None:
    spec = LayerSpec(TensorSpec(4, 64), TensorSpec(4, 64))
    key = torch.randn(2, 1, 64).half()
    slots = torch.arange(2)
    pool = torch.zeros(2, spec.bytes_per_token(1, 64), dtype=torch.uint8)
    with pytest.raises(LayoutError, match="uint8"):
        store(key, key, pool[:, :-4], slots, spec)
    with pytest.raises(LayoutError, match="float32"):
        store(key.float(), key, pool, slots, spec)
    with pytest.raises(LayoutError, match="centring"):
        store(key, key, pool, slots, spec, Centres(torch.zeros(1, 64)))
    with pytest.raises(LayoutError, match=r"positions are torch\.int32"):
        store(key, key, pool, slots, spec, positions=torch.zeros(2, dtype=torch.int32))
    banded = LayerSpec.parse("b44444444/16")
    wide = torch.zeros(2, banded.bytes_per_token(1, 64), dtype=torch.uint8)
    for centre in (None, torch.zeros(1, 64)):
        with pytest.raises(LayoutError, match="basis"):
            store(key, key, wide, slots, banded, Centres(centre))
        with pytest.raises(LayoutError, match="basis"):
            gather(wide, slots, banded, 1, 64, Centres(centre))
    odd = LayerSpec(TensorSpec(4, 48), TensorSpec(4, 48))
    pool = torch.zeros(2, odd.bytes_per_token(1, 48), dtype=torch.uint8)
    with pytest.raises(LayoutError, match="head_dim=48"):
        store(key[..., :48], key[..., :48], pool, slots, odd)
