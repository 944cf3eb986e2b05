"""A whole run against a small truthful server, and one with single faults: what it records and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import PROFILE, ROOT, STEPS, Start, failed, measure, rules, step

from kvtuner_search.bench import files, journal, slo
from kvtuner_search.bench.correctness import check_totals
from kvtuner_search.bench.record import Hardware
from kvtuner_search.errors import NotComparableError, UsageError
from kvtuner_search.models.reference_model import reference_model_path
from kvtuner_search.profile.canonical import load
from kvtuner_search.servers.transport import ServerError
from tests.search.servers.fake_base import CAPACITY


def test_a_truthful_server_gives_a_record_of_all_that_came_back(fake: Start, tmp_path: Path) -> None:
    server = fake()
    record = measure(tmp_path / "run", url=server.url, objectives=slo.parse("success=0.999,memory=0.9"))
    assert record.passed, (record.violations, record.correctness, record.gates)
    assert record == files.read(tmp_path / "run" / "record.json")
    assert [check.name for check in record.correctness] == ["profile", "answers", "likelihood", "totals"]
    assert [(gate.name, gate.passed) for gate in record.gates] == [("success", True), ("memory", True)]
    profile = load(PROFILE)
    assert (record.cache.profile, record.cache.digest) == (profile.name, profile.digest)
    assert (record.cache.effective_bits, record.cache.bytes_per_token) == (4.0, 2048)
    assert (record.served.token_capacity, record.served.started) == (4 * CAPACITY, False)
    assert record.environment.versions["sglang"] == "0.5.14"
    assert record.environment.hardware is not None
    assert record.environment.hardware.count == 1
    for cell, asked in zip(record.cells, STEPS, strict=True):
        assert (cell.section, cell.shape) == (asked.section, asked.shape)
        assert cell.succeeded == cell.shape.requests
        assert cell.returned_tokens == cell.shape.requests * cell.shape.output_tokens
        assert cell.prompt_tokens == cell.shape.requests * cell.shape.input_tokens
        assert (cell.cached_tokens, cell.failures) == (0, {})
        assert cell.speed is not None
        assert cell.floor is not None
        assert cell.speed.latency.samples == cell.shape.requests
    memory = record.cells[-1]
    assert memory.free_tokens == (4 * CAPACITY, 4 * CAPACITY)
    assert len(memory.readings) == 1 + 3
    totals = next(scrape for scrape in record.scrapes if scrape.name.startswith("sglang:generation_tokens_total"))
    returned = sum(cell.returned_tokens for cell in record.cells)
    assert totals.maximum - totals.minimum >= returned
    assert "/a/folder" not in (tmp_path / "run" / "record.json").read_text(), "labels that name folders are dropped"


def test_every_raw_request_is_kept_beside_the_record(fake: Start, tmp_path: Path) -> None:
    record = measure(tmp_path / "run", url=fake().url)
    logs = journal.read(tmp_path / "run" / "requests.jsonl")
    assert list(logs) == [journal.cell_key(cell.section, cell.shape) for cell in record.cells]
    for cell, log in zip(record.cells, logs.values(), strict=True):
        results = [result for result in log.results if not result.warmup]
        assert sum(len(result.tokens) for result in results) == cell.returned_tokens
        assert sorted(result.index for result in results) == list(range(cell.shape.requests))
    assert {result.round for result in logs["memory/400/2/2/6"].results} == {0, 1, 2}


def test_a_stock_server_is_measured_without_a_profile(fake: Start, tmp_path: Path) -> None:
    record = measure(tmp_path / "run", url=fake(profile=None).url, profile=None, model=None, steps=STEPS[:1])
    assert record.passed
    assert (record.cache.profile, record.cache.digest, record.cache.effective_bits) == ("16-bit", None, 16)
    assert record.cache.bytes_per_token == 2 * 16 * 2 * 64 * 2
    assert record.served.token_capacity == CAPACITY


def test_without_profile_the_digest_is_the_servers(fake: Start, tmp_path: Path) -> None:
    record = measure(tmp_path / "run", url=fake().url, profile=None, steps=STEPS[:1])
    assert record.cache.digest == load(PROFILE).digest
    assert record.cache.effective_bits == 4.0
    several = fake(tp_size=2)
    with pytest.raises(UsageError, match="name that profile with --profile"):
        measure(tmp_path / "several", url=several.url, profile=None, steps=STEPS[:1])
    with pytest.raises(NotComparableError, match="start it with this profile"):
        measure(tmp_path / "another", url=several.url, profile=PROFILE.with_name("reference-3.25bit.json"))


def test_a_server_with_another_profile_is_not_measured(fake: Start, tmp_path: Path) -> None:
    server = fake(profile=PROFILE.with_name("reference-3.25bit.json"))
    record = measure(tmp_path / "run", url=server.url)
    assert not record.passed
    assert set(failed(record)) == {"profile"}
    assert record.cells == []
    assert server.streams == 0
    stock = measure(tmp_path / "stock", url=fake(profile=None).url)
    assert "the server has a 16-bit cache" in failed(stock)["profile"]


@pytest.mark.parametrize(
    ("fault", "check", "said"),
    [
        ({"garbled": True}, "likelihood", "decode reads something else"),
        ({"canned": True}, "answers", "different prompts got the same answer"),
    ],
)
def test_wrong_answers_leave_no_speed(
    fake: Start, tmp_path: Path, fault: dict[str, bool], check: str, said: str
) -> None:
    server = fake()
    vars(server).update(fault)
    record = measure(tmp_path / "run", url=server.url)
    assert said in failed(record)[check]
    assert not record.cells


def test_random_weights_need_no_likely_answers(fake: Start, tmp_path: Path) -> None:
    server = fake(load_format="dummy")
    server.garbled = True
    record = measure(tmp_path / "run", url=server.url, steps=STEPS[:1])
    assert record.passed
    assert record.model.dummy_weights


def test_tokens_that_the_server_never_generated_leave_no_speed(fake: Start, tmp_path: Path) -> None:
    server = fake()
    server.uncounted = True
    record = measure(tmp_path / "run", url=server.url, steps=STEPS[:2])
    assert set(failed(record)) == {"totals"}
    assert [cell.speed for cell in record.cells] == [None, None]
    assert record.cells[1].returned_tokens == 30
    assert check_totals(5, None, None) == []
    assert [check.passed for check in check_totals(5, 1.0, 6.0)] == [True]


@pytest.mark.parametrize(
    ("lie", "rule"), [("404", "http-status"), ("no-tokens", "no-tokens"), ("drops", "dropped"), ("stalls", "stalled")]
)
def test_a_server_that_begins_to_lie_when_load_comes_is_caught(
    fake: Start, tmp_path: Path, lie: str, rule: str
) -> None:
    server = fake()
    server.lie = lie
    record = measure(tmp_path / "run", url=server.url, steps=STEPS[1:2], stall=0.3)
    assert record.correct, "it answers the checks, which are not streamed"
    assert not record.passed
    assert rule in rules(record)
    (cell,) = record.cells
    assert cell.succeeded == 0
    assert cell.failures[rule] >= 1
    assert cell.speed is None, "an error is a failure, not a sample"


def test_a_node_that_answers_404_is_refused_with_the_reason(fake: Start, tmp_path: Path) -> None:
    server = fake()
    server.lie = "404-always"
    with pytest.raises(ServerError, match=r"/server_info answered 404: .*the first node's address"):
        measure(tmp_path / "run", url=server.url)


def test_lost_slots_are_a_violation(fake: Start, tmp_path: Path) -> None:
    server = fake()
    server.leak = 7
    record = measure(tmp_path / "run", url=server.url, steps=STEPS[-1:])
    (violation,) = record.violations
    assert violation.rule == "leak"
    assert violation.figure.startswith("42 of "), "six requests lost seven each; the warm-up's loss came before"
    assert not record.passed


def test_a_figure_below_the_floor_is_no_result(fake: Start, tmp_path: Path) -> None:
    slow = Hardware(name="slow", count=4, bandwidth=1e8, flops=1e12, source="given")
    record = measure(tmp_path / "run", url=fake().url, hardware=slow, steps=STEPS[1:2])
    assert record.correct
    assert "below-floor" in rules(record)
    assert not record.passed
    assert record.environment.hardware is not None
    assert record.environment.hardware.count == 1, "as many as the server has ranks"


def test_without_hardware_there_is_no_floor(fake: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtuner_search.bench.hardware.detect", lambda *_: None)
    record = measure(tmp_path / "run", url=fake().url, steps=STEPS[:1])
    assert record.environment.hardware is None
    assert record.cells[0].floor is None


def test_cells_that_do_not_fit_the_server_are_refused_before_any_is_measured(fake: Start, tmp_path: Path) -> None:
    server = fake()
    with pytest.raises(UsageError, match=r"4000 tokens in, 500 out does not fit: the server takes 4096"):
        measure(tmp_path / "a", url=server.url, steps=[*STEPS, step("long", 1, 1, 4000, 500)])
    server.info["max_req_input_len"] = 110
    with pytest.raises(UsageError, match=r"100 tokens in, 20 out does not fit: the server takes 114"):
        measure(tmp_path / "b", url=server.url, steps=STEPS[:3])
    assert server.streams == 0


def test_inputs_are_refused_before_anything_is_asked(fake: Start, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no server and no model"):
        measure(tmp_path / "a", model=None)
    other = ROOT / "profiles" / "qwen2.5-7b" / "qwen2.5-7b-kv4.json"
    with pytest.raises(NotComparableError):
        measure(tmp_path / "b", url=fake().url, profile=other)
    with pytest.raises(UsageError, match="name the model with --model-path"):
        measure(tmp_path / "c", url=fake(model_path="/nowhere/model").url, model=None)
    with pytest.raises(UsageError, match="stores its cache as fp8_e5m2"):
        measure(tmp_path / "d", url=fake(profile=None, kv_cache_dtype="fp8_e5m2").url, profile=None)
    with pytest.raises(ServerError, match="is the server up"):
        measure(tmp_path / "e", url="http://127.0.0.1:9")


def test_the_record_is_json_that_names_no_folder(fake: Start, tmp_path: Path) -> None:
    measure(tmp_path / "run", url=fake().url, steps=STEPS[:1])
    text = (tmp_path / "run" / "record.json").read_text()
    assert str(reference_model_path().parent) not in text
    assert json.loads(text)["model"]["name"] == "reference"
