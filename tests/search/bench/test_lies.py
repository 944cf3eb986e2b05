"""Every lie of a server is caught, and named as what it is."""

from __future__ import annotations

import socket

import pytest

from kvtuner_search.bench import load
from kvtuner_search.bench.client import FAILURES, RequestResult
from kvtuner_search.bench.prompts import draw
from kvtuner_search.bench.record import Cell, Shape, Violation
from kvtuner_search.bench.sender import GIVE_UP
from tests.search.servers import lying_server

TOKENS = 16
SHAPE = Shape(requests=6, concurrency=3, input_tokens=10, output_tokens=TOKENS)
LIES_CAUGHT = {
    "404": "http-status",
    "redirect": "http-status",
    "json": "malformed",
    "html": "malformed",
    "noise": "malformed",
    "empty": "no-tokens",
    "no-tokens": "no-tokens",
    "drops": "dropped",
    "drops-before": "dropped",
    "ends": "dropped",
    "stalls": "stalled",
    "trickles": "timeout",
    "claims-more": "miscounted",
    "claims-less": "miscounted",
    "too-few": "too-few-tokens",
    "too-many": "too-many-tokens",
    "stops": "wrong-finish",
    "aborts": "aborted",
    "errors": "server-error",
    "other-id": "wrong-request",
    "cut-prompt": "wrong-prompt",
    "changes": "malformed",
    "strings": "malformed",
}
DOUBTED = {
    "cached": "cached",
    "canned": "same-answer",
    "one-piece": "not-streamed",
}  # answers that are whole, and not believed


def ask(lie: str, pause: float = 0.0, **more: float) -> tuple[list[RequestResult], Cell, list[Violation]]:
    with lying_server.lying(lie, pause) as (url, _):
        prompts = draw(lie, SHAPE.input_tokens, SHAPE.requests, 1000)
        results = load.run_cell(url, prompts, SHAPE, concurrency=3, **{"timeout": 20, "stall": 20, **more})
    cell = load.summarise("throughput", SHAPE, results)
    return results, cell, load.violations(cell.title, results)


@pytest.mark.parametrize(("lie", "kind"), LIES_CAUGHT.items())
def test_no_answer_of_a_liar_is_a_sample(lie: str, kind: str) -> None:
    limits = {"stalls": {"stall": 0.3}, "trickles": {"timeout": 0.5}}.get(lie, {})
    results, cell, found = ask(lie, **limits)
    sent = [result for result in results if result.failure != "not-sent"]
    assert sent
    assert {result.failure for result in sent} == {kind}, [result.detail for result in sent]
    assert cell.succeeded == cell.returned_tokens == 0
    assert cell.speed is None
    assert cell.failures[kind] == len(sent)
    named = next(violation for violation in found if violation.rule == kind)
    assert named.where == cell.title
    assert f"{len(sent)} of 6" in named.figure
    assert FAILURES[kind] in named.reason
    assert sent[0].detail in named.reason


@pytest.mark.parametrize(("lie", "rule"), DOUBTED.items())
def test_a_whole_answer_that_cannot_be_is_named(lie: str, rule: str) -> None:
    _, cell, found = ask(lie)
    assert cell.succeeded == 6
    assert [violation.rule for violation in found] == [rule]


def test_cached_prompts_are_counted() -> None:
    assert ask("cached")[1].cached_tokens == 6 * (SHAPE.input_tokens - 1)


@pytest.mark.parametrize("honest", ["honest", "incremental", "racing"])
def test_an_honest_server_is_believed(honest: str) -> None:
    """Ids cumulative, incremental, and cumulative with more ids than an intermediate line claims: all of these SGLang sends.

    Each token takes its time; without that, a busy client reads all lines together, as those of a server that collects them.
    """
    results, cell, found = ask(honest, pause=0.01)
    assert (cell.succeeded, cell.failures, found) == (6, {}, [])
    assert cell.returned_tokens == 6 * TOKENS
    assert cell.finish_reasons == {"length": 6}
    prompts = draw(honest, SHAPE.input_tokens, SHAPE.requests, 1000)
    assert [list(result.tokens) for result in results] == [lying_server.answer_to(prompt, TOKENS) for prompt in prompts]


def test_every_lie_is_tested() -> None:
    assert {*LIES_CAUGHT, *DOUBTED, "honest", "incremental", "racing"} == set(lying_server.LIES)


def test_what_nobody_serves_is_refused_and_soon_given_up() -> None:
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        shape = Shape(requests=100, concurrency=1, input_tokens=4, output_tokens=4)
        results = load.run_cell(
            f"http://127.0.0.1:{taken.getsockname()[1]}", draw(0, 4, 100, 1000), shape, concurrency=1
        )
    cell = load.summarise("ttft", shape, results)
    assert cell.failures == {"refused": GIVE_UP, "not-sent": 100 - GIVE_UP}
    assert {violation.rule for violation in load.violations("ttft", results)} == {"refused", "not-sent"}


def test_two_stalls_in_a_row_are_enough() -> None:
    shape = Shape(requests=20, concurrency=1, input_tokens=4, output_tokens=4)
    with lying_server.lying("stalls") as (url, liar):
        results = load.run_cell(url, draw(0, 4, 20, 1000), shape, concurrency=1, stall=0.2)
    assert len(liar.asked) == 2
    assert load.summarise("ttft", shape, results).failures == {"stalled": 2, "not-sent": 18}
