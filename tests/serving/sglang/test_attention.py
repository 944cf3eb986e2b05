"""The torch backend's attention over rows, against a dense computation from what the pool stores."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.reference import Centres, as_stored
from kvtuner_kernels.warm_up import example_centres
from kvtuner_search.serving.sglang.attention import PackedTorchBackend, _window
from kvtuner_search.serving.sglang.pool import PackedPool

HEADS, GROUP, DIM, LAYER = 2, 3, 64, 5
PLAIN = LayerSpec.parse("4-g64-asym-c-r/8-g32-sym")
BANDED = LayerSpec.parse("b65443322/b54433221")
GENERATOR = torch.Generator().manual_seed(0)
CENTRES = {
    PLAIN: Centres(torch.randn(HEADS, DIM, generator=GENERATOR), None),
    BANDED: example_centres(BANDED, HEADS, DIM, torch.device("cpu")),
}


def layer(window: int = -1, cap: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(
        layer_id=LAYER, tp_q_head_num=HEADS * GROUP, qk_head_dim=DIM, v_head_dim=DIM, scaling=0.1, logit_cap=cap,
        logit_capping_method="tanh", sliding_window_size=window, is_cross_attention=False, attn_type=AttentionType.DECODER,
    )  # fmt: skip


def dense(query: Tensor, key: Tensor, value: Tensor, window: int, cap: float) -> Tensor:
    """Attention of the last ``len(query)`` of ``len(key)`` tokens in fp64; ``window`` counts as SGLang counts."""
    key, value = (side.double().repeat_interleave(GROUP, 1) for side in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * 0.1
    scores = cap * torch.tanh(scores / cap) if cap else scores
    position = torch.arange(len(key) - len(query), len(key))[:, None]
    column = torch.arange(len(key))[None, :]
    visible = column <= position
    if window > -1:
        visible &= column >= position - window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -math.inf).softmax(-1), value)


@pytest.mark.parametrize(("window", "cap"), [(-1, 0.0), (-1, 3.0), (4, 0.0), (0, 0.0), (4, 3.0)])
@pytest.mark.parametrize("spec", [PLAIN, BANDED], ids=str)
def test_prefill_with_prefix_then_decode(spec: LayerSpec, window: int, cap: float) -> None:
    centres = CENTRES[spec]
    pool = PackedPool(
        64, page_size=1, dtype=torch.bfloat16, head_num=HEADS, head_dim=DIM, layer_num=1, device="cpu",
        enable_memory_saver=False, start_layer=LAYER, end_layer=LAYER + 1, layers=[spec], centres={LAYER: centres},
        heads=slice(0, HEADS),
    )  # fmt: skip
    lengths, new = [11, 7], [4, 7]  # stored tokens of two requests after the chunk; the second has no prefix
    keys, values = ([torch.randn(n, HEADS, DIM, generator=GENERATOR).bfloat16() for n in lengths] for _ in range(2))
    slots = torch.randperm(64, generator=GENERATOR)[: sum(lengths) + 2] + 1
    table = torch.zeros(4, 32, dtype=torch.int32)
    table[3, :11], table[1, :7] = slots[:11], slots[11:18]
    backend = PackedTorchBackend.__new__(PackedTorchBackend)
    backend.token_to_kv_pool, backend.req_to_token_pool = pool, SimpleNamespace(req_to_token=table)
    with pool.storing(torch.arange(7)):
        pool.set_kv_buffer(layer(), KVWriteLoc(slots[:7]), keys[0][:7], values[0][:7])  # the first request's prefix
    query = torch.randn(sum(new), HEADS * GROUP, DIM, generator=GENERATOR).bfloat16()
    batch = SimpleNamespace(
        out_cache_loc=slots[7:18], req_pool_indices=torch.tensor([3, 1]), seq_lens=torch.tensor(lengths),
        extend_seq_lens=torch.tensor(new), batch_size=2, extend_prefix_lens=torch.tensor([7, 0]),
        positions=torch.cat((torch.arange(7, 11), torch.arange(7))),
    )  # fmt: skip
    chunk = (torch.cat((keys[0][7:], keys[1])), torch.cat((values[0][7:], values[1])))
    found = backend.forward_extend(query.flatten(1), *chunk, layer(window, cap), batch)
    stored = [
        tuple(
            as_stored(side.float(), one, centre, first=torch.arange(len(side)) == 0)
            for side, one, centre in zip(both, (spec.key, spec.value), centres, strict=True)
        )
        for both in zip(keys, values, strict=True)
    ]
    expected = torch.cat(
        [dense(q, *sides, window, cap) for q, sides in zip(query.split(new), stored, strict=True)]
    )  # fmt: skip
    torch.testing.assert_close(found.view_as(query).double(), expected, rtol=2**-8, atol=2**-8)

    token = [torch.randn(2, heads, DIM, generator=GENERATOR).bfloat16() for heads in (HEADS * GROUP, HEADS, HEADS)]
    table[3, 11], table[1, 7] = slots[18], slots[19]
    batch = SimpleNamespace(
        out_cache_loc=slots[18:], req_pool_indices=torch.tensor([3, 1]), seq_lens=torch.tensor([12, 8]), batch_size=2
    )
    found = backend.forward_decode(token[0].flatten(1), token[1], token[2], layer(window, cap), batch)
    longer = [
        tuple(
            torch.cat((old, as_stored(side[i : i + 1].float(), one, centre)))
            for old, side, one, centre in zip(stored[i], token[1:], (spec.key, spec.value), centres, strict=True)
        )
        for i in range(2)
    ]
    expected = torch.cat([dense(token[0][i : i + 1], *longer[i], window, cap) for i in range(2)])
    torch.testing.assert_close(found.view(2, -1, DIM).double(), expected, rtol=2**-8, atol=2**-8)


def test_windows_count_the_token_itself() -> None:
    assert [_window(size) for size in (-1, 0, 4)] == [0, 1, 5]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"is_cross_attention": True}, "not causal self-attention"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "ENCODER_ONLY, not causal"),
        ({"logit_cap": 5.0, "logit_capping_method": "clamp"}, "caps its scores by clamp"),
    ],
)
def test_layers_that_rows_cannot_serve_fail(changes: dict[str, object], text: str) -> None:
    backend = PackedTorchBackend.__new__(PackedTorchBackend)
    backend.token_to_kv_pool = SimpleNamespace(storing=lambda *_: nullcontext())
    batch = SimpleNamespace(extend_seq_lens=torch.tensor([1]), extend_prefix_lens=None, positions=None)
    odd = SimpleNamespace(**{**vars(layer()), **changes})
    with pytest.raises(NotImplementedError, match=text):
        backend.forward_extend(torch.zeros(1), None, None, odd, batch)
