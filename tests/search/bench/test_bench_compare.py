"""Comparing two records: pairing, ratios, intervals that cover, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvtuner_search.bench import compare as module
from kvtuner_search.bench import files, intervals
from kvtuner_search.bench.compare import compare
from kvtuner_search.bench.record import Record, Violation
from kvtuner_search.cli.main import run
from kvtuner_search.errors import DataError, NotComparableError
from tests.search.bench import record_factory as made


def stored(folder: Path, record: Record, **requests: Any) -> Path:
    """The record in a folder of its own, with its raw requests if their making is given."""
    path = folder / "record.json"
    files.write(record, path)
    if requests:
        made.write_requests(record, folder / "requests.jsonl", **requests)
    return path


def altered(record: Record, part: str, **changes: Any) -> Record:
    return record.model_copy(update={part: getattr(record, part).model_copy(update=changes)})


# intervals


def sample(rng: np.random.Generator, blocks: int, size: int, level: float) -> NDArray[np.float64]:
    """Requests of a block are alike, as requests are that share the server's steps; skewed, as latencies are."""
    shared = 1 + rng.exponential(0.05, size=(blocks, 1))
    return (level * shared * (1 + rng.exponential(0.02, size=(blocks, size)))).ravel()


@pytest.mark.parametrize(("blocks", "size"), [(6, 1), (6, 8), (40, 8)])
def test_intervals_cover_the_true_ratio_as_often_as_they_say(blocks: int, size: int) -> None:
    rng = np.random.default_rng(0)
    found = [
        intervals.ratio(sample(rng, blocks, size, 1.1), sample(rng, blocks, size, 1.0), (size, size), intervals.mean)
        for _ in range(200)
    ]
    covered = sum(one is not None and one.low <= 1.1 <= one.high for one in found)
    assert 181 <= covered <= 198, "of 200 intervals at 95%; binomial, three standard deviations"


