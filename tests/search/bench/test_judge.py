"""Which figures of a record, and of the adapter's report, are flagged, and with which reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtuner_search.bench import claims
from kvtuner_search.bench.floors import floor_of
from kvtuner_search.bench.hardware import parse
from kvtuner_search.bench.judge import CAUSES, judge, split_causes
from kvtuner_search.bench.record import Cell, Shape, Violation
from kvtuner_search.errors import DataError
from tests.search.bench.ideal_server import BF16, H200, RTX_4090, cell, record, setup

CLAIMS = Path(__file__).parent / "adapter_report.json"
ASKED = Shape(requests=32, concurrency=8, input_tokens=200, output_tokens=20)


def flagged(changed: Cell, **changes: Any) -> list[tuple[str, str]]:
    return [
        (violation.rule, violation.figure.split()[-1]) for violation in judge(record([changed], setup(), **changes))
    ]


def with_speed(old: Cell, **changes: Any) -> Cell:
    assert old.speed is not None
    return old.model_copy(update={"speed": old.speed.model_copy(update=changes)})


@given(
    st.integers(1, 3000), st.integers(1, 60), st.integers(1, 32), st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]),
    st.floats(1, 50),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_nothing_that_was_measured_rightly_is_flagged(
    n: int, tokens: int, at_once: int, layout: tuple[int, int], slower: float
) -> None:
    """Not even of a server that loses no time at all."""
    asked = Shape(requests=2 * at_once, concurrency=at_once, input_tokens=n, output_tokens=tokens)
    s = setup(H200, *layout)
    assert judge(record([cell(s, asked, slower)], s)) == []


def test_a_server_of_another_kind_is_flagged_in_every_figure() -> None:
    """Half of the time that is needed: each figure is under its floor, and the reason says what is needed and what may have happened."""
    found = judge(
        record([cell(setup(), Shape(requests=4, concurrency=1, input_tokens=900, output_tokens=20), 0.5)], setup())
    )
    assert [violation.rule for violation in found] == ["below-floor"] * 5
    ttft, per_token, latency, requests, tokens = found
    assert ttft.where == "throughput 900 in, 20 out, 1 at a time"
    assert ttft.figure.startswith("ttft ")
    assert split_causes(ttft.reason)[0].startswith(
        "at least 10.9 ms is needed (11.9 T operations at 1 x 989.5 TFLOP/s + 10%); this is 2 times"
    )
    assert "19 more: reading 14.1 GB of weights and 51.6 MB of cache" in latency.reason
    assert "at 1 x 4800 GB/s + 3%" in per_token.reason
    assert "a request takes" in requests.reason
    assert tokens.reason.endswith("; ".join(CAUSES["tokens/s"]))
    assert "requested, not as returned" in tokens.reason


def test_the_clock_has_two_percent() -> None:
    asked = Shape(requests=1, concurrency=1, input_tokens=10, output_tokens=20)
    assert judge(record([cell(setup(), asked, 0.985)], setup())) == []
    assert judge(record([cell(setup(), asked, 0.975)], setup())) != []


def test_one_late_first_token_is_no_violation() -> None:
    """It makes that request's other tokens look quick; the median does not move."""
    whole = cell(setup(), ASKED)
    assert whole.speed is not None
    assert whole.speed.per_token is not None
    gaps = whole.speed.per_token.model_copy(update={"minimum": 0.01})
    assert flagged(with_speed(whole, per_token=gaps)) == []
    least = floor_of(setup(), ASKED).per_token
    assert flagged(with_speed(whole, per_token=gaps.model_copy(update={"p50": 0.98 * least - 4.5 / 19}))) == []
    found = flagged(with_speed(whole, per_token=gaps.model_copy(update={"p50": 0.98 * least - 5.5 / 19})))
    assert found == [("below-floor", "ms")]


