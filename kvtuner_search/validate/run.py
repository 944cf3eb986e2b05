"""One validation from beginning to end: prompts, two servers one after the other, the offline evaluation, the block."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from kvtuner_search.addresses import check_url
from kvtuner_search.data import Split
from kvtuner_search.errors import DataError, UsageError, first_line
from kvtuner_search.evaluation.offline import open_profile
from kvtuner_search.evaluation.stored import stored_cache
from kvtuner_search.files import write_atomic
from kvtuner_search.models.load import ModelOptions, load_model
from kvtuner_search.models.reference_model import REFERENCE_NAME, reference_model_path
from kvtuner_search.models.source import TOKENIZERS, check_length, check_pointers, has_tokenizer, local_folder
from kvtuner_search.profile.canonical import canonical_json, digest_without_validation, save, seal
from kvtuner_search.profile.checks import check_model
from kvtuner_search.profile.fields import MAX_NOTES
from kvtuner_search.profile.model_config import text_config
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.text import bounded
from kvtuner_search.profile.validation import Semantics, ServerRecord, Validation
from kvtuner_search.progress import Reporter
from kvtuner_search.secrets import mask, mask_arguments
from kvtuner_search.servers.facts import Facts, check_alike
from kvtuner_search.servers.folder import BLOCK, AnswerJournal, RunFolder
from kvtuner_search.servers.host import hardware, offline_versions, server_versions, tool
from kvtuner_search.servers.interface import interface
from kvtuner_search.servers.process import Server, started_server
from kvtuner_search.serving.engine import engine
from kvtuner_search.validate import figures
from kvtuner_search.validate.explained import Explained, ExplainedSide, notes_on_rounding
from kvtuner_search.validate.judge import judge
from kvtuner_search.validate.measure import MeasurementPlan, Method, ServerAnswers, ask, outcome
from kvtuner_search.validate.options import ValidationOptions
from kvtuner_search.validate.prompts import build, cut_short, notes_on_data, right

_OWN: Final = ("profile", "url", "baseline url")  # settings that the stock server's answers do not depend on
_VARYING: Final = ("tokens", "cache_gib")  # may differ between two starts of the same server


@dataclass(frozen=True)
class _Side:
    """One of the two servers, and its answers."""

    facts: Facts
    versions: dict[str, str]
    outcome: ServerAnswers
    method: Method


class ValidationRun:
    """The parts of a validation that both servers share.

    Raises:
        KVTunerError: if an input cannot be used, before anything is started.
    """

    def __init__(self, options: ValidationOptions, reporter: Reporter) -> None:
        self.options, self.reporter = options, reporter
        self.model_path = str(reference_model_path()) if options.model == REFERENCE_NAME else options.model
        self.key = engine().api_key(options.api_key, options.server_arguments)
        self.urls = {
            name: None if url is None else check_url(url, self.key)
            for name, url in (("profile", options.url), ("baseline", options.baseline_url))
        }
        self.profile, self.centres = open_profile(options.profile)
        check_model(self.profile, engine().served_model(self.model_path), options.model)
        for note in check_length(engine().served_config(self.model_path), options.length, options.model):
            reporter.say(note)
        self.vocabulary = _vocabulary(self.model_path)
        self.tokenizer, self.config_dtype = _tokenizer(self.model_path)
        with reporter.stage("prompts"):
            self.prompts = build(
                self.tokenizer,
                sources=options.sources,
                samples=options.samples,
                length=options.length,
                tasks=options.tasks,
                task_prompts=options.task_prompts,
                greedy_prompts=options.greedy_prompts,
                seed=options.seed,
            )
        settings = {
            "tool": tool(),
            "profile": self.profile.digest,
            "prompts": self.prompts.digest,
            "greedy tokens": options.greedy_tokens,
            "server arguments": mask_arguments(options.server_arguments),
            "url": options.url and mask(options.url),
            "baseline url": options.baseline_url and mask(options.baseline_url),
        }
        self.folder = RunFolder(options.folder, settings, resume=options.resume, overwrite=options.overwrite)
        if options.baseline_from is not None:
            self.folder.borrow("baseline", options.baseline_from, [name for name in settings if name not in _OWN])

    def validate(self) -> Validation:
        """Measure what the folder does not have yet, and judge it."""
        options = self.options
        baseline = self._side("baseline", self.urls["baseline"], None)
        ours = self._side("profile", self.urls["profile"], baseline.facts)
        compared = options.offline and ours.facts.quantization is None
        block = self._block(ours, baseline, self._explained(ours, baseline) if compared else None)
        write_atomic(self.folder.path / BLOCK, canonical_json(block.model_dump(mode="json")))
        return block

    def _side(self, name: str, url: str | None, baseline: Facts | None) -> _Side:
        """One server's answers: those in the folder, and the missing ones from the server."""
        journal = self.folder.journal(name)
        try:
            if journal.server is None or not self._complete(journal, name):
                versions = {} if url is not None else server_versions(self.options.server_python)
                with self._server(name, url) as (address, server):
                    asyncio.run(self._measure(name, address, server, journal, versions, baseline))
            assert journal.server is not None
            facts = Facts(**journal.server["facts"])
            plan = self._plan(name, facts, None)
            return _Side(facts, journal.server["versions"], outcome(plan, journal), plan.method)
        finally:
            journal.close()

    def _complete(self, journal: AnswerJournal, name: str) -> bool:
        assert journal.server is not None
        return len(journal.done) == self._plan(name, Facts(**journal.server["facts"]), None).requests

    @contextmanager
    def _server(self, name: str, url: str | None) -> Iterator[tuple[str, Server | None]]:
        if url is not None:
            yield url, None
            return
        profile = str(self.options.profile.resolve()) if name == "profile" else None
        arguments = engine().server_arguments(
            self.model_path, self.options.server_arguments, profile=profile, as_stored=profile is not None
        )
        with started_server(self.options.server_python, arguments, self.folder.path / f"{name}.log") as server:
            with self.reporter.stage(f"start of the {name} server"):
                asyncio.run(server.wait_until_ready(self.options.start_timeout))
            yield server.url, server

    async def _measure(
        self,
        name: str,
        url: str,
        server: Server | None,
        journal: AnswerJournal,
        versions: dict[str, str],
        baseline: Facts | None,
    ) -> None:
        async with interface().client(url, self.options.timeout, self.key, self.vocabulary) as client:
            facts = (await client.info()).facts
            if baseline is None:
                facts.check_stock(url)
            else:
                facts.check_profile(self.profile, url)
                check_alike(baseline, facts)
            plan = self._plan(name, facts, server)
            if server is None:
                versions = {engine().NAME: facts.version}  # all that a server tells
            _identify(journal, facts, versions)
            with self.reporter.stage(f"{name} server", plan.requests) as advance:
                advance(len(journal.done))
                await ask(client, plan, journal, advance)

    def _plan(self, name: str, facts: Facts, server: Server | None) -> MeasurementPlan:
        return MeasurementPlan(
            prompts=self.prompts,
            method="decode" if name == "baseline" else scoring_method(self.profile, facts),
            greedy_tokens=self.options.greedy_tokens,
            concurrency=self.options.concurrency,
            alive=(lambda: None) if server is None else server.check_alive,
            vocabulary=self.vocabulary,
        )

    def _explained(self, ours: _Side, baseline: _Side) -> Explained:
        """The same tokens through the offline evaluation: does the server compute what calibration measured?"""
        from kvtuner_search.models.runner import Runner
        from kvtuner_search.validate.twice import compute

        dtype = interface().resolve_dtype(ours.facts.dtype, self.config_dtype)
        with self.reporter.stage("load the model"):
            loaded = load_model(ModelOptions(source=self.options.model, dtype=dtype, device=self.options.device))
            runner = Runner(loaded)
        split, greedy = self.prompts.split, self.prompts.greedy
        sides = []
        stored = stored_cache(tuple(self.profile.layer_specs()), self.centres)
        for name, server, tap in (("profile", ours.outcome, stored), ("16 bit", baseline.outcome, None)):
            total = 2 * (split.tokens + sum(map(len, (*greedy, *server.continuations))))
            with self.reporter.stage(f"offline, {name}", total) as advance:
                found = compute(
                    runner,
                    tap,
                    split,
                    greedy,
                    server.continuations,
                    batch_tokens=self.options.batch_tokens,
                    as_stored=ours.method != "token-by-token",
                    advance=advance,
                )
            sides.append(ExplainedSide(server, found))
        return Explained(*sides)

    def _block(self, ours: _Side, baseline: _Side, explained: Explained | None) -> Validation:
        options, facts, prompts = self.options, ours.facts, self.prompts
        likelihood = figures.likelihood(prompts.split, ours.outcome.nll, baseline.outcome.nll)
        answers = [
            [right(p, self._text(tokens)) for p, tokens in zip(prompts.tasks, side.outcome.task_tokens, strict=True)]
            for side in (ours, baseline)
        ]
        tasks = figures.task_results(prompts.tasks, *answers)
        greedy = figures.greedy_agreement(ours.outcome.continuations, baseline.outcome.continuations)
        capacity = figures.capacity(self.profile, facts, baseline.facts)
        semantics = Semantics(
            method=ours.method,
            tokens=sum(len(part) for part in ours.outcome.rescored),
            difference=ours.outcome.path_difference(),
            baseline_difference=baseline.outcome.path_difference(),
        )
        checks = judge(options.limits, likelihood, tasks, greedy, capacity, semantics, explained)
        if not checks:
            raise UsageError("every threshold is none, so there is nothing to judge: set one")
        return Validation(
            profile_digest=digest_without_validation(self.profile),
            verdict="pass" if all(check.passed for check in checks) else "fail",
            checks=checks,
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            tool=tool(),
            command=options.command,
            server=ServerRecord(
                version=facts.version,
                started=options.url is None,
                attention_backend=facts.attention_backend,
                dtype=interface().resolve_dtype(facts.dtype, self.config_dtype),
                tensor_parallel=facts.tensor_parallel,
                pipeline_parallel=facts.pipeline_parallel,
                page_size=facts.page_size,
            ),
            versions=ours.versions | (offline_versions() if explained is not None else {}),
            hardware=hardware(facts, options.url, options.hardware),
            semantics=semantics,
            likelihood=likelihood,
            tasks=tasks,
            greedy=greedy,
            capacity=capacity,
            offline=[] if explained is None else explained.rows(),
            data=prompts.data(),
            notes=bounded(
                [
                    *self._notes(ours, baseline, prompts.split),
                    *([] if explained is None else notes_on_rounding(explained)),
                ],
                MAX_NOTES,
            ),
        )

    def _notes(self, ours: _Side, baseline: _Side, split: Split) -> list[str]:
        notes = notes_on_data(self.profile, split)
        if self.options.model == REFERENCE_NAME:
            notes.append("measured on the embedded reference model, a 13.9 M-parameter test instrument")
        if self.options.offline and ours.facts.quantization is not None:
            notes.append(
                f"not compared with the offline evaluation: the weights are quantized ({ours.facts.quantization})"
            )
        if self.options.url is not None and Path(ours.facts.model).name != Path(self.model_path).name:
            notes.append(f"the server calls its model {Path(ours.facts.model).name}")
        if ours.facts.attention_backend != baseline.facts.attention_backend:
            notes.append(f"the stock server's attention backend was {baseline.facts.attention_backend}")
        if self.options.baseline_from is not None:
            notes.append("the stock server's answers are those of an earlier run with the same prompts and options")
        for side, name in ((baseline, "stock"), (ours, "profile's")):
            notes += cut_short(name, self.prompts.tasks, side.outcome.task_tokens)
            if side.outcome.failures:
                notes.append(f"{len(side.outcome.failures)} requests to the {name} server failed and were repeated")
        return notes

    def _text(self, tokens: tuple[int, ...]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def write_block(profile: Profile, block: Validation, path: Path) -> None:
    """Write the profile with the block, in its canonical form; the digest changes, ``block.profile_digest`` keeps the old one."""
    content = profile.model_dump(mode="json", exclude={"digest"})
    save(seal(content | {"validation": block.model_dump(mode="json")}), path)


def scoring_method(profile: Profile, facts: Facts) -> Method:
    """How this server can score a sequence so that attention reads cached rows as stored.

    Raises:
        UsageError: if it cannot.
    """
    if all(spec.key.raw and spec.value.raw for spec in profile.layer_specs()):
        return "decode"  # the cache stores exactly what extend reads
    if facts.as_stored:
        return "as-stored-extend"
    if facts.prefix_cache and facts.page_size == 1:
        return "token-by-token"
    raise UsageError(
        f"the server reads a prompt's own keys unquantized, and cannot be scored token by token (page size {facts.page_size},"
        f" prefix cache {'on' if facts.prefix_cache else 'off'}): start it with {engine().AS_STORED}"
    )


def _identify(journal: AnswerJournal, facts: Facts, versions: dict[str, str]) -> None:
    """Record which server answers; answers of different servers are never mixed.

    Raises:
        UsageError: if earlier answers came from another server.
    """
    found: dict[str, Any] = {"facts": asdict(facts), "versions": versions}
    if journal.server is not None:
        before, now = journal.server["facts"], found["facts"]
        differing = [name for name in now if name not in _VARYING and before.get(name) != now[name]]
        if differing or journal.server["versions"] != versions:
            what = ", ".join(differing) or "package versions"
            raise UsageError(
                f"{journal.path} has answers of a server with other {what}: use --overwrite or another folder"
            )
    journal.identify(found)


def _vocabulary(model_path: str) -> int | None:
    """Ids of the model's embedding; None where its config.json does not say."""
    found = text_config(engine().served_config(model_path)).get("vocab_size")
    return found if type(found) is int and found > 0 else None


def _tokenizer(model_path: str) -> tuple[Any, str]:
    """The model's tokenizer, and the dtype that its config names.

    Raises:
        DataError: if there is none.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = local_folder(model_path)
    if folder is not None:
        check_pointers(folder)
        if not has_tokenizer(folder):
            raise DataError(f"model folder {model_path} has no tokenizer ({', '.join(TOKENIZERS)}): copy it there")
    try:
        dtype = AutoConfig.from_pretrained(model_path).dtype
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        first = first_line(error)
        raise DataError(
            f"cannot load the tokenizer of {model_path}: {first}: give a folder or hub id that has one"
        ) from error
    return tokenizer, str(dtype or "float32").removeprefix("torch.")
