"""SGLang's pool of keys and values, stored as packed rows.

A layer is one tensor, uint8 [slots, row bytes], and a slot is one row that holds the keys and the values of all local KV heads
(``kvtuner_kernels.layout``). Slots are SGLang's own: the token's slot id is the row's index.

A row in a fitted basis records whether it holds the first token of a sequence, so code can read, copy, move or reuse a slot without
knowing its content. Only code that stores has to give the tokens' positions (:meth:`PackedPool.storing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
import triton
from sglang.srt.environ import envs
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, unwrap_write_loc
from torch import Tensor

from kvtuner_kernels.bands import BasisError, basis
from kvtuner_kernels.gather import move
from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.quantize import store
from kvtuner_kernels.reference import NO_CENTRES, Centres, pack_rows
from kvtuner_search.errors import ProfileError


class LayerStorage(NamedTuple):
    """One layer's cache on this rank: its rows and their format."""

    spec: LayerSpec
    centres: Centres  # fp32 [local KV heads, D], or a basis [local KV heads, D + 2, D], on the pool's device
    rows: Tensor  # uint8 [slots, row bytes]


class _Said(NamedTuple):
    """The known facts about the tokens that are being stored."""

    positions: Tensor | None  # int64 [tokens or more]; None: none of them is the first of its sequence
    prefixes: Tensor | None  # int [requests]: tokens that each has stored already


def uses_triton(device: torch.device | str) -> bool:
    """Whether rows on ``device`` are written and read by the Triton kernels: on a GPU, and in Triton's interpreter."""
    return torch.device(device).type == "cuda" or bool(triton.knobs.runtime.interpret)


def local_heads(kv_heads: int, rank: int, ranks: int) -> slice:
    """The KV heads that a tensor-parallel rank stores; with fewer heads than ranks, several ranks store the same one."""
    if kv_heads >= ranks:
        count = kv_heads // ranks
        return slice(rank * count, (rank + 1) * count)
    head = rank // (ranks // kv_heads)
    return slice(head, head + 1)


