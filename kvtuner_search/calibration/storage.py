"""Where a study is stored: a journal file or a database that other processes may share, and the errors when it cannot be used."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from sqlalchemy import create_engine, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from kvtuner_search.calibration.journal import LOST, CheckedJournal
from kvtuner_search.errors import DataError, KVTunerError, UsageError, first_line
from kvtuner_search.files import FULL, make_room, unusual
from kvtuner_search.profile.text import printable

# Package names of database drivers whose module has another name.
PACKAGES: Final = {"MySQLdb": "mysqlclient", "psycopg2": "psycopg2-binary", "pymysql": "PyMySQL"}
TABLES: Final = frozenset({"studies", "trials", "version_info"})  # some of those that Optuna makes
TRIES: Final = 4  # at opening a database in which another worker makes the tables at this moment
WHAT_IS_KEPT: Final = "finished work is kept: continue with --resume"
_BEGIN: Final = "leave --resume out to begin one, or give the --storage and --study-name of the first run"
# What databases say of a file, tables or rows that somebody damaged, emptied or took away.
DAMAGE: Final = ("no such table", "malformed", "not a database", "no such column")


@dataclass(frozen=True)
class Store:
    """An open storage.

    Args:
        where: a path, or a URL with its credentials.
        backend: Optuna's storage.
        file: the journal or database where it is a file of this machine's file systems, else None.
    """

    where: str
    backend: BaseStorage
    file: Path | None
    inode: tuple[int, int] | None = None  # of the file, as it was opened

    @property
    def name(self) -> str:
        """The name used in messages, without credentials."""
        return hidden(self.where)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn any failure of the storage inside the block into one line.

        Raises:
            DataError: with the reason, and how to continue.
        """
        try:
            self._check_file()
            yield
            self._check_file()  # what was written to a file that nobody can open any more is lost
        except KVTunerError:
            raise
        except (OSError, SQLAlchemyError, optuna.exceptions.OptunaError, *_ODD) as error:
            self._check_file()
            raise DataError(
                f"cannot use the study {self.name}: {_reason(error, self.where)}: {_remedy(error, WHAT_IS_KEPT)}"
            ) from error

    def _check_file(self) -> None:
        """A file that was deleted or replaced stays open, and takes what nobody will read.

        Raises:
            DataError: if the file is not the one that was opened.
        """
        if self.file is None or self.inode is None:
            return
        try:
            status = self.file.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(
                f"cannot use the study {self.name}: it was deleted or moved while this run was at work: {LOST}"
            ) from error
        except OSError:
            return  # what is done with it next says why
        if (status.st_dev, status.st_ino) != self.inode:
            raise DataError(f"cannot use the study {self.name}: it was replaced while it was in use: {LOST}")
        if status.st_size == 0 and "://" in self.where:  # a journal may begin empty, and looks itself
            raise DataError(f"cannot use the study {self.name}: it was emptied while it was in use: {LOST}")


# Raised by Optuna for content that it did not write, a schema of another version, or a lost lock.
_ODD: Final = (KeyError, ValueError, TypeError, AssertionError, RuntimeError)


def hidden(where: str) -> str:
    """A storage's name without credentials: no user, password or values of a URL's query.

    Example:
        ``hidden("mysql://u:pw@host/db?ssl_key=k") == "mysql://***@host/db?***"``
    """
    scheme, there, rest = where.partition("://")
    if not there:
        return where
    credentials, at, rest = rest.rpartition("@")  # a password may hold any character
    shown = re.split("[?&;#]", rest)[0]
    return f"{scheme}://{'***' if credentials else ''}{at}{shown}{'?***' if shown != rest else ''}"


