"""Storages that lock, vanish, fill up, are damaged or belong to somebody else: one line, no credentials, and nothing of theirs is touched."""

import errno
import os
import sqlite3
import sys
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import OperationalError
from study_worker import main as work
from test_space import make_space

from kvtuner_search.calibration import storage
from kvtuner_search.calibration.storage import check_resumed, hidden, open_storage
from kvtuner_search.calibration.study import Study
from kvtuner_search.calibration.trials import Anchor
from kvtuner_search.errors import DataError, KVTunerError, UsageError


def open_study(where: str) -> Study:
    return Study(open_storage(where), "test", "tpe", 7)


@pytest.mark.parametrize(
    ("where", "shown"),
    [
        ("mysql://u:secret@host:3999/db", "mysql://***@host:3999/db"),
        ("mysql://secret@host/db", "mysql://***@host/db"),
        ("postgresql://u:sec@ret@host/db", "postgresql://***@host/db"),
        ("postgresql://u:sec?r/et#@host/db", "postgresql://***@host/db"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db?***"),
        ("postgresql://host/db?user=me@corp&password=secret", "postgresql://***@corp?***"),
        ("sqlite:////tmp/study.db", "sqlite:////tmp/study.db"),
        ("runs/study.journal", "runs/study.journal"),
    ],
)
def test_a_storage_is_shown_without_credentials(where: str, shown: str) -> None:
    assert hidden(where) == shown


@pytest.mark.parametrize("where", ["{}/none.journal", "sqlite:///{}/none.db", "sqlite:///{}/empty.db"])
def test_there_is_nothing_to_resume_in_a_file_that_is_not_there_and_none_is_made(where: str, tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    with pytest.raises(UsageError, match="holds no study to resume: leave --resume out to begin one, or give the --st"):
        open_storage(where.format(tmp_path), resumed=True)
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("where", ["{}/study.journal", "sqlite:///{}/study.db", "sqlite://"])
def test_a_study_of_another_name_is_not_resumed(where: str, tmp_path: Path) -> None:
    store = open_storage(where.format(tmp_path))
    check_resumed(store, "mine", none_will_do=True)
    with pytest.raises(UsageError, match="holds no study 'mine' to resume: leave --resume out"):
        check_resumed(store, "mine", none_will_do=False)
    Study(store, "theirs\x1b[2J", "tpe", 0).close()
    for none_will_do in (True, False):
        with pytest.raises(UsageError, match=r"no study 'mine' to resume \(it has 'theirs.\[2J'\): leave") as caught:
            check_resumed(store, "mine", none_will_do=none_will_do)
        assert "\x1b" not in str(caught.value)
    Study(store, "mine", "tpe", 0).close()
    check_resumed(store, "mine", none_will_do=False)


@pytest.mark.parametrize(
    ("url", "module", "package"),
    [
        ("mysql://u:secret@127.0.0.1:3999/db", "MySQLdb", "mysqlclient"),
        ("mysql+pymysql://u:secret@127.0.0.1:3999/db", "pymysql", "PyMySQL"),
        ("postgresql+psycopg2://u:secret@127.0.0.1:1/db?options=secret", "psycopg2", "psycopg2-binary"),
    ],
)
def test_the_missing_driver_is_named_and_the_password_is_not(
    url: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=f"{module} is not installed: pip install {package}$") as raised:
        open_storage(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("said", ["no access for 'hush123'", "cannot reach mysql://u:h%75sh123@h/db", "tls key s3cr3t"])
def test_a_driver_that_repeats_the_password_is_not_repeated(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OperationalError("select 1", {}, Exception(said))

    monkeypatch.setattr(storage, "RDBStorage", fail)
    monkeypatch.setattr(storage, "_has_tables", lambda _: False)
    with pytest.raises(DataError, match="cannot open the study") as raised:
        open_storage("mysql://u:h%75sh123@h/db?key=s3cr3t")
    assert not [word for word in ("hush123", "h%75sh123", "s3cr3t") if word in str(raised.value)]


@pytest.mark.parametrize(
    "where", ["nosuch://u:secret@h/db", "redis://:secret@h", "mysql:u:secret@h", "sqlite:////no/x.db"]
)
def test_an_address_that_cannot_be_used_is_one_line(where: str) -> None:
    with pytest.raises(KVTunerError) as raised:
        open_storage(where)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_database_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table bookmarks (id integer, url text)")
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"another program's database .its tables: bookmarks.*name another file"):
        open_storage(f"sqlite:///{path}")
    assert path.read_bytes() == before
    path.write_bytes(b"no database at all, " * 99)
    with pytest.raises(DataError, match="not a database"):
        open_storage(f"sqlite:///{path}")
    assert path.read_bytes() == b"no database at all, " * 99


def test_a_database_of_an_older_optuna_is_named_and_its_tables_are_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/old.db"
    optuna.create_study(storage=url)
    with sqlite3.connect(tmp_path / "old.db") as connection:
        connection.execute("update alembic_version set version_num = 'v1.3.0.a'")
        connection.execute("drop table trial_heartbeats")
    with pytest.raises(DataError, match=r"no longer compatible.*optuna storage upgrade") as raised:
        open_storage(url)
    assert "\n" not in str(raised.value)
    with sqlite3.connect(tmp_path / "old.db") as connection:
        assert not list(connection.execute("select 1 from sqlite_master where name = 'trial_heartbeats'"))


def test_tables_that_another_worker_makes_at_the_same_time_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = storage.RDBStorage, []

    def racing(*arguments: object, **named: object) -> object:
        calls.append(named)
        if len(calls) == 1:
            raise OperationalError("create table studies", {}, Exception("table studies already exists"))
        return real(*arguments, **named)

    monkeypatch.setattr(storage, "RDBStorage", racing)
    assert open_study(f"sqlite:///{tmp_path}/new.db").finished() == []
    assert len(calls) == 2


def test_a_database_that_is_locked_says_how_to_go_on(tmp_path: Path) -> None:
    study = open_study(f"sqlite:///{tmp_path}/study.db?timeout=0.01")
    study.enqueue(make_space(2), [Anchor("proxy", (1, 1))])
    holder = sqlite3.connect(tmp_path / "study.db")
    holder.execute("begin exclusive")
    with pytest.raises(DataError, match=r"database is locked.*continue with --resume") as raised:
        study.finished()
    assert "\n" not in str(raised.value)
    holder.close()
    assert study.finished() == []


def test_a_full_disk_is_one_line_and_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(str(tmp_path / "study.journal"))
    before = (tmp_path / "study.journal").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"No space left on device: make room on the disk; .*--resume"):
            study.enqueue(make_space(2), [Anchor("proxy", (1, 1))])
    assert (tmp_path / "study.journal").read_bytes() == before
    study.enqueue(make_space(2), [Anchor("proxy", (1, 1))])
    assert len(open_study(str(tmp_path / "study.journal")).study.get_trials()) == 1


def damaged(lines: list[bytes], how: str) -> list[bytes]:
    at = next(i for i, line in enumerate(lines) if b'"rungs"' in line)
    if how == "digit":
        start = lines[at].index(b'"rungs"')
        place = next(i for i in range(start, len(lines[at])) if chr(lines[at][i]).isdigit())
        digit = b"%d" % ((lines[at][place] - ord("0") + 1) % 10)
        return [*lines[:at], lines[at][:place] + digit + lines[at][place + 1 :], *lines[at + 1 :]]
    if how == "lost":
        return lines[:at] + lines[at + 1 :]
    if how == "twice":
        return [*lines[: at + 1], *lines[at:]]
    if how == "checksum":
        return [*lines[:at], lines[at][:-5] + bytes([lines[at][-5] ^ 1]) + lines[at][-4:], *lines[at + 1 :]]
    assert how == "swapped"
    return [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]]


@pytest.mark.parametrize("how", ["digit", "lost", "twice", "checksum", "swapped"])
def test_a_line_that_was_changed_is_noticed(how: str, tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    work(str(path), "tpe", 3, 0.0)
    lines = path.read_bytes().splitlines(keepends=True)
    changed = damaged(lines, how)
    path.write_bytes(b"".join(changed))
    number = next(i for i, line in enumerate(changed) if line != lines[i]) + 1
    with pytest.raises(DataError, match=rf"study\.journal: line {number} "):
        open_study(str(path))
    assert path.read_bytes() == b"".join(changed)


@pytest.mark.parametrize(
    "content", [b"notes of mine\nwithout an end", b"notes of mine", b'{"a": 1}\n{"a"', b"\x00\x01\n\xff", b"[1]\n2"]
)
def test_a_file_of_another_program_is_left_as_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"notes\.txt.*name another file"):
        open_storage(str(path))
    assert path.read_bytes() == content


def test_a_journal_without_checksums_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.journal"
    optuna.create_study(storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))))
    before = path.read_bytes()
    with pytest.raises(DataError, match="line 1 has no checksum"):
        open_storage(str(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["trials", "attributes", "objectives"])
def test_a_study_of_that_name_by_another_program_is_left_alone(kind: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    theirs = optuna.create_study(
        storage=url, study_name="test", directions=["minimize"] * (2 if kind == "objectives" else 1)
    )
    if kind == "trials":
        theirs.ask()
    if kind == "attributes":
        theirs.set_user_attr("owner", "somebody")
    before = (theirs.get_trials(), theirs.user_attrs)
    with pytest.raises(DataError, match=r"'test' in .* belongs to another program.*choose another --study-name"):
        open_study(url)
    theirs = optuna.load_study(storage=url, study_name="test")
    assert (theirs.get_trials(), theirs.user_attrs) == before


def test_an_empty_study_that_was_made_beforehand_is_used(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    optuna.create_study(storage=url, study_name="test")
    assert open_study(url).finished() == []


def test_a_folder_that_cannot_be_made_is_a_matter_of_usage() -> None:
    with pytest.raises(UsageError, match="cannot open the study"):
        open_storage("/dev/null/study.journal")
