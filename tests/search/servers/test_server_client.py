"""The HTTP client takes nothing for a sample that is not exactly what was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kvtuner_search.servers.client import Answer, Request
from kvtuner_search.servers.process import free_port
from kvtuner_search.servers.transport import OutOfTimeError, ServerError
from kvtuner_search.serving.sglang.client import Client
from tests.search.servers.fake_sglang import Fake, Handler, logprob

PROMPT = tuple(range(5, 15))
Start = Callable[..., Fake]


def ask(url: str, request: Request, timeout: float = 5.0) -> Answer:
    async def main() -> Answer:
        async with Client(url, timeout) as client:
            return (await client.generate(request))[0]

    return asyncio.run(main())


def test_scores_a_prompt_from_where_it_is_told(fake: Start) -> None:
    server = fake()
    answer = ask(server.url, Request(PROMPT, logprob_start=3))
    expected = [logprob(list(PROMPT[:i]), PROMPT[i]) for i in range(4, 10)]
    assert answer.input_logprobs == pytest.approx(expected)
    assert server.asked[0]["return_logprob"] is True
    assert server.asked[0]["logprob_start_len"] == 3


def test_generates_greedily_with_log_probabilities(fake: Start) -> None:
    server = fake()
    answer = ask(server.url, Request(PROMPT, 4, output_logprobs=True))
    assert len(answer.output_ids) == len(answer.output_logprobs) == 4
    assert server.asked[0]["sampling_params"] == {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


def test_asks_about_one_token(fake: Start) -> None:
    assert ask(fake().url, Request(PROMPT, asked=77)).asked == pytest.approx(logprob(list(PROMPT), 77))


SCORED = Request(PROMPT, 2, logprob_start=0, output_logprobs=True)
FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"status": 404}, r"answered 404: Not Found; use the first node's address"),
    ({"status": 500, "body": b"boom"}, "answered 500: boom"),
    ({"raw": b"<html>"}, "did not answer with JSON: <html>"),
    ({"raw": [1]}, "no meta_info"),
    ({"finish_reason": {"type": "abort", "message": "too long"}}, "not finished"),
    ({"finish_reason": None}, "not finished"),
    ({"prompt_tokens": 9}, "saw 9 prompt tokens of 10: the prompt was cut"),
    ({"output_ids": []}, "the answer is empty"),
    ({"output_ids": [1]}, r"1 tokens \(it says 2\) of 2 and ended by length: the answer is short"),
    ({"output_ids": [1, 2, 3], "completion_tokens": 3}, "the answer is short"),
    ({"completion_tokens": 7}, r"2 tokens \(it says 7\)"),
    ({"input_token_logprobs": None}, "no input_token_logprobs of 10"),
    ({"input_token_logprobs": [[None, 5, None]]}, "1 input_token_logprobs of 10"),
    ({"input_token_logprobs": [[None, 5, None]] + [[-1.0, 5, None]] * 9}, "of token 5 instead of 6"),
    ({"output_token_logprobs": [[float("nan"), 1, None]] * 2, "output_ids": [1, 1]}, "not a finite log-probability"),
    ({"output_token_logprobs": [[None, 1, None]] * 2, "output_ids": [1, 1]}, "not a finite log-probability"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_faulty_answer_is_an_error_with_its_reason(fake: Start, fault: dict[str, Any], reason: str) -> None:
    server = fake()
    server.fault = fault
    with pytest.raises(ServerError, match=reason):
        ask(server.url, SCORED)


def test_a_text_that_ends_early_is_short_unless_a_stop_was_allowed(fake: Start) -> None:
    server = fake()
    server.fault = {"output_ids": [1], "completion_tokens": 1, "finish_reason": {"type": "stop", "matched": 0}}
    assert ask(server.url, Request(PROMPT, 4, exact_length=False)).output_ids == (1,)
    with pytest.raises(ServerError, match="the answer is short"):
        ask(server.url, Request(PROMPT, 4))


def test_a_stall_is_an_error(fake: Start) -> None:
    server = fake()
    server.fault = {"stall": 2.0}
    with pytest.raises(ServerError, match=r"did not answer within 0\.2 s: it stalled"):
        ask(server.url, SCORED, timeout=0.2)


def test_what_is_found_out_about_a_refusal_shares_its_time(fake: Start) -> None:
    """A server that refuses at once and then falls silent is looked at for as long as an answer may take, not for every path that could say more."""

    class Silent(Handler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.server.stopped.wait()

    paths: list[str] = []
    server = fake()
    server.fault, server.RequestHandlerClass = {"status": 404}, Silent
    with pytest.raises(ServerError, match=r"answered 404: Not Found$"):
        ask(server.url, SCORED, timeout=0.5)
    assert paths == ["/v1/models"]


def test_an_answer_may_have_less_time_than_the_client(fake: Start) -> None:
    server = fake()
    server.fault = {"stall": 2.0}

    async def main() -> None:
        async with Client(server.url, 60.0) as client:
            await client.generate(SCORED, within=0.2)

    with pytest.raises(OutOfTimeError, match=r"did not answer within 0\.2 s: it stalled"):
        asyncio.run(main())


def test_a_server_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ServerError, match=r"cannot be reached .+: is the server up\?"):
        ask(f"http://127.0.0.1:{free_port()}", SCORED)


def test_no_url_is_an_error() -> None:
    with pytest.raises(ServerError, match="http://host:port"):
        ask("localhost:30000", SCORED)
