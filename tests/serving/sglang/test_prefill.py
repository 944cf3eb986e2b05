"""FlashInfer for prompts: what it is given, when it is not asked, and what happens where it does not work."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from copy import copy
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from torch import Tensor
from torch_flashinfer import plain, stand_in

from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.reference import NO_CENTRES, pack_rows, unpack_rows
from kvtuner_kernels.warm_up import example_centres
from kvtuner_search.errors import UsageError
from kvtuner_search.serving.sglang import attention
from kvtuner_search.serving.sglang import prefill as module
from kvtuner_search.serving.sglang.pool import LayerStorage
from kvtuner_search.serving.sglang.prefill import SWITCH, PrefillAttention, prefill_attention

HEADS, KV_HEADS, DIM = 6, 2, 64
SPEC = LayerSpec.parse("8-g64-asym/4-g64-asym")
BANDED = LayerSpec.parse("b65443322/b54433221")


def stored_16bit(rows: Tensor, slots: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of the rows at ``slots``."""
    key, value = unpack_rows(rows[slots], *more)
    return key.half(), value.half()


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = stand_in()
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return module


@pytest.fixture
def torch_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own tests hold it to this."""
    monkeypatch.setattr(module, "gather", stored_16bit)


def make(capability: tuple[int, int] = (9, 0), **named: Any) -> PrefillAttention | None:
    options = {"head_dim": DIM, "dtype": torch.float16} | named
    return prefill_attention(HEADS, KV_HEADS, device=torch.device("cpu"), capability=capability, **options)


@pytest.mark.parametrize(
    ("lengths", "prefixes"), [([150, 60], [0, 0]), ([150], [40]), ([150, 3, 60], [40, 0, 7])], ids=str
)
@pytest.mark.parametrize("spec", [SPEC, BANDED], ids=str)
def test_a_chunk_attends_to_its_own_prefix_as_stored_and_to_itself(
    flashinfer: ModuleType, torch_gather: None, spec: LayerSpec, lengths: list[int], prefixes: list[int]
) -> None:
    """Rows of prefixes say themselves which of them are first tokens."""
    prefill = make()
    assert prefill is not None
    assert prefill.plan(lengths, prefixes)
    torch.manual_seed(0)
    new, old, padding = sum(lengths), sum(prefixes), 5
    query, key, value = (torch.randn(new + padding, n, DIM).half() for n in (HEADS, KV_HEADS, KV_HEADS))
    slots = torch.randperm(300)[: old + padding]  # SGLang's list may be longer than what is used
    centres = example_centres(spec, KV_HEADS, DIM, torch.device("cpu"))
    first = torch.zeros(300, dtype=torch.bool)
    for request, prefix in enumerate(prefixes):
        first[slots[sum(prefixes[:request])]] |= prefix > 0
    stored = pack_rows(*torch.randn(2, 300, KV_HEADS, DIM).half(), spec, centres, first)
    every_key, every_value = (side.half() for side in unpack_rows(stored, spec, KV_HEADS, DIM, centres, torch.float16))
    out = torch.full_like(query, torch.nan)
    prefill.run(query, key, value, out, slots, LayerStorage(spec, centres, stored))
    assert out[new:].isnan().all()
    first = used = 0
    for length, prefix in zip(lengths, prefixes, strict=True):
        chunk = slice(first, first + length)
        prefix_slots = slots[used : used + prefix]
        old_key, old_value = every_key[prefix_slots], every_value[prefix_slots]
        expected = plain(query[chunk], torch.cat([old_key, key[chunk]]), torch.cat([old_value, value[chunk]]))
        torch.testing.assert_close(out[chunk], expected)
        first, used = first + length, used + prefix


def test_short_chunks_of_many_requests_and_great_prefixes_are_left_to_the_packed_kernels(
    flashinfer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = make()
    assert prefill is not None
    assert prefill.plan([16], [0])
    assert not prefill.plan([15], [0])
    assert not prefill.plan([20, 11], [0, 0])
    assert prefill.plan([2] * 64, [0] * 64)
    assert not prefill.plan([], [])
    prefill.multiprocessors = 132
    assert prefill.plan([128], [100_000])  # the packed kernel would leave most of the chip idle
    assert prefill.plan([16] * 64, [256] * 64)
    assert not prefill.plan([16] * 70, [257] * 70)
    monkeypatch.setattr(module, "LARGEST_COPY", 2 * (128 + 2 * 100) * KV_HEADS * DIM * 2)
    assert prefill.plan([128], [100])
    assert not prefill.plan([128], [101])
    monkeypatch.setattr(
        module, "LARGEST_COPY", (4 + 4 + 2) * 1000 * KV_HEADS * DIM
    )  # what a gather from a fitted basis takes
    assert prefill.plan([128], [1000])
    assert not prefill.plan([128], [1001])


def test_another_kind_of_layer_is_left_to_the_packed_kernels(flashinfer: ModuleType) -> None:
    prefill = make()
    assert prefill is not None
    assert prefill.takes(DIM**-0.5, 0.0, -1)
    assert prefill.takes(None, 0.0, -1)
    assert not prefill.takes(0.5, 0.0, -1)
    assert not prefill.takes(None, 30.0, -1)
    assert not prefill.takes(None, 0.0, 0)


@pytest.mark.parametrize(
    "named", [{"capability": (8, 9)}, {"head_dim": 80}, {"dtype": torch.float32}], ids=lambda named: str(*named)
)
def test_it_is_asked_only_where_it_was_measured(flashinfer: ModuleType, named: dict[str, Any]) -> None:
    assert make(**named) is None


def test_without_flashinfer_nothing_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert make() is None
    assert not caplog.records


def test_it_can_be_switched_off(flashinfer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "triton")
    assert make() is None
    monkeypatch.setenv(SWITCH, "auto")
    assert make() is not None
    monkeypatch.setenv(SWITCH, "off")
    with pytest.raises(UsageError, match="KVTUNER_PREFILL=off is unknown: set it to auto or triton"):
        make()


def test_a_broken_flashinfer_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    assert make() is None
    assert "cannot import name 'BatchPrefillWithRaggedKVCacheWrapper'" in caplog.text


@pytest.mark.parametrize(
    ("fault", "said"),
    [({"wrong": True}, "its attention of 200 tokens over 0 is off by"), ({"broken": "no nvcc\nat all"}, "no nvcc")],
)
def test_what_does_not_work_is_logged_and_not_used(
    flashinfer: ModuleType, caplog: pytest.LogCaptureFixture, fault: dict[str, Any], said: str
) -> None:
    for name, content in fault.items():
        setattr(flashinfer.BatchPrefillWithRaggedKVCacheWrapper, name, content)
    assert make() is None
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert said in record.getMessage()
    assert "\n" not in record.getMessage()


class Recorder:
    """In the place of FlashInfer's attention and of the packed kernel: who was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.pays = True

    def plan(self, lengths: list[int], prefixes: list[int]) -> bool:
        return self.pays

    def takes(self, *_: Any) -> bool:
        return True

    def run(self, *_: Any) -> None:
        self.asked.append("flashinfer")

    def extend(self, *_: Any, **__: Any) -> None:
        self.asked.append("packed")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> attention.PackedTritonBackend:
    """One whose parent does nothing but call the function that attends."""

    def forward_extend(
        self: Any, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, mask: Tensor | None
    ) -> Tensor:
        self._extend(q, k, v, q, q, q, None, None, None, mask, True, None, len(q))
        return q

    monkeypatch.setattr(attention.TritonAttnBackend, "init_forward_metadata", lambda *_: None)
    monkeypatch.setattr(attention.TritonAttnBackend, "forward_extend", forward_extend)
    made = attention.PackedTritonBackend.__new__(attention.PackedTritonBackend)
    made._prefill = made.recorder = Recorder()
    made._planned = made.sliding_window_size = None
    made.token_to_kv_pool = SimpleNamespace(
        head_num=KV_HEADS,
        storage=lambda _: LayerStorage(SPEC, NO_CENTRES, torch.empty(0)),
        storing=lambda *_: nullcontext(),
    )
    monkeypatch.setattr(attention, "extend", made.recorder.extend)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # a build for the CPU has none
    return made


