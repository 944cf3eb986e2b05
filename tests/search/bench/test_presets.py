"""What the presets measure, the prompts that they send, and the cross-check with SGLang's own client."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtuner_search.bench.client import RequestResult
from kvtuner_search.bench.cross_check import cross_check
from kvtuner_search.bench.journal import cell_key
from kvtuner_search.bench.presets import PRESETS, CellPlan
from kvtuner_search.bench.prompts import draw
from kvtuner_search.bench.record import SECTIONS, Cell, Shape
from kvtuner_search.bench.summary import summarise
from kvtuner_search.errors import DataError, KVTunerError, UsageError
from kvtuner_search.models.reference_model import reference_model_path

CLAIMS = json.loads(Path(__file__).with_name("adapter_report.json").read_text())


def table(preset: str, section: str) -> list[CellPlan]:
    return [step for step in PRESETS[preset] if step.section == section]


def test_the_legacy_preset_is_the_grid_of_the_adapters_report() -> None:
    assert [step.shape.input_tokens for step in table("legacy", "ttft")] == [
        row["prompt_tokens"] for row in CLAIMS["ttft_ms"]
    ]
    assert [step.shape.concurrency for step in table("legacy", "throughput")] == [
        row["concurrency"] for row in CLAIMS["throughput"]
    ]
    long = [(step.shape.input_tokens, step.shape.output_tokens) for step in table("legacy", "long")]
    assert long == [(row["input"], row["output"]) for row in CLAIMS["long_sequence"]]
    batches = table("legacy", "batch")
    assert [step.shape.concurrency for step in batches] == [row["batch"] for row in CLAIMS["batch"]]
    assert all(step.shape.requests == step.rounds * step.shape.concurrency for step in batches)
    (memory,) = table("legacy", "memory")
    assert memory.rounds == CLAIMS["memory_stress"]["rounds"]


def test_the_full_preset_covers_what_it_promises() -> None:
    lengths = [step.shape.input_tokens for step in table("full", "ttft")]
    assert (lengths[0], lengths[-1]) == (10, 16000)
    assert [step.shape.concurrency for step in table("full", "throughput")] == [2**power for power in range(9)]
    grid = {(step.shape.input_tokens, step.shape.output_tokens) for step in table("full", "long")}
    assert grid >= {(length, output) for length in (100, 4000, 16000) for output in (50, 200, 500)}
    assert [step.shape.concurrency for step in table("full", "batch")] == [2**power for power in range(7)]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_can_be_run(preset: str) -> None:
    steps = PRESETS[preset]
    assert [section for section in SECTIONS if table(preset, section)] == list(SECTIONS)
    keys = [cell_key(step.section, step.shape) for step in steps]
    assert len(set(keys)) == len(keys)  # so that a run can be resumed, and two runs compared
    for step in steps:
        assert step.shape.requests % step.rounds == 0
        assert step.warmup >= 1
        assert step.shape.requests // step.rounds >= step.shape.concurrency  # or that many are never in flight


@pytest.mark.parametrize("preset", ["legacy", "full"])
def test_short_requests_are_enough_for_a_99th_percentile(preset: str) -> None:
    assert all(step.shape.requests >= 100 for section in ("ttft", "throughput") for step in table(preset, section))
    assert all(step.shape.requests >= 10 for step in PRESETS[preset])


def test_the_quick_preset_fits_the_reference_model() -> None:
    context = json.loads((reference_model_path() / "config.json").read_text())["max_position_embeddings"]
    assert max(step.shape.input_tokens + step.shape.output_tokens for step in PRESETS["quick"]) <= context


@given(
    seed=st.one_of(st.integers(), st.text()),
    length=st.integers(1, 20),
    count=st.integers(0, 40),
    vocabulary=st.integers(50, 10_000),
)
def test_no_two_prompts_begin_alike(seed: int | str, length: int, count: int, vocabulary: int) -> None:
    prompts = draw(seed, length, count, vocabulary)
    assert prompts == draw(seed, length, count, vocabulary)
    assert len(prompts) == count == len({prompt[0] for prompt in prompts})
    assert all(len(prompt) == length for prompt in prompts)
    assert all(10 <= token < vocabulary for prompt in prompts for token in prompt)


def test_prompts_do_not_change_between_versions() -> None:
    """Records of two runs are compared request by request."""
    assert draw("0:ttft", 4, 2, 8192) == [[5650, 6215, 6760, 4798], [2106, 3715, 7050, 701]]
    assert draw("0:ttft", 4, 2, 8192) != draw("1:ttft", 4, 2, 8192)


@pytest.mark.parametrize(("length", "count", "vocabulary"), [(0, 1, 100), (1, 91, 100), (1, 1, 5)])
def test_prompts_that_cannot_be_drawn_are_refused(length: int, count: int, vocabulary: int) -> None:
    with pytest.raises(UsageError, match=f"cannot draw {count} prompts of {length} tokens from"):
        draw(0, length, count, vocabulary)


def cell() -> tuple[Cell, list[list[int]]]:
    """Four requests, two at a time: 20 ms to the first of three tokens, then 5 ms each."""
    shape = Shape(requests=4, concurrency=2, input_tokens=6, output_tokens=3)
    results = [
        RequestResult(
            index=index, round=0, sent=float(index // 2) * 0.03, asked=3, prompt_tokens=6, status=200, finish="length", counted_prompt=6,
            claimed=3, tokens=(1, 2, index), arrivals=((20.0, 1), (25.0, 1), (30.0, 1)),
        )
        for index in range(4)
    ]  # fmt: skip
    return summarise("throughput", shape, results), draw(0, 6, 4, 100)


@pytest.fixture
def bench_serving(tmp_path: Path) -> str:
    """An interpreter whose ``-m sglang.bench_serving`` writes what it is told, and keeps what it was given."""
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, sys, time\n"
        "from pathlib import Path\n"
        f"here = Path({str(tmp_path)!r})\n"
        "told = json.loads((here / 'told.json').read_text())\n"
        "arguments = sys.argv[1:]\n"
        "value = lambda name: arguments[arguments.index(name) + 1]\n"
        "rows = Path(value('--dataset-path')).read_text()\n"
        "(here / 'given.json').write_text(json.dumps({'arguments': arguments, 'rows': rows}))\n"
        "time.sleep(told.get('sleep', 0))\n"
        "if told['result'] is not None:\n"
        "    Path(value('--output-file')).write_text(json.dumps(told['result']) + '\\n')\n"
        "sys.stderr.write('Traceback\\nValueError: no such tokenizer\\n')\n"
        "sys.exit(told.get('code', 0))\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def tell(python: str, **told: Any) -> None:
    Path(python).with_name("told.json").write_text(json.dumps(told))


def test_sglangs_client_gets_the_same_load_and_figures_are_divided(bench_serving: str) -> None:
    ours, prompts = cell()
    theirs = {
        "completed": 4, "request_throughput": 4 / 0.06, "output_throughput": 24.0 / 0.06, "mean_e2e_latency_ms": 40.0, "mean_ttft_ms": 16.0,
        "median_ttft_ms": 0.0, "mean_tpot_ms": 5.0, "mean_itl_ms": None,
    }  # fmt: skip
    tell(bench_serving, result=theirs)
    found = cross_check(bench_serving, "http://127.0.0.1:5/", "folder", prompts, ours, 30)
    assert found == pytest.approx(
        {
            "requests_per_second": 1.0,
            "output_tokens_per_second": 0.5,
            "latency_mean": 0.75,
            "ttft_mean": 1.25,
            "per_token_mean": 1.0,
        }
    )
    given = json.loads(Path(bench_serving).with_name("given.json").read_text())
    rows = [json.loads(row) for row in given["rows"].splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert {(row["prompt_len"], row["output_len"]) for row in rows} == {(6, 3)}
    text = " ".join(given["arguments"])
    for part in (
        "-m sglang.bench_serving",
        "--base-url http://127.0.0.1:5 ",
        "--max-concurrency 2",
        "--num-prompts 4",
        "--flush-cache",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("told", "timeout", "message"),
    [
        ({"result": None, "code": 1}, 30, "ended with 1: ValueError: no such tokenizer: run it by hand"),
        ({"result": None}, 30, "ended with 0: ValueError"),
        ({"result": {"completed": 3}}, 30, "got 3 of 4 answers"),
        ({"result": None, "sleep": 60}, 1, "took more than 1 s"),
    ],
)
def test_a_client_that_fails_says_why(bench_serving: str, told: dict[str, Any], timeout: float, message: str) -> None:
    ours, prompts = cell()
    tell(bench_serving, **told)
    with pytest.raises(DataError, match=message):
        cross_check(bench_serving, "http://127.0.0.1:5", "folder", prompts, ours, timeout)


def test_nothing_is_compared_with_nothing(tmp_path: Path) -> None:
    ours, prompts = cell()
    with pytest.raises(DataError, match="nothing succeeded"):
        cross_check("python", "http://x", "folder", prompts, summarise("throughput", ours.shape, []), 30)
    with pytest.raises(KVTunerError, match="cannot be run"):
        cross_check(str(tmp_path / "none"), "http://x", "folder", prompts, ours, 30)
