"""Bytes by rank and stage against the layout, and token capacity."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtuner_kernels.layout import LayerSpec, bytes_per_token
from kvtuner_search.errors import UsageError
from kvtuner_search.serving.capacity import StageBytes, basis_bytes, heads_per_rank, stage_bytes, token_capacity

KINDS = [
    LayerSpec.parse(text)
    for text in (
        "16/16", "8-g64-asym/4-g64-sym", "4-g128-asym/2-g32-asym", "2-g64-sym/16", "b65443322/b54433221", "b65443322/16",
        "4-g64-asym-c/b83322211",
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("kv_heads", "tp_size", "expected"), [(4, 1, 4), (4, 2, 2), (4, 4, 1), (4, 8, 1), (6, 3, 2), (1, 4, 1)]
)
def test_heads_of_a_rank(kv_heads: int, tp_size: int, expected: int) -> None:
    assert heads_per_rank(kv_heads, tp_size) == expected


@pytest.mark.parametrize(("kv_heads", "tp_size"), [(4, 3), (6, 4), (2, 5)])
def test_heads_that_do_not_divide_are_refused(kv_heads: int, tp_size: int) -> None:
    with pytest.raises(UsageError, match=f"{kv_heads} KV heads cannot be spread over {tp_size} ranks"):
        heads_per_rank(kv_heads, tp_size)


@given(
    st.lists(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5), min_size=1, max_size=4),
    st.sampled_from([1, 2, 4]),
)
def test_stages_add_up_to_the_layout(groups: list[list[LayerSpec]], kv_heads: int) -> None:
    layers = [layer for group in groups for layer in group]
    stages = stage_bytes(layers, [len(group) for group in groups], kv_heads, 128)
    assert [stage.stored for stage in stages] == [bytes_per_token(group, kv_heads, 128) for group in groups]
    assert [stage.raw for stage in stages] == [len(group) * 2 * kv_heads * 128 * 2 for group in groups]
    assert [layers[stage.first : stage.end] for stage in stages] == groups
    assert sum(stage.stored for stage in stages) == bytes_per_token(layers, kv_heads, 128)


def test_bases_are_those_of_the_banded_sides_and_the_ranks_heads() -> None:
    """One side of a head of 128 channels takes 4 x 129 x 128 numbers: what the file holds, and what the kernels need of it."""
    one = 4 * 4 * 129 * 128
    stages = stage_bytes(KINDS, [5, 2], 2, 128)
    assert [stage.bases for stage in stages] == [2 * 2 * one, 2 * 2 * one]
    assert basis_bytes([LayerSpec.parse("b65443322/b54433221")] * 28, 4, 128) == 28 * 2 * 4 * one


def test_banded_sides_that_share_words_take_fewer_bytes_than_two_that_do_not() -> None:
    """The bytes of a layer are no sum over its sides: bands of 17 and 7 bits take two words of 16 together, two and one apart."""
    both, key, value = (LayerSpec.parse(text) for text in ("b53333000/b32200000", "b53333000/16", "16/b32200000"))
    raw = LayerSpec()
    sizes = [spec.bytes_per_token(4, 128) for spec in (both, key, value, raw)]
    assert sizes[0] < sizes[1] + sizes[2] - sizes[3]
    assert stage_bytes([both], [1], 4, 128)[0].stored == sizes[0]


def test_qwen_at_four_bits_holds_what_the_issue_asks_for() -> None:
    """K4V4 with one asymmetric group per head: 544 bytes a layer of 2,048, so 3.76 times the tokens."""
    stage = stage_bytes([LayerSpec.parse("4-g128-asym/4-g128-asym")] * 28, [28], 4, 128)
    assert stage == [StageBytes(0, 28, 28 * 544, 57344, 0)]
    budget = 1_034_151 * 57344  # bytes for which bf16 was seen to report 1,034,151 tokens
    assert token_capacity(budget, stage[0].raw) == 1_034_151
    assert token_capacity(budget, stage[0].stored) >= 0.99 * 1_034_151 * 16 / 4.25


@given(
    st.integers(0, 10**9),
    st.integers(1, 5000),
    st.sampled_from([1, 16, 64]),
    st.one_of(st.none(), st.integers(1, 10**6)),
)
def test_capacity_is_the_most_whole_pages_that_fit(cache: int, nbytes: int, page: int, limit: int | None) -> None:
    tokens = token_capacity(cache, nbytes, page, limit)
    assert tokens % page == 0
    assert limit is None or tokens <= limit
    assert tokens * nbytes <= cache
    more = tokens + page
    assert more * nbytes > cache or (limit is not None and more > limit)


def test_no_memory_is_no_token() -> None:
    assert token_capacity(-5, 100) == 0
