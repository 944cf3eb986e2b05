"""Heads times a matrix, and requests' first rows: against the same in float64, with what must not be read poisoned."""

import pytest
import torch

from kvtuner_kernels import basis_kernel
from kvtuner_kernels.bands import basis
from kvtuner_kernels.basis_kernel import first_rows, transform_heads
from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_kernels.reference import pack_rows, transform, unpack_rows
from tests.kernels.fitted import made_up


def expected(x: torch.Tensor, matrix: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    heads = len(matrix)
    grouped = x.double().unflatten(1, (heads, x.shape[1] // heads)) - before.double().unsqueeze(1)
    turned = torch.einsum("hij,nhgj->nhgi", matrix.double(), grouped) + after.double().unsqueeze(1)
    return turned.flatten(1, 2)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(("tokens", "heads", "group"), [(1, 1, 1), (3, 2, 7), (41, 3, 1)])
def test_every_head_dim_and_ratio_of_heads(head_dim: int, tokens: int, heads: int, group: int) -> None:
    torch.manual_seed(tokens)
    matrix = torch.randn(heads, head_dim, head_dim) / head_dim**0.5
    before, after = torch.randn(2, heads, head_dim) * 5
    x = torch.randn(tokens, heads * group, head_dim + 8)[..., 8:]  # strided
    none = torch.zeros(heads, head_dim)
    for given in (x, x.half()):
        got = transform_heads(given, matrix, heads, before, after)
        assert got.is_contiguous()
        assert torch.allclose(got.double(), expected(given, matrix, before, after), atol=5e-5)
    got = transform_heads(x, matrix.mT, heads, dtype=torch.float16)
    assert got.dtype == torch.float16
    assert torch.allclose(got.double(), expected(x, matrix.mT, none, none), atol=4e-3)


def test_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(basis_kernel, "FEW_TILES", 0)
    matrix, x = torch.randn(2, 80, 80) / 9, torch.randn(37, 6, 80)
    none = torch.zeros(2, 80)
    assert torch.allclose(transform_heads(x, matrix, 2).double(), expected(x, matrix, none, none), atol=5e-5)


def test_no_tokens() -> None:
    assert transform_heads(torch.zeros(0, 2, 64), torch.zeros(2, 64, 64), 2).shape == (0, 2, 64)


def test_an_output_of_ones_own_and_tokens_with_nothing() -> None:
    torch.manual_seed(0)
    matrix, after, x = torch.randn(2, 64, 64) / 8, torch.randn(2, 64), torch.randn(3, 4, 64)
    x[1] = torch.nan  # nobody's
    wide = torch.full((3, 4, 100), 7.0, dtype=torch.float16)
    out = wide[..., 20:84]
    got = transform_heads(x, matrix, 2, after=after, out=out, indptr=torch.tensor([0, 2, 2, 9], dtype=torch.int32))
    assert got is out
    assert not out[1].any()
    plain = expected(x, matrix, torch.zeros(2, 64), after)
    assert torch.allclose(out[::2].double(), plain[::2], atol=4e-3)
    assert (wide[..., :20] == 7).all()
    assert (wide[..., 84:] == 7).all()


def test_what_does_not_fit_is_refused() -> None:
    x, matrix = torch.zeros(1, 3, 64), torch.zeros(2, 64, 64)
    with pytest.raises(LayoutError, match="multiple of 2 heads"):
        transform_heads(x, matrix, 2)
    with pytest.raises(LayoutError, match=r"the matrix is torch\.float64"):
        transform_heads(x, matrix.double()[:1], 1)
    with pytest.raises(LayoutError, match="expected float32"):
        transform_heads(x, matrix, 3)


@pytest.mark.parametrize(
    "spec",
    [
        "b65443322/b54433221",
        "b76543210/4-g32-asym-c-r",
        "8-g32-sym/b30000002",
        "16/b11111111",
        "b88888888/2-g64-asym-c",
        "16/16",
    ],
)
@pytest.mark.parametrize("head_dim", [64, 80, 192])
def test_first_rows(spec: str, head_dim: int) -> None:
    if head_dim == 80:
        spec = spec.replace("g32", "g80").replace("g64", "g80")
    torch.manual_seed(head_dim)
    layer, heads, tokens = LayerSpec.parse(spec), 3, 11
    centres = made_up(layer, heads, head_dim)
    key, value = torch.randn(2, tokens, heads, head_dim).half()
    pool = torch.full((tokens + 5, layer.bytes_per_token(heads, head_dim)), 0xFF, dtype=torch.uint8)
    slots = torch.randperm(tokens + 5)[:tokens]
    lengths = [3, 0, 1, 7, 0]
    indptr = torch.tensor([0, *lengths]).cumsum(0).int()
    first = torch.zeros(tokens, dtype=torch.bool)
    first[3] = True  # of the third request; the others' first rows are not first tokens
    pool[slots] = pack_rows(key, value, layer, centres, first)
    pool[slots[torch.tensor([1, 2, 5])]] = 0xFF  # later rows are not read
    got = first_rows(pool, indptr, slots, layer, heads, head_dim, centres, torch.float16)
    stored = unpack_rows(pool[slots], layer, heads, head_dim, centres, torch.float16)
    for mine, side, centre, plain in zip(got, (layer.key, layer.value), centres, stored, strict=True):
        assert mine.dtype == torch.float32
        assert mine.shape == (5, heads, head_dim)
        assert not mine[1].any()
        assert not mine[4].any()
        found = plain[indptr[torch.tensor([0, 2, 3])].long()].float()
        if side.banded:
            turned = basis(centre)
            found = torch.einsum("hij,nhj->nhi", turned.matrix, found - turned.mean)
        elif not side.raw:
            found = transform(found, side, centre)
        assert torch.allclose(mine[torch.tensor([0, 2, 3])], found, atol=2e-4, rtol=2e-5)


def test_a_raw_side_has_a_type_of_16_bits() -> None:
    layer = LayerSpec.parse("16/b44444444")
    pool = torch.zeros(1, layer.bytes_per_token(1, 64), dtype=torch.uint8)
    start = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(TypeError, match=r"torch\.float32"):
        first_rows(pool, start, torch.arange(1), layer, 1, 64, made_up(layer, 1, 64), torch.float32)
