"""Extend and decode beside SGLang's own kernels over 16-bit rows, in Triton's interpreter: prints the largest difference of each case.

Windows, sinks, and a mask of drafted tokens over the whole context beside the slots of a window, as SGLang's Triton backend gives them.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.triton_ops.decode_attention import decode_attention_fwd
from sglang.srt.layers.attention.triton_ops.extend_attention import extend_attention_fwd

from kvtuner_kernels.decode import decode
from kvtuner_kernels.extend import extend
from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.reference import pack_rows

HEADS, QUERY_HEADS, HEAD_DIM, NEW = 1, 2, 64, 5
CONTEXTS = [30, 3, 17]


def main() -> None:
    """All cases, one a line."""
    torch.manual_seed(0)
    spec, total = LayerSpec(), sum(CONTEXTS)
    key, value = torch.randn(2, total, HEADS, HEAD_DIM).half()
    rows, slots = pack_rows(key, value, spec), torch.arange(total)
    query = torch.randn(NEW * len(CONTEXTS), QUERY_HEADS, HEAD_DIM).half()
    chunk_key, chunk_value = torch.randn(2, len(query), HEADS, HEAD_DIM).half()
    sinks, qo_indptr = torch.randn(QUERY_HEADS) * 2, torch.arange(len(CONTEXTS) + 1, dtype=torch.int32) * NEW
    masks = [torch.rand(NEW, context + NEW) < 0.6 for context in CONTEXTS]
    for context, mask in zip(CONTEXTS, masks, strict=True):
        mask[:, context - 1] = True
        mask[torch.arange(NEW), context + torch.arange(NEW)] = True
    mask, mask_indptr = (
        torch.cat([m.flatten() for m in masks]),
        torch.tensor([0, *(m.numel() for m in masks)]).cumsum(0),
    )
    starts = torch.tensor([0, *CONTEXTS]).cumsum(0)
    for size in (-1, 7, 1):  # SGLang counts the tokens before the current one
        left = [max(0, context - size) if size > 0 else 0 for context in CONTEXTS]
        kept = torch.cat([slots[starts[i] + left[i] : starts[i + 1]] for i in range(len(CONTEXTS))])
        indptr = torch.tensor([0, *(c - out for c, out in zip(CONTEXTS, left, strict=True))]).cumsum(0).int()
        offsets, window = torch.tensor(left), size + 1 if size > 0 else 0
        for logits in (None, sinks):
            for masked in (False, True):
                theirs, ours = torch.empty_like(query), torch.empty_like(query)
                extend_attention_fwd(
                    query, chunk_key, chunk_value, theirs, key, value, qo_indptr, indptr, kept, mask if masked else None,
                    True, mask_indptr if masked else None, NEW, 1.0, 1.0, skip_prefix_custom_mask=False,
                    sliding_window_size=size, sinks=logits, window_kv_offsets=offsets,
                )  # fmt: skip
                extend(
                    query, chunk_key, chunk_value, rows, spec, HEADS, qo_indptr, indptr, kept, NEW, ours, window=window,
                    sinks=logits, custom_mask=mask if masked else None, mask_indptr=mask_indptr if masked else None,
                    skip_prefix_mask=False, mask_offsets=offsets if masked and size > 0 else None,
                )  # fmt: skip
                print(f"extend {size} {logits is not None} {masked} {(theirs - ours).abs().max().item():.1e}")
            one, splits = query[: len(CONTEXTS)], 2
            theirs, counts = torch.empty_like(one), torch.full((len(CONTEXTS),), splits, dtype=torch.int32)
            decode_attention_fwd(
                one, key, value, theirs, indptr, kept, torch.empty(len(CONTEXTS), QUERY_HEADS, splits, HEAD_DIM),
                torch.empty(len(CONTEXTS), QUERY_HEADS, splits), counts, splits, HEAD_DIM**-0.5, 1.0, 1.0, sinks=logits,
            )  # fmt: skip
            ours = decode(one, rows, spec, HEADS, indptr, kept, sinks=logits)
            print(f"decode {size} {logits is not None} {(theirs - ours).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
