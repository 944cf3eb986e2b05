"""One benchmark from beginning to end: a server, the cells that are missing, the record."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from kvtuner_search.addresses import check_url
from kvtuner_search.bench import files, floors, judge, load, slo
from kvtuner_search.bench.account import Account, SessionRecord, account_of
from kvtuner_search.bench.journal import REQUESTS, CellLog, RequestJournal
from kvtuner_search.bench.options import BenchOptions
from kvtuner_search.bench.record import Cell, Check, Environment, Record, Scrape, Violation
from kvtuner_search.bench.session import BenchServer, BenchSession, busiest, key_of
from kvtuner_search.bench.watch import merge
from kvtuner_search.errors import UsageError
from kvtuner_search.models.reference_model import REFERENCE_NAME, reference_model_path
from kvtuner_search.profile.canonical import load as load_profile
from kvtuner_search.profile.checks import check_model
from kvtuner_search.profile.schema import Profile
from kvtuner_search.progress import Reporter
from kvtuner_search.secrets import mask, mask_arguments
from kvtuner_search.servers.folder import RunFolder
from kvtuner_search.servers.host import processor, server_versions, tool
from kvtuner_search.servers.process import started_server
from kvtuner_search.serving.engine import engine

RECORD: Final = "record.json"
LOG: Final = "server.log"


class BenchRun:
    """A benchmark in a folder of its own.

    Raises:
        KVTunerError: if an input cannot be used, before anything is started.
    """

    def __init__(self, options: BenchOptions, reporter: Reporter) -> None:
        self.options, self.reporter = options, reporter
        self.model_path = str(reference_model_path()) if options.model == REFERENCE_NAME else options.model
        self.key = engine().api_key(options.api_key, options.server_arguments)
        self.url = None if options.url is None else check_url(options.url, self.key)
        if options.url is None and self.model_path is None:
            raise UsageError("no server and no model: give --url of a running server, or --model-path to start one")
        if options.cross_check:
            busiest(options.steps)
        self.profile: Profile | None = None
        if options.profile is not None:
            self.profile = load_profile(options.profile)
            if self.model_path is not None:
                check_model(self.profile, engine().served_model(self.model_path), str(options.model))
        settings = {
            "tool": tool(),
            "profile": self.profile.digest if self.profile else None,
            "model": options.model,
            "preset": options.preset,
            "cells": [key_of(step) for step in options.steps],
            "seed": options.seed,
            "server arguments": mask_arguments(options.server_arguments),
            "url": options.url and mask(options.url),
        }
        self.folder = RunFolder(
            options.folder,
            settings,
            resume=options.resume,
            overwrite=options.overwrite,
            journals=(REQUESTS,),
            results=(RECORD, LOG),
        )

    def measure(self) -> Record:
        """Measure what the folder does not have yet, judge it, and write the record.

        Raises:
            ServerError: if a server cannot be started or queried. Finished measurements are kept.
        """
        journal = RequestJournal(self.folder.path / REQUESTS)
        try:
            if not self._complete(journal):
                with self._server() as place:
                    BenchSession(self.options, self.profile, self.model_path, place, journal, self.reporter).measure()
            record = self._record(journal)
        finally:
            journal.close()
        files.write(record, self.folder.path / RECORD)
        return record

    def _complete(self, journal: RequestJournal) -> bool:
        """Whether a server that passed its checks has answered every cell."""
        contents = journal.contents
        if contents.server is None or not account_of(contents.server).correct:
            return False
        if self.options.cross_check and not any(found["cross_check"] for found in contents.sessions):
            return False
        logs = [contents.cells.get(key_of(step)) for step in self.options.steps]
        return all(log is not None and log.done for log in logs)

    @contextmanager
    def _server(self) -> Iterator[BenchServer]:
        """A server that is ready."""
        options = self.options
        if self.url is not None:
            yield BenchServer(self.url, key=self.key)
            return
        versions = server_versions(options.server_python)
        profile = None if options.profile is None else str(options.profile.resolve())
        arguments = engine().server_arguments(
            str(self.model_path), options.server_arguments, profile=profile, metrics=True
        )
        with started_server(options.server_python, arguments, self.folder.path / LOG) as server:
            with self.reporter.stage("start of the server"):
                asyncio.run(server.wait_until_ready(options.start_timeout))
            yield BenchServer(server.url, server, arguments, versions, self.key)

    def _record(self, journal: RequestJournal) -> Record:
        assert journal.contents.server is not None
        account = account_of(journal.contents.server)
        sessions = [SessionRecord.model_validate(found) for found in journal.contents.sessions]
        checks = account.checks + _last_of_each([check for session in sessions for check in session.checks])
        correct = all(check.passed for check in checks)
        scrapes: list[Scrape] = []
        for session in sessions:
            scrapes = merge(scrapes, session.scrapes)
        cells, violations = [], []
        if account.correct:
            for step in self.options.steps:
                log = journal.cells[key_of(step)]
                cell = self._cell(account, log, correct)
                cells.append(cell)
                violations += load.violations(cell.title, log.results) + leaks(cell)
                for remark in load.remarks(cell.title, log.results):
                    self.reporter.say(remark)
        record = Record(
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            command=self.options.command,
            preset=self.options.preset,
            environment=Environment(hardware=account.hardware, client=processor(), versions=account.versions),
            model=account.model,
            served=account.served,
            cache=account.cache,
            correctness=checks,
            cells=cells,
            scrapes=scrapes,
            cross_check={name: value for session in sessions for name, value in session.cross_check.items()},
            violations=violations,
        )
        # Both read the record, and the record is frozen.
        record = record.model_copy(update={"violations": violations + judge.judge(record)})
        return record.model_copy(update={"gates": slo.judge(self.options.objectives, record)})

    def _cell(self, account: Account, log: CellLog, correct: bool) -> Cell:
        """One cell with its floor; without speed if a check failed."""
        cell = load.summarise(log.section, log.shape, log.results)
        more: dict[str, object] = {"readings": log.readings}
        if log.readings:
            first, last = log.readings[0], log.readings[-1]
            for name in ("free_tokens", "device_bytes"):
                pair = getattr(first, name), getattr(last, name)
                more[name] = None if None in pair else pair
        if not correct:
            more["speed"] = None
        if account.hardware is not None:
            more["floor"] = floors.floor(
                account.model,
                account.served,
                account.cache,
                account.hardware,
                cell.shape,
                cell.cached_tokens,
                cell.succeeded or None,
            )
        return cell.model_copy(update=more)


def _last_of_each(checks: list[Check]) -> list[Check]:
    """One check of each name: the last, but a failure is never forgotten."""
    found: dict[str, Check] = {}
    for check in checks:
        if check.name not in found or found[check.name].passed:
            found[check.name] = check
    return list(found.values())


def leaks(cell: Cell) -> list[Violation]:
    """Slots of the cache that an idle server, its prefix cache flushed, has lost over the rounds of a memory cell."""
    if cell.free_tokens is None or cell.free_tokens[0] <= cell.free_tokens[1]:
        return []
    before, after = cell.free_tokens
    return [
        Violation(
            rule="leak",
            where=cell.title,
            figure=f"{before - after} of {before} free slots",
            reason="they were free before the rounds and are not after, with no request running and the prefix cache flushed:"
            " requests leak slots, or others use the server",
        )
    ]


def folder_of(options_profile: Path | None, model: str | None, preset: str) -> Path:
    """The default folder of a run."""
    name = options_profile.stem if options_profile else Path(model).name if model else "server"
    return Path("kvtuner-bench") / f"{name}-{preset}"
