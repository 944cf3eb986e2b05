"""The same load through the engine's own client: do two clients that share no code see the same server?

It gets the same prompts as the cell, the same concurrency and answer length, and a flushed cache, so figures agree up to noise and the connections' cost.
It checks our clock, not the other way round: what it counts is not what came back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from kvtuner_search.bench.record import Cell
from kvtuner_search.errors import DataError
from kvtuner_search.servers.interface import interface
from kvtuner_search.serving.engine import engine

# Over successful requests; an engine's client gives its own by the same names.
FIGURES: Final[dict[str, Callable[[Any], float]]] = {
    "requests_per_second": lambda speed: speed.requests_per_second,
    "output_tokens_per_second": lambda speed: speed.output_tokens_per_second,
    "latency_mean": lambda speed: speed.latency.mean,
    "ttft_mean": lambda speed: speed.ttft.mean if speed.ttft else 0.0,
    "ttft_p50": lambda speed: speed.ttft.p50 if speed.ttft else 0.0,
    "per_token_mean": lambda speed: speed.per_token.mean if speed.per_token else 0.0,
    "inter_token_mean": lambda speed: speed.inter_token.mean if speed.inter_token else 0.0,
}


def cross_check(
    python: str,
    url: str,
    tokenizer: str,
    prompts: Sequence[Sequence[int]],
    cell: Cell,
    timeout: float,
    key: str | None = None,
) -> dict[str, float]:
    """Send a cell's requests again through the engine's client.

    Args:
        python: interpreter of an environment that has the engine.
        url: of the server.
        tokenizer: folder or hub id.
        prompts: of the cell's measured requests.
        cell: our figures.
        timeout: seconds for the whole run of that client.
        key: sent as bearer token.

    Returns:
        Our figure over theirs, where both are positive.

    Raises:
        UsageError: if the client cannot be run.
        DataError: if it failed, or did not get all answers.
    """
    if cell.speed is None:
        raise DataError(
            f"{cell.title}: nothing succeeded, so there is nothing to compare with {engine().TITLE}'s client"
        )
    theirs = interface().own_client(
        python,
        url,
        tokenizer,
        prompts,
        output_tokens=cell.shape.output_tokens,
        concurrency=cell.shape.concurrency,
        timeout=timeout,
        key=key,
    )
    found = {name: (ours(cell.speed), theirs.get(name, 0.0)) for name, ours in FIGURES.items()}
    return {name: our / their for name, (our, their) in found.items() if our > 0 and their > 0}
