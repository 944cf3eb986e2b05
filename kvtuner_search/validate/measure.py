"""Send all requests to one server, keep every response, and extract the raw data of the figures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from kvtuner_search.data import Sample
from kvtuner_search.servers.client import Answer, Client, Request
from kvtuner_search.servers.folder import AnswerJournal
from kvtuner_search.servers.interface import interface
from kvtuner_search.servers.transport import OutOfTimeError, ServerError
from kvtuner_search.serving.engine import engine
from kvtuner_search.validate.prompts import Prompts, TaskPrompt

Method = Literal["as-stored-extend", "token-by-token", "decode"]
ATTEMPTS: Final = 3  # of one request, before the run ends with the reason, or fewer where its time is over
_PAUSE: Final = (
    1.0  # seconds before the second attempt, twice that before the third, but no more than a quarter of what is left
)


@dataclass(frozen=True)
class ServerAnswers:
    """One server's answers, in the order of the prompts."""

    scored: list[NDArray[np.float64]]  # log-probabilities of the scored tokens, a sample each
    task_tokens: list[tuple[int, ...]]  # generated, a prompt each
    continuations: list[tuple[int, ...]]  # greedy
    decoded: list[NDArray[np.float64]]  # log-probabilities of the continuations' tokens, by decode
    rescored: list[NDArray[np.float64]]  # the same tokens scored as part of a prompt; empty if they were not rescored
    failures: list[str]  # attempts that failed before one succeeded

    @property
    def nll(self) -> NDArray[np.float64]:
        """[samples]: sum of negative log-likelihoods of the scored tokens, nats."""
        return np.array([-float(part.sum()) for part in self.scored])

    def path_difference(self) -> float | None:
        """Mean absolute difference of ``decoded`` and ``rescored``, nats a token."""
        if not self.rescored:
            return None
        return float(np.abs(np.concatenate(self.decoded) - np.concatenate(self.rescored)).mean())


@dataclass(frozen=True)
class MeasurementPlan:
    """The requests to one server, and how to send them."""

    prompts: Prompts
    method: Method
    greedy_tokens: int
    concurrency: int
    alive: Callable[[], None] = lambda: None  # raises ServerError if a server that was started here has ended
    vocabulary: int | None = None  # ids of the model's embedding; None: not known

    @property
    def requests(self) -> int:
        """Number of requests in the whole run; a sequence that is scored token by token counts once."""
        again = 0 if self.method == "token-by-token" else len(self.prompts.greedy)
        return len(self.prompts.split.samples) + len(self.prompts.tasks) + len(self.prompts.greedy) + again


def _score(sample: Sample) -> Request:
    return Request(sample.tokens, logprob_start=sample.scored[0][0] - 1)


def _task(prompt: TaskPrompt) -> Request:
    return Request(prompt.tokens, prompt.max_new_tokens, exact_length=False, stop=prompt.stop)


def _greedy(prompt: tuple[int, ...], count: int) -> Request:
    return Request(prompt, count, output_logprobs=True)


def _again(prompt: tuple[int, ...], continuation: tuple[int, ...]) -> Request:
    return Request(prompt + continuation, logprob_start=len(prompt) - 1)


async def ask(client: Client, plan: MeasurementPlan, journal: AnswerJournal, advance: Callable[..., None]) -> None:
    """Send the requests that the journal does not have yet, phase by phase, with the prefix cache emptied before each.

    Raises:
        ServerError: if a request failed ATTEMPTS times, or the server ended; the journal has all answers so far.
    """
    prompts = plan.prompts
    score = _step_by_step if plan.method == "token-by-token" else _score_at_once
    greedy = [_greedy(prompt, plan.greedy_tokens) for prompt in prompts.greedy]

    async def part(name: str, jobs: Iterable[Job]) -> None:
        advance(0, name)
        await client.flush()
        await _all(client, plan, journal, advance, [(f"{name}/{i}", job) for i, job in enumerate(jobs)])

    await part("nll", [score(client, sample) for sample in prompts.split.samples])
    await part("task", [_single(client, _task(prompt)) for prompt in prompts.tasks])
    await part("greedy", [_single(client, request) for request in greedy])
    if plan.method != "token-by-token":
        answers = [_answer(plan, journal, f"greedy/{i}", request) for i, request in enumerate(greedy)]
        pairs = zip(prompts.greedy, answers, strict=True)
        await part("again", [_single(client, _again(prompt, answer.output_ids)) for prompt, answer in pairs])


