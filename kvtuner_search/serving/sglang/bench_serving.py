"""SGLang's own load generator, ``python -m sglang.bench_serving``.

Its ``autobench`` dataset takes token ids. It opens a connection for each request and starts a request as soon as another ends, as a closed loop does. It
counts what the server claims, and *requested* tokens where an answer has no text (``--skip-tokenizer-init``), and knows neither failed counts nor
cached prompts.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.profile.text import printable

# Our name of a figure -> its own. Both are over successful requests.
_FIGURES: Final = {
    "requests_per_second": "request_throughput",
    "output_tokens_per_second": "output_throughput",
    "latency_mean": "mean_e2e_latency_ms",
    "ttft_mean": "mean_ttft_ms",
    "ttft_p50": "median_ttft_ms",
    "per_token_mean": "mean_tpot_ms",
    "inter_token_mean": "mean_itl_ms",
}


def own_client(
    python: str,
    url: str,
    tokenizer: str,
    prompts: Sequence[Sequence[int]],
    *,
    output_tokens: int,
    concurrency: int,
    timeout: float,
    key: str | None = None,
) -> dict[str, float]:
    """See :meth:`kvtuner_search.servers.interface.Interface.own_client`.

    Words of answers are counted with the tokenizer, which is not used here. The key goes by OPENAI_API_KEY.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, result = Path(folder, "prompts.jsonl"), Path(folder, "result.jsonl")
        rows = ({"prompt": list(prompt), "prompt_len": len(prompt), "output_len": output_tokens} for prompt in prompts)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [
            *(python, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url.rstrip("/")),
            *("--dataset-name", "autobench", "--dataset-path", str(data), "--num-prompts", str(len(prompts))),
            *("--model", tokenizer, "--tokenizer", tokenizer, "--tokenize-prompt", "--disable-tqdm", "--flush-cache"),
            *("--max-concurrency", str(concurrency), "--output-file", str(result)),
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
        found = json.loads(result.read_text().splitlines()[-1])
    if found.get("completed") != len(prompts):
        raise DataError(
            f"sglang.bench_serving got {found.get('completed')} of {len(prompts)} answers: look at the server's log"
        )
    figures = {name: found.get(theirs) for name, theirs in _FIGURES.items()}
    return {name: float(figure) for name, figure in figures.items() if isinstance(figure, int | float)}


def _environment(key: str | None) -> dict[str, str]:
    """This process's environment, with only the measured server's key: the client reads OPENAI_API_KEY and API_KEY, which belong to other services."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OPENAI_API_KEY", "API_KEY")}
    return kept if key is None else kept | {"OPENAI_API_KEY": key}
