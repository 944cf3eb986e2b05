"""Decode: against the reference's attention over the same rows, with everything that must not be read poisoned."""

import pytest
import torch

from kvtuner_kernels import merge as merge_module
from kvtuner_kernels.decode import decode, decode_workspace
from kvtuner_kernels.layout import CODE_BITS, RAW, LayerSpec, LayoutError, TensorSpec
from kvtuner_kernels.merge import merge_constants
from kvtuner_kernels.reference import attend, pack_rows
from kvtuner_kernels.tuning import DecodeLaunch
from tests.kernels.fitted import made_up

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}
SMALL = DecodeLaunch(batch=4, runs=1, tokens=16, columns=8, stages=3, warps=4, programs=1)


def check(
    spec: LayerSpec,
    lengths: list[int],
    heads: int = 2,
    group: int = 7,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    launch: DecodeLaunch | None = SMALL,
    num_kv_splits: list[int] | None = None,
    soft_cap: float = 0.0,
    window: int = 0,
    sinks: float = 0.0,
) -> None:
    """``sinks`` is the spread of attention sinks about 1; 0 is none."""
    torch.manual_seed(sum(lengths))
    tokens = sum(lengths)
    centres = made_up(spec, heads, head_dim)
    # 0xFF is NaN as a scale, a minimum or a raw number.
    pool = torch.full((tokens + 20, spec.bytes_per_token(heads, head_dim)), 0xFF, dtype=torch.uint8)
    slots = torch.randperm(tokens + 20)[:tokens]
    key, value = (torch.randn(2, tokens, heads, head_dim) + 0.5).half()
    indptr = torch.tensor([0, *lengths]).cumsum(0).int()
    # Every other request begins with the first token of a sequence; the others, as behind a window, do not.
    first = torch.zeros(tokens + 1, dtype=torch.bool)
    first[indptr[:-1:2].long()] = True
    if tokens:
        pool[slots] = pack_rows(key, value, spec, centres, first[:tokens])
    query = torch.randn(len(lengths), heads * group, head_dim).to(dtype)
    out = torch.full_like(query, torch.nan)
    logits = torch.randn(heads * group) * sinks + 1 if sinks else None
    splits = {}
    if num_kv_splits is not None:
        splits = {"num_kv_splits": torch.tensor(num_kv_splits, dtype=torch.int32), "max_kv_splits": max(num_kv_splits)}
    decode(
        query, pool, spec, heads, indptr, slots, out,
        centres=centres, launch=launch, soft_cap=soft_cap, window=window, sinks=logits, **splits,
    )  # fmt: skip
    for request, length in enumerate(lengths):
        if length == 0:
            assert not out[request].any()
            continue
        rows = pool[slots[indptr[request] : indptr[request + 1]]]
        expected = attend(
            query[request : request + 1],
            rows,
            spec,
            heads,
            centres,
            soft_cap=soft_cap,
            window=window,
            sinks=logits,
            dtype=torch.float16,
        )[0]
        error = (out[request].float() - expected).norm() / expected.norm()
        assert error <= TOLERANCE[dtype], f"request {request} of {lengths}: {error:.1e}"


@pytest.mark.parametrize("key", CODE_BITS)
@pytest.mark.parametrize("value", CODE_BITS)
def test_every_pair_of_widths(key: int, value: int) -> None:
    check(LayerSpec(TensorSpec(key, 64), TensorSpec(value, 32)), [63, 0, 1, 20])


@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(RAW, TensorSpec(4, 64)),
        LayerSpec(TensorSpec(8, 64), RAW),
        LayerSpec(RAW, RAW),
        LayerSpec(TensorSpec(4, 64), TensorSpec(2, 64)),
    ],
    ids=str,
)
def test_sixteen_bits_and_fp16_queries(spec: LayerSpec) -> None:
    check(spec, [33, 1], dtype=torch.float16)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_transforms(rotated: bool, centred: bool, symmetric: bool) -> None:
    side = TensorSpec(4, 32, symmetric, centred, rotated, 0.9)
    check(LayerSpec(side, side), [5, 40])


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_every_head_dim_with_its_own_launch(head_dim: int) -> None:
    spec = LayerSpec(TensorSpec(4, head_dim), TensorSpec(8, head_dim, centred=True, rotated=True))
    check(spec, [70, 0, 3], head_dim=head_dim, launch=None)


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (1, 8), (1, 20), (2, 1), (3, 4), (4, 7), (8, 3)])
def test_every_ratio_of_heads(heads: int, group: int) -> None:
    check(LayerSpec(TensorSpec(4, 64), TensorSpec(4, 64)), [9, 50], heads=heads, group=group, launch=None)