def test_hits_of_the_prefix_cache_excuse_a_quick_first_token() -> None:
    asked = Shape(requests=4, concurrency=1, input_tokens=16000, output_tokens=1)
    first = cell(setup(), asked)
    quick = cell(setup(), Shape(requests=4, concurrency=1, input_tokens=10, output_tokens=1))
    lie = first.model_copy(update={"speed": quick.speed, "cached_tokens": 0})
    figures = {figure for rule, figure in flagged(lie) if rule == "below-floor"}
    assert figures == {"ms", "requests/s", "tokens/s"}
    honest = lie.model_copy(update={"cached_tokens": 4 * 15990})
    assert not [rule for rule, _ in flagged(honest) if rule == "below-floor"]


@pytest.mark.parametrize(
    ("changes", "rule", "said"),
    [
        ({"returned_tokens": 0}, "miscounted", "0 returned tokens"),
        ({"returned_tokens": 32 * 20 - 1}, "miscounted", "639 returned tokens"),
        ({"prompt_tokens": 32 * 199}, "miscounted", "6,368 prompt tokens"),
        ({"cached_tokens": 32 * 201}, "miscounted", "6,432 cached tokens"),
    ],
)
def test_tokens_are_held_to_what_was_asked_for(changes: dict[str, int], rule: str, said: str) -> None:
    found = judge(record([cell(setup(), ASKED, 3.0, **changes)], setup()))
    assert (rule, said) in [(violation.rule, violation.figure) for violation in found]


@pytest.mark.parametrize("figure", ["requests_per_second", "input_tokens_per_second", "output_tokens_per_second"])
def test_a_rate_that_does_not_follow_from_its_count_is_a_contradiction(figure: str) -> None:
    """Possible by themselves, but not what seconds and counts say: e.g. requested tokens."""
    whole = cell(setup(), ASKED, 3.0)
    assert flagged(whole) == []
    lie = with_speed(whole, **{figure: 1.2 * getattr(whole.speed, figure)})
    assert (
        "contradiction",
        figure.replace("_per_second", "/s").replace("input_", "").replace("output_", "").replace("_", " ").split()[-1],
    ) in flagged(lie)


def test_more_in_flight_than_allowed_breaks_littles_law() -> None:
    whole = cell(setup(), ASKED, 3.0)
    assert whole.speed is not None
    longer = {
        name: 1.5 * getattr(whole.speed.latency, name) for name in ("mean", "minimum", "p50", "p90", "p99", "maximum")
    }
    found = judge(record([with_speed(whole, latency=whole.speed.latency.model_copy(update=longer))], setup()))
    assert [violation.rule for violation in found] == ["littles-law"]
    assert "12 requests were in flight, but at most 8 were allowed" in found[0].reason


def test_no_first_token_comes_after_the_last() -> None:
    whole = cell(setup(), ASKED, 3.0)
    assert whole.speed is not None
    assert flagged(
        with_speed(whole, ttft=whole.speed.latency.model_copy(update={"mean": 1.2 * whole.speed.latency.mean}))
    ) == [("contradiction", "least")]


def test_other_hardware_than_named_is_found_by_its_speed() -> None:
    """Figures of an H200 in a record that says RTX 4090."""
    found = judge(record([cell(setup(), ASKED)], setup(RTX_4090)))
    assert {violation.rule for violation in found} == {"below-floor"}
    assert "the hardware, layout, model or dtype is not the one named" in found[0].reason
    assert judge(record([cell(setup(), ASKED)], setup(RTX_4090)), parse("H200")) == []


def test_hardware_that_is_flattered_is_flagged() -> None:
    """Floors drawn with the rate of sparse matrices would be half as high."""
    flattered = setup(H200.model_copy(update={"flops": 1979e12, "bandwidth": 9.6e12}))
    found = judge(record([], flattered))
    assert [(violation.rule, violation.figure) for violation in found] == [
        ("hardware", "bandwidth 9.6e+12 bytes/s"), ("hardware", "flops 1.979e+15 operations/s"),
    ]  # fmt: skip


