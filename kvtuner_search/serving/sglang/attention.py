"""SGLang's Triton and torch backends over packed rows.

Everything but the kernels is SGLang's: metadata, CUDA-graph buffers, windows, masks. The Triton backend replaces the three
functions through which its parent reads the pool; the torch backend, for the CPU, replaces the two forward methods.

SGLang stores into the pool only through the two forward methods, and they give the positions of the stored tokens
(:meth:`~kvtuner_search.serving.sglang.pool.PackedPool.storing`):

* **Decode** stores no first token: an extend has already stored the request's prompt. So it declares that there is none, without
  reading positions. Padding within a graph goes to slot 0, which no request has.
* **Everything else is an extend** (chunks, mixed batches with their decoded tokens, drafted tokens that are verified, replays of graphs of
  prompts) and comes with the positions by which SGLang rotates keys, counted from the start of the sequence: 0 is a sequence's
  first token and no other, whatever the radix cache, an earlier chunk or an earlier life of the request had stored. Graphs
  read positions and slots from their own buffers, which SGLang fills in the same way before each replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from torch import Tensor

from kvtuner_kernels.decode import Workspaces, decode, decode_parts
from kvtuner_kernels.extend import extend
from kvtuner_kernels.reference import attend
from kvtuner_kernels.tuning import decode_launch, multiprocessors, shared_memory
from kvtuner_kernels.warm_up import KernelError, Layer, Use, warm_up
from kvtuner_search.errors import ServingError
from kvtuner_search.serving.sglang.kinds import attended, attention_layers, has_sinks
from kvtuner_search.serving.sglang.pool import LayerStorage, PackedPool
from kvtuner_search.serving.sglang.prefill import PrefillAttention, prefill_attention


class PackedTorchBackend(TorchNativeAttnBackend):
    """Attention on the CPU by ``kvtuner_kernels.reference``. Prefill, too, reads rows as stored."""

    token_to_kv_pool: PackedPool
    swa_out_cache_loc: Tensor | None = None  # the parent sets it, where layers with windows have slots of their own

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """New tokens [T, Hq * D] of several requests over all their rows."""
        lengths = forward_batch.extend_seq_lens.tolist()
        with self.token_to_kv_pool.storing(forward_batch.positions, forward_batch.extend_prefix_lens):
            return self._forward(q, k, v, layer, forward_batch, lengths, save_kv_cache, sinks)

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One new token of each request."""
        with self.token_to_kv_pool.storing(None):
            return self._forward(q, k, v, layer, forward_batch, [1] * forward_batch.batch_size, save_kv_cache, sinks)

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, lengths: list[int], save: bool,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        _check_layer(layer)
        pool, index = self.token_to_kv_pool, layer.layer_id
        if save and k is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, self.swa_out_cache_loc), k, v)
        spec, centres, rows = pool.storage(index)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(query)
        window = attended(layer).window
        first = 0
        stored = batch.seq_lens.tolist()
        for request, (new, length) in enumerate(zip(lengths, stored, strict=True)):
            begin = max(0, length - new - window + 1) if window else 0  # older rows may be gone
            slots = self.req_to_token_pool.req_to_token[batch.req_pool_indices[request], begin:length].long()
            out[first : first + new] = attend(
                query[first : first + new],
                rows[pool.slots_of(index, slots)],
                spec,
                pool.head_num,
                centres,
                softmax_scale=layer.scaling,
                soft_cap=layer.logit_cap or 0.0,
                window=window,
                sinks=sinks,
                dtype=pool.model_dtype,
            )
            first += new
        return out.view(len(out), -1)


