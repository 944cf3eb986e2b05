"""Service-level objectives: parsed strictly, judged on the worst cell, failed where nothing was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.bench import slo
from kvtuner_search.bench.record import Cell, Gate, Record, Scrape
from kvtuner_search.errors import ExitCode, UsageError
from tests.search.bench import record_factory as made


def gate(text: str, record: Record) -> Gate:
    (found,) = slo.judge(slo.parse(text), record)
    return found


def with_cells(*cells: Cell, **changes: Any) -> Record:
    return made.record(small=True, cells=list(cells), **changes)


def test_the_issues_example() -> None:
    found = slo.parse("ttft_p99=200, success=0.999,memory=0.9")
    assert found == [
        slo.ServiceObjective("ttft_p99", 200),
        slo.ServiceObjective("success", 0.999),
        slo.ServiceObjective("memory", 0.9),
    ]
    assert [one.relation for one in found] == ["at most", "at least", "at most"]
    assert all(g.passed for g in slo.judge(found, made.record()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no limit: write NAME=LIMIT"),
        ("ttft_p99", "has no limit"),
        ("ttft_p99=200,", "has no limit"),
        ("ttft_p98=1", "'ttft_p98' is unknown: choose from ttft_mean"),
        ("ttft=1", "is unknown"),
        ("ttft_maximum=1", "is unknown"),
        ("ttft_p99=", "give a number of ms from 0 on"),
        ("ttft_p99=fast", "give a number of ms"),
        ("ttft_p99=-1", "give a number of ms"),
        ("ttft_p99=nan", "give a number of ms"),
        ("ttft_p99=inf", "give a number of ms"),
        ("success=99.9", "give a fraction from 0 to 1"),
        ("memory=90", "give a fraction"),
        ("success=0.9,success=0.99", "given twice"),
        ("gpu.ttft_p99=1", "there is no table 'gpu': choose from ttft, throughput"),
        (".ttft_p99=1", "there is no table ''"),
        ("throughput.memory=0.9", "applies to the whole run: leave throughput. out"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        slo.parse(text)
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("name", ["ttft_p99", "per_token_p50", "latency_max", "latency_mean"])
def test_times_are_judged_on_the_worst_cell(name: str) -> None:
    record = made.record()
    time, statistic = name.rsplit("_", 1)
    found = {}
    for cell in record.cells:
        assert cell.speed is not None
        summary = getattr(cell.speed, time)
        if summary is not None:
            found[cell.title] = getattr(summary, {"max": "maximum"}.get(statistic, statistic))
    where, worst = max(found.items(), key=lambda item: item[1])
    for limit, passed in ((worst, True), (worst * 0.999, False), (worst * 1.001, True)):
        judged = gate(f"{name}={limit!r}", record)
        assert (judged.value, judged.where, judged.passed) == (worst, where, passed)


def test_a_table_can_be_named() -> None:
    record = made.record()
    short, everywhere = gate("ttft.ttft_mean=1000", record), gate("ttft_mean=1000", record)
    assert short.name == "ttft.ttft_mean"
    assert short.where == "ttft 1000 in, 1 out, 1 at a time"
    assert short.value is not None
    assert everywhere.value is not None
    assert everywhere.value > short.value


def test_success_is_of_the_worst_cell_and_one_lost_request_shows() -> None:
    record = with_cells(made.cell("throughput", 100, 64, 8), made.cell("batch", 100, 64, 8, failed=1))
    judged = gate("success=0.999", record)
    assert (judged.value, judged.passed) == (127 / 128, False)
    assert judged.where.startswith("batch")
    assert gate("throughput.success=1", record).passed


def test_a_cell_without_answers_fails_times_however_good_the_others_are() -> None:
    record = with_cells(made.cell("ttft", 10, 1), made.cell("ttft", 50, 1, requests=4, failed=4))
    judged = gate("ttft_p99=1e6", record)
    assert (judged.value, judged.passed) == (None, False)
    assert judged.where == "ttft 50 in, 1 out, 1 at a time: no request succeeded"


def test_nothing_measured_fails() -> None:
    red, bare = made.record(small=True, correct=False), with_cells(made.cell("ttft", 10, 1), scrapes=[])
    for text, record, reason in (
        ("latency_p50=1e6", red, "a correctness check failed"),
        ("requests_per_second=0", red, "a correctness check failed"),
        ("memory=1", bare, "sglang:token_usage was not read"),
        ("device_memory=1", bare, "device memory was not read"),
        ("batch.success=0", bare, "no cell of batch was measured"),
        ("per_token_p50=1e6", bare, "no cell has a per token"),
    ):
        judged = gate(text, record)
        assert (judged.value, judged.passed) == (None, False), text
        assert reason in judged.where


def test_rates_are_peaks() -> None:
    record = made.record()
    rates = {cell.title: cell.speed.requests_per_second for cell in record.cells if cell.speed}
    judged = gate("requests_per_second=1", record)
    assert judged.value == max(rates.values())
    assert rates[judged.where] == judged.value
    assert not gate(f"output_tokens_per_second={1e9:g}", record).passed


def test_memory_is_the_fullest_ranks_peak_of_slots() -> None:
    scrapes = [
        Scrape(name='sglang:token_usage{tp_rank="0"}', samples=9, minimum=0.0, maximum=0.5, last=0.0),
        Scrape(name='sglang:token_usage{tp_rank="1"}', samples=9, minimum=0.0, maximum=0.95, last=0.0),
        Scrape(name="sglang:token_usage_of_something_else", samples=9, minimum=0.0, maximum=1.0, last=0.0),
    ]
    judged = gate("memory=0.9", made.record(scrapes=scrapes))
    assert (judged.value, judged.passed) == (0.95, False)
    assert "tp_rank" in judged.where


def test_device_memory_is_of_what_the_device_has() -> None:
    judged = gate("device_memory=0.9", made.record())
    assert judged.value == pytest.approx(0.8)
    assert judged.passed
    unknown = made.hardware().model_copy(update={"memory": None})
    environment = made.record().environment.model_copy(update={"hardware": unknown})
    assert not gate("device_memory=0.9", made.record(environment=environment)).passed


def test_every_name_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs/bench-records.md").read_text()
    for name in slo.UNITS:
        time, _, statistic = name.rpartition("_")
        assert f"`{name}`" in text or (
            f"`{time}_{{mean,p50,p90,p99,max}}`" in text and statistic in ("mean", "p50", "p90", "p99", "max")
        )
