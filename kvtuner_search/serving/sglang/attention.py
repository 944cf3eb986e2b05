"""SGLang's Triton and torch backends over packed rows.

Everything but the kernels is SGLang's: metadata, CUDA-graph buffers, windows, masks. The Triton backend replaces the three
functions through which its parent reads the pool; the torch backend, for the CPU, replaces the two forward methods.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from torch import Tensor

from kvtuner_kernels.compilation import KernelError, warm_up
from kvtuner_kernels.decode import Workspace, decode, decode_parts
from kvtuner_kernels.extend import extend
from kvtuner_kernels.quantize import store
from kvtuner_kernels.reference import attend
from kvtuner_kernels.tuning import decode_launch, multiprocessors, shared_memory
from kvtuner_search.errors import ServingError
from kvtuner_search.serving.sglang.pool import LayerStorage, PackedPool


class PackedTorchBackend(TorchNativeAttnBackend):
    """Attention on the CPU by ``kvtuner_kernels.reference``. Prompts, too, are read as stored."""

    token_to_kv_pool: PackedPool

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        """New tokens [T, Hq * D] of several requests over all their rows."""
        lengths = forward_batch.extend_seq_lens.tolist()
        return self._forward(q, k, v, layer, forward_batch, lengths, save_kv_cache)

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Tensor:
        """One new token of each request."""
        return self._forward(q, k, v, layer, forward_batch, [1] * forward_batch.batch_size, save_kv_cache)

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, lengths: list[int], save: bool
    ) -> Tensor:
        _check_layer(layer)
        if save and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, batch.out_cache_loc, k, v)
        spec, centres, rows = self.token_to_kv_pool.storage(layer.layer_id)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(query)
        window = layer.sliding_window_size
        first = 0
        stored = batch.seq_lens.tolist()
        for request, (new, length) in enumerate(zip(lengths, stored, strict=True)):
            slots = self.req_to_token_pool.req_to_token[batch.req_pool_indices[request], :length]
            out[first : first + new] = attend(
                query[first : first + new],
                rows[slots.long()],
                spec,
                self.token_to_kv_pool.head_num,
                centres,
                softmax_scale=layer.scaling,
                soft_cap=layer.logit_cap,
                window=window + 1 if window is not None and window > -1 else 0,
                dtype=self.token_to_kv_pool.model_dtype,
            )
            first += new
        return out.view(len(out), -1)


class PackedTritonBackend(TritonAttnBackend):
    """Attention by the Triton kernels of ``kvtuner_kernels``.

    Args:
        model_runner: SGLang's, with a :class:`PackedPool`.
        as_stored: a prompt's own keys and values are read from the pool too, as in deterministic mode.
    """

    token_to_kv_pool: PackedPool

    def __init__(self, model_runner: Any, as_stored: bool = False, **named: Any) -> None:
        self.enable_deterministic = False  # the parent sets it
        super().__init__(model_runner, **named)
        # With splits and tiles that depend on a request alone, its result does not depend on who else is in the batch.
        self.batch_invariant = bool(self.enable_deterministic)
        # The parent reads this to choose how prompts attend, and for the splits of decode, which then go unused.
        self.enable_deterministic = self.enable_deterministic or as_stored
        self.decode_attention_fwd = torch.compiler.disable(self._decode)
        self.extend_attention_fwd = torch.compiler.disable(self._extend)
        self.extend_attention_fwd_unified = torch.compiler.disable(self._extend_unified)
        self._layer: LayerStorage | None = None
        self._workspaces: list[Workspace] = []  # earlier ones stay: captured graphs write to them
        self._capacity = 0  # requests that the last workspace is enough for
        self._warm_up()

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *arguments: Any, **named: Any) -> None:
        """As the parent's, and the space for partial results, which must not move once a graph is captured."""
        super().init_cuda_graph_state(max_bs, max_num_tokens, *arguments, **named)
        self._workspace(max_num_tokens)

    def forward_extend(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, *arguments: Any, **named: Any) -> Tensor:
        """As the parent's, over packed rows."""
        self._select(layer)
        if k is None:
            raise NotImplementedError(
                f"layer {layer.layer_id} shares another layer's keys: this model is not supported"
            )
        return super().forward_extend(q, k, v, layer, *arguments, **named)

    def forward_decode(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, *arguments: Any, **named: Any) -> Tensor:
        """As the parent's, over packed rows."""
        self._select(layer)
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
        """SGLang's ``decode_attention_fwd``. A window is in ``kv_indices`` already; scales of the checkpoint are not used."""
        _check_extras(sinks, xai_temperature_len)
        assert self._layer is not None
        spec, centres, rows = self._layer
        decode(
            q, rows, spec, self.token_to_kv_pool.head_num, kv_indptr, kv_indices, o, centres=centres,
            softmax_scale=sm_scale, soft_cap=logit_cap, num_kv_splits=num_kv_splits if self.batch_invariant else None,
            max_kv_splits=max_kv_splits if self.batch_invariant else 0, workspace=self._workspace(len(q)),
        )  # fmt: skip

    def _extend(
        self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, k_buffer: Tensor, v_buffer: Tensor, qo_indptr: Tensor,
        kv_indptr: Tensor, kv_indices: Tensor, custom_mask: Tensor | None, is_causal: bool, mask_indptr: Tensor | None,
        max_len_extend: int, k_scale: float = 1.0, v_scale: float = 1.0, sm_scale: float | None = None,
        logit_cap: float = 0.0, skip_prefix_custom_mask: bool = True, sliding_window_size: int = -1,
        sinks: Tensor | None = None, window_kv_offsets: Tensor | None = None, xai_temperature_len: int = -1, **_: Any,
    ) -> None:  # fmt: skip
        """SGLang's ``extend_attention_fwd``: the chunk unquantized, its prefix from the pool."""
        _check_extras(sinks, xai_temperature_len)
        assert self._layer is not None
        spec, centres, rows = self._layer
        extend(
            q, k, v, rows, spec, self.token_to_kv_pool.head_num, qo_indptr, kv_indptr, kv_indices, max_len_extend, o,
            centres=centres, causal=is_causal, custom_mask=custom_mask,
            mask_indptr=None if custom_mask is None else mask_indptr, skip_prefix_mask=skip_prefix_custom_mask,
            softmax_scale=sm_scale, soft_cap=logit_cap, window=_window(sliding_window_size, custom_mask),
        )  # fmt: skip

    def _extend_unified(
        self, q: Tensor, o: Tensor, k_buffer: Tensor, v_buffer: Tensor, k_scale: float, v_scale: float,
        qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, prefix_lens: Tensor, max_len_extend: int,
        custom_mask: Tensor | None = None, mask_indptr: Tensor | None = None, sm_scale: float | None = None,
        logit_cap: float = 0.0, is_causal: bool = True, sliding_window_size: int = -1, sinks: Tensor | None = None,
        window_start_pos: Tensor | None = None, xai_temperature_len: int = -1, **_: Any,
    ) -> None:  # fmt: skip
        """SGLang's ``extend_attention_fwd_unified``: chunk and prefix from the pool."""
        _check_extras(sinks, xai_temperature_len)
        assert self._layer is not None
        spec, centres, rows = self._layer
        extend(
            q, None, None, rows, spec, self.token_to_kv_pool.head_num, qo_indptr, kv_indptr, kv_indices,
            max_len_extend, o, centres=centres, causal=is_causal, custom_mask=custom_mask,
            mask_indptr=None if custom_mask is None else mask_indptr, softmax_scale=sm_scale, soft_cap=logit_cap,
            window=_window(sliding_window_size, custom_mask), batch_invariant=self.batch_invariant,
        )  # fmt: skip

    def _workspace(self, requests: int) -> Workspace:
        """Space for the partial results of a batch; grows outside of graphs only, where batches are within the first size."""
        if requests > self._capacity:
            pool, group = self.token_to_kv_pool, self.num_head // self.num_kv_head
            device = pool.k_buffer[0].device
            parts = 0
            for spec in set(pool.specs):
                launch = decode_launch(spec, pool.head_num, group, pool.head_dim, shared=shared_memory(device))
                splits = self._splits(device, launch.programs)
                parts = max(parts, decode_parts(requests, splits, self.batch_invariant) * launch.runs)
            heads = self.num_head
            self._workspaces.append(
                Workspace(
                    torch.empty(parts * heads * pool.head_dim, dtype=torch.float32, device=device),
                    torch.empty(parts * heads, dtype=torch.float32, device=device),
                )
            )
            self._capacity = requests
        return self._workspaces[-1]

    def _splits(self, device: torch.device, programs: int) -> int:
        """Splits of each request, or of the whole batch; ``programs`` is how many a multiprocessor takes."""
        return self.max_kv_splits if self.batch_invariant else multiprocessors(device) * programs

    def _warm_up(self) -> None:
        """Compile every kernel that this model takes, by running it on the padding slot, before graphs are captured.

        A soft cap or a window is part of a kernel: those variants are compiled by the passes that SGLang runs before it captures.

        Raises:
            ServingError: if a kernel's results are wrong on this GPU.
        """
        pool, group = self.token_to_kv_pool, self.num_head // self.num_kv_head
        device = pool.k_buffer[0].device
        if device.type == "cuda":  # the interpreter's results have tests
            try:
                warm_up(pool.specs, pool.head_num, group, pool.head_dim, pool.model_dtype, device)
            except KernelError as error:
                raise ServingError(str(error)) from error
        # The merge of partial results has one form for few requests and another from a twelfth of all partial results on.
        batches = (1, self._splits(device, 2) * 4 // 12 + 1)
        # A tile of prompts holds 16, 64 or 128 query heads of one group.
        chunks = (1, -(-17 // group), -(-65 // group))
        query = torch.zeros(max(*batches, *chunks), self.num_head, pool.head_dim, dtype=pool.model_dtype, device=device)
        key = torch.zeros(len(query), pool.head_num, pool.head_dim, dtype=pool.model_dtype, device=device)
        slots = torch.zeros(len(query), dtype=torch.int64, device=device)
        one = torch.arange(2, dtype=torch.int32, device=device)
        ends = torch.arange(len(query) + 1, dtype=torch.int32, device=device)
        splits = torch.ones(len(query), dtype=torch.int32, device=device)
        scale, out = pool.head_dim**-0.5, torch.empty_like(query)
        for layer in {storage.spec: storage for storage in pool.layers}.values():
            self._layer = layer
            store(key[:1], key[:1], layer.rows, slots[:1], layer.spec, layer.centres)
            for n in batches:
                self._decode(
                    query[:n], slots, slots, out[:n], ends[: n + 1], slots, slots, slots, splits[:n], self.max_kv_splits,
                    scale,
                )  # fmt: skip
            for n in chunks:
                starts = one.long() * n
                if self.enable_deterministic:
                    self._extend_unified(
                        query[:n], out[:n], slots, slots, 1.0, 1.0, starts, starts, slots, slots, n, sm_scale=scale
                    )
                else:
                    self._extend(
                        query[:n], key[:n], key[:n], out[:n], slots, slots, starts, one, slots, None, True, None, n,
                        sm_scale=scale,
                    )  # fmt: skip
            layer.rows[0].zero_()


def _window(sliding_window_size: int, custom_mask: Tensor | None) -> int:
    """SGLang counts the tokens before the current one, the kernels count that one too; 0 is no window."""
    if sliding_window_size < 0:
        return 0
    if custom_mask is not None:
        raise NotImplementedError("a sliding window together with a mask of drafted tokens is not supported")
    return sliding_window_size + 1


def _check_layer(layer: Any) -> None:
    """Refuse what no model that passed the checks at start has."""
    if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
        _unsupported(f"layer {layer.layer_id} is {layer.attn_type}, not causal self-attention")
    if layer.logit_cap and layer.logit_capping_method != "tanh":
        _unsupported(f"layer {layer.layer_id} caps its scores by {layer.logit_capping_method}")


def _check_extras(sinks: Tensor | None, xai_temperature_len: int) -> None:
    if sinks is not None or xai_temperature_len > 0:
        _unsupported("the model has attention sinks, or a temperature that depends on the length")


def _unsupported(what: str) -> NoReturn:
    raise NotImplementedError(f"{what}: packed rows cannot serve it; serve this model without a profile")
