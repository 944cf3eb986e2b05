"""Servers that are started, die and are stopped; runs that go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import PROFILE, ROOT, STEPS, Start, measure

from kvtuner_search.bench import journal
from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.servers.transport import ServerError


def test_cells_that_are_whole_are_not_repeated(fake: Start, tmp_path: Path) -> None:
    server = fake()
    measure(tmp_path / "run", url=server.url)
    before, text = server.streams, (tmp_path / "run" / "requests.jsonl").read_text()
    with pytest.raises(UsageError, match="--resume"):
        measure(tmp_path / "run", url=server.url)
    assert measure(tmp_path / "run", url=server.url, resume=True).passed
    assert server.streams == before

    lines = text.splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if '"end"' in line)
    (tmp_path / "run" / "requests.jsonl").write_text("".join([*lines[:last], lines[last][:9]]))
    again = measure(tmp_path / "run", url=server.url, resume=True)
    assert again.passed
    assert 6 < server.streams - before < 10, "the last cell and its warm-up only"
    assert again.cells[-1].succeeded == 6
    assert measure(tmp_path / "run", url=server.url, overwrite=True).passed
    assert server.streams > 2 * before


def test_a_resumed_run_takes_no_other_server_and_no_other_options(fake: Start, tmp_path: Path) -> None:
    server = fake()
    measure(tmp_path / "run", url=server.url, steps=STEPS[:2])
    with pytest.raises(UsageError, match="other cells"):
        measure(tmp_path / "run", url=server.url, resume=True)
    path = tmp_path / "run" / "requests.jsonl"
    path.write_text("".join(line for line in path.open() if '"throughput' not in line))
    server.info["page_size"] = 64
    with pytest.raises(UsageError, match="other served"):
        measure(tmp_path / "run", url=server.url, steps=STEPS[:2], resume=True)


def test_a_damaged_journal_is_refused_with_its_line(fake: Start, tmp_path: Path) -> None:
    server = fake()
    measure(tmp_path / "run", url=server.url, steps=STEPS[:1])
    path = tmp_path / "run" / "requests.jsonl"
    path.write_text(path.read_text() + '{"cell": "ttft", "result": {}}\n')
    with pytest.raises(DataError, match=r"requests.jsonl, line \d+"):
        measure(tmp_path / "run", url=server.url, steps=STEPS[:1], resume=True)


def test_a_server_is_started_measured_and_stopped(
    fake_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_PID", str(tmp_path / "pid"))
    record = measure(
        tmp_path / "run", server_python=fake_python, server_arguments=("--page-size", "16"), steps=STEPS[:1]
    )
    assert record.passed
    assert record.served.started
    assert record.served.page_size == 16
    assert record.served.arguments == [
        "--model-path", "reference", "--page-size", "16", "--kvtuner-profile", PROFILE.name, "--enable-metrics",
    ]  # fmt: skip
    assert str(tmp_path) not in (tmp_path / "run" / "record.json").read_text()
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_server_that_dies_ends_the_run_and_keeps_what_was_whole(
    fake_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DIE_AFTER", "6")
    with pytest.raises(ServerError, match="the server ended with 3"):
        measure(tmp_path / "run", server_python=fake_python)
    logs = journal.read(tmp_path / "run" / "requests.jsonl")
    assert [log.done for log in logs.values()] == [True, False]
    assert not (tmp_path / "run" / "record.json").exists()
    monkeypatch.delenv("FAKE_DIE_AFTER")
    assert measure(tmp_path / "run", server_python=fake_python, resume=True).passed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_server_and_keeps_what_came(
    number: signal.Signals, fake_python: str, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "kvtuner_search", "bench", "--profile", str(PROFILE), "--model-path", "reference", "--server-python", fake_python,
        "--preset", "quick", "--folder", str(tmp_path / "run"),
    ]  # fmt: skip
    environment = os.environ | {"FAKE_PID": str(tmp_path / "pid"), "FAKE_TOKEN_SECONDS": "0.2"}
    started = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    path = tmp_path / "run" / "requests.jsonl"
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (path.exists() and '"result"' in path.read_text()):
            assert started.poll() is None
            time.sleep(0.1)
        started.send_signal(number)
        error = started.communicate(timeout=60)[1]
    finally:
        started.kill()
    assert started.returncode == 130, error
    assert "bench continue with --resume" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert [log for log in journal.read(path).values() if log.results]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