def batch_of(mode: ForwardMode = ForwardMode.EXTEND) -> SimpleNamespace:
    return SimpleNamespace(
        forward_mode=mode,
        extend_seq_lens_cpu=[150],
        extend_prefix_lens_cpu=[0],
        positions=None,
        extend_prefix_lens=None,
    )


def ask(backend: attention.PackedTritonBackend, batch: SimpleNamespace, mask: Tensor | None = None) -> str:
    """Who attends in one layer of a batch."""
    x = torch.zeros(1)
    layer = SimpleNamespace(
        layer_id=0, is_cross_attention=False, attn_type=attention.AttentionType.DECODER, logit_cap=0.0
    )
    backend.forward_extend(x, x, x, layer, batch, mask)
    found: str = backend.recorder.asked.pop()
    return found


def test_the_batch_that_was_planned_is_flashinfers_in_every_layer_and_as_a_graphs_copy(
    backend: attention.PackedTritonBackend,
) -> None:
    batch = batch_of()
    backend.init_forward_metadata(batch)
    assert [ask(backend, batch), ask(backend, batch), ask(backend, copy(batch))] == ["flashinfer"] * 3
    assert ask(backend, batch, mask=torch.ones(1)) == "packed"
    assert ask(backend, batch_of()) == "packed"  # another batch, which happens to be as long


@pytest.mark.parametrize("mode", [ForwardMode.MIXED, ForwardMode.TARGET_VERIFY])
def test_batches_of_other_kinds_are_the_packed_kernels(
    backend: attention.PackedTritonBackend, mode: ForwardMode
) -> None:
    backend.init_forward_metadata(batch_of())
    batch = batch_of(mode)
    backend.init_forward_metadata(batch)
    assert ask(backend, batch) == "packed"


def test_what_does_not_pay_and_what_a_graph_records_is_the_packed_kernels(
    backend: attention.PackedTritonBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of()
    backend.init_forward_metadata(batch)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert ask(backend, batch) == "packed"
    assert ask(backend, batch) == "flashinfer"
    backend.recorder.pays = False
    backend.init_forward_metadata(batch)
    assert ask(backend, batch) == "packed"
