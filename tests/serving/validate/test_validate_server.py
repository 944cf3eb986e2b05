"""``validate`` against the real SGLang on the CPU, with the reference model."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from servers import COMMON, environment, running

from kvtuner_search.models.reference_model import reference_model_path
from kvtuner_search.servers.folder import AnswerJournal
from kvtuner_search.serving.sglang.client import Client
from kvtuner_search.validate.measure import MeasurementPlan, Method, ServerAnswers, ask, outcome
from kvtuner_search.validate.prompts import build

FLAGS = [flag for flag in COMMON if flag not in ("--host", "127.0.0.1")]


@pytest.fixture(scope="module")
def block(mixed_profile: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one small run wrote. Capacity is not judged: on the CPU it follows whatever memory is free at the moment."""
    folder = tmp_path_factory.mktemp("validation") / "run"
    command = [
        sys.executable, "-m", "kvtuner_search", "validate", "--profile", str(mixed_profile), "--folder", str(folder), "--samples", "4",
        "--data", "recall", "--data", "text", "--length", "448", "--task-prompts", "10", "--greedy-prompts", "6", "--greedy-tokens", "16",
        "--max-accuracy-drop", "0.2", "--min-capacity", "none", "--min-offline-tokens", "0.9", "--json", "--", *FLAGS,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    assert found == json.loads((folder / "validation.json").read_text())
    return found


def test_likelihood_and_accuracy_are_those_of_a_four_bit_cache(block: dict[str, Any]) -> None:
    text = next(m for m in block["likelihood"] if m["data"] == "text")
    assert text["tokens"] == 4 * 447
    assert 0 < text["value"] - text["baseline"] < 0.05, "the cache is quantized, and not badly"
    (recall,) = block["tasks"]
    assert recall["baseline"] == 1.0
    assert recall["value"] >= 0.9


def test_decode_reads_what_extend_reads(block: dict[str, Any]) -> None:
    semantics = block["semantics"]
    assert semantics["method"] == "as-stored-extend"
    assert semantics["tokens"] == 6 * 16
    assert semantics["difference"] < semantics["baseline_difference"] + 0.02


def test_the_server_agrees_with_the_offline_evaluation(block: dict[str, Any]) -> None:
    profile, raw = block["offline"]
    assert (profile["cache"], raw["cache"]) == ("profile", "16bit")
    assert abs(raw["nll_difference"]) < 0.005
    assert abs(profile["nll_difference"]) < 0.015
    assert min(profile["token_agreement"], raw["token_agreement"]) > 0.9


def test_the_packed_cache_holds_more(block: dict[str, Any]) -> None:
    assert block["capacity"]["predicted"] == 4.0
    assert block["capacity"]["ratio"] > 3


def test_token_by_token_scores_what_as_stored_extend_scores(mixed_profile: Path, tmp_path: Path) -> None:
    """The slow way reads every row but the newest from the cache; on one server both ways give nearly the same likelihood."""
    from transformers import AutoTokenizer

    prompts = build(
        AutoTokenizer.from_pretrained(reference_model_path()), sources=["list"], samples=3, length=200, tasks=[], task_prompts=1,
        greedy_prompts=2, seed=0,
    )  # fmt: skip

    async def measure(url: str, method: Method) -> ServerAnswers:
        plan = MeasurementPlan(prompts, method, greedy_tokens=4, concurrency=1)
        journal = AnswerJournal(tmp_path / f"{method}.jsonl")
        async with Client(url, 120) as client:
            await ask(client, plan, journal, lambda *_: None)
        return outcome(plan, journal)

    with running(tmp_path, "--kvtuner-profile", str(mixed_profile), "--kvtuner-as-stored") as server:
        url = f"http://127.0.0.1:{server.ports[0]}"
        slow, quick = (asyncio.run(measure(url, method)) for method in ("token-by-token", "as-stored-extend"))
    tokens = sum(sample.scored_tokens for sample in prompts.split.samples)
    assert abs(slow.nll.sum() - quick.nll.sum()) / tokens < 0.02
    assert slow.continuations == quick.continuations
    assert slow.rescored == []