def test_unknown_hardware_leaves_consistency_to_judge() -> None:
    silly = record([cell(setup(), ASKED, 1e-6, returned_tokens=5)], setup())
    unknown = silly.model_copy(update={"environment": silly.environment.model_copy(update={"hardware": None})})
    assert {violation.rule for violation in judge(unknown)} == {"miscounted", "contradiction"}


def test_a_cache_larger_than_the_devices_is_flagged() -> None:
    served = record([], setup()).served
    most = (141 * 2**30 - setup().model.weight_bytes) // BF16.bytes_per_token
    assert judge(record([], setup(), served=served.model_copy(update={"token_capacity": most}))) == []
    [found] = judge(record([], setup(), served=served.model_copy(update={"token_capacity": 2 * most})))
    assert (found.rule, found.where) == ("over-memory", "token capacity")
    [found] = judge(record([cell(setup(), ASKED, device_bytes=(10**9, 200 * 10**9))], setup()))
    assert found.figure == "200 GB in use on the first device"


def report(**changes: Any) -> dict[str, Any]:
    return json.loads(CLAIMS.read_text()) | changes


def verdict(**changes: Any) -> claims.Verdict:
    parsed = claims.parse(report(**changes), "mine")
    return claims.judge(parsed, claims.setup_of(parsed))


@pytest.fixture(scope="module")
def impossible() -> list[Violation]:
    return verdict().violations


def test_every_time_to_first_token_of_the_claims_is_impossible(impossible: list[Violation]) -> None:
    found = {violation.where: violation for violation in impossible if violation.where.startswith("ttft of")}
    assert list(found) == [f"ttft of {n} tokens" for n in (10, 50, 100, 500, 1000)]
    assert found["ttft of 10 tokens"].figure == "ttft mean 2.55, min 1.35, max 3.78 ms"
    assert "at least 6.56 ms is needed (reading 14.1 GB of weights" in found["ttft of 10 tokens"].reason
    assert found["ttft of 1000 tokens"].figure == "ttft mean 2.08, min 1.89, max 2.23 ms"
    assert "13.3 T operations at 4 x 165.2 TFLOP/s" in found["ttft of 1000 tokens"].reason
    assert all("ranks above 0 answer 404" in violation.reason for violation in found.values())


def test_every_cell_of_the_claimed_long_grid_is_impossible_twice(impossible: list[Violation]) -> None:
    for row in report()["long_sequence"]:
        where = f"long sequence, {row['input']} in, {row['output']} out"
        latency, rate = (violation for violation in impossible if violation.where == where)
        assert latency.figure == f"latency {row['latency_ms']:g} ms"
        assert rate.figure == f"{row['tok_per_s']:,} tokens/s"
        assert f"it is the {row['output']} requested tokens over {row['latency_ms']:g} ms" in rate.reason
    [best] = [violation for violation in impossible if violation.figure == "231,321 tokens/s"]
    assert (
        "at most 152 tokens/s are possible (500 tokens take 3,281 ms or more); this is 1,518 times as many"
        in best.reason
    )


def test_claimed_rates_are_impossible_by_themselves_or_by_their_requests(impossible: list[Violation]) -> None:
    rules = {violation.figure: violation.rule for violation in impossible if violation.figure.endswith("requests/s")}
    assert rules == {
        "332.75 requests/s": "below-floor",
        "543.94 requests/s": "below-floor",
        "583.6 requests/s": "same-requests",
        "570.29 requests/s": "same-requests",
        "388.87 requests/s": "below-floor",
        "404.19 requests/s": "below-floor",
        "443 requests/s": "same-requests",
        "452.44 requests/s": "same-requests",
    }


