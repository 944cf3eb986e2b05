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

from kvtuner_search.calibration.journal import CheckedJournal
from kvtuner_search.errors import DataError, KVTunerError, UsageError
from kvtuner_search.files import FULL

# Package names of database drivers whose module has another name.
PACKAGES: Final = {"MySQLdb": "mysqlclient", "psycopg2": "psycopg2-binary", "pymysql": "PyMySQL"}
TABLES: Final = frozenset({"studies", "trials", "version_info"})  # some of those that Optuna makes
TRIES: Final = 4  # to open a database while another worker creates its tables
WHAT_IS_KEPT: Final = "finished work is kept: continue with --resume"


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
            yield
        except KVTunerError:
            raise
        except (OSError, SQLAlchemyError, optuna.exceptions.OptunaError, *_ODD) as error:
            raise DataError(
                f"cannot use the study {self.name}: {_reason(error, self.where)}: {_remedy(error, WHAT_IS_KEPT)}"
            ) from error


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


def open_storage(where: str) -> Store:
    """A journal file (a path), or anything that Optuna takes as a storage URL.

    Raises:
        DataError: if the journal is damaged, the database cannot be opened, or belongs to another program.
        UsageError: if the folder does not exist or cannot be written to.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if "://" in where:
            return Store(where, _open_database(where), _database_file(where))
        if re.match(r"[A-Za-z][\w+.-]*:.*@", where):
            raise UsageError("--storage is neither a path nor a URL: write SCHEME://USER:PASSWORD@HOST/DATABASE")
        path = Path(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        return Store(where, JournalStorage(CheckedJournal(path)), path)
    except OSError as error:
        if error.errno in FULL:
            raise DataError(f"cannot open the study {where}: {_reason(error, where)}: {_remedy(error, '')}") from error
        raise UsageError(
            f"cannot open the study {hidden(where)}: {error.strerror or _one_line(error)}:"
            " choose a folder that can be written to"
        ) from error
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, *_ODD) as error:
        raise DataError(
            f"cannot open the study {hidden(where)}: {_reason(error, where)}:"
            f" {_remedy(error, 'check the address, or name another --storage')}"
        ) from error


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
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database == ":memory:":
        return None
    return None if parsed.database.startswith("file:") else Path(parsed.database)


def _reason(error: BaseException, where: str) -> str:
    """The innermost reason in one line, without the credentials of ``where``."""
    missing = _missing_driver(error)
    if missing is not None:
        return f"the database driver {missing} is not installed"
    while isinstance(error, optuna.exceptions.OptunaError) and error.__cause__ is not None:
        error = error.__cause__  # Optuna's own message fits any failed commit
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
        return f"make room on the disk; {usual}" if usual else "make room on the disk"
    if "no longer compatible with the table schema" in text:
        return "name another --storage, or upgrade this one with `optuna storage upgrade`"
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
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