@pytest.mark.parametrize(
    "spec",
    [
        "b65443322/b54433221",  # words of keys, of values, and shared
        "b88888888/b11111111",
        "b30000000/b00000004",
        "b76543210/4-g64-asym-c-r",
        "8-g32-sym/b43332222",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bands(spec: str, dtype: torch.dtype) -> None:
    check(LayerSpec.parse(spec), [40, 0, 1, 1, 63, 2], dtype=dtype)


@pytest.mark.parametrize("spec", ["16/b54433222", "b54433222/16"])
def test_bands_beside_sixteen_bits(spec: str) -> None:
    check(LayerSpec.parse(spec), [40, 0, 1, 1, 63, 2], dtype=torch.float16)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_bands_of_every_head_dim_with_its_own_launch(head_dim: int) -> None:
    check(LayerSpec.parse("b65443322/b54433221"), [70, 0, 3], head_dim=head_dim, launch=None)


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (3, 4), (4, 7)])
def test_bands_of_every_ratio_of_heads(heads: int, group: int) -> None:
    check(LayerSpec.parse("b54433221/b65443322"), [9, 50], heads=heads, group=group, launch=None)


@pytest.mark.parametrize("soft_cap", [0.0, 20.0])
@pytest.mark.parametrize("window", [0, 1, 40])
def test_bands_with_window_soft_cap_and_splits(soft_cap: float, window: int) -> None:
    lengths = [90, 39, 40, 0, 41, 3]
    splits = [5, 1, 2, 1, 3, 1]
    for counts in (None, splits):
        check(LayerSpec.parse("b65443322/b54433221"), lengths, soft_cap=soft_cap, window=window, num_kv_splits=counts)


