"""A tap that replaces keys and values by what attention would read back from a quantized cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.reference import NO_CENTRES, Centres, as_stored
from kvtuner_search.transforms import transform_of

Setting = tuple[LayerSpec, ...]  # one LayerSpec a layer


def first_tokens(key: Tensor) -> Tensor:
    """bool [B, T]: the first token of each sequence of keys [B, T, H, D] that begin at position 0."""
    return (torch.arange(key.shape[1], device=key.device) == 0).expand(key.shape[:2])


class StoredCache:
    """Tap: every key and value is quantized and read back as the setting says. Sequences begin at position 0.

    Args:
        specs: LayerSpec by layer index; missing layers stay unquantized.
        centres: by layer index, the tensors of centred or banded sides (see transform_of).
    """

    def __init__(self, specs: Mapping[int, LayerSpec], centres: Mapping[int, Centres]) -> None:
        self.specs, self.centres = specs, centres

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        spec = self.specs.get(layer)
        if spec is None:
            return key, value
        centres, first = self.centres.get(layer, NO_CENTRES), first_tokens(key)
        return (
            as_stored(key, spec.key, transform_of(spec.key, centres.key, key.device), first=first),
            as_stored(value, spec.value, transform_of(spec.value, centres.value, value.device), first=first),
        )


def stored_cache(setting: Sequence[LayerSpec], centres: Mapping[int, Centres]) -> StoredCache:
    """The tap for a whole setting."""
    return StoredCache(dict(enumerate(setting)), centres)
