"""The rows of an ablation, their bits counted by hand, and the simulated ones against a cache that is kept token by token."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtuner_kernels.layout import LayoutError, TensorSpec
from kvtuner_kernels.reference import as_stored
from kvtuner_search.bench.ablate.simulate import SimulatedCache, per_channel
from kvtuner_search.bench.ablate.variants import BASELINE, FAMILIES, Scheme, catalogue
from kvtuner_search.errors import UsageError
from kvtuner_search.models.attention import _attention, tapped

QWEN_7B = SimpleNamespace(architecture="Qwen2ForCausalLM", num_layers=28, num_kv_heads=4, head_dim=128)
SMALL = SimpleNamespace(architecture="Qwen2ForCausalLM", num_layers=4, num_kv_heads=2, head_dim=64)
FOUR = TensorSpec(4, 64)


def test_every_family_of_the_adapter_has_rows_and_the_baseline_is_first() -> None:
    rows = catalogue(QWEN_7B)
    assert (rows[0].name, rows[0].family) == (BASELINE, "bits")
    assert {row.family for row in rows} == set(FAMILIES) - {"profile"}
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert (row.setting is None) != (row.scheme is None)
        if row.setting is not None:
            assert len(row.setting) == 28
            assert all(layer.row(4, 128).nbytes > 0 for layer in row.setting)
    names = {row.name for row in rows}
    assert {
        "KV8",
        "KV4",
        "KV2",
        "KV4 symmetric",
        "KV4 groups of 64",
        "KV4 centred keys",
        "KV4 per-channel keys",
    } <= names
    assert {"KV4 window 128", "KIVI-2", "Qwen2.5-7B-Instruct_pertoken_KVTuner4_0"} <= names


def test_a_model_without_published_presets_has_a_row_that_says_so() -> None:
    rows = catalogue(SMALL, ["published"])
    assert [row.name for row in rows] == [BASELINE, "published presets"]
    assert rows[1].setting is rows[1].scheme is None
    assert "none is published for this model (Qwen2ForCausalLM, 4 layers, 2 KV heads of 64)" in rows[1].reason


def test_group_sizes_are_those_that_divide_the_head() -> None:
    def sizes(head_dim: int) -> list[str]:
        model = SimpleNamespace(architecture="X", num_layers=1, num_kv_heads=1, head_dim=head_dim)
        return [row.name for row in catalogue(model, ["group size"])[1:]]

    assert sizes(128) == ["KV4 groups of 32", "KV4 groups of 64", "KV2 groups of 32", "KV2 groups of 64"]
    assert sizes(64) == ["KV4 groups of 32", "KV2 groups of 32"]
    assert sizes(80) == []


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UsageError, match="'bit' is not a family"):
        catalogue(SMALL, ["bit"])


@pytest.mark.parametrize(
    ("scheme", "context", "bits"),
    [
        (Scheme(FOUR, FOUR), 100, 4.5),  # 4 + 2 x 16 / 64
        # 100 tokens, the newest 32 in 16 bits: (68 x 4.5 + 32 x 16) / 100
        (Scheme(FOUR, FOUR, window=32), 100, 8.18),
        (Scheme(FOUR, FOUR, window=32), 16, 16.0),
        # keys 4 + 32 / 32 = 5 bits once a block is full; the mean over 33 .. 64 tokens, values 4.5 throughout
        (
            Scheme(FOUR, FOUR, token_group=32, key_block=32),
            64,
            sum((5 * (n // 32 * 32) + 16 * (n % 32)) / n for n in range(33, 65)) / 64 + 2.25,
        ),
        # KIVI with R = 64: keys leave in blocks of 64, the newest 64 values stay
        (
            Scheme(FOUR, FOUR, token_group=32, key_block=64, window=64),
            128,
            sum((5 * (n // 64 * 64) + 16 * (n % 64) + 4.5 * (n - 64) + 16 * 64) / (2 * n) for n in range(65, 129)) / 64,
        ),
    ],
)
def test_bits_count_metadata_and_window(scheme: Scheme, context: int, bits: float) -> None:
    assert scheme.effective_bits(64, context) == pytest.approx(bits)


def test_bits_of_a_long_context_approach_those_without_a_window() -> None:
    assert Scheme(FOUR, FOUR, token_group=32, key_block=128, window=128).effective_bits(64, 2**17) == pytest.approx(
        4.75, abs=0.02
    )


def test_blocks_must_hold_whole_groups() -> None:
    with pytest.raises(LayoutError, match="blocks of 48 keys"):
        Scheme(FOUR, FOUR, token_group=32, key_block=48)


def naive_asymmetric(x: np.ndarray, bits: int) -> np.ndarray:
    """One group: the definition, with scale and minimum in fp16."""
    top = 2**bits - 1
    scale = np.float32(np.float16((x.max() - x.min()) / top))
    minimum = np.float32(np.float16((x.max() + x.min()) / 2 - scale * top / 2))
    codes = np.clip(np.round((x - minimum) / scale), 0, top) if scale else np.zeros_like(x)
    return codes * scale + minimum


def test_per_channel_groups_run_along_the_sequence() -> None:
    key = torch.randn(2, 11, 2, 8, generator=torch.Generator().manual_seed(1)) * 3
    got = per_channel(key, 4, 4)
    for b, h, d in np.ndindex(2, 2, 8):
        for start in (0, 4):
            expected = naive_asymmetric(key[b, start : start + 4, h, d].numpy(), 4)
            np.testing.assert_allclose(got[b, start : start + 4, h, d].numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[:, 8:], key[:, 8:])  # the group that is not full


def keep_token_by_token(scheme: Scheme, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One sequence decoded token by token, as KIVI's cache works: lists of what is stored, quantized when it leaves its window.

    query [T, Hq, D], key and value [T, H, D] -> [T, Hq, D]
    """
    keys: list[Tensor] = []  # as read back, each [H, D]
    values: list[Tensor] = []
    done_keys = done_values = 0
    outputs = []
    for t in range(len(query)):
        keys.append(key[t])
        values.append(value[t])
        if scheme.token_group:
            while len(keys) - done_keys >= scheme.key_block:
                block = torch.stack(keys[done_keys : done_keys + scheme.key_block])
                for start in range(0, scheme.key_block, scheme.token_group):
                    for h, d in np.ndindex(*block.shape[1:]):
                        part = block[start : start + scheme.token_group, h, d]
                        part.copy_(torch.from_numpy(naive_asymmetric(part.numpy().copy(), scheme.key.bits)))
                keys[done_keys : done_keys + scheme.key_block] = list(block)
                done_keys += scheme.key_block
        else:
            while len(keys) - done_keys > scheme.window:
                keys[done_keys] = as_stored(keys[done_keys], scheme.key)
                done_keys += 1
        while len(values) - done_values > scheme.window:
            values[done_values] = as_stored(values[done_values], scheme.value)
            done_values += 1
        k, v = (torch.stack(side).repeat_interleave(query.shape[1] // key.shape[1], dim=1) for side in (keys, values))
        scores = torch.einsum("hd,shd->hs", query[t], k) * query.shape[-1] ** -0.5
        outputs.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(TensorSpec(2, 32), TensorSpec(2, 32), token_group=8, key_block=8),
        Scheme(TensorSpec(2, 32), TensorSpec(4, 32), token_group=8, key_block=16, window=16),
        Scheme(TensorSpec(2, 32), TensorSpec(2, 32), window=5),
        Scheme(TensorSpec(4, 32), TensorSpec(2, 32), window=100),  # longer than the sequence: nothing is quantized
    ],
    ids=str,
)
def test_one_pass_equals_a_cache_kept_token_by_token(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, heads, 37, 32, generator=generator) for heads in (4, 2, 2))
    with tapped(SimulatedCache(scheme)):
        got = _attention(SimpleNamespace(layer_idx=0), query, key, value, None)[0][0]
    expected = keep_token_by_token(scheme, *(x[0].transpose(0, 1) for x in (query, key, value)))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    plain = _attention(SimpleNamespace(layer_idx=0), query, key, value, None)[0][0]
    assert torch.allclose(got, plain, atol=1e-5) == (scheme.window == 100)
