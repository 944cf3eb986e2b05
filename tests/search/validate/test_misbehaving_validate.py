"""`validate` as a whole against a server that goes wrong at one endpoint: one line that names it, exit code 5, in bounded time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtuner_search.data import Sample
from kvtuner_search.servers.client import Request
from kvtuner_search.servers.transport import OutOfTimeError, ServerError
from kvtuner_search.validate import measure
from tests.search.servers.fake_sglang import Fake, Handler
from tests.search.servers.misbehaving import FAULTS, bomb
from tests.search.servers.misbehaving import Handler as Misbehaving
from tests.search.validate.test_validate_command import PROFILE, at, profile_server, validate

Start = Callable[..., Fake]
WAIT = {
    "silent": "3",
    "drip": "3",
    "drip-head": "3",
    "drip-chunks": "3",
}  # seconds, enough for all other answers on busy cores; other faults show at once


@pytest.fixture
def broken(fake: Start, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    """A server with the profile that has a fault at one endpoint, from its ``after``-th answer there on."""
    monkeypatch.setattr(measure, "_PAUSE", 0.0)
    bomb(1 << 29)  # made before anybody waits for it

    def start(fault: str, endpoint: str, after: int = 0) -> Fake:
        class Broken(Handler):
            def do_GET(self) -> None:
                self._answer_or_not(super().do_GET)

            def do_POST(self) -> None:
                self._answer_or_not(super().do_POST)

            def _answer_or_not(self, answer: Callable[[], None]) -> None:
                asked = self.path.startswith(endpoint)
                server.faulty += asked  # type: ignore[attr-defined]
                if asked and server.faulty > after:  # type: ignore[attr-defined]
                    Misbehaving.misbehave(self, fault)
                else:
                    with suppress(OSError):
                        answer()

        server = profile_server(fake)
        server.faulty = 0  # type: ignore[attr-defined]
        server.RequestHandlerClass = Broken
        return server

    return start


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_ends_the_command(
    fault: str, broken: Start, fake: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half-way, so that answers are kept."""
    server = broken(fault, "/generate", 5)
    servers = at(fake(), server)
    assert validate(PROFILE, tmp_path / "run", *servers, "--timeout", WAIT.get(fault, "20")) == 5
    error = capsys.readouterr().err
    assert re.fullmatch(
        rf"kvtuner-search: request \S+ failed.*: {server.url}/generate .*; continue with --resume\n", error
    )
    assert len(error) < 700
    server.RequestHandlerClass = Handler
    assert validate(PROFILE, tmp_path / "run", *servers, "--resume") == 0


@pytest.mark.parametrize(("fault", "asked"), [("drip", 1), ("drip-chunks", 1), ("silent", 1), ("short", 3)])
def test_an_answer_that_took_all_its_time_is_not_asked_for_again(
    fault: str, asked: int, broken: Start, fake: Start, tmp_path: Path
) -> None:
    server = broken(fault, "/generate")
    options = ("--timeout", WAIT.get(fault, "20"), "--concurrency", "1")
    assert validate(PROFILE, tmp_path / "run", *at(fake(), server), *options) == 5
    assert server.faulty == asked  # type: ignore[attr-defined]


class Clock:
    """Time that passes only where a client answers or a run pauses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(measure.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(measure.asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


class Slow:
    """A client whose server takes ``seconds`` for each answer: those that ``works`` says, by number, are whole, others refusals."""

    def __init__(self, clock: Clock, timeout: float, seconds: float, works: Callable[[int], bool]) -> None:
        self.clock, self.timeout, self.seconds, self.works = clock, timeout, seconds, works
        self.asked = 0

    async def generate(self, request: Request, within: float) -> Any:
        assert 0 < within <= self.timeout
        self.asked += 1
        self.clock.now += min(self.seconds, within)
        if self.seconds >= within:
            raise OutOfTimeError("it stalled")
        if not self.works(self.asked):
            raise ServerError("answered 503")
        return SimpleNamespace(cached_tokens=len(request.input_ids) - 1, asked=-1.0), {}


class Kept:
    """A journal that keeps nothing but the count of failures."""

    failures = 0

    def failure(self, name: str, reason: str) -> None:
        self.failures += 1


PLAN = SimpleNamespace(alive=lambda: None)


@pytest.mark.parametrize("timeout", [0.5, 4.0, 600.0])
@pytest.mark.parametrize(("part", "asked"), [(0.0, 3), (0.01, 3), (0.3, 3), (0.6, 2), (0.9, 2), (1.0, 1), (50.0, 1)])
def test_all_attempts_at_a_request_share_its_time(
    timeout: float, part: float, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, kept = Clock(monkeypatch), Kept()
    client: Any = Slow(clock, timeout, part * timeout, lambda number: False)
    job = measure._single(client, Request((1, 2)))
    with pytest.raises(ServerError, match=r"request nll/0 failed.*; continue with --resume"):
        asyncio.run(measure._attempts(PLAN, kept, "nll/0", job, timeout))  # type: ignore[arg-type]
    assert (client.asked, kept.failures) == (asked, asked)
    assert clock.now <= timeout * (1 + 1e-9)


def test_steps_that_succeed_take_nothing_off_the_time_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that is scored token by token is one job of many requests; two of them fail and are repeated."""
    clock, kept = Clock(monkeypatch), Kept()
    client: Any = Slow(clock, 4.0, 0.4, lambda number: number not in (20, 40))
    job = measure._step_by_step(client, Sample("x", tuple(range(30)), ((1, 30),), is_task=False))
    found = asyncio.run(measure._attempts(PLAN, kept, "nll/0", job, 4.0))  # type: ignore[arg-type]
    assert (found, kept.failures) == ([-1.0] * 29, 2)
    assert clock.now > 4.0


