"""Taps that replace keys and values by what attention would read back from a quantized cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.reference import NO_CENTRES, Centres, as_stored
from kvtuner_search.models.attention import Tap
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


class PrefilledCache:
    """Tap: a prompt's own tokens read each other as computed, as in a prefill of one chunk; all later tokens read every row as stored.

    That is how a server computes that keeps the new keys and values of a prefill at hand. The two differ by more than rounding: a prompt's keys
    and values of all layers but the first depend on what its own tokens read. Call ``begin`` before each pass.

    Args:
        stored: tap that returns keys and values as stored.
    """

    def __init__(self, stored: Tap) -> None:
        self.stored = stored
        self._prompts = torch.empty(0, dtype=torch.int64)

    def begin(self, prompts: Tensor) -> None:
        """Announce a pass over sequences whose prompts have int64 [B] tokens."""
        self._prompts = prompts

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stored = self.stored(layer, query, key, value)
        at = torch.arange(key.shape[1], device=key.device)
        causal = at[:, None] >= at
        prefill = (at < self._prompts.to(key.device)[:, None])[..., None]  # [B, T, 1]
        visible = torch.cat((causal & prefill, causal & ~prefill), -1).unsqueeze(1)
        return torch.cat((key, stored[0]), 1), torch.cat((value, stored[1]), 1), visible, at.repeat(2)


def stored_cache(setting: Sequence[LayerSpec], centres: Mapping[int, Centres]) -> StoredCache:
    """The tap for a whole setting."""
    return StoredCache(dict(enumerate(setting)), centres)
