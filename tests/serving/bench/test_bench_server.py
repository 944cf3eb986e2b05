"""``bench`` against the real SGLang on the CPU, with the reference model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from servers import COMMON, environment, running

from kvtuner_search.bench import files, journal
from kvtuner_search.bench.presets import PRESETS
from kvtuner_search.bench.record import SECTIONS, Record

FLAGS = [flag for flag in COMMON if flag not in ("--host", "127.0.0.1")]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvtuner_search", "bench", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(mixed_profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one `quick` run left, the server started by it and serving a mixed profile."""
    path = tmp_path_factory.mktemp("bench") / "run"
    done = bench(
        "--profile", str(mixed_profile), "--model-path", "reference", "--preset", "quick", "--folder", str(path),
        "--slo", "success=1,memory=0.9", "--json", "--", *FLAGS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    assert found == json.loads((path / "record.json").read_text())
    return path


@pytest.fixture(scope="module")
def record(folder: Path) -> Record:
    return files.read(folder / "record.json")


def test_every_table_is_there_and_every_request_came_back_whole(record: Record) -> None:
    assert record.passed
    assert {cell.section for cell in record.cells} == set(SECTIONS)
    assert [(cell.section, cell.shape) for cell in record.cells] == [
        (step.section, step.shape) for step in PRESETS["quick"]
    ]
    for cell in record.cells:
        assert (cell.succeeded, cell.failures) == (cell.shape.requests, {}), cell.title
        assert cell.returned_tokens == cell.shape.requests * cell.shape.output_tokens
        assert cell.finish_reasons == {"length": cell.shape.requests}
        assert cell.cached_tokens == 0
        assert cell.speed is not None
        assert cell.speed.ttft is not None
        assert cell.floor is not None
        assert cell.speed.ttft.minimum > cell.floor.ttft


def test_the_server_was_right_before_it_was_fast(record: Record, mixed_profile: Path) -> None:
    checks = {check.name: check for check in record.correctness}
    assert list(checks) == ["profile", "answers", "likelihood", "totals"]
    digest = json.loads(mixed_profile.read_text())["digest"]
    assert (record.cache.digest, record.cache.effective_bits) == (digest, 4.0)
    assert record.served.started
    assert record.served.token_capacity > 1000
    assert record.environment.versions["sglang"] == record.served.version


def test_memory_is_what_it_was_after_the_rounds(record: Record) -> None:
    memory = next(cell for cell in record.cells if cell.section == "memory")
    assert len(memory.readings) > 2
    assert {reading.free_tokens for reading in memory.readings} == {record.served.token_capacity}
    peak = next(s for s in record.scrapes if s.name.startswith("sglang:num_running_reqs"))
    assert peak.maximum >= 1, "metrics were read while requests ran"
    assert {gate.name for gate in record.gates} == {"success", "memory"}


def test_raw_requests_are_those_of_the_record(folder: Path, record: Record) -> None:
    logs = journal.read(folder / "requests.jsonl")
    for cell in record.cells:
        results = [r for r in logs[journal.cell_key(cell.section, cell.shape)].results if not r.warmup]
        assert sum(len(result.tokens) for result in results) == cell.returned_tokens
        assert all(result.ttft > 0 for result in results)


def test_a_stock_server_that_is_pointed_at_is_measured_too(tmp_path: Path) -> None:
    with running(tmp_path / "server") as server:
        url = f"http://127.0.0.1:{server.ports[0]}"
        done = bench(
            "--url", url, "--folder", str(tmp_path / "run"), "--quiet", "--cross-check",
            "--section", "ttft", "--section", "memory", "--section", "throughput",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout
        assert (
            server.info()["max_total_num_tokens"] == files.read(tmp_path / "run" / "record.json").served.token_capacity
        )
    record = files.read(tmp_path / "run" / "record.json")
    assert (record.cache.profile, record.cache.effective_bits, record.cache.bytes_per_token) == ("16-bit", 16, 8192)
    assert record.model.name == "reference"
    assert not record.served.started
    assert [check.name for check in record.correctness] == ["profile", "answers", "likelihood"], "no metrics, no totals"
    assert record.scrapes == []
    # SGLang's own client saw the same requests: how the figures compare depends on the machine, that there are any does not.
    assert {"requests_per_second", "latency_mean"} <= set(record.cross_check), record.cross_check
    assert all(ratio > 0 for ratio in record.cross_check.values())
