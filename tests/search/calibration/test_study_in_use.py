"""A study whose file or rows are taken away, replaced or damaged while a run is at work on it: noticed, in one line, before a trial is lost."""

import errno
import fcntl
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from study_worker import main as work
from test_space import make_space

from kvtuner_search.calibration import journal
from kvtuner_search.calibration.objective import TrialOutcome
from kvtuner_search.calibration.space import Choices
from kvtuner_search.calibration.storage import open_storage
from kvtuner_search.calibration.study import Study
from kvtuner_search.errors import DataError

SPACE = make_space(8)
MIDDLE = SPACE.nbytes([len(v.pairs) // 2 for v in SPACE.variables])
BUDGETS = [MIDDLE * tenths // 10 for tenths in (10, 9, 8, 7, 6, 5)]  # each trial has one of its own
NAMES = ("study.journal", "study.db")


def address(path: Path) -> str:
    return f"sqlite:///{path}" if path.suffix == ".db" else str(path)


def join(path: Path) -> Study:
    study = Study(open_storage(address(path)), "test", "tpe", 7)
    study.fail_abandoned()
    return study


def run(study: Study, trials: int, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Finish trials; ``meanwhile`` happens while one is scored."""

    def score(choices: Choices, done: Sequence[TrialOutcome], _: bool) -> TrialOutcome:
        if len(done) == 1:
            meanwhile()
        return TrialOutcome(SPACE.cost(choices), (0.1 + sum(choices),), True)

    study.run(SPACE, score, trials, BUDGETS)


def other_study(folder: Path, name: str) -> Path:
    """Another run's study of the same name, with more trials."""
    path = folder / f"other{Path(name).suffix}"
    other = join(path)
    run(other, 4)
    other.close()
    return path


HOW = {
    "deleted": ("deleted or moved", lambda path, _: path.unlink()),
    "moved": ("deleted or moved", lambda path, _: path.rename(path.with_name("elsewhere"))),
    "folder": ("deleted or moved", lambda path, _: shutil.rmtree(path.parent)),
    "replaced": ("replaced while it was in use", lambda path, other: other.rename(path)),
    "emptied": ("emptied|cut short", lambda path, _: os.truncate(path, 0)),
    "halved": ("malformed|cut short", lambda path, _: os.truncate(path, path.stat().st_size // 2)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", HOW)
def test_a_file_that_is_not_the_same_any_more_ends_the_run(name: str, how: str, tmp_path: Path) -> None:
    says, change = HOW[how]
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / name
    other = other_study(tmp_path, name)
    theirs = other.read_bytes()
    me = join(path)
    with pytest.raises(DataError, match=rf"{name}.*({says}).*put it back.*--resume, or start again$") as raised:
        run(me, 3, lambda: change(path, other))
    assert "\n" not in str(raised.value)
    me.close()
    if how in ("deleted", "moved", "folder"):
        assert not path.exists()  # an empty one in its place would look like a study that lost everything
    elif how == "replaced":
        assert path.read_bytes() == theirs


@pytest.mark.parametrize("what", ["another study", "an older copy"])
def test_another_content_in_the_same_database_is_noticed(what: str, tmp_path: Path) -> None:
    path, copy = tmp_path / "study.db", other_study(tmp_path, "study.db")
    if what == "an older copy":
        copy = tmp_path / "copy.db"
        before = join(path)
        run(before, 1)
        before.close()
        shutil.copy(path, copy)
    me = join(path)
    content = copy.read_bytes()
    with pytest.raises(DataError, match=r"does not know this run any more.*put it back.*--resume"):
        run(me, 3, lambda: bool(path.write_bytes(content)) and None)
    me.close()
    assert path.read_bytes() == content


@pytest.mark.parametrize("what", ["study", "table"])
def test_a_study_that_is_dropped_from_its_database_is_noticed(what: str, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    me = join(path)

    def drop() -> None:
        if what == "study":
            optuna.delete_study(study_name="test", storage=address(path))
        else:
            with sqlite3.connect(path) as connection:
                connection.execute("drop table trials")

    with pytest.raises(DataError, match=r"cannot use the study.*put it back.*--resume") as raised:
        run(me, 3, drop)
    assert "\n" not in str(raised.value)


def test_a_study_that_was_put_back_goes_on(tmp_path: Path) -> None:
    for name in NAMES:
        path = tmp_path / name
        with pytest.raises(DataError, match="put it back"):
            run(join(path), 3, lambda path=path: path.rename(tmp_path / "elsewhere"))  # type: ignore[misc]
        (tmp_path / "elsewhere").rename(path)
        me = join(path)
        assert len(me.finished()) == 1
        run(me, 3)
        assert len(me.finished()) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_on_files_loses_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    me = join(path)
    run(me, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, limits[1]))  # half a line fits
    try:
        with pytest.raises(DataError, match="finished work is kept: continue with --resume") as raised:
            me.publish({"centres": ["x" * 99_999]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(raised.value)
    assert ("ulimit -f" in str(raised.value)) == (name == "study.journal")
    me.close()
    me = join(path)
    assert len(me.finished()) == 1
    assert me.plan() is None
    run(me, 5)
    assert len(me.finished()) == 5


def test_a_line_is_written_whole_where_the_system_takes_a_part_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = journal.CheckedJournal._writing

    class Slow:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

        def write(self, data: bytes) -> int:
            return int(self.stream.write(data[:7]))

    @contextmanager
    def slow(self: journal.CheckedJournal) -> Iterator[Any]:
        with real(self) as stream:
            yield Slow(stream)

    monkeypatch.setattr(journal.CheckedJournal, "_writing", slow)
    work(str(tmp_path / "study.journal"), "tpe", 3, 0.0)
    monkeypatch.undo()
    assert len(join(tmp_path / "study.journal").finished()) == 3


def test_half_a_line_of_a_killed_worker_spoils_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    me = join(path)
    run(me, 2)
    with path.open("ab") as stream:
        stream.write(b'{"op_code":5,"trial')  # another worker, killed while it wrote
    run(me, 4)
    assert len(me.finished()) == 4
    assert me.finished() == join(path).finished()


def test_nothing_is_cut_off_what_is_no_line_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    me = join(path)
    before = path.read_bytes() + b"somebody's notes"
    path.write_bytes(before)
    with pytest.raises(DataError, match="is not a study"):
        run(me, 1)
    assert path.read_bytes() == before


def test_a_writer_that_is_stopped_is_waited_for_and_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "STOPPED", 0.2)
    path = tmp_path / "study.journal"
    me = join(path)
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"locked: a worker was stopped.*continue with --resume"):
            run(me, 1)
    run(me, 1)
    assert len(me.finished()) == 1


def test_where_there_are_no_locks_the_lock_file_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(journal.fcntl, "flock", none)
    me = join(tmp_path / "study.journal")
    run(me, 2)
    assert len(me.finished()) == 2


def test_a_lock_that_is_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    """Optuna's lock would ask for its age for ever."""
    (tmp_path / "study.journal.lock").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"study\.journal\.lock is a link.*delete it"):
        join(tmp_path / "study.journal")


def test_a_foreign_exclusive_lock_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    me = Study(open_storage(f"sqlite:///{path}?timeout=0.01"), "test", "tpe", 7)
    me.fail_abandoned()
    code = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('begin exclusive'); print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(DataError, match=r"database is locked: another program has locked it; .*continue with --resume"):
        run(me, 2)
    holder.communicate("")
    me.close()
    again = join(path)
    run(again, 3)
    assert len(again.finished()) == 3


def test_a_killed_worker_leaves_a_study_that_others_go_on_with_at_once(tmp_path: Path) -> None:
    """SIGKILL in two process id namespaces, as of two containers with one host name; with one, where namespaces may not be made."""
    space = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*space, "true"], capture_output=True, check=False).returncode:
        space = []
    path, worker = tmp_path / "study.db", Path(__file__).with_name("study_worker.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [*space, sys.executable, str(worker), address(path), "tpe", "40", "300"]
    others = [subprocess.Popen(command, env=environment, start_new_session=True) for _ in range(2)]
    try:
        me = Study(open_storage(address(path)), "test", "tpe", 7)
        deadline = time.monotonic() + 240

        def signed() -> list[str]:
            trials = me.study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
            return [trial.user_attrs["worker"] for trial in trials if "worker" in trial.user_attrs]

        while len(signed()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert me.fail_abandoned() == 0
        assert len(set(signed())) == 2
        os.killpg(others[0].pid, signal.SIGKILL)
        others[0].wait()
        while me.fail_abandoned() == 0:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(signed()) == 1  # the other one is alive and left alone
    finally:
        for other in others:
            other.kill()
            other.wait()
