"""Tokens so far apart that a token's number times its stride passes 32 bits. Memory is mapped, and hardly any of it touched."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from torch import Tensor

from kvtuner_kernels.basis_kernel import first_rows, transform_heads
from kvtuner_kernels.decode import decode
from kvtuner_kernels.extend import extend
from kvtuner_kernels.gather import gather
from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_kernels.quantize import store
from kvtuner_kernels.reference import pack_rows
from kvtuner_kernels.rotation import rotate_heads
from kvtuner_kernels.tuning import DecodeLaunch
from tests.kernels.fitted import made_up

STRIDE = 2**30 + 64  # of tokens: twice that passes 2**31
HEADS, GROUP, DIM = 1, 2, 64
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on
SPECS = [LayerSpec.parse(text) for text in ("4-g64-asym/4-g64-asym", "b65443322/b54433221", "4-g64-asym/b54433221")]
SMALL = DecodeLaunch(batch=4, runs=1, tokens=16, columns=8, stages=3, warps=4, programs=1)


def mapped(count: int, dtype: torch.dtype) -> Tensor:
    """So many zeros that take no memory until they are written."""
    pages = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(pages, dtype=dtype)


def apart(x: Tensor) -> Tensor:
    """A copy of ``x`` [3, H, D] whose tokens are far apart. Where a product that wrapped around would lead are zeros."""
    below = 2**31
    memory = mapped(below + 2 * STRIDE + x[0].numel(), x.dtype)
    view = memory[below:].as_strided(x.shape, (STRIDE, x.stride(1), 1), below)
    view.copy_(x)
    return view


def filled(spec: LayerSpec, tokens: int) -> tuple[Tensor, Tensor]:
    """Rows and slots of so many tokens."""
    key, value = torch.randn(2, tokens, HEADS, DIM).half()
    return pack_rows(key, value, spec, made_up(spec, HEADS, DIM)), torch.arange(tokens)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_decode(spec: LayerSpec) -> None:
    torch.manual_seed(0)
    rows, slots = filled(spec, 30)
    query, indptr = torch.randn(3, HEADS * GROUP, DIM).half(), torch.tensor([0, 10, 20, 30], dtype=torch.int32)
    call = (rows, spec, HEADS, indptr, slots)
    more = {"centres": made_up(spec, HEADS, DIM), "launch": SMALL}
    expected = decode(query, *call, **more)
    out = apart(torch.zeros_like(query))
    decode(apart(query), *call, out, **more)
    assert torch.equal(out, expected)
    assert expected[2].any()


def test_decode_refuses_a_query_of_2_to_the_31_numbers() -> None:
    rows, slots = filled(SPECS[0], 3)
    query = torch.zeros(DIM).half().expand(2**25, HEADS * GROUP, DIM)
    with pytest.raises(LayoutError, match="pass fewer at once"):
        decode(query, rows, SPECS[0], HEADS, slots.int(), slots)


@pytest.mark.parametrize("as_stored", [False, True], ids=["chunk", "as-stored"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_extend(spec: LayerSpec, as_stored: bool) -> None:
    torch.manual_seed(0)
    rows, slots = filled(spec, 9)
    query, (key, value) = torch.randn(3, HEADS * GROUP, DIM).half(), torch.randn(2, 3, HEADS, DIM).half()
    ends, prefix = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    rest = (rows, spec, HEADS, ends, prefix, slots, 2)
    more = {"centres": made_up(spec, HEADS, DIM)}
    expected = extend(query, *((None, None) if as_stored else (key, value)), *rest, **more)
    out = apart(torch.zeros_like(query))
    extend(apart(query), *((None, None) if as_stored else (apart(key), apart(value))), *rest, out, **more)
    assert torch.equal(out, expected)
    assert expected[2].any()


def test_masks() -> None:
    """A mask has a row of all stored tokens for each new one; a window keeps the test from reading them."""
    stored, new, spec = 2**29 + 64, 5, SPECS[0]
    torch.manual_seed(0)
    rows, _ = filled(spec, 3)
    slots, mask = mapped(stored, torch.int64), mapped(new * stored, torch.bool)
    slots[-2:] = torch.tensor([1, 2])
    mask[-2:] = True  # the last token sees itself and the one before, the others nothing
    query = torch.ones(new, HEADS * GROUP, DIM).half()
    found = extend(
        query, None, None, rows, spec, HEADS, torch.tensor([0, new]).int(), torch.tensor([0, stored]).int(), slots, new,
        custom_mask=mask, mask_indptr=torch.tensor([0, mask.numel()]), skip_prefix_mask=False, window=3,
    )  # fmt: skip
    two = torch.tensor([0, 2]).int()
    expected = extend(
        query[:1], None, None, rows, spec, HEADS, torch.tensor([0, 1]).int(), two, torch.tensor([1, 2]), 1
    )
    assert torch.equal(found[-1], expected[0])
    assert expected.any()
    assert not found[:-1].any()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_store(spec: LayerSpec) -> None:
    torch.manual_seed(0)
    key, value = torch.randn(2, 3, HEADS, DIM).half()
    centres = made_up(spec, HEADS, DIM)
    found = torch.zeros(3, spec.bytes_per_token(HEADS, DIM), dtype=torch.uint8)
    store(apart(key), apart(value), found, torch.arange(3), spec, centres)
    expected = torch.zeros_like(found)
    store(key, value, expected, torch.arange(3), spec, centres)
    assert torch.equal(found, expected)


def test_transforms() -> None:
    torch.manual_seed(0)
    x, matrix = torch.randn(3, HEADS, DIM).half(), torch.randn(HEADS, DIM, DIM)
    assert torch.equal(rotate_heads(apart(x), inverse=False), rotate_heads(x, inverse=False))
    out = apart(torch.zeros_like(x))
    transform_heads(apart(x), matrix, HEADS, out=out)
    assert torch.equal(out, transform_heads(x, matrix, HEADS, dtype=torch.float16))
    assert math.isfinite(float(out.abs().sum()))


def large_pool(rows: Tensor) -> tuple[Tensor, int]:
    """A pool of 8 GiB whose last rows are these, and the slot of the first. Rows are read in units of up to 4 bytes: a slot times its row passes 2**31 in each.

    Where a product that wrapped around would lead are zeros.
    """
    count, width = rows.shape
    below, first = 2**33, 2**33 // width + 1
    pool = mapped(below + (first + count) * width, torch.uint8)[below:].view(first + count, width)
    pool[first:] = rows
    return pool, first


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_of_a_pool_of_more_than_8_gib(spec: LayerSpec) -> None:
    torch.manual_seed(0)
    rows, slots = filled(spec, 12)
    pool, first = large_pool(rows)
    centres, ends = made_up(spec, HEADS, DIM), torch.tensor([0, 4, 9, 12], dtype=torch.int32)
    query = torch.randn(3, HEADS * GROUP, DIM).half()

    def read(rows: Tensor, slots: Tensor) -> list[Tensor]:
        fresh = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
        return [
            decode(query, rows, spec, HEADS, ends, slots, centres=centres, launch=SMALL),
            extend(query, None, None, rows, spec, HEADS, fresh, ends, slots, 1, centres=centres),
            *gather(rows, slots, spec, HEADS, DIM, centres, torch.float16),
            *first_rows(rows, ends, slots, spec, HEADS, DIM, centres, torch.float16),
        ]

    expected = read(rows, slots)
    for found, wanted in zip(read(pool, slots + first), expected, strict=True):
        assert torch.equal(found, wanted)
        assert wanted.any()
    key, value = torch.randn(2, 3, HEADS, DIM).half()
    store(key, value, rows, slots[:3], spec, centres)
    store(key, value, pool, slots[:3] + first, spec, centres)
    assert torch.equal(pool[first:], rows)
