"""Layers of several kinds: sinks, windows, soft caps and masks together, in decode and extend, and what must not be read."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtuner_kernels.decode import decode
from kvtuner_kernels.extend import extend
from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_kernels.reference import attend, pack_rows
from kvtuner_kernels.tuning import DecodeLaunch
from tests.kernels.fitted import made_up
from tests.kernels.interpreted.test_triton_decode import SMALL
from tests.kernels.interpreted.test_triton_decode import check as check_decode
from tests.kernels.interpreted.test_triton_extend import check as check_extend

PLAIN = LayerSpec.parse("4-g64-asym/4-g64-asym")
BANDED = LayerSpec.parse("b65443322/b54433221")
HALF_BANDED = ("4-g64-asym-c-r/b54433221", "b65443322/8-g32-sym-c")
SPECS = st.sampled_from(
    ["4-g64-asym/4-g64-asym", "4-g32-asym-c-r/8-g64-sym-c-r", "b65443322/b54433221", *HALF_BANDED]
).map(LayerSpec.parse)
SHAPES = st.sampled_from([(1, 4), (2, 3), (2, 1)])  # KV heads, query heads of each
CAPS, WINDOWS, SINKS = st.sampled_from([0.0, 5.0]), st.sampled_from([0, 1, 7, 100]), st.sampled_from([0.0, 3.0])


@settings(deadline=None, max_examples=16)
@given(SPECS, SHAPES, CAPS, WINDOWS, SINKS, st.lists(st.integers(0, 40), min_size=1, max_size=2), st.integers(0, 4))
def test_decode(
    spec: LayerSpec, shape: tuple[int, int], cap: float, window: int, sinks: float, lengths: list[int], splits: int
) -> None:
    counts = [splits] * len(lengths) if splits else None
    check_decode(spec, lengths, *shape, soft_cap=cap, window=window, sinks=sinks, num_kv_splits=counts)


@settings(deadline=None, max_examples=24)
@given(
    SPECS,
    SHAPES,
    CAPS,
    WINDOWS,
    SINKS,
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1, max_size=2),
    st.booleans(),
    st.sampled_from(["", "chunk", "all"]),
    st.sampled_from([0, 5]),
)
def test_extend(
    spec: LayerSpec,
    shape: tuple[int, int],
    cap: float,
    window: int,
    sinks: float,
    lengths: list[tuple[int, int]],
    as_stored: bool,
    mask: str,
    left_out: int,
) -> None:
    if as_stored and mask:  # the stored rows include the chunk, so the whole mask applies
        mask = "all"
    check_extend(
        spec, *map(list, zip(*lengths, strict=True)), *shape, as_stored=as_stored, mask=mask, soft_cap=cap, window=window,
        sinks=sinks, left_out=left_out, hidden=mask == "all" and sinks > 0,
    )  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("text", ["4-g{0}-asym-c-r/8-g{0}-asym-c-r", "b65443322/b54433221"])
def test_sinks_and_a_window_of_a_head_size_with_its_own_launch(text: str, head_dim: int) -> None:
    """One KV head with four query heads, as in Gemma 3 270M, where the head has 256 channels."""
    spec = LayerSpec.parse(text.format(head_dim))
    more = {"head_dim": head_dim, "soft_cap": 20.0, "window": 12, "sinks": 3.0}
    check_decode(spec, [30, 0, 3], 1, 4, launch=None, **more)
    check_extend(spec, [25, 0], [3, 2], 1, 4, **more)


@pytest.mark.parametrize("text", ["4-g64-asym-c-r/8-g64-asym-c-r", "b65443322/b54433221"])
@pytest.mark.parametrize("parts", ["few", "many"])
def test_sinks_meet_every_merge(text: str, parts: str) -> None:
    """Few partial results are merged by one warp, or together with the way out of the basis; many are not."""
    launch = DecodeLaunch(batch=4, runs=1, tokens=16, columns=8, stages=3, warps=4, programs=1 if parts == "few" else 8)
    check_decode(LayerSpec.parse(text), [70, 0, 3], 2, 2, launch=launch, sinks=3.0)


@pytest.mark.parametrize("splits", [None, 1, 2, 5])
@pytest.mark.parametrize("runs", [1, 4])
@pytest.mark.parametrize("spec", [PLAIN, BANDED], ids=str)
def test_a_sink_counts_once_however_many_splits_there_are(spec: LayerSpec, runs: int, splits: int | None) -> None:
    """With a query of 0 and values of 1, the output is ``n / (n + exp(sink))``."""
    torch.manual_seed(0)
    centres, lengths = made_up(spec, 1, 64), [90, 1, 20]
    value = torch.ones(sum(lengths), 1, 64).half()
    rows = pack_rows(torch.randn_like(value), value, spec, centres)
    sinks, indptr = torch.tensor([0.0, 3.0]), torch.tensor([0, *lengths]).cumsum(0).int()
    more = {}
    if splits:
        more = {"num_kv_splits": torch.full((3,), splits, dtype=torch.int32), "max_kv_splits": splits}
    launch = DecodeLaunch(batch=4, runs=runs, tokens=16, columns=8, stages=3, warps=4, programs=3)
    call = (torch.zeros(3, 2, 64), rows, spec, 1, indptr, torch.arange(len(rows)))
    without = decode(*call, centres=centres, launch=launch, **more)
    got = decode(*call, centres=centres, launch=launch, sinks=sinks, **more)
    for request, length in enumerate(lengths):
        share = length / (length + sinks.exp())
        assert torch.allclose(got[request], without[request] * share[:, None], rtol=1e-4, atol=1e-6), length


def test_sinks_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    spec, lengths = LayerSpec.parse("4-g64-asym/2-g64-asym-c-r"), [3, 30, 17]
    centres = made_up(spec, 1, 64)
    pool = pack_rows(*torch.randn(2, sum(lengths), 1, 64).half(), spec, centres)
    query, slots, sinks = torch.randn(3, 4, 64), torch.randperm(sum(lengths)), torch.randn(4)
    indptr = torch.tensor([0, *lengths]).cumsum(0).int()
    counts = torch.tensor([-(-length // 8) for length in lengths], dtype=torch.int32)
    more = {"centres": centres, "launch": SMALL, "max_kv_splits": 4, "sinks": sinks}
    together = decode(query, pool, spec, 1, indptr, slots, num_kv_splits=counts, **more)
    for request in range(3):
        one, part = slice(request, request + 1), slots[indptr[request] : indptr[request + 1]]
        ends = indptr[request : request + 2] - indptr[request]
        alone = decode(query[one], pool, spec, 1, ends, part, num_kv_splits=counts[one], **more)
        assert torch.equal(alone, together[one]), request


def test_sinks_of_sixteen_bits_and_strided_queries() -> None:
    """A centred key makes the merge read the query itself, which need not be dense."""
    torch.manual_seed(0)
    spec = LayerSpec.parse("4-g64-asym-c/4-g64-asym")
    centres = made_up(spec, 2, 64)
    rows, wide = pack_rows(*torch.randn(2, 9, 2, 64).half(), spec, centres), torch.randn(1, 4, 3, 64)
    sinks, indptr = torch.randn(4).half(), torch.tensor([0, 9], dtype=torch.int32)
    got = decode(wide[:, :, 1], rows, spec, 2, indptr, torch.arange(9), centres=centres, launch=SMALL, sinks=sinks)
    expected = attend(wide[:, :, 1], rows, spec, 2, centres, sinks=sinks)
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("spec", [PLAIN, BANDED, *map(LayerSpec.parse, HALF_BANDED)], ids=str)
def test_decode_reads_no_row_behind_the_window(spec: LayerSpec) -> None:
    torch.manual_seed(0)
    centres = made_up(spec, 1, 64)
    rows = pack_rows(*torch.randn(2, 80, 1, 64).half(), spec, centres)
    call = (spec, 1, torch.tensor([0, 50, 80], dtype=torch.int32), torch.arange(80))
    query, more = torch.randn(2, 2, 64), {"centres": centres, "launch": SMALL, "window": 9}
    clean = decode(query, rows, *call, **more)
    rows[:41] = rows[50:71] = 0xFF  # NaN as a scale
    assert torch.equal(decode(query, rows, *call, **more), clean)


@pytest.mark.parametrize("as_stored", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("window", "prefix"), [(5, 70), (40, 70), (3, 64), (200, 70)])
def test_extend_reads_no_row_behind_all_windows(as_stored: bool, masked: bool, window: int, prefix: int) -> None:
    """The same tiles are visited, so that results are the same bit for bit."""
    torch.manual_seed(0)
    new, stored = 4, prefix + (4 if as_stored else 0)
    rows = pack_rows(*torch.randn(2, stored, 1, 64).half(), PLAIN)
    chunk = torch.randn(2, new, 1, 64)
    more = {}
    if masked:
        mask = torch.rand(new, prefix + new) < 0.7
        more = {
            "custom_mask": mask.flatten(),
            "mask_indptr": torch.tensor([0, mask.numel()]),
            "skip_prefix_mask": False,
        }
    start = torch.tensor([0, 1], dtype=torch.int32)
    query, sides = torch.randn(new, 2, 64), (None, None) if as_stored else chunk.unbind()

    def run() -> torch.Tensor:
        return extend(
            query, *sides, rows, PLAIN, 1, start * new, start * stored, torch.arange(stored), new, window=window, **more
        )

    clean = run()
    rows[: max(0, prefix - window + 1)] = 0xFF
    assert torch.equal(run(), clean)


def test_extend_reads_no_key_of_the_chunk_behind_all_windows() -> None:
    torch.manual_seed(0)
    rows, query = torch.zeros(1, PLAIN.bytes_per_token(1, 64), dtype=torch.uint8), torch.randn(140, 1, 64)
    key, value = torch.randn(2, 140, 1, 64)
    start = torch.tensor([0, 1], dtype=torch.int32)
    call = (rows, PLAIN, 1, start * 140, start * 0, torch.arange(0), 140)
    clean = extend(query, key, value, *call, window=5)
    key[:124] = value[:124] = math.nan  # the second tile begins with query 128
    assert torch.equal(extend(query, key, value, *call, window=5)[128:], clean[128:])


@pytest.mark.parametrize("as_stored", [False, True])
@pytest.mark.parametrize("spec", [PLAIN, BANDED], ids=str)
def test_a_mask_of_all_tokens_over_the_slots_of_a_window(spec: LayerSpec, as_stored: bool) -> None:
    """SGLang gives the slots of a window, and a mask over the whole context beside ``window_kv_offsets``."""
    torch.manual_seed(0)
    prefixes, new, window = [40, 5, 60], 6, 10
    centres = made_up(spec, 1, 64)
    lengths = [prefix + new * as_stored for prefix in prefixes]
    slots = torch.randperm(sum(lengths))
    rows = pack_rows(*torch.randn(2, sum(lengths), 1, 64).half(), spec, centres)
    query, (key, value) = torch.randn(3 * new, 2, 64), torch.randn(2, 3 * new, 1, 64)
    masks = [torch.rand(new, prefix + new) < 0.6 for prefix in prefixes]
    for prefix, mask in zip(prefixes, masks, strict=True):
        mask[torch.arange(new), prefix + torch.arange(new)] = True
    starts = torch.tensor([0, *lengths]).cumsum(0)
    more = {
        "custom_mask": torch.cat([mask.flatten() for mask in masks]),
        "mask_indptr": torch.tensor([0, *(mask.numel() for mask in masks)]).cumsum(0),
        "skip_prefix_mask": False, "centres": centres, "window": window, "sinks": torch.randn(2),
    }  # fmt: skip

    def run(indptr: torch.Tensor, indices: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        sides = (None, None) if as_stored else (key, value)
        starts_of_new = torch.arange(4, dtype=torch.int32) * new
        return extend(query, *sides, rows, spec, 1, starts_of_new, indptr.int(), indices, new, **more, **options)

    left = [max(0, prefix - (window - 1)) for prefix in prefixes]
    kept = torch.cat([slots[starts[i] + left[i] : starts[i + 1]] for i in range(3)])
    ends = torch.tensor([0, *(length - out for length, out in zip(lengths, left, strict=True))]).cumsum(0)
    for dtype in (torch.int32, torch.int64):
        got = run(ends, kept, mask_offsets=torch.tensor(left, dtype=dtype))
        assert torch.allclose(got, run(starts, slots), atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    rows, start = torch.zeros(1, PLAIN.bytes_per_token(1, 64), dtype=torch.uint8), torch.tensor([0, 1]).int()
    query, call = torch.zeros(1, 2, 64), (rows, PLAIN, 1, start, torch.arange(1))
    with pytest.raises(LayoutError, match=r"attention sinks are torch.float32 \[3\], expected floating point \[2\]"):
        decode(query, *call, sinks=torch.zeros(3))
    chunked = (query, None, None, rows, PLAIN, 1, start, start, torch.arange(1), 1)
    with pytest.raises(LayoutError, match=r"attention sinks are torch.int64 \[2\]"):
        extend(*chunked, sinks=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(LayoutError, match="mask_offsets without a mask"):
        extend(*chunked, mask_offsets=torch.zeros(1, dtype=torch.int32))
