"""Which architectures can be calibrated: dense decoders in which every layer has standard, full attention."""

from __future__ import annotations

from typing import Any

from kvtuner_search.errors import DataError

_MLA_FIELDS = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim")


def check_supported(config: Any) -> None:
    """Refuse a transformers config that has a layer without standard, full attention.

    Raises:
        DataError: names the first such layer and why.
    """
    kind = getattr(config, "model_type", "unknown")
    if getattr(config, "is_encoder_decoder", False):
        raise DataError(f"model type {kind!r} is an encoder-decoder: only decoders are supported")
    if getattr(config, "kv_lora_rank", None):
        fields = ", ".join(f"{name}={getattr(config, name)}" for name in _MLA_FIELDS if getattr(config, name, None))
        raise DataError(
            f"layer 0 of model type {kind!r} has multi-head latent attention ({fields}): its cache is not keys and values"
        )
    layers = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["full_attention"] * layers
    for layer, name in enumerate(types[:layers]):
        if name not in ("full_attention", "attention"):
            span = f" (window {config.sliding_window})" if name == "sliding_attention" else ""
            raise DataError(
                f"layer {layer} of model type {kind!r} is {name}{span}: only models with full attention everywhere are supported"
            )
    window = getattr(config, "sliding_window", None)
    if (
        getattr(config, "layer_types", None) is None
        and getattr(config, "use_sliding_window", True)
        and window is not None
    ):
        raise DataError(
            f"layer 0 of model type {kind!r} attends in a sliding window of {window} tokens: if texts stay below that,"
            " set sliding_window to null in config.json"
        )