def open_storage(where: str, resumed: bool = False) -> Store:
    """A journal file (a path), or anything that Optuna takes as a storage URL.

    Args:
        resumed: a file must be there already, with a study's tables if it is a database.

    Raises:
        DataError: if the journal is damaged, the database cannot be opened, or belongs to another program.
        UsageError: if the folder does not exist or cannot be written to, or there is nothing to resume.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if "://" in where:
            file = _database_file(where)
            _refuse_unusual(where, file)
            if resumed and file is not None and not (file.exists() and _has_tables(where)):
                raise UsageError(f"{hidden(where)} holds no study to resume: {_BEGIN}")
            return _of_file(where, _open_database(where), file)
        if re.match(r"[A-Za-z][\w+.-]*:.*@", where):
            raise UsageError("--storage is neither a path nor a URL: write SCHEME://USER:PASSWORD@HOST/DATABASE")
        path = Path(where)
        _refuse_unusual(where, path)
        if resumed and not path.exists():
            raise UsageError(f"{where} holds no study to resume: {_BEGIN}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return _of_file(where, JournalStorage(CheckedJournal(path)), path)
    except OSError as error:
        if error.errno in FULL:
            raise DataError(
                f"cannot open the study {hidden(where)}: {_reason(error, where)}: {_remedy(error, '')}"
            ) from error
        raise UsageError(
            f"cannot open the study {hidden(where)}: {error.strerror or _one_line(error)}:"
            " choose a folder that can be written to"
        ) from error
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, *_ODD) as error:
        raise DataError(
            f"cannot open the study {hidden(where)}: {_reason(error, where)}:"
            f" {_remedy(error, 'check the address, or name another --storage')}"
        ) from error


def check_resumed(store: Store, name: str, none_will_do: bool) -> None:
    """Refuse to resume a study that is not there: a misspelt name or address would start another search unasked.

    Args:
        store: where it has to be.
        name: the study's.
        none_will_do: whether a storage without any study is one whose first run ended before it began.

    Raises:
        UsageError: names the studies that are there.
    """
    with store.guard():
        names = sorted(study.study_name for study in store.backend.get_all_studies())
    if name in names or (none_will_do and not names):
        return
    others = [f"{printable(other)[:60]!r}" for other in names if not other.endswith(("-agreed", "-random"))]
    has = f" (it has {', '.join(others[:5])}{', …' if len(others) > 5 else ''})" if others else ""
    raise UsageError(f"{store.name} holds no study {name!r} to resume{has}: {_BEGIN}")


def _refuse_unusual(where: str, file: Path | None) -> None:
    kind = unusual(file) if file is not None else None
    if kind is not None:
        raise UsageError(f"cannot open the study {hidden(where)}: it is {kind}: name a file")


def _of_file(where: str, backend: BaseStorage, file: Path | None) -> Store:
    status = file.stat() if file is not None else None
    return Store(where, backend, file, (status.st_dev, status.st_ino) if status is not None else None)


def _open_database(url: str) -> BaseStorage:
    """Optuna's storage for a URL. Tables are created only if the database has none from another program or another Optuna version.

    Raises:
        DataError: if the file is another program's database.
    """
    for attempt in range(TRIES):
        try:
            return optuna.storages.get_storage(RDBStorage(url, skip_table_creation=_has_tables(url)))
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            # Two workers that start together both create the tables: the second finds them when it tries again.
            text = _chain(error)
            if attempt == TRIES - 1 or not (
                "already exists" in text or "unique constraint" in text or "duplicate" in text
            ):
                raise
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError("unreachable")


def _has_tables(url: str) -> bool:
    """Whether Optuna has created all its tables; it would add those that another version lacks, and so break its upgrade."""
    try:
        engine = create_engine(url, poolclass=NullPool)
    except ImportError:
        return False  # Optuna says so
    try:
        tables = set(inspect(engine).get_table_names())
    finally:
        engine.dispose()
    file = _database_file(url)
    if file is not None and tables and not tables >= TABLES and not tables <= _optunas():
        raise DataError(
            f"cannot open the study {hidden(url)}: the file is another program's database"
            f" (its tables: {', '.join(sorted(tables)[:5])}): name another file"
        )
    return "alembic_version" in tables  # it is created last


def _optunas() -> set[str]:
    from optuna.storages._rdb.models import BaseModel

    return {*BaseModel.metadata.tables, "alembic_version"}


def _database_file(url: str) -> Path | None:
    """The file of an SQLite URL."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return None
    name = parsed.database
    if parsed.get_backend_name() != "sqlite" or not name or parsed.query.get("mode") == "memory":
        return None
    if name.startswith("file:"):
        name = unquote(re.sub("^file:(//[^/]*)?", "", name))
    return None if name in ("", ":memory:") else Path(name)


def _reason(error: BaseException, where: str) -> str:
    """The innermost reason in one line, without the credentials of ``where``."""
    missing = _missing_driver(error)
    if missing is not None:
        return f"the database driver {missing} is not installed"
    while isinstance(error, optuna.exceptions.OptunaError) and error.__cause__ is not None:
        error = error.__cause__  # Optuna's own words are of any failed commit
    if isinstance(error, KeyError):
        return "what was stored is not there any more"
    kind = type(error).__name__
    original = getattr(error, "orig", None)
    if isinstance(original, BaseException):
        error = original
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = _one_line(error)
    if "://" in where:  # a driver may quote the address that it was given, or the password alone
        for secret in sorted(_secrets(where), key=len, reverse=True):
            text = text.replace(secret, "***")
    return f"{kind}: {text}"


def _secrets(where: str) -> set[str]:
    """The credentials, the password alone, the values of the query, and their unquoted forms."""
    rest = where.partition("://")[2]
    credentials = rest.rpartition("@")[0]
    values = (part.partition("=")[2] for part in re.split("[?&;#]", rest)[1:])
    found = {where, credentials, credentials.partition(":")[2], *values}
    return {text for secret in found for text in (secret, unquote(secret)) if len(text) > 2}


def _missing_driver(error: BaseException | None) -> str | None:
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name
        error = error.__cause__ or error.__context__
    return None


def _remedy(error: BaseException, usual: str) -> str:
    missing = _missing_driver(error)
    if missing is not None:
        return f"pip install {PACKAGES.get(missing, missing)}"
    text = _chain(error)
    full = (isinstance(error, OSError) and error.errno in FULL) or "disk is full" in text
    if full:
        room = make_room(error.errno if isinstance(error, OSError) else None)
        return f"{room}; {usual}" if usual else room
    if "no longer compatible with the table schema" in text:
        return "name another --storage, or upgrade this one with `optuna storage upgrade`"
    if usual == WHAT_IS_KEPT and (isinstance(error, KeyError) or any(words in text for words in DAMAGE)):
        return LOST
    if "is locked" in text:
        return f"another program has locked it; {usual}"
    return usual


def _chain(error: BaseException | None) -> str:
    """The messages of an error and its causes."""
    texts = []
    while error is not None:
        texts.append(str(error).lower())
        error = error.__cause__
    return "\n".join(texts)


def _one_line(error: BaseException) -> str:
    return first_line(error).rstrip(".")
