"""SGLang's two pools of models that forget what left a window, both over packed rows: slots, bytes, attention, copies and capacity."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exact_bases import eighths, made_up_centres
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor import pool_configurator
from torch import Tensor

from kvtuner_kernels.layout import LayerSpec, bytes_per_token
from kvtuner_kernels.reference import attend, pack_rows
from kvtuner_search.errors import UsageError
from kvtuner_search.serving.sglang import hooks, rank, v0_5_14
from kvtuner_search.serving.sglang.attention import PackedTorchBackend
from kvtuner_search.serving.sglang.rank import RankPlace, check_windows, rank_window_bytes, swa_pool_factory
from kvtuner_search.serving.sglang.swa_pool import PackedSWAPool

HEADS, GROUP, DIM, WINDOW = 2, 2, 64, 6
FULL_SIZE, WINDOW_SIZE = 48, 20
SPECS = [
    LayerSpec.parse(text)
    for text in ("b65443322/b54433221", "8-g64-asym-c/4-g64-asym", "4-g32-sym/b83322211", "8-g64-sym/8-g64-sym")
]
WINDOWED, FULL = [0, 2], [1, 3]
CENTRES = made_up_centres(SPECS, HEADS, DIM)
WHICH: Any = SimpleNamespace(layers=SPECS, centres=CENTRES)
PLACE = RankPlace(0, 4, 4, HEADS, DIM, DIM, 0, 1, torch.bfloat16, torch.bfloat16, "cpu", True, windowed=tuple(WINDOWED))


def made() -> tuple[PackedSWAPool, SWATokenToKVPoolAllocator]:
    pool = swa_pool_factory(WHICH, slice(0, HEADS))(
        size=FULL_SIZE, size_swa=WINDOW_SIZE, page_size=1, dtype=torch.bfloat16, head_num=HEADS, head_dim=DIM,
        swa_attention_layer_ids=WINDOWED, full_attention_layer_ids=FULL, enable_kvcache_transpose=False, device="cpu",
        enable_kv_cache_copy=False,
    )  # fmt: skip
    allocator = SWATokenToKVPoolAllocator(
        FULL_SIZE, WINDOW_SIZE, page_size=1, dtype=torch.bfloat16, device="cpu", kvcache=pool, need_sort=False
    )
    return pool, allocator


def layer(index: int, sinks: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        layer_id=index, tp_q_head_num=HEADS * GROUP, qk_head_dim=DIM, scaling=0.1, logit_cap=0.0, logit_capping_method="tanh",
        sliding_window_size=WINDOW - 1 if index in WINDOWED else -1, is_cross_attention=False, attn_type=AttentionType.DECODER,
        sinks=sinks,
    )  # fmt: skip


def test_each_layer_is_in_one_pool_and_bytes_are_what_the_layout_says() -> None:
    pool, _ = made()
    assert isinstance(pool, SWAKVPool)
    assert [pool.storage(index).spec for index in range(4)] == SPECS
    windows = bytes_per_token([SPECS[index] for index in WINDOWED], HEADS, DIM)
    others = bytes_per_token([SPECS[index] for index in FULL], HEADS, DIM)
    assert (rank_window_bytes(PLACE, WHICH), rank.bytes_per_token(SPECS, HEADS, DIM)) == (windows, windows + others)
    expected = (FULL_SIZE + 1) * others, (WINDOW_SIZE + 1) * windows
    assert pool.get_kv_size_bytes() == expected
    assert pool.row_bytes() == pool.predicted_bytes() == sum(expected)
    assert pool.get_value_buffer(3).shape == (0, HEADS, DIM)  # nothing but our backends can read a row
    assert pool.dtype == torch.uint8


def serve(tokens: int, chunk: int) -> tuple[PackedSWAPool, Tensor, list[Tensor]]:
    """One request through a real allocator: chunks, then decode, slots taken back as they leave the window.

    Returns:
        the pool, the request's slots, and the outputs of each layer.
    """
    pool, allocator = made()
    generator = torch.Generator().manual_seed(1)
    key, value = eighths(2, tokens, HEADS, DIM, generator=generator).to(torch.bfloat16)
    query = torch.randn(tokens, HEADS * GROUP, DIM, generator=generator).bfloat16()
    sinks = torch.randn(HEADS * GROUP, generator=generator)
    table = torch.zeros(2, 64, dtype=torch.int32)
    backend = PackedTorchBackend.__new__(PackedTorchBackend)
    backend.token_to_kv_pool, backend.req_to_token_pool = pool, SimpleNamespace(req_to_token=table)
    backend.use_sliding_window_kv_pool = True
    found: list[list[Tensor]] = [[] for _ in SPECS]
    done = freed = 0
    while done < tokens:
        new = min(chunk, 20 - done) if done < 20 else 1
        slots = allocator.alloc(new)
        assert slots is not None
        table[1, done : done + new] = slots
        batch = SimpleNamespace(
            out_cache_loc=slots, req_pool_indices=torch.tensor([1]), seq_lens=torch.tensor([done + new]), batch_size=1,
            extend_seq_lens=torch.tensor([new]), extend_prefix_lens=torch.tensor([done]),
            positions=torch.arange(done, done + new),
        )  # fmt: skip
        backend.init_forward_metadata(batch)
        forward = backend.forward_extend if done < 20 else backend.forward_decode
        part = slice(done, done + new)
        for index in range(4):
            out = forward(query[part].flatten(1), key[part], value[part], layer(index), batch, sinks=sinks)
            found[index].append(out.view(new, -1, DIM))
        done += new
        if done - WINDOW + 1 > freed:  # what the next query does not see
            allocator.free_swa(table[1, freed : done - WINDOW + 1].long())
            freed = done - WINDOW + 1
    for index, spec in enumerate(SPECS):
        rows = pack_rows(key, value, spec, CENTRES[index], torch.arange(tokens) == 0)
        expected = attend(
            query, rows, spec, HEADS, CENTRES[index], softmax_scale=0.1, window=WINDOW if index in WINDOWED else 0,
            sinks=sinks, dtype=torch.bfloat16,
        )  # fmt: skip
        torch.testing.assert_close(torch.cat(found[index]).float(), expected, rtol=2**-7, atol=2**-7)
    return pool, table[1, :tokens].long(), [rows]


@pytest.mark.parametrize("chunk", [20, 7, 1])
def test_a_request_beyond_the_window_reads_what_it_should(chunk: int) -> None:
    """The windows' pool is smaller than the request: its slots are used again."""
    pool, slots, _ = serve(40, chunk)
    kept = pool.slots_of(0, slots) > 0
    assert kept.tolist() == [False] * (40 - WINDOW + 1) + [True] * (WINDOW - 1)
    assert torch.equal(pool.slots_of(1, slots), slots)


