"""The pool on its own: what a rank stores, and that rows keep what they hold wherever they are copied."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator

from kvtuner_kernels.layout import LayerSpec, bytes_per_token
from kvtuner_kernels.reference import Centres, unpack_rows
from kvtuner_search.serving.sglang.pool import PackedPool, local_heads

HEADS, DIM, SIZE, PAGE = 4, 64, 40, 8
SPECS = [
    LayerSpec.parse(text)
    for text in ("4-g64-asym-c-r/4-g32-sym", "16/2-g64-asym", "8-g64-sym/16", "2-g32-asym-c-x0.8/8-g64-asym-c")
]


def centres() -> dict[int, Centres]:
    generator = torch.Generator().manual_seed(1)
    return {
        layer: Centres(
            *(torch.randn(HEADS, DIM, generator=generator) if side.centred else None for side in (spec.key, spec.value))
        )
        for layer, spec in enumerate(SPECS)
    }


def make(heads: slice = slice(0, HEADS), start: int = 0, end: int = len(SPECS), **named: Any) -> PackedPool:
    return PackedPool(
        SIZE, page_size=PAGE, dtype=torch.bfloat16, head_num=heads.stop - heads.start, head_dim=DIM, layer_num=end - start,
        device="cpu", enable_memory_saver=False, start_layer=start, end_layer=end, layers=SPECS[start:end],
        centres=centres(), heads=heads, **named,
    )  # fmt: skip


def fill(pool: PackedPool, heads: slice = slice(0, HEADS)) -> torch.Tensor:
    """Store the same keys and values in every layer that the pool has; returns the slots."""
    generator = torch.Generator().manual_seed(2)
    key, value = torch.randn(2, 7, HEADS, DIM, generator=generator).to(torch.bfloat16)
    slots = torch.tensor([3, 40, 17, 9, 47, 1, 22])
    for layer in range(pool.start_layer, pool.start_layer + pool.layer_num):
        before = key.clone(), value.clone()
        pool.set_kv_buffer(SimpleNamespace(layer_id=layer), KVWriteLoc(slots), key[:, heads], value[:, heads])
        assert torch.equal(key, before[0])
        assert torch.equal(value, before[1])
    return slots


def test_bytes_are_what_the_layout_says() -> None:
    pool = make()
    assert isinstance(pool, MHATokenToKVPool)
    assert pool.get_kv_size_bytes() == pool.predicted_bytes() == (SIZE + PAGE) * bytes_per_token(SPECS, HEADS, DIM)
    assert [rows.data_ptr() % 16 for rows in pool.k_buffer] == [0] * len(SPECS)
    assert pool.dtype == torch.uint8  # turns SGLang's own store of keys and values off


def test_only_our_backends_can_read_a_row() -> None:
    pool = make(start=2)
    for layer in range(
        len(SPECS)
    ):  # SGLang's Triton backend asks layer 0 for its channels, also where it is on another rank
        assert pool.get_key_buffer(layer).shape == pool.get_value_buffer(layer).shape == (0, HEADS, DIM)


def test_slots_that_were_not_written_keep_their_bytes() -> None:
    pool = make()
    for rows in pool.k_buffer:
        rows.fill_(0xA5)
    slots = fill(pool)
    others = [slot for slot in range(SIZE + PAGE) if slot not in slots.tolist()]
    assert all(bool((rows[others] == 0xA5).all()) for rows in pool.k_buffer)


@pytest.mark.parametrize(("ranks", "stages"), [(2, 1), (4, 1), (1, 2), (2, 2), (8, 1)])
def test_ranks_store_the_codes_of_one_rank_bit_for_bit(ranks: int, stages: int) -> None:
    """Given the same keys and values; the rows of a rank hold its heads and layers alone."""
    whole = make()
    slots = fill(whole)
    for stage in range(stages):
        start, end = stage * len(SPECS) // stages, (stage + 1) * len(SPECS) // stages
        for rank in range(ranks):
            heads = local_heads(HEADS, rank, ranks)
            part = make(heads, start, end)
            fill(part, heads)
            for layer in range(start, end):
                spec, all_centres, rows = whole.storage(layer)
                own = part.storage(layer)
                for side, mine in zip(
                    unpack_rows(rows[slots], spec, HEADS, DIM, all_centres),
                    unpack_rows(own.rows[slots], spec, heads.stop - heads.start, DIM, own.centres),
                    strict=True,
                ):
                    assert torch.equal(side[:, heads], mine)  # equal codes, scales and minima give equal numbers
                assert codes(rows[slots], spec, HEADS, heads) == codes(
                    own.rows[slots], spec, len(mine[0]), slice(0, 99)
                )


def codes(rows: torch.Tensor, spec: LayerSpec, heads: int, chosen: slice) -> list[list[int]]:
    """The bytes of some heads: codes and metadata of keys and values."""
    row = spec.row(heads, DIM)
    parts = []
    for at, nbytes in (
        (row.key_codes, spec.key.code_bytes(DIM)),
        (row.value_codes, spec.value.code_bytes(DIM)),
        (row.key_metadata, spec.key.metadata_bytes(DIM)),
        (row.value_metadata, spec.value.metadata_bytes(DIM)),
    ):
        parts.append(rows[:, at : at + heads * nbytes].view(len(rows), heads, nbytes)[:, chosen].flatten().tolist())
    return parts


def test_rows_move_and_travel_to_the_host_and_back() -> None:
    pool = make()
    slots = fill(pool)
    rows = [layer.rows[slots].clone() for layer in pool.layers]
    saved = pool.get_cpu_copy(slots)
    pool.move_kv_cache(slots + 0, slots.roll(1))
    assert all(torch.equal(layer.rows[slots], old.roll(1, 0)) for layer, old in zip(pool.layers, rows, strict=True))
    elsewhere = torch.tensor([30, 31, 32, 33, 34, 35, 36])
    pool.load_cpu_copy(saved, elsewhere)
    assert all(torch.equal(layer.rows[elsewhere], old) for layer, old in zip(pool.layers, rows, strict=True))


@pytest.mark.parametrize(("page", "available"), [(1, 10_000_000), (64, 10_000_000), (1, 12_345)])
def test_capacity_is_bytes_over_bytes(page: int, available: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own configurator under our hook: free bytes over packed bytes, with a bf16 draft model's bytes added."""
    from sglang.srt.model_executor import pool_configurator

    from kvtuner_search.serving.sglang import hooks, rank, v0_5_14

    raw = 2 * HEADS * DIM * 2
    packed = bytes_per_token(SPECS, HEADS, DIM)
    monkeypatch.setattr(pool_configurator, "get_attention_tp_size", lambda: 1)
    monkeypatch.setattr(v0_5_14, "_place", lambda runner: None)
    monkeypatch.setattr(hooks, "_active", [None])
    monkeypatch.setattr(rank, "served", lambda configuration: None)
    monkeypatch.setattr(rank, "measure", lambda place, which: packed)
    for draft_layers in (0, 1):
        runner = SimpleNamespace(
            mambaish_config=None,
            num_effective_layers=len(SPECS),
            kv_cache_dtype=torch.bfloat16,
            use_mla_backend=False,
            is_draft_worker=False,
            eagle_draft_num_layers=draft_layers,
            spec_algorithm=SimpleNamespace(is_eagle=lambda: True, is_standalone=lambda: False, is_dflash=lambda: False),
            model_config=SimpleNamespace(get_num_kv_heads=lambda tp: HEADS, head_dim=DIM, v_head_dim=DIM),
        )
        configurator = DefaultPoolConfigurator.__new__(DefaultPoolConfigurator)
        v0_5_14._measure_cell(DefaultPoolConfigurator.__init__, configurator, runner)
        found = configurator.calculate_pool_sizes(available, page).max_total_num_tokens
        assert found == available // (packed + draft_layers * raw) // page * page
