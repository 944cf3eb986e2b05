"""A worker that may be alive is never taken for one that ended, whatever names and numbers it shares with others."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.calibration import workers
from kvtuner_search.calibration.workers import Worker

CODE = """
import json, sys, time
from pathlib import Path
from kvtuner_search.calibration.workers import Worker
worker = Worker(Path(sys.argv[1]) if sys.argv[1] else None)
print(json.dumps(worker.begin()), flush=True)
time.sleep(300)
"""
Start = Callable[[Path | None], tuple[subprocess.Popen[str], dict[str, Any]]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process that works on the study of a file, and return it with what it tells others."""
    import json

    found = []

    def begin(file: Path | None) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(file or "")],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        found.append(process)
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())

    yield begin
    for process in found:
        process.kill()
        process.wait()


def elsewhere(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """From now on this process is in another container, or on another machine, of the same host name."""
    monkeypatch.setattr(workers, "_namespace", lambda: "pid:[1]")
    if what == "machine":
        monkeypatch.setattr(workers, "_boot", lambda: "another")


@pytest.mark.parametrize("where", ["here", "container", "machine"])
def test_beside_a_file_the_lock_tells(
    where: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, other = start(tmp_path / "study.db")
    monkeypatch.setattr(workers, "_local", lambda _: True)
    if where != "here":
        elsewhere(monkeypatch, where)
    me = Worker(tmp_path / "study.db")
    me.begin()
    assert not me.ended(other)
    process.send_signal(signal.SIGSTOP)  # stopped is not ended
    assert not me.ended(other)
    process.kill()
    process.wait()
    assert me.ended(other)
    me.end()
    assert not (tmp_path / "study.db.workers").exists()


def test_a_lock_says_nothing_of_another_machine_on_a_shared_file_system(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, other = start(tmp_path / "study.db")
    elsewhere(monkeypatch, "machine")
    monkeypatch.setattr(workers, "_local", lambda _: False)  # as on NFS that is mounted without locks
    process.kill()
    process.wait()
    assert not Worker(tmp_path / "study.db").ended(other)


def test_without_a_file_the_process_is_looked_up(start: Start) -> None:
    process, other = start(None)
    me = Worker(None)
    assert not me.ended(other)
    process.kill()
    time.sleep(0.2)
    assert me.ended(other)  # though nobody has waited for it yet
    process.wait()
    assert me.ended(other)
    assert me.ended(other | {"pid": os.getpid()})  # the number was given to another process


@pytest.mark.parametrize("where", ["container", "machine", "host name", "unknown"])
def test_a_process_that_cannot_be_seen_counts_as_alive(
    where: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, other = start(None)
    process.kill()
    process.wait()
    if where == "unknown":
        monkeypatch.setattr(workers, "_namespace", lambda: None)
        other["processes"] = None
    elif where == "host name":
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
    else:
        elsewhere(monkeypatch, where)
    assert not Worker(None).ended(other)


def test_a_process_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    me = Worker(None)
    other = me.begin() | {"id": "other", "pid": 4321, "started": "77"}

    def kill(_: int, __: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(workers, "_stat", lambda _: None)  # as with hidepid
    assert not me.ended(other)


@pytest.mark.parametrize("record", [{}, 7, {"id": "x"}, ["host", 1, "2"]])
def test_what_is_no_worker_of_ours_counts_as_alive(record: object) -> None:
    assert not Worker(None).ended(record)


def hear(me: Worker, other: dict[str, Any], beats: list[int], step: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listen to another worker once every ``step`` seconds of a clock that nobody has to wait for."""
    for beat in beats:
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda now=now: now + step)
        me.listen([other | {"beat": beat}, None, {}, 7, {"id": [], "beat": "x"}])


LOOKS = int(workers.SILENCE / workers.BEAT)  # one more ends the last of as many intervals


@pytest.mark.parametrize("where", ["container", "machine"])
def test_a_worker_that_cannot_be_seen_is_heard(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other, me = Worker(None).begin(), Worker(None)
    elsewhere(monkeypatch, where)
    hear(me, other, [5] * LOOKS, workers.BEAT + 1, monkeypatch)
    assert not me.ended(other)
    hear(me, other, [5], workers.BEAT + 1, monkeypatch)
    assert me.ended(other)
    hear(me, other, [6], workers.BEAT, monkeypatch)  # it had been stopped
    assert not me.ended(other)
    hear(me, other, [*range(7, 7 + 2 * LOOKS)], workers.BEAT, monkeypatch)
    assert not me.ended(other)


def test_time_in_which_nobody_looked_is_not_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    other, me = Worker(None).begin(), Worker(None)
    elsewhere(monkeypatch, "machine")
    hear(me, other, [5] * LOOKS, 3600.0, monkeypatch)  # this one slept, or the storage could not be reached
    assert not me.ended(other)


def test_silence_tells_nothing_of_a_worker_that_can_be_seen(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_local", lambda _: True)
    for file in (tmp_path / "study.db", None):
        process, other = start(file)
        process.send_signal(signal.SIGSTOP)
        me = Worker(file)
        with monkeypatch.context() as patch:
            hear(me, other, [0] * 2 * LOOKS, workers.BEAT + 1, patch)
            assert not me.ended(other)
            if file is not None:
                elsewhere(patch, "container")
                assert not me.ended(other)
                assert me.holds(other)


def test_a_sign_of_life_is_another_one_each_time() -> None:
    me = Worker(None)
    first = me.begin()
    assert [me.beat()["beat"] - first["beat"] for _ in range(3)] == [1, 2, 3]
    assert me.beat() | {"beat": 0} == first


def test_whoever_writes_the_study_does_not_say_which_files_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "study.db.workers").mkdir()
    (tmp_path / "precious").touch()
    me = Worker(tmp_path / "study.db")
    for name in ("../precious", str(tmp_path / "precious"), "..", ""):
        other = me.begin() | {"id": name, "host": "another"}
        assert not me.ended(other)
        assert not me.holds(other)
    assert (tmp_path / "precious").exists()


def test_links_to_a_study_lead_to_the_same_locks(tmp_path: Path) -> None:
    (tmp_path / "study.db").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link.db").symlink_to("../study.db")
    me, other = Worker(tmp_path / "study.db"), Worker(tmp_path / "folder" / "link.db")
    assert me.holds(other.begin())
    assert workers.at_work(tmp_path / "folder" / "link.db")
    other.end()
    assert not workers.at_work(tmp_path / "study.db")


def test_who_said_so_has_ended_and_a_worker_is_never_gone_for_itself() -> None:
    me = Worker(None)
    assert me.ended(None)
    assert not me.ended(me.begin())
    assert Worker(None).id != me.id
