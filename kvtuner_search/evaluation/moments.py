"""First and second moments of queries, keys and values, gathered while the 16-bit cache is scored."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvtuner_kernels.reference import Centres


@dataclass
class LayerMoments:
    """Running sums of one layer, fp64 on the model's device."""

    tokens: int
    key: Tensor  # [H, D] sum of keys
    value: Tensor  # [H, D] sum of values
    query: Tensor  # [H, D, D] sum of q q^T over the query heads that read each KV head

    def centres(self) -> Centres:
        """Mean key and mean value, fp32 [H, D] each."""
        return Centres((self.key / self.tokens).float(), (self.value / self.tokens).float())


@dataclass
class Moments:
    """Tap that returns keys and values unchanged. ``valid`` [B, T] marks what is not padding; set it before each pass."""

    valid: Tensor | None = None
    layers: dict[int, LayerMoments] = field(default_factory=dict)

    def begin(self, valid: Tensor) -> None:
        """Announce a batch."""
        self.valid = valid

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        assert self.valid is not None, "begin() comes before the pass"
        valid = self.valid.to(key.device)
        heads, head_dim = key.shape[-2:]
        k, v, q = key[valid], value[valid], query[valid].float()
        grouped = q.reshape(len(q), heads, -1, head_dim)
        moments = self.layers.get(layer)
        if moments is None:
            zeros = torch.zeros(heads, head_dim, dtype=torch.float64, device=key.device)
            moments = self.layers[layer] = LayerMoments(
                0, zeros, zeros.clone(), zeros.unsqueeze(-1).repeat(1, 1, head_dim)
            )
        moments.tokens += len(k)
        moments.key += k.sum(0, dtype=torch.float64)
        moments.value += v.sum(0, dtype=torch.float64)
        moments.query += torch.einsum("nhgd,nhge->hde", grouped, grouped)
        return key, value

    def centres(self) -> dict[int, Centres]:
        """Mean key and value by layer."""
        return {layer: moments.centres() for layer, moments in self.layers.items()}