class PackedTritonBackend(TritonAttnBackend):
    """Attention by the Triton kernels of ``kvtuner_kernels``.

    Args:
        model_runner: SGLang's, with a :class:`PackedPool`.
        as_stored: prefill also reads a prompt's own keys and values from the pool, as in deterministic mode.
    """

    token_to_kv_pool: PackedPool
    sliding_window_size: int | None  # tokens before a query's own; the parent sets it

    def __init__(self, model_runner: Any, as_stored: bool = False, **named: Any) -> None:
        self.enable_deterministic = False  # the parent sets it
        super().__init__(model_runner, **named)
        # With splits and tiles that depend on a request alone, its result does not depend on the rest of the batch.
        self.batch_invariant = bool(self.enable_deterministic)
        # The parent reads this to choose how prefill attends, and for the splits of decode, which then go unused.
        self.enable_deterministic = self.enable_deterministic or as_stored
        self.allow_bidirectional_attention_in_extend = False  # Gemma 3's layers would read a prompt in both directions
        self.decode_attention_fwd = torch.compiler.disable(self._decode)
        self.extend_attention_fwd = torch.compiler.disable(self._extend)
        self.extend_attention_fwd_unified = torch.compiler.disable(self._extend_unified)
        self._layer: LayerStorage | None = None
        self._workspaces = self._make_workspaces()
        self._prefill = self._prefill_attention()
        self._planned: Any = None  # extend_seq_lens_cpu of the batch that FlashInfer is prepared for
        self._by_flashinfer = False  # FlashInfer handles the current layer
        self._warm_up(model_runner.model)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """As the parent's; and plan FlashInfer for prefill where that pays."""
        decodes = forward_batch.forward_mode.is_decode_or_idle()
        with self._window_and_own(decodes):
            super().init_forward_metadata(forward_batch)
        self._planned = None
        if self._prefill is not None and forward_batch.forward_mode == ForwardMode.EXTEND:
            lengths, prefixes = forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu
            if lengths is not None and prefixes is not None and self._prefill.plan(list(lengths), list(prefixes)):
                self._planned = lengths

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *arguments: Any, **named: Any) -> None:
        """As the parent's, and the space for partial results: one for all graphs, whatever the order in which they are captured."""
        with self._window_and_own():
            super().init_cuda_graph_state(max_bs, max_num_tokens, *arguments, **named)
        self._workspaces.of(max_num_tokens)

    def _update_decode_kv_buffers(self, *arguments: Any, **named: Any) -> Any:
        with self._window_and_own():
            return super()._update_decode_kv_buffers(*arguments, **named)

    @contextmanager
    def _window_and_own(self, wanted: bool = True) -> Iterator[None]:
        """Let a decoded token see its whole window.

        SGLang 0.5.14 counts a window without a query's own token, and takes as many rows for decode, where that token is stored already:
        its own kernels then see one token less in decode than in prefill, and than its torch backend.
        """
        size = self.sliding_window_size
        if wanted and size is not None and size > 0:
            self.sliding_window_size = size + 1
        try:
            yield
        finally:
            self.sliding_window_size = size

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, *arguments: Any, **named: Any
    ) -> Tensor:
        """As the parent's, over packed rows."""
        self._select(layer)
        # A prefill graph gets a copy of the planned batch with its lists; a graph under capture is for all batches.
        planned = self._planned is not None and self._planned is forward_batch.extend_seq_lens_cpu
        self._by_flashinfer = planned and not torch.cuda.is_current_stream_capturing()
        if k is None:
            raise NotImplementedError(
                f"layer {layer.layer_id} shares another layer's keys: this model is not supported"
            )
        with self.token_to_kv_pool.storing(forward_batch.positions, forward_batch.extend_prefix_lens):
            return super().forward_extend(q, k, v, layer, forward_batch, *arguments, **named)

    def forward_decode(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, *arguments: Any, **named: Any) -> Tensor:
        """As the parent's, over packed rows."""
        self._select(layer)
        with self.token_to_kv_pool.storing(None):
            return super().forward_decode(q, k, v, layer, *arguments, **named)

    def _select(self, layer: Any) -> None:
        _check_layer(layer)
        self._layer = self.token_to_kv_pool.storage(layer.layer_id)

    def _decode(
        self, q: Tensor, k_buffer: Tensor, v_buffer: Tensor, o: Tensor, kv_indptr: Tensor, kv_indices: Tensor,
        attn_logits: Tensor, attn_lse: Tensor, num_kv_splits: Tensor, max_kv_splits: int, sm_scale: float,
        k_scale: float = 1.0, v_scale: float = 1.0, logit_cap: float = 0.0, sinks: Tensor | None = None,
        xai_temperature_len: int = -1, **_: Any,
    ) -> None:  # fmt: skip
        """SGLang's ``decode_attention_fwd``. ``kv_indices`` already accounts for a window; scales of the checkpoint are not used."""
        _check_extras(xai_temperature_len)
        assert self._layer is not None
        spec, centres, rows = self._layer
        decode(
            q, rows, spec, self.token_to_kv_pool.head_num, kv_indptr, kv_indices, o, centres=centres,
            softmax_scale=sm_scale, soft_cap=logit_cap, sinks=sinks, num_kv_splits=num_kv_splits if self.batch_invariant else None,
            max_kv_splits=max_kv_splits if self.batch_invariant else 0, workspace=self._workspaces.of(len(q)),
        )  # fmt: skip

    def _extend(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, k_buffer: Tensor, v_buffer: Tensor, qo_indptr: Tensor,
        kv_indptr: Tensor, kv_indices: Tensor, custom_mask: Tensor | None, is_causal: bool, mask_indptr: Tensor | None,
        max_len_extend: int, k_scale: float = 1.0, v_scale: float = 1.0, sm_scale: float | None = None,
        logit_cap: float = 0.0, skip_prefix_custom_mask: bool = True, sliding_window_size: int = -1,
        sinks: Tensor | None = None, window_kv_offsets: Tensor | None = None, xai_temperature_len: int = -1, **_: Any,
    ) -> None:  # fmt: skip
        """SGLang's ``extend_attention_fwd``: the chunk unquantized, its prefix from the pool."""
        _check_extras(xai_temperature_len)
        assert self._layer is not None
        plain = custom_mask is None and is_causal and sinks is None
        prefill = self._prefill if self._by_flashinfer and plain else None
        if prefill is not None and prefill.takes(sm_scale, logit_cap, sliding_window_size):
            prefill.run(q, k, v, o, kv_indices, self._layer)
            return
        spec, centres, rows = self._layer
        extend(
            q, k, v, rows, spec, self.token_to_kv_pool.head_num, qo_indptr, kv_indptr, kv_indices, max_len_extend, o,
            centres=centres, causal=is_causal, custom_mask=custom_mask,
            mask_indptr=None if custom_mask is None else mask_indptr, skip_prefix_mask=skip_prefix_custom_mask,
            softmax_scale=sm_scale, soft_cap=logit_cap, window=_window(sliding_window_size), sinks=sinks,
            mask_offsets=None if custom_mask is None or sliding_window_size < 0 else window_kv_offsets,
        )  # fmt: skip

    def _extend_unified(
        self, q: Tensor, o: Tensor, k_buffer: Tensor, v_buffer: Tensor, k_scale: float, v_scale: float,
        qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, prefix_lens: Tensor, max_len_extend: int,
        custom_mask: Tensor | None = None, mask_indptr: Tensor | None = None, sm_scale: float | None = None,
        logit_cap: float = 0.0, is_causal: bool = True, sliding_window_size: int = -1, sinks: Tensor | None = None,
        window_start_pos: Tensor | None = None, xai_temperature_len: int = -1, **_: Any,
    ) -> None:  # fmt: skip
        """SGLang's ``extend_attention_fwd_unified``: chunk and prefix from the pool."""
        _check_extras(xai_temperature_len)
        assert self._layer is not None
        spec, centres, rows = self._layer
        # SGLang's window_start_pos takes drafted tokens for stored ones.
        offsets = None if custom_mask is None or sliding_window_size < 0 else self.forward_metadata.window_kv_offsets
        extend(
            q, None, None, rows, spec, self.token_to_kv_pool.head_num, qo_indptr, kv_indptr, kv_indices,
            max_len_extend, o, centres=centres, causal=is_causal, custom_mask=custom_mask,
            mask_indptr=None if custom_mask is None else mask_indptr, softmax_scale=sm_scale, soft_cap=logit_cap,
            window=_window(sliding_window_size), sinks=sinks, mask_offsets=offsets, batch_invariant=self.batch_invariant,
        )  # fmt: skip

    def _make_workspaces(self) -> Workspaces:
        """Space for the partial results of a batch, enough for any of the pool's layers."""
        pool, group = self.token_to_kv_pool, self.num_head // self.num_kv_head
        device = pool.k_buffer[0].device
        launches = [
            decode_launch(spec, pool.head_num, group, pool.head_dim, shared=shared_memory(device))
            for spec in set(pool.specs)
        ]

        def parts(requests: int) -> int:
            return max(
                decode_parts(requests, self._splits(device, launch.programs), self.batch_invariant) * launch.runs
                for launch in launches
            )

        return Workspaces(parts, self.num_head, pool.head_dim, device)

    def _splits(self, device: torch.device, programs: int) -> int:
        """Splits of each request, or of the whole batch; ``programs`` is the number per multiprocessor."""
        return self.max_kv_splits if self.batch_invariant else multiprocessors(device) * programs

    def _prefill_attention(self) -> PrefillAttention | None:
        """FlashInfer for prefill; None if the packed kernels do it: only they read a batch in one order, or as stored."""
        pool = self.token_to_kv_pool
        device = pool.k_buffer[0].device
        if device.type != "cuda" or self.enable_deterministic:
            return None
        capability = torch.cuda.get_device_capability(device)
        return prefill_attention(self.num_head, self.num_kv_head, pool.head_dim, pool.model_dtype, device, capability)

    def _warm_up(self, model: Any) -> None:
        """Compile every kernel that this model uses, with its caps, windows and sinks, before graphs are captured.

        Raises:
            ServingError: if a kernel's results are wrong on this GPU.
        """
        pool, device = self.token_to_kv_pool, self.token_to_kv_pool.k_buffer[0].device
        if device.type != "cuda":  # the interpreter compiles nothing, and tests cover its results
            return
        # The merge of partial results has one form for few requests and another from a twelfth of all partial results on.
        use = Use(
            pool.head_num, self.num_head // self.num_kv_head, pool.head_dim, pool.model_dtype,
            batches=(1, self._splits(device, 2) * 4 // 12 + 1), as_stored=self.enable_deterministic,
            splits=self.max_kv_splits if self.batch_invariant else 0,
        )  # fmt: skip
        try:
            warm_up(_layers(model, pool), use, device)
        except KernelError as error:
            raise ServingError(str(error)) from error


def _layers(model: Any, pool: PackedPool) -> list[Layer]:
    """The variants of the kernels that a loaded model needs."""
    found = [
        Layer(pool.storage(layer.layer_id).spec, float(layer.logit_cap or 0), attended(layer).window, has_sinks(holder))
        for layer, holder in attention_layers(model)
    ]
    return found or list(map(Layer, pool.specs))


def _window(sliding_window_size: int) -> int:
    """SGLang counts the tokens before the current one, the kernels count that one too; 0 means no window."""
    return max(0, sliding_window_size + 1)


def _check_layer(layer: Any) -> None:
    """Refuse layers that no model has that passed the checks at start. Gemma 3's are bidirectional for images only, which are read causally here."""
    if layer.is_cross_attention or layer.attn_type not in (AttentionType.DECODER, AttentionType.DECODER_BIDIRECTIONAL):
        _unsupported(f"layer {layer.layer_id} is {layer.attn_type}, not causal self-attention")
    if layer.logit_cap and layer.logit_capping_method != "tanh":
        _unsupported(f"layer {layer.layer_id} caps its scores by {layer.logit_capping_method}")


def _check_extras(xai_temperature_len: int) -> None:
    if xai_temperature_len > 0:
        _unsupported("the model has a temperature that depends on the length")


def _unsupported(what: str) -> NoReturn:
    raise NotImplementedError(f"{what}: packed rows cannot serve it; serve this model without a profile")
