"""A session with one server: its description, its correctness, and the cells that the journal does not have yet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

from kvtuner_search import __version__
from kvtuner_search.bench import hardware, load
from kvtuner_search.bench.account import Account, SessionRecord, account_of, refuse_another
from kvtuner_search.bench.client import RequestResult
from kvtuner_search.bench.correctness import PROMPT_TOKENS, PROMPTS, check_answers, check_profile, check_totals
from kvtuner_search.bench.cross_check import cross_check
from kvtuner_search.bench.journal import RequestJournal, cell_key
from kvtuner_search.bench.options import BenchOptions
from kvtuner_search.bench.presets import CellPlan
from kvtuner_search.bench.prompts import draw
from kvtuner_search.bench.record import Check, Hardware
from kvtuner_search.bench.served import ServerDescription, describe
from kvtuner_search.bench.watch import Watch
from kvtuner_search.errors import UsageError
from kvtuner_search.profile.schema import Profile
from kvtuner_search.progress import Reporter
from kvtuner_search.servers.client import Client
from kvtuner_search.servers.interface import interface
from kvtuner_search.servers.process import Server
from kvtuner_search.serving.engine import engine

CROSS_CHECK_SECONDS: Final = 1800.0  # the engine's own client may always take this long
LEAST_ANSWER: Final = 6  # tokens
_LOCAL: Final = ("localhost", "127.0.0.1", "::1")
T = TypeVar("T")


@dataclass(frozen=True)
class BenchServer:
    """A server that answers."""

    url: str
    server: Server | None = None  # the process, if this run started it
    arguments: Sequence[str] = ()  # its arguments
    versions: dict[str, str] = field(
        default_factory=dict
    )  # of the packages in its environment; empty if it was given by its URL
    key: str | None = field(default=None, repr=False)  # sent as bearer token


class BenchSession:
    """Measure the missing cells.

    Args:
        options: of the run.
        profile: the profile that the server should have; None: any.
        model: folder or hub id of the model; None: as the server names it.
        place: the server.
        journal: records everything.
    """

    def __init__(
        self,
        options: BenchOptions,
        profile: Profile | None,
        model: str | None,
        place: BenchServer,
        journal: RequestJournal,
        reporter: Reporter,
    ) -> None:
        self.options, self.profile, self.model = options, profile, model
        self.url, self.server, self.key = place.url, place.server, place.key
        self.journal, self.reporter = journal, reporter
        self.target = describe(
            self._ask(lambda client: client.info()),
            self.url,
            model=model,
            profile=profile,
            started=self.server is not None,
            arguments=place.arguments,
        )
        if options.cross_check and model is None and not Path(self.target.facts.model).is_dir():
            raise UsageError(
                f"--cross-check: {engine().TITLE}'s client would fetch the tokenizer of {self.target.facts.model}, which {self.url} names: name the"
                " model with --model-path, or leave --cross-check out"
            )
        self._versions = {engine().NAME: self.target.served.version, **place.versions, "kvtuner-search": __version__}
        self._local = urlsplit(self.url).hostname in _LOCAL

    def measure(self) -> None:
        """Check the server, then measure the cells that are missing. Nothing is measured on a server that fails a check.

        Raises:
            ServerError: if it cannot be queried at all, or a server that was started here has ended.
            UsageError: if the preset does not fit it, or earlier answers came from another.
        """
        check_room(self.options.steps, self.target)
        account = Account(
            served=self.target.served,
            cache=self.target.cache,
            model=self.target.model,
            hardware=self._hardware(),
            versions=self._versions,
            checks=self._checks(),
        )
        if self.journal.contents.server is not None:
            refuse_another(account_of(self.journal.contents.server), account, self.options.folder)
        self.journal.identify(account.model_dump(mode="json"))
        if account.correct:
            self._cells()

    def _hardware(self) -> Hardware | None:
        """As given, or as found for a server on this machine."""
        count = self.target.devices
        if self.options.hardware is not None:
            return self.options.hardware.model_copy(update={"count": count})
        return hardware.detect(self.target.facts.device == "cpu", count) if self._local else None

    def _checks(self) -> list[Check]:
        prompts = draw(f"{self.options.seed}:checks", PROMPT_TOKENS, PROMPTS, self.target.model.vocabulary)
        with self.reporter.stage("correctness"):
            found = [check_profile(self.profile, self.target.facts)]
            model = self.target.model
            found += self._ask(lambda client: check_answers(client, prompts, model), model.vocabulary)
        return found

    def _cells(self) -> None:
        watch = Watch(
            self.url,
            self.target.facts,
            local=self._local,
            first_device=self.target.first_device,
            timeout=self.options.timeout,
            key=self.key,
        )
        generated = watch.generated()
        if watch.fault is not None:
            raise watch.fault
        returned, ratios = 0, {}
        try:
            with watch.scraping():
                for step in self.options.steps:
                    log = self.journal.cells.get(key_of(step))
                    if log is None or not log.done:
                        returned += self._cell(step, watch)
                if self.options.cross_check:
                    ratios = self._cross_check()
        finally:
            checks = check_totals(returned, generated, watch.generated())
            found = SessionRecord(checks=checks, scrapes=watch.scrapes(), cross_check=ratios)
            self.journal.session(found.model_dump(mode="json"))
        if watch.fault is not None:
            raise watch.fault

    def _cell(self, step: CellPlan, watch: Watch) -> int:
        """Measure one cell from its beginning; returns the tokens that came back."""
        key, shape = key_of(step), step.shape
        log = self.journal.begin(key, step.section, shape)
        prompts = self._prompts(step)
        send = partial(
            load.run_cell,
            self.url,
            concurrency=shape.concurrency,
            timeout=self.options.timeout,
            stall=self.options.stall,
            workers=self.options.workers,
            key=self.key,
            vocabulary=self.target.model.vocabulary,
        )
        with self.reporter.stage(title(step), shape.requests) as advance:
            if step.section == "memory":
                self._stress(step, prompts, send, watch, advance)
            else:
                self._flush()
                send(
                    prompts,
                    shape,
                    warmup=step.warmup,
                    rounds=step.rounds,
                    journal=partial(self.journal.result, key),
                    advance=advance,
                )
        if self.server is not None:
            self.server.check_alive()  # a cell spoiled by a crash is measured again
        self.journal.end(key)
        return sum(len(result.tokens) for result in log.results if not result.warmup)

    def _stress(
        self,
        step: CellPlan,
        prompts: Sequence[Sequence[int]],
        send: Callable[..., list[RequestResult]],
        watch: Watch,
        advance: Callable[[], None],
    ) -> None:
        """Rounds of prompts; before the first and after each the cache is flushed, and free slots and memory are read."""
        key, count = key_of(step), step.shape.requests // step.rounds
        warm, measured = prompts[: step.warmup], prompts[step.warmup :]
        # Sent before the first reading, because the first long prompt makes a server allocate some memory permanently.
        send(warm, step.shape.model_copy(update={"requests": step.warmup}))
        shape = step.shape.model_copy(update={"requests": count})
        for number in range(step.rounds + 1):
            self._flush()
            self.journal.reading(key, watch.reading())
            first = number * count
            if number == step.rounds:
                break

            def keep(result: RequestResult, number: int = number, first: int = first) -> None:
                self.journal.result(key, replace(result, round=number, index=first + result.index))

            send(measured[first : first + count], shape, journal=keep, advance=advance)

    def _cross_check(self) -> dict[str, float]:
        """The busiest throughput cell again, through the engine's own client: figure -> ours over theirs."""
        step = busiest(self.options.steps)
        cell = load.summarise(step.section, step.shape, self.journal.cells[key_of(step)].results)
        with self.reporter.stage(f"{engine().TITLE}'s own client"):
            return cross_check(
                self.options.server_python,
                self.url,
                self.model or self.target.facts.model,
                self._prompts(step)[step.warmup :],
                cell,
                max(self.options.timeout, CROSS_CHECK_SECONDS),
                **({} if self.key is None else {"key": self.key}),
            )

    def _prompts(self, step: CellPlan) -> list[list[int]]:
        """Token ids of a cell, the warm-up's first."""
        count = step.warmup + step.shape.requests
        seed = f"{self.options.seed}:{key_of(step)}"
        return draw(seed, step.shape.input_tokens, count, self.target.model.vocabulary)

    def _ask(self, question: Callable[[Client], Awaitable[T]], vocabulary: int | None = None) -> T:
        async def asked() -> T:
            async with interface().client(self.url, self.options.timeout, self.key, vocabulary) as client:
                return await question(client)

        return asyncio.run(asked())

    def _flush(self) -> None:
        self._ask(lambda client: client.flush())


