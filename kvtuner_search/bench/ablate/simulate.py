"""Attention over formats that layout version 1 cannot store, computed in plain torch: per-channel keys and a 16-bit window of newest tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtuner_kernels.layout import TensorSpec
from kvtuner_kernels.reference import as_stored
from kvtuner_search.bench.ablate.variants import Scheme


def per_channel(key: Tensor, bits: int, group: int) -> Tensor:
    """Keys [B, T, H, D] with each channel quantized over ``group`` consecutive tokens; a last, incomplete group stays unquantized.

    The arithmetic is the package's own, tokens taking the place of channels: asymmetric, fp16 scale and minimum.
    """
    whole = key.shape[1] // group * group
    grouped = key[:, :whole].reshape(len(key), whole // group, group, *key.shape[2:])
    blocks = grouped.permute(0, 1, 3, 4, 2)  # [B, groups, H, D, tokens of a group]
    stored = as_stored(blocks, TensorSpec(bits, group)).permute(0, 1, 4, 2, 3).flatten(1, 2)
    return torch.cat((stored, key[:, whole:]), dim=1)


class SimulatedCache:
    """Tap: each query sees older keys and values quantized and newer ones as computed, according to a scheme.

    A key can be in 16 bits for one query and quantized for a later one, so attention is given up to four copies of the sequence, one
    for each way in which a token's key and value can be stored, and a mask in which each query sees every earlier token once.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self._masks: dict[int, dict[tuple[bool, bool], Tensor]] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scheme = self.scheme
        if scheme.token_group:
            stored_key = per_channel(key, scheme.key.bits, scheme.token_group)
        else:
            stored_key = as_stored(key, scheme.key)
        keys, values = (key, stored_key), (value, as_stored(value, scheme.value))
        masks = self._masks_of(key.shape[1])
        visible = torch.cat(list(masks.values()), dim=-1).to(key.device)
        return (
            torch.cat([keys[k] for k, _ in masks], dim=1),
            torch.cat([values[v] for _, v in masks], dim=1),
            visible.view(1, 1, *visible.shape),
            torch.arange(key.shape[1], device=key.device).repeat(len(masks)),
        )

    def _masks_of(self, tokens: int) -> dict[tuple[bool, bool], Tensor]:
        """Which tokens [T, T] each query sees with (key quantized, value quantized); pairs that no query sees are left out."""
        if tokens not in self._masks:
            count = range(1, tokens + 1)  # tokens in the cache when each query attends, its own included
            column = torch.arange(tokens)
            old_key = column < torch.tensor([self.scheme.quantized_keys(n) for n in count]).unsqueeze(1)
            old_value = column < torch.tensor([self.scheme.quantized_values(n) for n in count]).unsqueeze(1)
            seen = column <= column.unsqueeze(1)
            every = {
                (k, v): seen & (old_key if k else ~old_key) & (old_value if v else ~old_value)
                for k in (False, True)
                for v in (False, True)
            }
            self._masks[tokens] = {pair: mask for pair, mask in every.items() if mask.any()}
        return self._masks[tokens]
