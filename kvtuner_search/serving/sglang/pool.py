"""SGLang's pool of keys and values, stored as packed rows.

A layer is one tensor, uint8 [slots, row bytes], and a slot is one row that holds the keys and the values of all local KV heads
(``kvtuner_kernels.layout``). Slots are SGLang's own: the token's slot id is the row's index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import triton
from sglang.srt.environ import envs
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, unwrap_write_loc
from torch import Tensor

from kvtuner_kernels.gather import move
from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.quantize import store
from kvtuner_kernels.reference import NO_CENTRES, Centres, pack_rows


class LayerStorage(NamedTuple):
    """Where one layer's cache lies on this rank, and how."""

    spec: LayerSpec
    centres: Centres  # fp32 [local KV heads, D], on the pool's device
    rows: Tensor  # uint8 [slots, row bytes]


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

    SGLang's getters of key and value buffers return an empty tensor of the right head and channel numbers: nothing but the
    backends in :mod:`kvtuner_search.serving.sglang.attention` can read a row, and anything else fails at once.

    Args:
        layers: the specs of this rank's layers, the first of which is ``start_layer``.
        centres: centring vectors of all KV heads, by global layer.
        heads: the KV heads that this rank stores.
        size, named: as for SGLang's own pool.
    """

    def __init__(
        self, size: int, *, layers: Sequence[LayerSpec], centres: Mapping[int, Centres], heads: slice, **named: Any
    ) -> None:
        self.specs = list(layers)
        self._all_centres = centres
        self._heads = heads
        self.model_dtype: torch.dtype = named.pop("dtype")
        super().__init__(size, dtype=torch.uint8, **named)

    def _create_buffers(self) -> None:
        if len(self.specs) != self.layer_num or self.head_dim != self.v_head_dim:
            raise ValueError(
                f"the pool has {self.layer_num} layers of {self.head_dim} and {self.v_head_dim} channels, the profile gives"
                f" {len(self.specs)} layers of equal channels: this model is not supported"
            )
        device = torch.device(self.device)
        self.layers: list[LayerStorage] = []
        for index, spec in enumerate(self.specs):
            both = self._all_centres.get(self.start_layer + index, NO_CENTRES)
            local = (None if side is None else side[self._heads].to(device).contiguous() for side in both)
            nbytes = spec.bytes_per_token(self.head_num, self.head_dim)
            # Slot 0 is not handed out: padded tokens are written there. The page behind `size` is its share.
            rows = torch.zeros(self.size + self.page_size, nbytes, dtype=torch.uint8, device=device)
            self.layers.append(LayerStorage(spec, Centres(*local), rows))
        self.k_buffer = [layer.rows for layer in self.layers]
        self.v_buffer: list[Tensor] = []
        self._stub = torch.empty(0, self.head_num, self.head_dim, dtype=torch.uint8, device=device)
        self.data_ptrs = torch.tensor([rows.data_ptr() for rows in self.k_buffer], dtype=torch.uint64, device=device)
        self.data_strides = torch.tensor([rows.stride(0) for rows in self.k_buffer], device=device)

    def storage(self, layer_id: int) -> LayerStorage:
        """The storage of a layer by its global index."""
        return self.layers[layer_id - self.start_layer]

    def get_kv_size_bytes(self) -> int:
        """Bytes of all rows, the padding slots' included."""
        return sum(rows.nbytes for rows in self.k_buffer)

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
        """Quantize and store keys and values [N, H, D] of one layer; they are left as they are. Scales are not needed."""
        slots, *_others = unwrap_write_loc(loc_info)
        spec, centres, rows = self.storage(layer.layer_id if layer_id_override is None else layer_id_override)
        key = cache_k.view(-1, self.head_num, self.head_dim)
        value = cache_v.view(-1, self.head_num, self.head_dim)
        if uses_triton(rows.device):
            store(key, value, rows, slots, spec, centres)
        else:
            rows[slots] = pack_rows(key, value, spec, centres)

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
        """The inverse of :meth:`get_cpu_copy`, into other slots if need be."""
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
