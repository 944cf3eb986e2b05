"""Whatever SGLang does with its slots, a request's rows are what the offline reference stores for its tokens, the first one as the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from schedules import SPECS, Naive, Serving
from sglang.srt.mem_cache.allocator import paged
from sglang.srt.server_args import get_global_server_args, set_global_server_args_for_scheduler
from torch import Tensor

from kvtuner_search.serving.sglang.pool import PackedPool

STEPS = 100
EVENTS = {
    "first token stored", "prefix in the radix cache", "chunk", "mixed batch", "retracted", "aborted", "chunked request aborted",
    "evicted", "travelled", "whole prompt cached",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _plain_allocator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SGLang's paged allocator without its Triton kernels, and its global arguments as they were afterwards."""
    monkeypatch.setattr(paged, "alloc_extend_kernel", Naive(True))
    monkeypatch.setattr(paged, "alloc_decode_kernel", Naive(False))
    try:
        before = get_global_server_args()
    except ValueError:
        before = None
    yield
    set_global_server_args_for_scheduler(before)


@pytest.mark.parametrize("page", [1, 64])
def test_rows_are_the_offline_references_after_any_schedule(page: int) -> None:
    seen: dict[str, int] = {}
    for seed in range(4):
        serving = Serving(page, seed)
        serving.run(STEPS)
        serving.drain()
        seen = {what: seen.get(what, 0) + serving.seen.get(what, 0) for what in {*seen, *serving.seen}}
    wanted = EVENTS | ({"moved"} if page == 1 else set())
    assert {what for what in wanted if not seen.get(what)} == set(), "the schedules did not come to that: add steps"


Storing = Callable[..., AbstractContextManager[None]]


def none_is_first(original: Storing, pool: PackedPool, positions: Tensor | None, prefixes: Tensor | None = None) -> Any:
    """Nobody passes positions on."""
    return original(pool, None)


def every_chunk_begins(
    original: Storing, pool: PackedPool, positions: Tensor | None, prefixes: Tensor | None = None
) -> Any:
    """Positions are counted from the beginning of the chunk, not of the sequence."""
    if positions is not None:
        goes_on = torch.cat([torch.zeros(1, dtype=torch.bool), positions.diff() == 1])
        positions = torch.where(goes_on, positions + 1, 0)
    return original(pool, positions)


@pytest.mark.parametrize("fault", [none_is_first, every_chunk_begins])
def test_wrong_positions_are_noticed(monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any]) -> None:
    original = PackedPool.storing
    monkeypatch.setattr(PackedPool, "storing", lambda pool, *said: fault(original, pool, *said))
    with pytest.raises(AssertionError, match=r"(rows|attention) of"):
        Serving(1, 0).run(STEPS)


def test_a_mark_that_outlives_its_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if first tokens stood in a table of slots that is never cleared: a slot's next token would still be one."""
    original = PackedPool.set_kv_buffer

    def sticky(pool: PackedPool, layer: Any, loc: Any, *sides: Any, **more: Any) -> None:
        rows, spec = pool.layers[layer.layer_id].rows, SPECS[layer.layer_id]
        at = spec.row(pool.head_num, pool.head_dim)
        signs = [  # bytes whose top bit is that of a scale
            begin + head * step + 2 * (digits.word + 8 // digits.bits) - 1
            for digits, begin, step in zip(
                spec.digits(pool.head_dim), (at.key_codes, at.value_codes), (at.key_head, at.value_head), strict=True
            )
            for head in range(pool.head_num)
            if digits is not None
        ]
        marks = rows[:, signs] & 128
        original(pool, layer, loc, *sides, **more)
        rows[:, signs] |= marks

    Serving(1, 0, dirty=False).run(STEPS)
    monkeypatch.setattr(PackedPool, "set_kv_buffer", sticky)
    with pytest.raises(AssertionError, match=r"(rows|attention) of"):
        Serving(1, 0, dirty=False).run(STEPS)
