"""Quantize-and-store and gather: the same bytes, and the same numbers, as the reference."""

import pytest
import torch

from kvtuner_kernels.gather import gather, move
from kvtuner_kernels.layout import RAW, LayerSpec, LayoutError, TensorSpec
from kvtuner_kernels.quantize import store
from kvtuner_kernels.reference import Centres, pack_rows, unpack_rows

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
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rotated", [False, True])
def test_every_head_dim(head_dim: int, bits: int, rotated: bool) -> None:
    whole = TensorSpec(bits, head_dim, rotated=rotated)
    grouped = TensorSpec(bits, 32 if head_dim % 32 == 0 else head_dim, symmetric=rotated)
    check(LayerSpec(whole, grouped), 3, 2, head_dim, torch.float16)


@pytest.mark.parametrize("tokens", [0, 1, 63, 257])
def test_odd_numbers_of_tokens(tokens: int) -> None:
    check(LayerSpec(TensorSpec(4, 128), TensorSpec(8, 64)), tokens, 1, 128, torch.float16)


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
    odd = LayerSpec(TensorSpec(4, 48), TensorSpec(4, 48))
    pool = torch.zeros(2, odd.bytes_per_token(1, 48), dtype=torch.uint8)
    with pytest.raises(LayoutError, match="head_dim=48"):
        store(key[..., :48], key[..., :48], pool, slots, odd)
