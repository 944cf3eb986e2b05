"""SGLang's Prometheus metrics that a record keeps."""

from __future__ import annotations

from typing import Final

GENERATED: Final = "sglang:generation_tokens_total"
TOKEN_USAGE: Final = "sglang:token_usage"
METRICS: Final = (
    TOKEN_USAGE,
    "sglang:num_used_tokens",
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
    "sglang:num_retracted_reqs",
    "sglang:gen_throughput",
    "sglang:cache_hit_rate",
    "sglang:spec_accept_length",
    "sglang:prompt_tokens_total",
    GENERATED,
    "sglang:cached_tokens_total",
    "sglang:num_requests_total",
    "sglang:num_aborted_requests_total",
)
