"""End a request whose numbers are not finite, and only that one. Only on the CPU: on a GPU every check would make it wait.

A key or value that cannot be stored (NaN, infinite, beyond fp16) is stored as a row that reads back as NaN
(:func:`kvtuner_kernels.reference.pack_rows`), so that attention, and at the end the logits, of its request are NaN, on every rank and in no other
request. The sampler then returns a token id outside every vocabulary, which the ranks of a pipeline pass on like any other. It ends the
request with an error, and the request's rows do not enter the prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

from sglang.srt.plugins.hook_registry import HookType
from torch import Tensor

NO_TOKEN: Final = -1
MESSAGE: Final = (
    "the model's numbers for this request are not finite, or too large for the cache: look for NaN or overflow in the weights, serve with"
    " --dtype float32, or store these layers with 16 bits"
)


def sample(original: Callable[..., Tensor], sampler: Any, logits_output: Any, *arguments: Any, **named: Any) -> Tensor:
    """SGLang's ``Sampler.forward``: token ids int64 [B], NO_TOKEN for each request with NaN among its logits [B, V]."""
    logits = logits_output.next_token_logits
    if logits is None or logits.is_cuda:
        return original(sampler, logits_output, *arguments, **named)
    bad = logits.isnan().any(-1)
    if not bad.any():
        return original(sampler, logits_output, *arguments, **named)
    logits.masked_fill_(bad[:, None], 0)  # sampling from NaN would end the process
    tokens = original(sampler, logits_output, *arguments, **named)
    return tokens.masked_fill(bad, NO_TOKEN)


def finish(original: Callable[..., None], request: Any, new_accepted_len: int = 1) -> None:
    """SGLang's ``Req.update_finish_state``: end a request that got NO_TOKEN with an error."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    for index in range(max(0, len(request.output_ids) - new_accepted_len), len(request.output_ids)):
        if request.output_ids[index] == NO_TOKEN:
            request.output_ids[index] = 0  # the detokenizer reads all of them
            request.skip_radix_cache_insert = True
            request.to_finish = FINISH_ABORT(MESSAGE, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")
    original(request, new_accepted_len)


def forward(original: Callable[..., Any], runner: Any, forward_batch: Any, *arguments: Any, **named: Any) -> Any:
    """SGLang's ``ModelRunner.forward``: with overlapping batches, a request passes through the model once more before :func:`finish` sees it."""
    if forward_batch.input_ids is not None and not forward_batch.input_ids.is_cuda:
        forward_batch.input_ids.clamp_(min=0)
    return original(runner, forward_batch, *arguments, **named)


HOOKS: Final = (
    ("sglang.srt.model_executor.model_runner.ModelRunner.forward", forward, HookType.AROUND),
    ("sglang.srt.layers.sampler.Sampler.forward", sample, HookType.AROUND),
    ("sglang.srt.managers.schedule_batch.Req.update_finish_state", finish, HookType.AROUND),
)