class Allowance:
    """The time that all attempts at one request have together, pauses included, so that a silent server is named within ``--timeout``.

    A job may be many requests: those that succeed take nothing off.
    """

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    async def generate(self, client: Client, request: Request) -> tuple[Answer, Any]:
        """``client.generate`` in the time that is left."""
        started = time.monotonic()
        try:
            return await client.generate(request, self.left)
        except ServerError:
            self.left -= time.monotonic() - started
            raise

    async def pause(self, seconds: float) -> None:
        """Wait before another attempt, which keeps most of the time."""
        seconds = min(seconds, self.left / 4)
        self.left -= seconds
        await asyncio.sleep(seconds)


Job = Callable[[Allowance], Awaitable[list[Any]]]  # returns the responses as received, each checked


def _single(client: Client, request: Request) -> Job:
    async def job(allowance: Allowance) -> list[Any]:
        return [(await allowance.generate(client, request))[1]]

    return job


def _score_at_once(client: Client, sample: Sample) -> Job:
    return _single(client, _score(sample))


def _step_by_step(client: Client, sample: Sample) -> Job:
    """Each token as a request of its own on top of cached rows; the log-probabilities of all tokens after the first.

    A request's last token is computed on top of the rows of all others, which earlier requests have stored. The server reports
    how many it took from the cache; if it did not take all, it recomputed rows from unquantized keys, and the request fails.
    """
    tokens, end = sample.tokens, sample.scored[-1][1]

    async def job(allowance: Allowance) -> list[Any]:
        found = []
        for count in range(1, end):
            answer, _ = await allowance.generate(client, Request(tokens[:count], asked=tokens[count]))
            if answer.cached_tokens != count - 1:
                raise ServerError(
                    f"the prefix cache held {answer.cached_tokens} of {count - 1} tokens, so cached rows were not read:"
                    f" start the server with {engine().AS_STORED}, or with pages of one token and a larger cache"
                )
            found.append(answer.asked)
        return found

    return job


async def _all(
    client: Client,
    plan: MeasurementPlan,
    journal: AnswerJournal,
    advance: Callable[..., None],
    jobs: Iterable[tuple[str, Job]],
) -> None:
    """Run the jobs that are not done yet, ``plan.concurrency`` at a time."""
    rest = iter([(name, job) for name, job in jobs if name not in journal.done])

    async def work() -> None:
        for name, job in rest:
            journal.answer(name, await _attempts(plan, journal, name, job, client.timeout))
            advance()

    workers = [asyncio.create_task(work()) for _ in range(plan.concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _attempts(plan: MeasurementPlan, journal: AnswerJournal, name: str, job: Job, timeout: float) -> list[Any]:
    allowance = Allowance(timeout)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await job(allowance)
        except ServerError as error:
            journal.failure(name, str(error))
            plan.alive()
            if attempt == ATTEMPTS or isinstance(error, OutOfTimeError) or allowance.left <= 0:
                times = "failed" if attempt == 1 else f"failed {attempt} times, at last"
                raise ServerError(f"request {name} {times}: {error}; continue with --resume") from error
            await allowance.pause(_PAUSE * attempt)
    raise AssertionError("unreachable")


def _answer(plan: MeasurementPlan, journal: AnswerJournal, name: str, request: Request) -> Answer:
    return interface().read_answer(request, journal.done[name][0], plan.vocabulary)


def outcome(plan: MeasurementPlan, journal: AnswerJournal) -> ServerAnswers:
    """Read a complete journal; every response is checked again."""
    prompts = plan.prompts
    greedy = [
        _answer(plan, journal, f"greedy/{i}", _greedy(prompt, plan.greedy_tokens))
        for i, prompt in enumerate(prompts.greedy)
    ]
    rescored: list[NDArray[np.float64]] = []
    if plan.method != "token-by-token":
        requests = [_again(p, a.output_ids) for p, a in zip(prompts.greedy, greedy, strict=True)]
        rescored = [np.array(_answer(plan, journal, f"again/{i}", r).input_logprobs) for i, r in enumerate(requests)]
    return ServerAnswers(
        scored=[_scored(journal, plan, i, sample) for i, sample in enumerate(prompts.split.samples)],
        task_tokens=[_answer(plan, journal, f"task/{i}", _task(p)).output_ids for i, p in enumerate(prompts.tasks)],
        continuations=[answer.output_ids for answer in greedy],
        decoded=[np.array(answer.output_logprobs) for answer in greedy],
        rescored=rescored,
        failures=list(journal.failures),
    )


def _scored(journal: AnswerJournal, plan: MeasurementPlan, index: int, sample: Sample) -> NDArray[np.float64]:
    name = f"nll/{index}"
    values: Sequence[float]
    if plan.method == "token-by-token":
        values, first = journal.done[name], 1
    else:
        values, first = _answer(plan, journal, name, _score(sample)).input_logprobs, sample.scored[0][0]
    return np.array([values[position - first] for start, end in sample.scored for position in range(start, end)])