def test_rows_travel_to_the_host_and_back_where_the_window_kept_them() -> None:
    pool, slots, _ = serve(40, 20)
    before = [pool.storage(index).rows[pool.slots_of(index, slots)].clone() for index in range(4)]
    saved = pool.get_cpu_copy(slots)
    kept = pool.slots_of(0, slots) > 0
    for index in range(4):
        pool.storage(index).rows[pool.slots_of(index, slots)] = 0
    mapping = pool.full_to_swa_index_mapping
    mapping[slots[-2]] = 0  # one more has left the window meanwhile
    kept[-2] = False
    pool.load_cpu_copy(saved, slots)
    for index in range(4):
        rows, chosen = pool.storage(index).rows, kept if index in WINDOWED else torch.ones_like(kept)
        assert torch.equal(rows[pool.slots_of(index, slots[chosen])], before[index][chosen])


def test_first_tokens_need_their_positions_in_both_pools() -> None:
    pool, allocator = made()
    slots = allocator.alloc(2)
    loc = KVWriteLoc(slots, pool.translate_loc_from_full_to_swa(slots))
    key, value = torch.zeros(2, 2, HEADS, DIM, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="the positions of 2 tokens in their sequences are unknown"):
        pool.set_kv_buffer(layer(0), loc, key, value)
    with pool.storing(torch.arange(2)):
        pool.set_kv_buffer(layer(0), loc, key, value)


@pytest.mark.parametrize("windowed", [(), (0, 1, 2, 3)])
def test_a_stage_with_one_kind_only_is_refused(windowed: tuple[int, ...]) -> None:
    check_windows(PLACE)
    place = RankPlace(0, 4, 4, HEADS, DIM, DIM, 0, 1, torch.bfloat16, torch.bfloat16, "cpu", True, windowed=windowed)
    with pytest.raises(UsageError, match=r"layers 0 to 3 .* choose another --pp-size"):
        check_windows(place)


@pytest.mark.parametrize("capped", [False, True])
def test_capacity_is_bytes_over_bytes(capped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own configurators under our hooks; the next stage's first layer, which SGLang counts too, does not count."""
    full, windows, bases, available, ratio = 700, 300, 5000, 10_000_000, 0.25
    monkeypatch.setattr(pool_configurator, "get_attention_tp_size", lambda: 1)
    monkeypatch.setattr(v0_5_14, "_place", lambda runner: None)
    monkeypatch.setattr(hooks, "_active", [None])
    monkeypatch.setattr(rank, "served_profile", lambda configuration: None)
    monkeypatch.setattr(rank, "check_windows", lambda place: None)
    monkeypatch.setattr(rank, "rank_bytes_per_token", lambda place, which: full + windows)
    monkeypatch.setattr(rank, "rank_window_bytes", lambda place, which: windows)
    monkeypatch.setattr(rank, "rank_basis_bytes", lambda place, which: bases)
    model = SimpleNamespace(
        full_attention_layer_ids=[1, 3], swa_attention_layer_ids=[0, 2, 4], head_dim=DIM, v_head_dim=DIM, swa_head_dim=DIM,
        swa_v_head_dim=DIM, get_num_kv_heads=lambda tp: HEADS, get_swa_num_kv_heads=lambda tp: HEADS,
    )  # fmt: skip
    arguments = SimpleNamespace(
        swa_full_tokens_ratio=ratio, max_running_requests=4, chunked_prefill_size=64, disable_overlap_schedule=True,
        speculative_num_draft_tokens=None, speculative_algorithm=None, disaggregation_mode="null", disable_radix_cache=True,
    )  # fmt: skip
    runner = SimpleNamespace(
        model_config=model, kv_cache_dtype=torch.bfloat16, server_args=arguments, end_layer=4, is_draft_worker=False,
        page_size=1, dp_size=1, sliding_window_size=WINDOW - 1,
    )  # fmt: skip
    plain, tight = pool_configurator.HybridSWAPoolConfigurator, pool_configurator.SWAChunkCapPoolConfigurator
    original = plain.__init__
    monkeypatch.setattr(plain, "__init__", lambda self, mr: v0_5_14._measure_windows(original, self, mr))
    configurator = (tight if capped else plain)(runner)
    sized = hooks.leave_room(type(configurator).calculate_pool_sizes, configurator, available, 1)
    assert (model.full_attention_layer_ids, model.swa_attention_layer_ids) == ([1, 3], [0, 2])
    if capped:
        left = available - bases - sized.swa_max_total_num_tokens * windows
        assert sized.full_max_total_num_tokens == left // full
    else:
        assert sized.full_max_total_num_tokens == int((available - bases) // (full + ratio * windows))
        assert sized.swa_max_total_num_tokens == int(sized.full_max_total_num_tokens * ratio)