def key_of(step: CellPlan) -> str:
    """The journal's name of a step's cell."""
    return cell_key(step.section, step.shape)


def busiest(steps: Sequence[CellPlan]) -> CellPlan:
    """The throughput cell with the most requests at a time.

    Raises:
        UsageError: if there is none.
    """
    found = [step for step in steps if step.section == "throughput"]
    if not found:
        raise UsageError("--cross-check needs a throughput cell: add --section throughput, or leave it out")
    return max(found, key=lambda step: step.shape.concurrency)


def title(step: CellPlan) -> str:
    """A step for progress."""
    shape = step.shape
    return f"{step.section} {shape.input_tokens} in {shape.output_tokens} out x{shape.concurrency}"


def check_room(steps: Sequence[CellPlan], target: ServerDescription) -> None:
    """Refuse cells whose prompt and answer do not fit into the model's context or the cache.

    Raises:
        UsageError: names the longest.
    """
    longest = max(steps, key=_tokens)
    wanted = _tokens(longest)
    if wanted > target.longest:
        raise UsageError(
            f"the {longest.section} cell of {longest.shape.input_tokens} tokens in, {longest.shape.output_tokens} out does not"
            f" fit: the server takes {target.longest} tokens; choose tables with --section, another preset, or serve with more"
        )


def _tokens(step: CellPlan) -> int:
    """Most tokens of a sequence; a server may refuse a prompt that leaves no room for a handful of tokens, as SGLang does."""
    return step.shape.input_tokens + max(step.shape.output_tokens, LEAST_ANSWER)
