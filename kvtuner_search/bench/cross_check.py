"""The same load through SGLang's own client, ``python -m sglang.bench_serving``: do two clients that share no code see the same server?

It gets the same prompts as the cell (its ``autobench`` dataset takes token ids), the same concurrency and answer length, and a flushed cache. It opens a
connection for each request and starts a request as soon as another ends, as a closed loop does; so figures agree up to noise and the connections' cost.
It counts what the server claims, and *requested* tokens where an answer has no text (``--skip-tokenizer-init``), and knows neither failed counts nor
cached prompts: it checks our clock, not the other way round.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from kvtuner_search.bench.record import Cell
from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.profile.text import printable

# Figure -> its name in bench_serving. Both are over successful requests.
_FIGURES: Final[dict[str, tuple[str, Callable[[Any], float]]]] = {
    "requests_per_second": ("request_throughput", lambda speed: speed.requests_per_second),
    "output_tokens_per_second": ("output_throughput", lambda speed: speed.output_tokens_per_second),
    "latency_mean": ("mean_e2e_latency_ms", lambda speed: speed.latency.mean),
    "ttft_mean": ("mean_ttft_ms", lambda speed: speed.ttft.mean if speed.ttft else 0.0),
    "ttft_p50": ("median_ttft_ms", lambda speed: speed.ttft.p50 if speed.ttft else 0.0),
    "per_token_mean": ("mean_tpot_ms", lambda speed: speed.per_token.mean if speed.per_token else 0.0),
    "inter_token_mean": ("mean_itl_ms", lambda speed: speed.inter_token.mean if speed.inter_token else 0.0),
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
    """Send a cell's requests again through SGLang's client.

    Args:
        python: interpreter of an environment that has SGLang.
        url: of the server.
        tokenizer: folder or hub id; that client counts words of answers with it, which is not used here.
        prompts: of the cell's measured requests.
        cell: our figures.
        timeout: seconds for the whole run of that client.
        key: sent as bearer token. That client takes one from OPENAI_API_KEY and API_KEY, which belong to other services and are removed.

    Returns:
        Our figure over theirs, for each that both have.

    Raises:
        UsageError: if the client cannot be run.
        DataError: if it failed, or did not get all answers.
    """
    if cell.speed is None:
        raise DataError(f"{cell.title}: nothing succeeded, so there is nothing to compare with SGLang's client")
    with tempfile.TemporaryDirectory() as folder:
        data, result = Path(folder, "prompts.jsonl"), Path(folder, "result.jsonl")
        rows = (
            {"prompt": list(prompt), "prompt_len": len(prompt), "output_len": cell.shape.output_tokens}
            for prompt in prompts
        )
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [
            *(python, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url.rstrip("/")),
            *("--dataset-name", "autobench", "--dataset-path", str(data), "--num-prompts", str(len(prompts))),
            *("--model", tokenizer, "--tokenizer", tokenizer, "--tokenize-prompt", "--disable-tqdm", "--flush-cache"),
            *("--max-concurrency", str(cell.shape.concurrency), "--output-file", str(result)),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, check=False, env=_environment(key)
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(
                f"sglang.bench_serving took more than {timeout:g} s: allow more, or leave it out"
            ) from error
        except OSError as error:
            raise UsageError(f"{python} cannot be run ({error}): name the SGLang environment's Python") from error
        if done.returncode or not result.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it printed nothing"]
            raise DataError(
                f"sglang.bench_serving ended with {done.returncode}: {printable(lines[-1])[:300]}: run it by hand, or leave it out"
            )
        theirs = json.loads(result.read_text().splitlines()[-1])
    return compare(cell, theirs, len(prompts))


def _environment(key: str | None) -> dict[str, str]:
    """This process's environment, with only the measured server's key."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OPENAI_API_KEY", "API_KEY")}
    return kept if key is None else kept | {"OPENAI_API_KEY": key}


def compare(cell: Cell, theirs: dict[str, Any], requests: int) -> dict[str, float]:
    """Our figures over those of ``sglang.bench_serving``'s result, where both are positive.

    Raises:
        DataError: if it did not get all answers.
    """
    if theirs.get("completed") != requests:
        raise DataError(
            f"sglang.bench_serving got {theirs.get('completed')} of {requests} answers: look at the server's log"
        )
    assert cell.speed is not None
    found = {}
    for name, (key, ours) in _FIGURES.items():
        their, our = theirs.get(key), ours(cell.speed)
        if isinstance(their, int | float) and their > 0 and our > 0:
            found[name] = our / their
    return found
