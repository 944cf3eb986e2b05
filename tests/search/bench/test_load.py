"""A cell's load: order, concurrency, rounds, warm-up, arrival times, processes, interruption, and the figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from pydantic import ValidationError

from kvtuner_search.bench import load, summary
from kvtuner_search.bench.client import RequestResult
from kvtuner_search.bench.prompts import draw
from kvtuner_search.bench.record import Shape
from kvtuner_search.errors import DataError, KVTunerError, UsageError
from tests.search.servers import lying_server as server

ROOT = Path(__file__).parents[3]


def shape(requests: int, concurrency: int = 1, output: int = 4) -> Shape:
    return Shape(requests=requests, concurrency=concurrency, input_tokens=5, output_tokens=output)


def result(index: int, sent: float = 0.0, **more: Any) -> RequestResult:
    """A whole answer of four tokens: the first after 10 ms, then 5 ms each."""
    arrivals = ((10.0, 1), (15.0, 1), (20.0, 1), (25.0, 1))
    fields = {
        "index": index,
        "round": 0,
        "sent": sent,
        "asked": 4,
        "prompt_tokens": 5,
        "counted_prompt": 5,
        "status": 200,
    }
    return RequestResult(
        **(fields | {"claimed": 4, "tokens": (index, 2, 3, 4), "arrivals": arrivals, "finish": "length"} | more)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_each_prompt_is_sent_once_and_its_own_answer_comes_back(workers: int) -> None:
    prompts, kept, advanced = draw(1, 5, 43, 500), [], []
    with server.lying() as (url, honest):
        found = load.run_cell(
            url, prompts, shape(40, 6), concurrency=6, warmup=3, rounds=2, workers=workers, journal=kept.append,
            advance=lambda: advanced.append(1),
        )  # fmt: skip
    assert [list(one.tokens) for one in found] == [server.answer_to(prompt, 4) for prompt in prompts[3:]]
    assert [one.index for one in found] == list(range(40))
    assert sorted(map(tuple, prompts)) == sorted(tuple(body["input_ids"]) for body in honest.asked)
    assert {one.index for one in kept} == set(range(-3, 40))  # the warm-up is kept, and not counted
    assert len(advanced) == 40
    assert len({body["rid"] for body in honest.asked}) == 43
    assert {tuple(body["input_ids"]) for body in honest.asked[:3]} == set(map(tuple, prompts[:3]))
    assert {tuple(body["input_ids"]) for body in honest.asked[3:23]} == set(map(tuple, prompts[3:23]))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_closed_loop_keeps_so_many_in_flight_and_no_more(workers: int) -> None:
    with server.lying(pause=0.02) as (url, honest):
        load.run_cell(url, draw(1, 5, 20, 500), shape(20, 5), concurrency=5, workers=workers)
    assert honest.most == 5


def test_a_round_begins_when_the_last_has_ended() -> None:
    with server.lying(pause=0.005) as (url, honest):
        found = load.run_cell(url, draw(1, 5, 12, 500), shape(12, 4), concurrency=4, rounds=3)
    for number in range(3):
        block = honest.spans[number * 8 : number * 8 + 8]
        assert {index for _, index in block} == set(range(number * 4, number * 4 + 4))
    assert [one.round for one in found] == [0] * 4 + [1] * 4 + [2] * 4


def test_connections_are_used_again() -> None:
    with server.lying() as (url, honest):
        load.run_cell(url, draw(1, 5, 30, 500), shape(28, 2), concurrency=2, warmup=2)
    assert honest.connections == 2


def test_an_open_loop_sends_when_it_is_due_whatever_is_under_way() -> None:
    """The clock runs from when a request was due: with one lane and a slow server, waiting for the lane counts as latency."""
    count, rate = 12, 200.0
    with server.lying(pause=0.01) as (url, honest):
        free = load.run_cell(url, draw(1, 5, count, 500), shape(count, count), concurrency=count, rate=rate, seed=5)
        assert honest.most > 1
        honest.most = 0
        held = load.run_cell(url, draw(1, 5, count, 500), shape(count), concurrency=1, rate=rate, seed=5)
        assert honest.most == 1
    for found in (free, held):
        due = numpy.array([one.sent for one in found])
        numpy.testing.assert_allclose(due - due[0], numpy.array(load_times(count, rate, 5)), atol=2e-6)
    assert held[-1].latency > 40 * count - 1e3 * (
        held[-1].sent - held[0].sent
    )  # at least 40 ms for each, one after the other


def load_times(count: int, rate: float, seed: int) -> list[float]:
    (block,) = load._blocks(count, 0, 1, rate, seed)
    assert block.due is not None
    return [at - block.due[0] for at in block.due]


def test_arrivals_are_poisson() -> None:
    """Gaps of 10,000 arrivals: mean and standard deviation of an exponential distribution are equal."""
    (block,) = load._blocks(10_000, 0, 1, 50.0, 0)
    gaps = numpy.diff(numpy.array(block.due))
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1]]}, "1 prompts for 0 [+] 4 requests"),
        ({"rounds": 3}, "as many requests in each round"),
        ({"rounds": 0}, "in 0 rounds"),
        ({"concurrency": 0}, "0 at a time"),
        ({"rate": 0.0}, "a rate of 0.0 requests/s"),
        ({"url": "localhost:30000"}, "not a URL of a server"),
        ({"url": "ftp://x"}, "not a URL of a server"),
    ],
)
def test_what_cannot_be_sent_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"url": "http://127.0.0.1:1", "prompts": [[1]] * 4, "concurrency": 1} | change
    with pytest.raises(UsageError, match=message):
        load.run_cell(arguments.pop("url"), arguments.pop("prompts"), shape(4), **arguments)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_ends_the_cell_with_its_own_error(workers: int) -> None:
    def journal(_: RequestResult) -> None:
        raise OSError(28, "No space left on device")

    with server.lying() as (url, _), pytest.raises(OSError, match="No space left"):
        load.run_cell(url, draw(1, 5, 20, 500), shape(20, 4), concurrency=4, workers=workers, journal=journal)


def test_a_process_that_dies_is_named() -> None:
    seen: list[int] = []

    def kill(_: RequestResult) -> None:
        if not seen:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            victims = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
            os.kill(victims[0], signal.SIGKILL)
            seen.append(victims[0])

    with server.lying(pause=0.01) as (url, _), pytest.raises(KVTunerError, match="load generator ended with -9"):
        load.run_cell(url, draw(1, 5, 60, 500), shape(60, 4), concurrency=4, workers=2, journal=kill)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_what_was_there(workers: int, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import json, signal, sys\n"
        "from kvtuner_search.bench import load\n"
        "from kvtuner_search.bench.prompts import draw\n"
        "from kvtuner_search.bench.record import Shape\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it\n"
        "    shape = Shape(requests=400, concurrency=2, input_tokens=5, output_tokens=4)\n"
        "    def journal(result):\n"
        "        print(json.dumps(result.to_json()), flush=True)\n"
        "    try:\n"
        f"        load.run_cell(sys.argv[1], draw(1, 5, 400, 500), shape, concurrency=2, workers={workers}, journal=journal)\n"
        "    except KeyboardInterrupt:\n"
        "        sys.exit(130)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    with server.lying(pause=0.01) as (url, _):
        process = subprocess.Popen(
            [sys.executable, str(script), url], stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        rest = process.communicate(timeout=30)[0].splitlines()
    assert process.returncode == 130
    kept = [RequestResult.from_json(json.loads(line)) for line in (first, *rest)]
    assert 1 <= len(kept) < 400
    assert all(one.whole for one in kept)


def test_figures_of_a_cell() -> None:
    """Two whole answers of three; the third and the warm-up count in nothing but their numbers."""
    first, second = (
        result(0, sent=100.0, lag=1.0, busy=0.1),
        result(1, lag=2.0, busy=0.36, sent=100.5, arrivals=((20.0, 1), (40.0, 3)), cached_tokens=2),
    )
    failed = result(2, sent=90.0, failure="stalled", arrivals=((1.0, 1),), tokens=(5,), finish=None)
    cell = load.summarise("ttft", shape(3), [result(-1, sent=1.0), first, second, failed])
    assert (cell.succeeded, cell.failures, cell.finish_reasons) == (2, {"stalled": 1}, {"length": 2})
    assert (cell.prompt_tokens, cell.returned_tokens, cell.cached_tokens) == (10, 8, 2)
    speed = cell.speed
    assert speed is not None
    assert speed.seconds == pytest.approx(0.54)
    assert speed.requests_per_second == pytest.approx(2 / 0.54)
    assert speed.output_tokens_per_second == pytest.approx(8 / 0.54)
    assert speed.input_tokens_per_second == pytest.approx(10 / 0.54)
    assert speed.ttft is not None
    assert (speed.ttft.samples, speed.ttft.mean, speed.ttft.p50, speed.ttft.p90) == (2, 15.0, 15.0, pytest.approx(19.0))
    assert (speed.latency.minimum, speed.latency.maximum) == (25.0, 40.0)
    assert speed.per_token is not None
    assert speed.per_token.mean == pytest.approx((5 + 20 / 3) / 2)
    assert (speed.client_lag, speed.client_busy) == (1.5, pytest.approx((25 * 0.1 + 40 * 0.36) / 65))
    assert speed.inter_token is not None
    assert (speed.inter_token.samples, speed.inter_token.mean) == (6, pytest.approx((3 * 5 + 20) / 6))


def test_pauses_between_rounds_do_not_count() -> None:
    results = [result(0, sent=100.0), result(1, sent=200.0, round=1)]
    assert load.elapsed(results) == pytest.approx(2 * 0.025)
    assert load.elapsed([result(0, failure="stalled")]) == 0


def test_percentiles_are_numpys() -> None:
    values = [float(value) for value in numpy.random.default_rng(0).exponential(size=237)]
    found = summary.summary(values)
    assert [found.p50, found.p90, found.p99] == [float(numpy.percentile(values, q)) for q in (50, 90, 99)]
    assert (found.samples, found.minimum, found.maximum) == (237, min(values), max(values))


def test_what_was_not_sent_is_a_failure_and_two_attempts_are_not_mixed() -> None:
    assert load.summarise("ttft", shape(5), [result(0)]).failures == {"not-sent": 4}
    none = load.summarise("ttft", shape(2), [])
    assert (none.speed, none.failures) == (None, {"not-sent": 2})
    with pytest.raises(DataError, match="two attempts are mixed"):
        load.summarise("ttft", shape(1), [result(0), result(1)])


def test_shape_must_have_a_request() -> None:
    with pytest.raises(ValidationError):
        shape(0)


@pytest.mark.parametrize(
    ("lag", "busy", "bound"), [(1.0, 0.3, False), (4.9, 0.79, False), (5.1, 0.3, True), (1.0, 0.81, True)]
)
def test_a_saturated_generator_is_named(lag: float, busy: float, bound: bool) -> None:
    found = load.violations("here", [result(index, sent=float(index), lag=lag, busy=busy) for index in range(10)])
    assert [violation.rule for violation in found] == (["client-bound"] if bound else [])


def test_a_cell_of_an_instant_says_nothing_of_the_generator() -> None:
    assert load.violations("here", [result(index, lag=50.0, busy=0.9) for index in range(10)]) == []


def test_lag_is_judged_against_what_is_measured() -> None:
    """A fifth of the time to the first token: 8 ms of 50 are tolerable, and not of 30."""
    slow = [result(index, sent=float(index), lag=8.0, arrivals=((50.0, 1), (60.0, 3))) for index in range(3)]
    fast = [replace(one, arrivals=((30.0, 1), (60.0, 3))) for one in slow]
    assert load.violations("here", slow) == []
    assert [violation.rule for violation in load.violations("here", fast)] == ["client-bound"]


def test_a_chance_hit_in_the_cache_is_no_violation() -> None:
    sent = [result(index, prompt_tokens=100, counted_prompt=100) for index in range(10)]
    assert load.violations("here", [replace(sent[0], cached_tokens=1), *sent[1:]]) == []
    assert [v.rule for v in load.violations("here", [replace(one, cached_tokens=2) for one in sent])] == ["cached"]


def test_dummy_weights_may_repeat_one_token() -> None:
    same = [result(index, tokens=(5,) * 20) for index in range(4)]
    assert load.violations("here", same) == []
    canned = [result(index, tokens=tuple(range(20))) for index in range(4)]
    assert [violation.rule for violation in load.violations("here", canned)] == ["same-answer"]


def test_the_generator_script_finds_its_own_limit(tmp_path: Path) -> None:
    """That it runs and counts; the rates are the machine's, and 20 requests/s are no challenge."""
    options = [
        "--workers",
        "1",
        "--requests",
        "40",
        "--concurrency",
        "4",
        "--rate",
        "20",
        "--pieces",
        "--json",
        str(tmp_path / "it.json"),
    ]
    command = [sys.executable, str(ROOT / "scripts" / "bench_load"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "20 requests/s of 16 tokens: held with 1 workers" in done.stdout
    rows = json.loads((tmp_path / "it.json").read_text())
    assert [(row["loop"], row["whole"], row["failures"]) for row in rows] == [
        ("closed", 40, {}),
        ("open at 20/s", 40, {}),
    ]
