"""Runs of ``calibrate`` that share a study or a folder, are killed, or cannot write."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from kvtuner_search.calibration import choosing, session
from kvtuner_search.calibration.study import Study, open_storage
from kvtuner_search.cli.main import run
from kvtuner_search.profile.canonical import load

SMALL = ("--data", "list", "--samples", "1", "--length", "170", "--no-random-baseline", "--no-bands", "--quiet")


def arguments(model: Path, output: Path, *more: str) -> list[str]:
    return ["calibrate", "--model", str(model), "--output", str(output), *SMALL, *more]


def wait_for(what: str, process: subprocess.Popen[bytes], ready: Any) -> None:
    deadline = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, what
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_helpers_end_with_their_parent_even_if_it_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "kvtuner_search", *arguments(tiny_model, output, "--trials", "4000")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--workers", "2"], env=environment)
    journal = output / "study.journal"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    # Both have registered and a trial is finished, so the helper is at work and not just about to start.
    wait_for("two workers", process, lambda: journal.exists() and journal.read_bytes().count(b'"worker:') >= 2)
    (helper,) = map(int, children.read_text().split())
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{helper}").exists() and b"kvtuner" in Path(f"/proc/{helper}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run(arguments(tiny_model, output, "--trials", "4", "--resume")) == 0
    assert (output / "tiny-qwen2-4.00bit.json").exists()
    assert not (output / "study.journal.workers").exists()


def test_a_helper_ends_with_its_parent_before_it_has_loaded_anything(tmp_path: Path) -> None:
    """Else whoever resumes a run that was killed early would find its folder taken, for as long as importing torch takes."""
    watched, held = os.pipe()
    os.close(held)
    code = (
        "import time; from kvtuner_search import threads; threads.settle = lambda: time.sleep(300);"
        f" from kvtuner_search.cli.calibrate import command; command(['--join', '--parent', '{watched}'])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, pass_fds=(watched,), cwd=tmp_path)
    os.close(watched)
    assert process.wait(240) == 130
    assert not list(tmp_path.iterdir())


def test_a_helper_that_is_stopped_does_not_hold_up_the_end(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "PATIENCE", 0.2)
    real, started = subprocess.Popen, []

    def start(*given: Any, **named: Any) -> Any:
        code = "import signal, time; signal.signal(signal.SIGTERM, print); print(flush=True); time.sleep(300)"
        started.append(real([sys.executable, "-c", code], **named | {"stdout": subprocess.PIPE}))
        started[-1].stdout.readline()  # from here on it hears SIGTERM only when it goes on, as a helper does
        started[-1].send_signal(signal.SIGSTOP)
        return started[-1]

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session.subprocess, "Popen", start)
    monkeypatch.setattr(session, "search", fail)
    assert run(arguments(tiny_model, tmp_path, "--workers", "2")) == 130
    assert [process.returncode for process in started] == [-signal.SIGKILL]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_told_to_end_says_so(number: int, tiny_model: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    more = ("--trials", "4000", "--storage", url)
    command = [sys.executable, "-m", "kvtuner_search", *arguments(tiny_model, tmp_path / "out", *more)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    study = Study(open_storage(url), "kvtuner", "tpe", 0)
    wait_for("a trial", process, study.finished)
    process.send_signal(number)
    assert b"--resume" in process.communicate()[1]
    assert process.returncode == 130
    workers = {name: value for name, value in study.study.user_attrs.items() if name.startswith("worker:")}
    assert len(workers) == 1
    assert set(workers.values()) == {None}
    study.fail_abandoned()  # at the most a trial that was just being taken
    assert not study.study.get_trials(states=(TrialState.RUNNING,))


@pytest.mark.parametrize("how", ["--resume", "--overwrite"])
def test_a_folder_in_which_another_run_is_at_work_is_left_alone(
    how: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.journal").write_bytes(b"the other's")
    monkeypatch.setattr(session, "WAIT", 0.0)
    with (tmp_path / "study.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run(arguments(tiny_model, tmp_path, how)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "another calibration is using" in line
    assert (tmp_path / "study.journal").read_bytes() == b"the other's"


def test_every_machine_writes_what_the_first_one_measured(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = ("--trials", "4", "--storage", f"sqlite:///{tmp_path}/study.db")
    assert run(arguments(tiny_model, tmp_path / "one", *storage)) == 0
    real = session.profile_content

    def elsewhere(*arguments: Any) -> dict[str, Any]:
        content = real(*arguments)
        content["provenance"]["device"] = "another"
        content["pareto"][0]["loss"] *= 1 + 1e-12
        return content

    monkeypatch.setattr(session, "profile_content", elsewhere)
    assert run(arguments(tiny_model, tmp_path / "two", *storage, "--name", "mine")) == 0
    assert run(arguments(tiny_model, tmp_path / "three", *storage)) == 0
    name = "tiny-qwen2-4.00bit"
    for suffix in (".json", ".safetensors"):
        assert (tmp_path / "three" / f"{name}{suffix}").read_bytes() == (
            tmp_path / "one" / f"{name}{suffix}"
        ).read_bytes()
    named = (tmp_path / "two" / "mine-4.00bit.json").read_text()
    assert '"another"' not in named
    assert run(["check", str(tmp_path / "two" / "mine-4.00bit.json")]) == 0


def test_resuming_with_more_patience_or_another_rule_searches_on_and_chooses_anew(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "preferred", lambda judged, robust: judged[0 if robust else -1])

    def result(*more: str) -> tuple[int, list[str]]:
        given = arguments(tiny_model, tmp_path, "--trials", "30", "--target-bits", "6", *more)
        assert run(given) == 0
        record = json.loads((tmp_path / "record.json").read_text())
        layers = load(tmp_path / "tiny-qwen2-6.00bit.json").layer_specs()
        assert [str(spec) for spec in layers] == record["targets"][0]["chosen"]["layers"]
        return len([t for t in record["trials"] if not t["duplicate"]]), list(map(str, layers))

    first, _ = result("--patience", "1")
    more, robust = result("--patience", "0", "--resume")
    assert first < more
    same, free = result("--patience", "0", "--no-robust", "--resume")
    assert same == more
    assert free != robust


def test_what_cannot_be_written_in_the_end_says_how_to_go_on(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "tiny-qwen2-4.00bit.json"
    blocked.mkdir()
    assert run(arguments(tiny_model, tmp_path, "--trials", "4")) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "tiny-qwen2-4.00bit.json" in line
    assert "the trials are kept: continue with --resume" in line
    blocked.rmdir()
    assert run(arguments(tiny_model, tmp_path, "--trials", "4", "--resume")) == 0
    assert blocked.is_file()


def test_a_full_disk_is_no_matter_of_usage(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert run(arguments(tiny_model, tmp_path)) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device: make room on the disk" in line
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_locks_in_the_middle_is_one_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sqlite3

    from kvtuner_search.calibration.objective import TrialObjective

    real, holders = TrialObjective.__call__, []

    def lock(*given: Any) -> Any:
        holder = sqlite3.connect(tmp_path / "study.db")
        holder.execute("begin exclusive")
        holders.append(holder)
        return real(*given)

    storage = ("--trials", "4", "--storage", f"sqlite:///{tmp_path}/study.db?timeout=0.01")
    with monkeypatch.context() as patch:
        patch.setattr(TrialObjective, "__call__", lock)
        assert run(arguments(tiny_model, tmp_path / "out", *storage)) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "database is locked: another program has locked it; finished work is kept: continue with --resume" in line
    for holder in holders:
        holder.close()
    assert run(arguments(tiny_model, tmp_path / "out", *storage, "--resume")) == 0


@pytest.mark.parametrize("storage", ["", "sqlite:///{}/other.db", "{}/other.journal"])
@pytest.mark.parametrize("name", ["kvtuner", "misspelt"])
def test_a_study_that_is_not_there_is_not_resumed(
    storage: str, name: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a misspelt address or name would start another search, and nobody would know. Before the model is read, and nothing is written."""
    output = tmp_path / "out"
    if name != "kvtuner":
        for where in (storage.format(tmp_path), str(output / "study.journal")):
            if where:
                Study(open_storage(where), "kvtuner", "tpe", 0).close()
    before = sorted(path for path in tmp_path.iterdir() if path != output)
    options = ["--resume", "--study-name", name, *(["--storage", storage.format(tmp_path)] if storage else [])]
    assert run(["calibrate", "--model", "no/such/model", "--output", str(output), "--quiet", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "to resume" in line
    assert "leave --resume out" in line
    assert ("(it has 'kvtuner')" in line) == (name != "kvtuner")
    assert sorted(path for path in tmp_path.iterdir() if path != output) == before


@pytest.mark.parametrize("where", ["journal", "database"])
def test_an_output_folder_that_is_deleted_in_the_middle(
    where: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvtuner_search.calibration.objective import TrialObjective

    real, output = TrialObjective.__call__, tmp_path / "out"

    def delete(*given: Any) -> Any:
        if output.exists():
            output.rename(tmp_path / "elsewhere")
        return real(*given)

    storage = ("--storage", f"sqlite:///{tmp_path}/study.db") if where == "database" else ()
    monkeypatch.setattr(TrialObjective, "__call__", delete)
    code = run(arguments(tiny_model, output, "--trials", "4", *storage))
    if where == "database":  # the trials are elsewhere, and the folder is made again
        assert code == 0
        assert (output / "tiny-qwen2-4.00bit.json").exists()
        return
    assert code == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "it was deleted or moved while this run was at work: put it back as it was and continue with --resume" in line
    )
    assert not output.exists()
    monkeypatch.undo()
    (tmp_path / "elsewhere").rename(output)
    assert run(arguments(tiny_model, output, "--trials", "4", "--resume")) == 0


def test_a_study_on_which_somebody_works_from_elsewhere_is_not_overwritten(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = tmp_path / "study.journal"
    other = Study(open_storage(str(journal)), "kvtuner", "tpe", 0)  # calibrate --storage PATH, which has another folder
    other.fail_abandoned()
    before = journal.read_bytes()
    assert run(arguments(tiny_model, tmp_path, "--overwrite")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"another calibration is at work on {journal}" in line
    assert journal.read_bytes() == before
    other.close()
    assert run(arguments(tiny_model, tmp_path, "--overwrite", "--trials", "4")) == 0


def test_a_password_is_never_said(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "MySQLdb", None)
    url = "mysql://u:secretpw@127.0.0.1:3999/db"
    assert run(arguments(tiny_model, tmp_path, "--overwrite", "--storage", url)) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "mysql://***@127.0.0.1:3999/db" in line
    assert "MySQLdb" in line
    assert "secretpw" not in line
