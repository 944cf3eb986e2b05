"""The pool on its own: what a rank stores, and that rows keep what they hold wherever they are copied."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exact_bases import eighths, made_up_centres
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator

from kvtuner_kernels.bands import basis, is_first, unpack_bands
from kvtuner_kernels.layout import LayerSpec, bytes_per_token
from kvtuner_kernels.reference import Centres, pack_rows, unpack_rows
from kvtuner_search.errors import ExitCode
from kvtuner_search.serving.capacity import basis_bytes
from kvtuner_search.serving.sglang import launcher
from kvtuner_search.serving.sglang.pool import PackedPool, local_heads
from kvtuner_search.serving.sglang.rank import RankPlace, pool_factory

HEADS, DIM, SIZE, PAGE = 4, 64, 40, 8
SPECS = [
    LayerSpec.parse(text)
    for text in (
        "4-g64-asym-c-r/4-g32-sym", "16/2-g64-asym", "8-g64-sym/16", "2-g32-asym-c-x0.8/8-g64-asym-c",
        "b65443322/b54433221", "b83322211/16", "8-g32-asym-c/b44332200", "b54321000/b87654321",
    )
]  # fmt: skip
SLOTS = torch.tensor([3, 40, 17, 9, 47, 1, 22])
POSITIONS = torch.tensor([5, 0, 1, 2, 0, 0, 31])  # of the tokens that `fill` stores


def centres() -> dict[int, Centres]:
    return made_up_centres(SPECS, HEADS, DIM)


def make(heads: slice = slice(0, HEADS), start: int = 0, end: int = len(SPECS), **named: Any) -> PackedPool:
    return PackedPool(
        SIZE, page_size=PAGE, dtype=torch.bfloat16, head_num=heads.stop - heads.start, head_dim=DIM, layer_num=end - start,
        device="cpu", enable_memory_saver=False, start_layer=start, end_layer=end, layers=SPECS[start:end],
        centres=centres(), heads=heads, **named,
    )  # fmt: skip


def fill(pool: PackedPool, heads: slice = slice(0, HEADS)) -> torch.Tensor:
    """Store the same keys and values in every layer that the pool has; returns the slots."""
    key, value = eighths(2, 7, HEADS, DIM, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    for layer in range(pool.start_layer, pool.start_layer + pool.layer_num):
        before = key.clone(), value.clone()
        with pool.storing(POSITIONS):
            pool.set_kv_buffer(SimpleNamespace(layer_id=layer), KVWriteLoc(SLOTS), key[:, heads], value[:, heads])
        assert torch.equal(key, before[0])
        assert torch.equal(value, before[1])
    return SLOTS


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
        (row.key_codes, row.key_head),
        (row.value_codes, row.value_head),
        (row.key_metadata, spec.key.metadata_bytes(DIM)),
        (row.value_metadata, spec.value.metadata_bytes(DIM)),
    ):
        parts.append(rows[:, at : at + heads * nbytes].view(len(rows), heads, nbytes)[:, chosen].flatten().tolist())
    return parts


def marks(pool: PackedPool, layer: int, slots: torch.Tensor) -> list[bool]:
    """Which of the rows say that they hold first tokens; all heads and sides must say the same."""
    spec, _, rows = pool.storage(layer)
    row = spec.row(pool.head_num, DIM)
    said = [
        is_first(
            unpack_bands(
                rows[slots, at : at + pool.head_num * step].unflatten(1, (pool.head_num, -1)), spec, index, DIM
            ).scale
        )
        for index, (side, at, step) in enumerate(
            ((spec.key, row.key_codes, row.key_head), (spec.value, row.value_codes, row.value_head))
        )
        if side.banded
    ]
    together = torch.cat(said, 1)
    assert torch.equal(together.all(1), together.any(1))
    return together.all(1).tolist()


BANDED = [layer for layer, spec in enumerate(SPECS) if spec.key.banded or spec.value.banded]


def test_tokens_at_position_0_are_stored_as_first_tokens_and_no_others() -> None:
    """Bit for bit as the reference packs them; what is stored next in the same slots starts afresh."""
    pool = make()
    slots = fill(pool)
    key, value = eighths(2, 7, HEADS, DIM, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    for layer in BANDED:
        expected = pack_rows(key, value, SPECS[layer], centres()[layer], POSITIONS == 0)
        assert torch.equal(pool.storage(layer).rows[slots], expected)
        assert marks(pool, layer, slots) == (POSITIONS == 0).tolist()
        with pool.storing(None):  # as decode does
            pool.set_kv_buffer(SimpleNamespace(layer_id=layer), slots, key, value)
        assert marks(pool, layer, slots) == [False] * 7
        expected = pack_rows(key, value, SPECS[layer], centres()[layer])
        assert torch.equal(pool.storage(layer).rows[slots], expected)


def test_tokens_of_which_nobody_says_where_they_are_are_not_stored_in_a_basis() -> None:
    pool = make()
    key, value = torch.zeros(2, 7, HEADS, DIM, dtype=torch.bfloat16)
    for layer in BANDED:
        one, before = SimpleNamespace(layer_id=layer), pool.storage(layer).rows.clone()
        with pytest.raises(
            RuntimeError, match="the positions of 7 tokens in their sequences are unknown: layers in a fitted basis"
        ):
            pool.set_kv_buffer(one, SLOTS, key, value)
        with pool.storing(POSITIONS[:6]), pytest.raises(RuntimeError, match="there are 6 positions for 7 tokens"):
            pool.set_kv_buffer(one, SLOTS, key, value)
        with pytest.raises(RuntimeError, match="are unknown"):  # what was said before is over
            pool.set_kv_buffer(one, SLOTS, key, value)
        assert torch.equal(pool.storage(layer).rows, before)
    pool.set_kv_buffer(SimpleNamespace(layer_id=0), SLOTS, key, value)  # positions are nothing to other layers


def test_a_buffer_of_positions_may_be_longer_than_the_batch() -> None:
    """As a graph's is, which ends in padding."""
    pool, whole = make(), make()
    slots = fill(whole)
    key, value = eighths(2, 7, HEADS, DIM, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    with pool.storing(torch.cat([POSITIONS, torch.zeros(9, dtype=torch.int64)])):
        pool.set_kv_buffer(SimpleNamespace(layer_id=BANDED[0]), slots, key, value)
    assert torch.equal(pool.storage(BANDED[0]).rows, whole.storage(BANDED[0]).rows)


def test_a_model_that_counts_its_positions_otherwise_is_noticed() -> None:
    """Gemma 3's class for images adds one in place: no token would be a first one."""
    key, value = torch.zeros(2, 7, HEADS, DIM, dtype=torch.bfloat16)
    one, new = SimpleNamespace(layer_id=BANDED[0]), torch.arange(7)
    pool = make()
    with pool.storing(torch.zeros(7, dtype=torch.int64), torch.tensor([0])):  # SGLang tries a model out so
        pool.set_kv_buffer(one, SLOTS, key, value)
    with (
        pool.storing(new + 1, torch.tensor([0])),
        pytest.raises(RuntimeError, match="after 0 stored tokens the model counts from"),
    ):
        pool.set_kv_buffer(one, SLOTS, key, value)
    with pool.storing(new + 12, torch.tensor([12, 40])):
        pool.set_kv_buffer(one, SLOTS, key, value)


def test_bases_live_beside_the_rows_and_take_the_bytes_that_capacity_reckons_with() -> None:
    pool = make(slice(0, 2))
    tensors = {}
    for layer in pool.layers:
        for side, centre in zip((layer.spec.key, layer.spec.value), layer.centres, strict=True):
            if side.banded:
                assert centre is not None
                parts = [centre, *basis(centre)]
                assert all(part.device == layer.rows.device for part in parts)
                tensors.update({part.data_ptr(): part.nbytes for part in parts})
    assert sum(tensors.values()) == basis_bytes(SPECS, 2, DIM)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda joined: joined[:, 3].copy_(joined[:, 4]), "the basis cannot be inverted"),
        (lambda joined: joined[2, -1, 5].fill_(torch.nan), "has a number that is not finite"),
    ],
)
def test_a_basis_that_cannot_be_used_ends_the_rank_before_it_serves(
    change: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = centres()
    change(broken[4].value)
    place = RankPlace(2, 6, len(SPECS), HEADS, DIM, DIM, 1, 2, torch.bfloat16, torch.bfloat16, "cpu", True)
    which: Any = SimpleNamespace(layers=SPECS, centres=broken)
    with pytest.raises(SystemExit) as ended, launcher.refusing():
        pool_factory(place, which)(
            SIZE, page_size=PAGE, dtype=torch.bfloat16, head_num=2, head_dim=DIM, layer_num=4, device="cpu",
            enable_memory_saver=False, start_layer=2, end_layer=6,
        )  # fmt: skip
    assert ended.value.code == ExitCode.DATA
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kvtuner-search: layers.4.value of the transforms file: ")
    assert said in line
    assert "restore the file that was written with the profile" in line


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
    assert all(marks(pool, layer, elsewhere) == (POSITIONS == 0).tolist() for layer in BANDED)


@pytest.mark.parametrize(("page", "available"), [(1, 10_000_000), (64, 10_000_000), (1, 12_345)])
def test_capacity_is_bytes_over_bytes(page: int, available: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own configurator under our hooks: free bytes less the bases, over packed bytes, with a bf16 draft model's bytes added."""
    from sglang.srt.model_executor import pool_configurator

    from kvtuner_search.serving.sglang import hooks, rank, v0_5_14

    raw = 2 * HEADS * DIM * 2
    packed, bases = bytes_per_token(SPECS, HEADS, DIM), 5000
    monkeypatch.setattr(pool_configurator, "get_attention_tp_size", lambda: 1)
    monkeypatch.setattr(v0_5_14, "_place", lambda runner: None)
    monkeypatch.setattr(hooks, "_active", [None])
    monkeypatch.setattr(rank, "served_profile", lambda configuration: None)
    monkeypatch.setattr(rank, "rank_bytes_per_token", lambda place, which: packed)
    monkeypatch.setattr(rank, "rank_basis_bytes", lambda place, which: bases)
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
        sized = hooks.leave_room(DefaultPoolConfigurator.calculate_pool_sizes, configurator, available, page)
        assert sized.max_total_num_tokens == (available - bases) // (packed + draft_layers * raw) // page * page
    draft = DefaultPoolConfigurator.__new__(DefaultPoolConfigurator)
    draft._cell_size = raw
    sized = hooks.leave_room(DefaultPoolConfigurator.calculate_pool_sizes, draft, available, page)
    assert sized.max_total_num_tokens == available // raw // page * page
