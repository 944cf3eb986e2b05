"""SGLang's two pools of models that keep no more than a window in some layers (gpt-oss): both hold packed rows.

Layers that keep every token share one pool and its slots; layers with windows share the other, whose slots SGLang takes back once a
token has left the window. A token's slot is that of the first pool; ``full_to_swa_index_mapping`` has its slot in the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from torch import Tensor

from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.reference import Centres
from kvtuner_search.serving.sglang.pool import LayerStorage, PackedPool


class PackedSWAPool(SWAKVPool):
    """Two pools of packed rows, for the layers of one rank.

    Args:
        size: tokens of the layers that keep all.
        size_swa: tokens of the layers with windows.
        layers: the specs of all layers of the model.
        centres: centring vectors and bases of all KV heads, by global layer.
        heads: the KV heads that this rank stores.
        swa_attention_layer_ids: global indices of this rank's layers with windows.
        full_attention_layer_ids: global indices of its other layers.
        named: as for SGLang's own pool.

    Raises:
        ProfileError: if a basis cannot be used.
    """

    full_kv_pool: PackedPool
    swa_kv_pool: PackedPool

    def __init__(
        self,
        size: int,
        size_swa: int,
        *,
        layers: Sequence[LayerSpec],
        centres: Mapping[int, Centres],
        heads: slice,
        swa_attention_layer_ids: Sequence[int],
        full_attention_layer_ids: Sequence[int],
        **named: Any,
    ) -> None:
        pending = {"windows": list(swa_attention_layer_ids), "all": list(full_attention_layer_ids)}

        def make(size: int, **inner: Any) -> PackedPool:
            ids = pending.pop(next(iter(pending)))  # SGLang makes the pool of the windows first
            specs = [layers[index] for index in ids]
            return PackedPool(size, layers=specs, layer_ids=ids, centres=centres, heads=heads, **inner)

        super().__init__(
            size, size_swa, swa_attention_layer_ids=list(swa_attention_layer_ids),
            full_attention_layer_ids=list(full_attention_layer_ids), token_to_kv_pool_class=make, **named,
        )  # fmt: skip
        assert self.swa_kv_pool.layer_ids == list(swa_attention_layer_ids)
        self.model_dtype = self.full_kv_pool.model_dtype
        self.dtype = torch.uint8  # as that of one pool: no code takes these rows for numbers
        self.specs = [*self.full_kv_pool.specs, *self.swa_kv_pool.specs]
        self.k_buffer = [*self.full_kv_pool.k_buffer, *self.swa_kv_pool.k_buffer]

    @contextmanager
    def storing(self, positions: Tensor | None, prefixes: Tensor | None = None) -> Iterator[None]:
        """As :meth:`PackedPool.storing`, for both pools."""
        with self.full_kv_pool.storing(positions, prefixes), self.swa_kv_pool.storing(positions, prefixes):
            yield

    def storage(self, layer_id: int) -> LayerStorage:
        """The storage of a layer by its global index."""
        index, windowed = self.layers_mapping[layer_id]
        return (self.swa_kv_pool if windowed else self.full_kv_pool).layers[index]

    def slots_of(self, layer_id: int, slots: Tensor) -> Tensor:
        """Where a layer stores the tokens of these slots; 0, which no token has, for those that it has forgotten."""
        _, windowed = self.layers_mapping[layer_id]
        return self.translate_loc_from_full_to_swa(slots) if windowed else slots

    def row_bytes(self) -> int:
        """Bytes of all rows of both pools."""
        return self.full_kv_pool.row_bytes() + self.swa_kv_pool.row_bytes()

    def predicted_bytes(self) -> int:
        """The same from the layout alone."""
        return self.full_kv_pool.predicted_bytes() + self.swa_kv_pool.predicted_bytes()

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of either pool; SGLang adds the two."""
        return self.full_kv_pool.row_bytes(), self.swa_kv_pool.row_bytes()

    def get_key_buffer(self, layer_id: int) -> Tensor:
        """Of any layer, also of another rank's: SGLang's Triton backend asks layer 0 for its channels."""
        return self.full_kv_pool.get_key_buffer(0)

    get_value_buffer = get_key_buffer

    def _filter_swa_cpu_copy(self, swa_kv_cpu: list[list[Tensor]] | None, row_mask: Tensor | None) -> Any:
        if swa_kv_cpu is None or row_mask is None or bool(row_mask.all()):
            return swa_kv_cpu
        chunk = self.swa_kv_pool.cpu_offloading_chunk_size
        return [list(torch.cat(chunks)[row_mask].split(chunk)) for chunks in swa_kv_cpu]