def test_the_rest_of_the_claims(impossible: list[Violation]) -> None:
    found = {(violation.where, violation.figure): violation.rule for violation in impossible}
    assert found["memory stress", "latency 2.55 ms"] == "below-floor"
    assert found["monitoring targets", "ttft below 5 ms"] == "unreachable"
    assert found["single node against distributed, TP=2", "ttft 3 ms"] == "below-floor"
    assert found["single node against distributed, TP=2 x PP=2", "ttft 2.9 ms"] == "below-floor"
    assert found["single node against distributed, TP=2 x PP=2", "583.6 requests/s"] == "same-requests"
    assert (
        found["memory estimates", "16 GB at 2 bits, 22 GB at 4 bits, 32 GB at 8 bits, 43 GB at 16 bits"] == "not-linear"
    )
    assert [where for where, _ in found if found[where, _] == "flat-latency"] == [
        f"long sequence, {n} in" for n in (100, 500, 1000, 2000, 4000)
    ]
    assert len(impossible) == len(found) == 64


def test_what_is_possible_in_the_claims_is_not_flagged(impossible: list[Violation]) -> None:
    """16 answers of one token in 36 ms, 7.88 ms each, could be: it is not claimed that they cannot."""
    assert not [violation for violation in impossible if violation.where == "batch of 16"]
    assert not [violation for violation in impossible if violation.where == "batch of 8, total"]


def test_what_the_claims_cannot_show_is_said() -> None:
    said = " ".join(verdict().remarks)
    for part in (
        "21610 of 24564 MiB: 0.880",
        "--mem-fraction-static",
        "539.61 requests/s",
        "tokens in and out are not given",
    ):
        assert part in said


def test_the_claimed_figures_made_slower_are_believed() -> None:
    """Nothing is flagged because it is the adapter's: figures that this hardware can reach pass."""
    slow = report()
    ttft = [row | {"mean": 40.0, "min": 30.0, "max": 60.0} for row in slow["ttft_ms"]]
    grid = [
        row
        | {"latency_ms": 100 + 12.0 * row["output"], "tok_per_s": 1e3 * row["output"] / (100 + 12.0 * row["output"])}
        for row in slow["long_sequence"]
    ]
    rows = [row | {"req_per_s": 10.0 * row["concurrency"], "mean_latency_ms": 99.0} for row in slow["throughput"]]
    batch = [
        row | {"req_per_s": 9.0 * row["batch"], "mean_latency_ms": 99.0, "total_ms": 111.0} for row in slow["batch"]
    ]
    found = verdict(
        ttft_ms=ttft, long_sequence=grid, throughput=rows, batch=batch,
        memory_stress={"rounds": 20, "mean_latency_ms": 300.0}, single_node_vs_distributed=[],
        memory_estimates_gb={"fp16": 48, "kv8": 32, "kv4": 24, "kv2": 20}, monitoring_targets={"ttft_ms_below": 50},
    )  # fmt: skip
    assert found.violations == []


def test_shape_and_hardware_of_a_report_can_be_given() -> None:
    parsed = claims.parse(report(model="another", hardware={"gpus": 4, "gpu": "unheard of"}), "mine")
    with pytest.raises(DataError, match=r"no shape is known for 'another': name its .* with --model"):
        claims.setup_of(parsed)
    with pytest.raises(DataError, match="no bandwidth and rate are known for 'unheard of'"):
        claims.setup_of(parsed, config=claims.CONFIGS["Qwen2.5-7B"])
    found = claims.setup_of(parsed, parse("RTX 4090"), claims.CONFIGS["Qwen2.5-7B"])
    usual = claims.setup_of(claims.parse(report(), "mine"))
    assert found == replace(usual, model=usual.model.model_copy(update={"name": "another"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ttft_ms": [{"prompt_tokens": 10, "mean": -1.0, "min": 1.0, "max": 2.0}]}, "ttft_ms"),
        ({"parallel": {"tp": 0, "pp": 2}}, "tp"),
        ({"throughput": [{"concurrency": "many"}]}, "throughput"),
        ({"hardware": 4}, "hardware"),
    ],
)
def test_a_damaged_report_is_refused_with_the_field(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"mine: .*{said}"):
        claims.parse(report(**changes), "mine")