@pytest.mark.parametrize("runs", [1, 2, 4])
def test_runs_of_a_tile(runs: int) -> None:
    launch = DecodeLaunch(batch=4, runs=runs, tokens=16, columns=8, stages=3, warps=4, programs=2)
    check(LayerSpec(TensorSpec(4, 64), TensorSpec(2, 64)), [257, 1, 0, 63, 130], heads=4 // runs, launch=launch)


def test_splits_as_sglang_counts_them() -> None:
    check(LayerSpec(TensorSpec(4, 64), TensorSpec(4, 64)), [257, 0, 1, 63], num_kv_splits=[5, 1, 2, 3])


@pytest.mark.parametrize("window", [1, 16, 100])
def test_window(window: int) -> None:
    check(LayerSpec(TensorSpec(4, 64), TensorSpec(4, 64)), [90, 17, 0, 3], window=window)


def test_soft_cap_sees_what_centring_took() -> None:
    check(LayerSpec(TensorSpec(4, 64, centred=True, rotated=True), TensorSpec(8, 64)), [40, 9], soft_cap=2.0)


def test_many_requests() -> None:
    check(LayerSpec(TensorSpec(2, 64), TensorSpec(2, 64)), [1, 0, 3] * 50, heads=1, group=2)


def test_a_query_of_any_magnitude() -> None:
    torch.manual_seed(0)
    spec = LayerSpec(TensorSpec(8, 64), TensorSpec(8, 64))
    key, value = torch.randn(2, 40, 1, 64).half()
    pool = pack_rows(key * 1e-3, value, spec)
    query = torch.randn(1, 2, 64)
    indptr = torch.tensor([0, 40], dtype=torch.int32)
    for factor in (1e-20, 1.0, 1e6):
        got = decode(query * factor, pool, spec, 1, indptr, torch.arange(40), launch=SMALL)
        expected = attend(query * factor, pool, spec, 1)
        assert torch.allclose(got, expected, atol=1e-4)


def test_a_workspace_is_shared_and_results_repeat() -> None:
    torch.manual_seed(0)
    spec = LayerSpec(TensorSpec(4, 64), TensorSpec(4, 64))
    pool = pack_rows(*torch.randn(2, 50, 1, 64).half(), spec)
    query = torch.randn(2, 2, 64)
    indptr = torch.tensor([0, 20, 50], dtype=torch.int32)
    workspace = decode_workspace(2, 3, 2, 64, SMALL, pool.device)
    for buffer in workspace:
        buffer.fill_(torch.nan)
    first = decode(query, pool, spec, 1, indptr, torch.arange(50), launch=SMALL, workspace=workspace)
    again = decode(query, pool, spec, 1, indptr, torch.arange(50), launch=SMALL, workspace=workspace)
    assert torch.equal(first, again)
    assert torch.equal(first, decode(query, pool, spec, 1, indptr, torch.arange(50), launch=SMALL))


def test_results_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    spec, lengths, most = LayerSpec(TensorSpec(4, 64), TensorSpec(2, 64, rotated=True)), [3, 70, 33, 1, 90, 20], 12
    pool = pack_rows(*torch.randn(2, sum(lengths), 1, 64).half(), spec)
    query, slots = torch.randn(len(lengths), 4, 64), torch.randperm(sum(lengths))
    indptr = torch.tensor([0, *lengths]).cumsum(0).int()
    counts = torch.tensor([-(-length // 8) for length in lengths], dtype=torch.int32)
    together = decode(query, pool, spec, 1, indptr, slots, launch=SMALL, num_kv_splits=counts, max_kv_splits=most)
    for request in range(len(lengths)):
        one = slice(request, request + 1)
        part = slots[indptr[request] : indptr[request + 1]]
        alone = decode(
            query[one], pool, spec, 1, indptr[request : request + 2] - indptr[request], part, launch=SMALL,
            num_kv_splits=counts[one], max_kv_splits=most,
        )  # fmt: skip
        assert torch.equal(alone, together[one]), request


def test_what_merges_splits_of_a_request_does_not_depend_on_the_batch() -> None:
    """The interpreter adds in one order whatever the tile; a GPU does not."""
    used = []
    spec, pool = LayerSpec(TensorSpec(4, 64), TensorSpec(4, 64)), torch.zeros(8, 72, dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            merge_module, "merge_constants", lambda *a, **k: used.append(merge_constants(*a, **k)) or used[-1]
        )
        for batch in (1, 8):
            decode(
                torch.zeros(batch, 2, 64), pool, spec, 1, torch.arange(batch + 1, dtype=torch.int32), torch.arange(8),
                launch=SMALL, num_kv_splits=torch.ones(batch, dtype=torch.int32), max_kv_splits=40,
            )  # fmt: skip
    assert used[0] == used[1]


def test_rows_beyond_two_gigabytes() -> None:
    spec = LayerSpec(TensorSpec(4, 128), TensorSpec(4, 128))
    rows = 2**31 // spec.bytes_per_token(4, 128) + 10
    pool = torch.empty(rows, spec.bytes_per_token(4, 128), dtype=torch.uint8)
    slots = torch.arange(rows - 5, rows)
    pool[slots] = pack_rows(*torch.randn(2, 5, 4, 128).half(), spec)
    query = torch.randn(1, 4, 128)
    got = decode(query, pool, spec, 4, torch.tensor([0, 5], dtype=torch.int32), slots, launch=SMALL)
    assert torch.allclose(got, attend(query, pool[slots], spec, 4), atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    spec = LayerSpec(TensorSpec(4, 64), TensorSpec(4, 64))
    pool = torch.zeros(4, spec.bytes_per_token(2, 64), dtype=torch.uint8)
    indptr = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(LayoutError, match="multiple of 2"):
        decode(torch.zeros(1, 3, 64), pool, spec, 2, indptr, torch.arange(1))
    with pytest.raises(LayoutError, match="max_kv_splits"):
        decode(torch.zeros(1, 2, 64), pool, spec, 2, indptr, torch.arange(1), max_kv_splits=2)
