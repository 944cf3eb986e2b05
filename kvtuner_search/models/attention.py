"""The attention function that lets calibration see, and replace, the keys and values of every layer.

It is registered with transformers' ``AttentionInterface`` under the name ``kvtuner``. Queries, keys and values arrive after the
rotary embedding, which is where a server stores them. The whole sequence is computed at once and attention reads every key and value as
the tap returns, the current token's included: the same as decoding token by token from a cache that holds those values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvtuner_search.errors import DataError

NAME: Final = "kvtuner"
_HARMLESS: Final = ("cache_position", "position_ids", "position_embeddings")  # tensors with the tokens' positions


class Tap(Protocol):
    """Called once a layer and forward pass.

    ``query`` is [B, T, Hq, D], ``key`` and ``value`` are [B, T, H, D], all in the model's dtype. The result takes the place
    of key and value. Without a third tensor there are T of them and attention is causal from position 0; a third one, bool
    [B or 1, 1, T, S], says which of the S that are returned each query sees, as decoding from a cache needs it.
    """

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]: ...


class Observer(Tap, Protocol):
    """A tap that returns keys and values unchanged; ``begin`` says before each pass which tokens [B, T] are not padding."""

    def begin(self, valid: Tensor) -> None: ...


_TAP: ContextVar[Tap | None] = ContextVar("kvtuner_tap", default=None)


@contextmanager
def tapped(tap: Tap | None) -> Iterator[None]:
    """Send forward passes inside the block through ``tap``."""
    token = _TAP.set(tap)
    try:
        yield
    finally:
        _TAP.reset(token)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention from position 0; [B, H, T, D] in, [B, T, Hq, D] out. Padding on the right needs no mask."""
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise DataError(
            f"attention module {type(module).__name__} has no layer_idx: this architecture is not supported"
        )
    if query.shape[2] != key.shape[2] or attention_mask is not None:
        raise DataError(
            f"layer {layer} attends with a cache or a mask: run the model without use_cache and padding on the left"
        )
    if sliding_window is not None and sliding_window < key.shape[2]:
        raise DataError(
            f"layer {layer} attends in a window of {sliding_window} tokens: only full attention is supported"
        )
    if softcap is not None or s_aux is not None:
        raise DataError(
            f"layer {layer} attends with {'a soft cap' if softcap is not None else 'sinks'}: only standard attention is supported"
        )
    unknown = sorted(name for name, value in more.items() if isinstance(value, Tensor) and name not in _HARMLESS)
    if unknown or is_causal is False:
        what = f"with {', '.join(unknown)}" if unknown else "in both directions"
        raise DataError(f"layer {layer} attends {what}: only standard causal attention is supported")
    tap, visible = _TAP.get(), None
    if tap is not None:
        found = tap(layer, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        key, value = found[0].transpose(1, 2), found[1].transpose(1, 2)
        visible = found[2] if len(found) == 3 else None
    output = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        is_causal=visible is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Causality is built in, so transformers need not build a mask."""


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)