def test_requests_in_flight_together_are_no_independent_samples() -> None:
    """Drawn one by one, they would make intervals that are far too narrow."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        found = intervals.ratio(sample(rng, 40, 8, 1.1), sample(rng, 40, 8, 1.0), (1, 1), intervals.mean)
        assert found is not None
        covered += found.low <= 1.1 <= found.high
    assert covered < 75


def test_too_few_blocks_have_no_interval() -> None:
    values = np.linspace(1, 2, 40)
    assert intervals.ratio(values, values, (8, 8), intervals.mean) is None
    assert intervals.ratio(values, values[:5], (1, 1), intervals.mean) is None
    found = intervals.ratio(values, values, (6, 6), intervals.mean)
    assert found is not None
    assert found.low < 1 < found.high
    assert found == intervals.ratio(values, values, (6, 6), intervals.mean), "the same input gives the same interval"


def test_any_statistic_is_drawn_alike() -> None:
    """The p99 of a sample is the p99 of what was drawn, whatever the memory at hand allows at once."""
    values = np.arange(1.0, 2001.0)
    found = intervals.ratio(2 * values, values, (1, 1), intervals.percentile(0.99))
    assert found is not None
    assert 1.95 < found.low < 2 < found.high < 2.05


def test_stand_ins_have_the_summarys_percentiles() -> None:
    summary = made.summary(list(np.random.default_rng(0).gamma(3, 1, 5000)))
    values = intervals.values_from_summary(summary, 1)
    assert len(values) == 5000
    again = made.summary(list(values))
    for name in ("p50", "p90", "p99"):
        assert getattr(again, name) == pytest.approx(getattr(summary, name), rel=1e-2)
    assert len(intervals.values_from_summary(summary, 8)) == 625


# comparisons


def test_ratios_are_b_over_a_and_verdicts_know_which_way_is_better(tmp_path: Path) -> None:
    a, b = made.record(), made.record(made.KV4, slower=1.2, seed=1)
    paths = stored(tmp_path / "a", a, seed=0), stored(tmp_path / "b", b, slower=1.2, seed=1)
    found = compare(a, b, paths)
    assert {row.section for row in found.rows} == {"ttft", "throughput", "long", "batch", "memory"}
    assert found.capacity == b.served.token_capacity / a.served.token_capacity
    for row in found.rows:
        assert row.ratio.value == row.b / row.a
        assert row.ratio.value == pytest.approx(1 / 1.2 if row.better == "higher" else 1.2, rel=0.06)
        if row.ratio.interval is None:
            assert (row.verdict, row.ratio.basis) == ("unjudged", "none")
        else:
            assert row.ratio.basis == "requests"
            assert row.ratio.interval.low < row.ratio.value < row.ratio.interval.high
            assert row.verdict == "worse"
    assert {row.verdict for row in compare(b, a, paths[::-1]).rows} <= {"better", "unjudged"}


def test_no_difference_is_undecided(tmp_path: Path) -> None:
    a, b = made.record(seed=5), made.record(seed=6)
    found = compare(a, b, (stored(tmp_path / "a", a, seed=5), stored(tmp_path / "b", b, seed=6)))
    verdicts = [row.verdict for row in found.rows if row.verdict != "unjudged"]
    assert verdicts.count("undecided") >= 0.85 * len(verdicts)
    assert {row.verdict for row in compare(a, a).rows} <= {"undecided", "unjudged"}


def test_intervals_say_what_they_are_from(tmp_path: Path) -> None:
    a, b = made.record(), made.record(slower=1.2, seed=1)
    raw_a, raw_b = stored(tmp_path / "a", a, seed=0), stored(tmp_path / "b", b, slower=1.2, seed=1)
    bare = stored(tmp_path / "bare", b)
    assert {row.ratio.basis for row in compare(a, b).rows} == {"summaries", "none"}
    assert {row.ratio.basis for row in compare(a, b, (raw_a, bare)).rows} == {"summaries", "none"}
    assert {row.ratio.basis for row in compare(a, b, (raw_a, raw_b)).rows} == {"requests", "none"}


def test_requests_of_another_run_are_not_used(tmp_path: Path) -> None:
    a, b = made.record(), made.record(slower=1.2, seed=1)
    path = stored(tmp_path / "a", a, seed=0)
    other = stored(tmp_path / "b", b, seed=7)
    assert {row.ratio.basis for row in compare(a, b, (path, other)).rows} == {"summaries", "none"}


def test_requests_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    a = made.record(small=True)
    path = stored(tmp_path, a)
    (tmp_path / "requests.jsonl").write_text('{"cell": "never begun", "result": {}}\n')
    with pytest.raises(DataError, match=r"requests\.jsonl cannot be read: .*; or move it away"):
        compare(a, a, (path, path))


def test_warm_ups_and_failures_are_no_samples(tmp_path: Path) -> None:
    a = made.record(small=True)
    path = stored(tmp_path, a, seed=0)
    timings = module.timings_beside(path, a)
    assert timings.keys() == {cell.title for cell in a.cells}
    for cell in a.cells:
        assert cell.speed is not None
        found = timings[cell.title]
        assert len(found.latency) == cell.speed.latency.samples
        assert found.latency.mean() == pytest.approx(cell.speed.latency.mean)
        if cell.speed.per_token:
            assert found.per_token.mean() == pytest.approx(cell.speed.per_token.mean)


def test_only_the_same_cells_are_paired() -> None:
    a = made.record(small=True)
    b = made.record(small=True, cells=[made.cell("ttft", 10, 1, requests=40), made.cell("throughput", 100, 64, 4)])
    found = compare(a, b)
    assert {(row.section, row.cell) for row in found.rows} == {("ttft", "ttft 10 in, 1 out, 1 at a time")}
    assert found.rows[0].ratio.samples == (16, 40)
    assert "throughput 100 in, 64 out, 4 at a time" in found.unpaired
    assert "throughput 100 in, 64 out, 2 at a time" in found.unpaired


def test_p99_needs_a_hundred_requests() -> None:
    few, many = (made.record(cells=[made.cell("ttft", 10, 1, requests=n)]) for n in (99, 100))
    assert [row.metric for row in compare(few, few).rows] == ["TTFT mean"]
    assert [row.metric for row in compare(many, many).rows] == ["TTFT mean", "TTFT p99"]


REFUSALS: dict[str, tuple[Callable[[Record], Record], str]] = {
    "model": (lambda r: altered(r, "model", name="Other"), r"B Other, 28 layers \(name Qwen2.5-7B and Other\)"),
    "layers": (lambda r: altered(r, "model", layers=32), "layers 28 and 32"),
    "preset": (lambda r: r.model_copy(update={"preset": "quick"}), "A used preset legacy and B quick"),
    "red": (lambda r: made.record(small=True, correct=False), r"B failed its correctness check \(profile\)"),
    "impossible": (
        lambda r: r.model_copy(
            update={"violations": [Violation(rule="below-floor", where="ttft", figure="2 ms", reason="because")]}
        ),
        "B has 1 violations, the first below-floor at ttft: it is not a result",
    ),
    "cells": (lambda r: r.model_copy(update={"cells": [made.cell("ttft", 11, 1)]}), "no cell with speed in common"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_cannot_be_compared_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = made.record(small=True)
    change, message = REFUSALS[kind]
    b = change(a)
    with pytest.raises(NotComparableError, match=message):
        compare(a, b)
    paths = [str(stored(tmp_path / name, record)) for name, record in (("a", a), ("b", b))]
    assert run(["bench", "compare", *paths]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_what_differs_is_named_and_warned_of() -> None:
    a = made.record(small=True)
    b = altered(altered(made.record(made.KV4, small=True), "served", page_size=64), "model", dummy_weights=False)
    newer = a.environment.versions | {"sglang": "0.5.23", "triton": "3.7"}
    found = {d.what: d for d in compare(a, altered(b, "environment", versions=newer)).differences}
    assert found["cache"].b == "qwen2.5-7b-kv4, 4.250 bits, sha256:4d4d4d4d4d4d"
    assert not found["cache"].warn
    assert not found["attention back end"].warn, "the cache differs, so it must"
    assert (found["page size"].a, found["page size"].b, found["page size"].warn) == ("1", "64", True)
    assert (found["dummy weights"].a, found["dummy weights"].b) == ("yes", "no")
    assert (found["version of sglang"].a, found["version of sglang"].b) == ("0.5.14", "0.5.23")
    assert (found["version of triton"].a, found["version of triton"].warn) == ("none", True)
    assert "layout" not in found
    assert compare(a, a).differences == []
    backend = altered(a, "served", attention_backend="triton")
    assert compare(a, backend).differences[0].warn, "of one cache it is not part of what is compared"


# the command


def test_the_command_prints_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = made.record(), made.record(made.KV4, tensor_parallel=2, pipeline_parallel=2, nodes=2)
    paths = [str(stored(tmp_path / "a", a, seed=0)), str(stored(tmp_path / "b", b, seed=0))]
    assert run(["bench", "compare", *paths]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Single node against distributed" in out
    assert "TP=2 x PP=2, 2 nodes" in out
    assert "(s)" not in out
    assert run(["bench", "compare", *paths, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    row = content["rows"][0]
    assert row["ratio"] == pytest.approx(row["b"] / row["a"])
    assert row["interval"][0] < row["ratio"] < row["interval"][1]
    assert (row["interval_from"], row["verdict"], row["requests"]) == ("requests", "better", [16, 16])


def test_same_layout_has_no_table_of_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(stored(tmp_path, made.record(small=True)))
    assert run(["bench", "compare", path, path]) == 0
    assert "Single node against distributed" not in capsys.readouterr().out


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(stored(tmp_path, made.record(small=True)))
    assert run(["bench", "compare", path, str(tmp_path / "none.json")]) == 3
    assert "does not exist: give the path of a benchmark record" in capsys.readouterr().err
    assert run(["bench", "compare", path]) == 2
    assert run(["bench", "compare", path, path, "--claims", path]) == 3
    assert "it is not a test report of this form" in capsys.readouterr().err
