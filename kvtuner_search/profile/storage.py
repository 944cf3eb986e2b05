"""What layers add up to: bytes per token, and bytes of a request at a context. Neither torch nor transformers is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_kernels.layout import bytes_per_token as layout_bytes_per_token
from kvtuner_kernels.layout import effective_bits as layout_effective_bits
from kvtuner_search.profile.fields import Count, Number, Strict
from kvtuner_search.profile.kinds import LayerKind


class Storage(Strict):
    """Totals over the layers; checked against the layout when a profile is loaded."""

    bytes_per_token: Count
    """Bytes that all layers store for one token, including codes, scales, minima and padding. A sequence's first token takes as many as any other."""
    bytes_per_token_16bit: Count
    """The same for an unquantized cache."""
    effective_bits: Number
    """Stored bits per cached number: bytes_per_token * 8 / (2 * layers * KV heads * head_dim)."""
    bytes_per_token_full: Count | None = None
    """Bytes of a token in the layers of full attention alone, which keep every token; present if other layers have windows or chunks."""
    bytes_per_request_windows: Count | None = None
    """Bytes that layers with windows or chunks hold for one request once it is longer than they are; present as the field before."""

    @model_serializer(mode="wrap")
    def _without_windows(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Profiles of models without windows keep their canonical form."""
        content: dict[str, Any] = handler(self)
        return {key: value for key, value in content.items() if value is not None}


def storage_of(
    layers: Sequence[LayerSpec], kv_heads: int, head_dim: int, kinds: Sequence[LayerKind] | None = None
) -> Storage:
    """The storage block for these layers; without ``kinds`` all of them are full.

    Raises:
        LayoutError: if a layer cannot be stored.
    """
    windows: dict[str, int] = {}
    try:
        raw = [LayerSpec()] * len(layers)
        if kinds is not None and any(kind.window for kind in kinds):
            each = [layer.bytes_per_token(kv_heads, head_dim) for layer in layers]
            windows = {
                "bytes_per_token_full": sum(n for n, kind in zip(each, kinds, strict=True) if not kind.window),
                "bytes_per_request_windows": sum(n * kind.window for n, kind in zip(each, kinds, strict=True)),
            }
        return Storage(
            bytes_per_token=layout_bytes_per_token(layers, kv_heads, head_dim),
            bytes_per_token_16bit=layout_bytes_per_token(raw, kv_heads, head_dim),
            effective_bits=layout_effective_bits(layers, kv_heads, head_dim),
            **windows,
        )
    except LayoutError as error:
        raise LayoutError(f"{error} (head_dim={head_dim})") from None


def bytes_per_request(
    layers: Sequence[LayerSpec], kv_heads: int, head_dim: int, kinds: Sequence[LayerKind], context: int
) -> int:
    """Bytes of the rows that a request of ``context`` tokens must keep: all of them in full layers, at most the window in others.

    An engine that keeps windowed layers in the pool of the full ones takes ``context * bytes_per_token`` instead.

    Args:
        layers: one LayerSpec a layer.
        kv_heads: KV heads of a layer.
        head_dim: channels of a head.
        kinds: the kind of each layer.
        context: tokens of the request, prompt and answer together.

    Raises:
        LayoutError: if a layer cannot be stored.

    Example:
        >>> bytes_per_request([LayerSpec()] * 2, 1, 64, [LayerKind("sliding", 512), LayerKind()], 4096)
        1179648
    """
    return sum(
        layer.bytes_per_token(kv_heads, head_dim) * kind.kept(context)
        for layer, kind in zip(layers, kinds, strict=True)
    )