class PackedPool(MHATokenToKVPool):
    """A pool of packed rows for the layers of one rank.

    SGLang's getters of key and value buffers return an empty tensor of the right head and channel numbers: only the
    backends in :mod:`kvtuner_search.serving.sglang.attention` can read a row, and any other code fails at once.

    Args:
        layers: the specs of this rank's layers, the first of which is ``start_layer``.
        centres: centring vectors and bases of all KV heads, by global layer.
        heads: the KV heads that this rank stores.
        layer_ids: the layers' global indices, if they do not follow each other.
        size, named: as for SGLang's own pool.

    Raises:
        ProfileError: if a basis cannot be used.
    """

    def __init__(
        self, size: int, *, layers: Sequence[LayerSpec], centres: Mapping[int, Centres], heads: slice,
        layer_ids: Sequence[int] | None = None, **named: Any,
    ) -> None:  # fmt: skip
        self.specs = list(layers)
        self.layer_ids = None if layer_ids is None else list(layer_ids)
        self._all_centres = centres
        self._heads = heads
        self._said: _Said | None = None  # within `storing`
        self._counts_from_0 = False  # whether a batch has confirmed it
        self.model_dtype: torch.dtype = named.pop("dtype")
        super().__init__(size, dtype=torch.uint8, **named)

    def _create_buffers(self) -> None:
        if len(self.specs) != self.layer_num or self.head_dim != self.v_head_dim:
            raise ValueError(
                f"the pool has {self.layer_num} layers of {self.head_dim} and {self.v_head_dim} channels, the profile has"
                f" {len(self.specs)} layers of equal channels: this model is not supported"
            )
        device = torch.device(self.device)
        self.layers: list[LayerStorage] = []
        for index, spec in enumerate(self.specs):
            layer = self.start_layer + index if self.layer_ids is None else self.layer_ids[index]
            centres = self._local_centres(layer, spec, device)
            nbytes = spec.bytes_per_token(self.head_num, self.head_dim)
            # Slot 0 is not handed out: padded tokens are written there. The page behind `size` is its share.
            rows = torch.zeros(self.size + self.page_size, nbytes, dtype=torch.uint8, device=device)
            self.layers.append(LayerStorage(spec, centres, rows))
        self.k_buffer = [layer.rows for layer in self.layers]
        self.v_buffer: list[Tensor] = []
        self._stub = torch.empty(0, self.head_num, self.head_dim, dtype=torch.uint8, device=device)
        self.data_ptrs = torch.tensor([rows.data_ptr() for rows in self.k_buffer], dtype=torch.uint64, device=device)
        self.data_strides = torch.tensor([rows.stride(0) for rows in self.k_buffer], device=device)

    def _local_centres(self, layer: int, spec: LayerSpec, device: torch.device) -> Centres:
        """This rank's heads of a layer's tensors in the transforms file. Quantities derived from a basis are computed here, once."""
        both = self._all_centres.get(layer, NO_CENTRES)
        local = Centres(*(None if side is None else side[self._heads].to(device).contiguous() for side in both))
        for name, side, centre in (("key", spec.key, local.key), ("value", spec.value, local.value)):
            if side.banded and centre is not None:
                try:
                    basis(centre)
                except BasisError as error:
                    raise ProfileError(
                        f"layers.{layer}.{name} of the transforms file: {error}: restore the file that was written with the"
                        " profile, or calibrate again"
                    ) from error
        return local

    @contextmanager
    def storing(self, positions: Tensor | None, prefixes: Tensor | None = None) -> Iterator[None]:
        """Give the positions of the tokens that are stored inside the block.

        Args:
            positions: int64 [at least N] of the N tokens of each call of :meth:`set_kv_buffer`, 0 for the first of a sequence; None
                if none of them is the first.
            prefixes: int [requests], number of tokens that each request has already stored, if known. The first batch is
                compared with it: a model that changes SGLang's positions in place (as Gemma 3's image class does) would
                store its first tokens like any others, which only the answers would show.
        """
        before, self._said = self._said, _Said(positions, prefixes)
        try:
            yield
        finally:
            self._said = before

    def _positions_of(self, tokens: int) -> Tensor | None:
        """The positions that :meth:`storing` gave for the tokens of a call, int64 [tokens].

        Raises:
            RuntimeError: if none were given, or not for all tokens, or they are impossible.
        """
        if self._said is None:
            _refuse_store(f"the positions of {tokens} tokens in their sequences are unknown")
        positions, prefixes = self._said
        if positions is None:
            return None
        if len(positions) < tokens:
            _refuse_store(f"there are {len(positions)} positions for {tokens} tokens")
        positions = positions[:tokens]  # a graph's buffer is as long as its largest batch
        capturing = positions.is_cuda and torch.cuda.is_current_stream_capturing()
        if not self._counts_from_0 and prefixes is not None and tokens and not capturing:
            least, most, expected = int(positions.min()), int(positions.max()), int(prefixes.min())
            if least != expected:
                _refuse_store(f"after {expected} stored tokens the model counts from position {least}")
            self._counts_from_0 = most > 0  # in SGLang's trial runs of a model, all are 0
        return positions

    def storage(self, layer_id: int) -> LayerStorage:
        """The storage of a layer by its global index."""
        return self.layers[layer_id - self.start_layer]

    def slots_of(self, _layer_id: int, slots: Tensor) -> Tensor:
        """Where a layer stores the tokens of these slots: all layers of this pool share them."""
        return slots

    def row_bytes(self) -> int:
        """Bytes of all rows, the padding slots' included."""
        return sum(rows.nbytes for rows in self.k_buffer)

    get_kv_size_bytes = row_bytes

    def predicted_bytes(self) -> int:
        """The same from the layout alone."""
        return (self.size + self.page_size) * sum(s.bytes_per_token(self.head_num, self.head_dim) for s in self.specs)

    def set_kv_buffer(
        self,
        layer: Any,
        loc_info: Any,
        cache_k: Tensor,
        cache_v: Tensor,
        k_scale: float | None = None,
        v_scale: float | None = None,
        layer_id_override: int | None = None,
        **_: Any,
    ) -> None:
        """Quantize and store keys and values [N, H, D] of one layer; they are not changed. Scales are not needed.

        Raises:
            RuntimeError: if the layer is stored in a fitted basis, and :meth:`storing` did not give the tokens' positions: only
                the answers would show rows that are stored wrongly.
        """
        slots, *_others = unwrap_write_loc(loc_info)
        spec, centres, rows = self.storage(layer.layer_id if layer_id_override is None else layer_id_override)
        key = cache_k.view(-1, self.head_num, self.head_dim)
        value = cache_v.view(-1, self.head_num, self.head_dim)
        positions = self._positions_of(len(key)) if spec.key.banded or spec.value.banded else None
        if uses_triton(rows.device):
            store(key, value, rows, slots, spec, centres, positions)
        else:
            first = None if positions is None else positions == 0
            rows[slots] = pack_rows(key, value, spec, centres, first, refuse=False)

    def _get_key_buffer(self, layer_id: int) -> Tensor:
        return self._stub

    _get_value_buffer = _get_key_buffer

    def _init_kv_copy_and_warmup(self) -> None:
        # SGLang sizes the copy's grid by the first row's width: let it see the widest. The warm-up copies a row onto itself.
        own = self.data_strides
        self.data_strides = torch.full_like(own, int(own.max()))
        super()._init_kv_copy_and_warmup()
        self.data_strides = own

    def move_kv_cache(self, tgt_loc: Tensor, src_loc: Tensor) -> None:
        """Copy rows of all layers to other slots (speculative decoding)."""
        if self._kv_copy_config is None or envs.SGLANG_NATIVE_MOVE_KV_CACHE.get():
            for rows in self.k_buffer:
                move(rows, tgt_loc.view(-1).long(), src_loc.view(-1).long())
        else:
            super().move_kv_cache(tgt_loc, src_loc)

    def get_cpu_copy(self, indices: Tensor, *_: Any, **__: Any) -> list[list[Tensor]]:
        """Rows of all layers in chunks, on the host."""
        chunks = indices.split(self.cpu_offloading_chunk_size)
        copies = [[rows[chunk].to("cpu", non_blocking=True) for chunk in chunks] for rows in self.k_buffer]
        _synchronize(self.k_buffer[0].device)
        return copies

    def load_cpu_copy(self, kv_cache_cpu: list[list[Tensor]], indices: Tensor, *_: Any, **__: Any) -> None:
        """The inverse of :meth:`get_cpu_copy`, into other slots if necessary."""
        chunks = indices.split(self.cpu_offloading_chunk_size)
        for rows, copies in zip(self.k_buffer, kv_cache_cpu, strict=True):
            for chunk, copy in zip(chunks, copies, strict=True):
                rows[chunk] = copy.to(rows.device, non_blocking=True)
        _synchronize(self.k_buffer[0].device)

    def get_contiguous_buf_infos(self) -> NoReturn:
        raise NotImplementedError("packed rows cannot be sent to another server: disaggregation is refused at start")

    def set_kv_buffer_prefix_valid(self, *arguments: Any, **named: Any) -> NoReturn:
        raise NotImplementedError("packed rows have no store of a committed prefix: DFLASH is refused at start")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _refuse_store(what: str) -> NoReturn:
    raise RuntimeError(
        f"{what}: layers in a fitted basis need every position; report this with the model and the options, or serve a profile"
        " without bases"
    )