@pytest.mark.parametrize("fault", ["drip", "endless", "bomb"])
def test_emptying_the_cache_has_the_same_bounds(
    fault: str, broken: Start, fake: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = broken(fault, "/flush_cache")
    assert validate(PROFILE, tmp_path / "run", *at(fake(), server), "--timeout", WAIT.get(fault, "20")) == 5
    assert re.match(rf"kvtuner-search: {server.url}/flush_cache\S* (had sent|gave no answer)", capsys.readouterr().err)


HUGE = 10**400
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("method", ["as-stored", "token-by-token"])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.5, -1e300, HUGE, None, "-0.5", True, []], ids=repr)
def test_no_figure_is_made_of_what_is_no_log_probability(
    value: object, method: str, fake: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setattr(measure, "_PAUSE", 0.0)
    server = profile_server(fake, as_stored=method == "as-stored")

    class Odd(Handler):
        def reply(self, status: int, content: Any) -> None:
            if isinstance(content, dict) and "meta_info" in content:
                meta = content["meta_info"]
                for rows in (meta.get("input_token_logprobs"), *meta.get("output_token_ids_logprobs", [])):
                    if rows:
                        rows[-1][0] = value
            super().reply(status, content)

    server.RequestHandlerClass = Odd
    assert validate(PROFILE, tmp_path / "run", *at(fake(), server)) == 5
    assert "log-probability" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"output_ids": []}, "the answer is empty"),
        ({"output_ids": [1, 2]}, "the answer is short"),
        ({"output_ids": [8192]}, "the vocabulary ends at 8191"),
        ({"output_ids": [-1]}, "answered token -1"),
        ({"output_ids": [NAN]}, "these are not token ids"),
        ({"prompt_tokens": 1}, "the prompt was cut"),
        ({"completion_tokens": 2}, "the answer is short"),
        ({"cached_tokens": HUGE}, "from its prefix cache"),
        ({"input_token_logprobs": []}, "log-probabilities are missing"),
        ({"meta_info": []}, "no meta_info"),
        ({"finish_reason": {"type": "abort", "message": "\x1b[2J\n::error::x"}}, "the request was not finished"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_answers_that_do_not_fit_the_request_end_the_command(
    fields: dict[str, Any], said: str, fake: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setattr(measure, "_PAUSE", 0.0)
    server = profile_server(fake)
    server.fault = fields
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that has heard enough hangs up
    assert validate(PROFILE, tmp_path / "run", *at(fake(), server)) == 5
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert "\x1b" not in error


def test_a_server_that_dies_half_way_ends_the_command(
    fake: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "_PAUSE", 0.0)
    server = profile_server(fake)

    class Dying(Handler):
        def generate(self, body: dict[str, Any]) -> None:
            if len(server.asked) == 7:
                server.socket.close()  # nobody listens any more
                raise ConnectionAbortedError
            super().generate(body)

    server.RequestHandlerClass, server.handle_error = Dying, lambda *_: None  # type: ignore[method-assign]
    assert validate(PROFILE, tmp_path / "run", *at(fake(), server), "--concurrency", "1") == 5
    assert re.search(r"failed 3 times, at last: .* cannot be reached \(.*--resume", capsys.readouterr().err)
