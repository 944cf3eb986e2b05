"""Attention sinks: a logit for each query head that takes its share of the softmax and has no value (gpt-oss)."""

from __future__ import annotations

from torch import Tensor

from kvtuner_kernels.layout import LayoutError


def check_sinks(sinks: Tensor | None, query_heads: int) -> Tensor | None:
    """Attention sinks as fp32 [Hq]: attention weights are ``softmax([scores, sink])`` without its last entry.

    Sinks are natural logarithms, compared with the scaled and capped scores, and are themselves neither scaled nor capped (gpt-oss model
    card, section 2.1; ``GptOssAttention`` in transformers passes them as ``s_aux``).

    Args:
        sinks: floating point [Hq]; None if the layer has none.
        query_heads: local query heads Hq.

    Raises:
        LayoutError: for another shape, or numbers that are not floating point.

    Example::

        sinks = check_sinks(attention.sinks, 64)
    """
    if sinks is None:
        return None
    if sinks.shape != (query_heads,) or not sinks.is_floating_point():
        raise LayoutError(
            f"attention sinks are {sinks.dtype} {list(sinks.shape)}, expected floating point [{query_heads}]: give one logit for"
            " each local query head"
        )
    return sinks.float().contiguous()
