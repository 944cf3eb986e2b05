"""Figures of a cell from its raw results, and the results that are not answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median
from typing import Final

from kvtuner_search.bench.client import FAILURES, RequestResult
from kvtuner_search.bench.record import Cell, Section, Shape, Speed, Summary, Violation
from kvtuner_search.errors import DataError

BUSY_LIMIT: Final = 0.8  # share of a core; above it requests wait for the generator's loop more than now and then (queueing at 80 % load)
LAG_SHARE: Final = 0.2  # of the median time to the first token, the shortest time that is measured
LAG_FLOOR: Final = 5.0  # ms; the timer itself is late by one or two, and more where a server shares the cores
LAG_SECONDS: Final = 0.5  # minimum length of a cell; in a shorter one lag may only mean that another process ran once
CHANCE: Final = 0.01  # of prompt tokens; beginnings of random prompts may hit what other cells left in the cache, whole prompts do not
_ALIKE: Final = 16  # tokens; shorter answers can be the same by chance
_TELLING: Final = (
    8  # tokens; the lines of a shorter answer are read together whenever client or server waits for a core
)
_EVIDENCE: Final = 32  # gaps between tokens of all such answers: fewer may all be lost in one moment of a busy machine
_LONG: Final = 64  # tokens; an answer this long may take several reads although it came in one piece
_INSTANT: Final = 0.5  # ms a token; the lines of such a fast answer may share a read without having been collected
_AT_ONCE: Final = 0.02  # ms a token between these reads: the time of reading, far below any decode step


def measured(results: Sequence[RequestResult]) -> list[RequestResult]:
    """Without the warm-up."""
    return [result for result in results if not result.warmup]


def elapsed(results: Sequence[RequestResult]) -> float:
    """Seconds from the first request sent to the last token received, each round by itself, so that pauses between rounds do not count.

    Failures are left out; a round in which nothing succeeded counts as 0.
    """
    spans: dict[int, tuple[float, float]] = {}
    for result in measured(results):
        if result.whole:
            first, last = spans.get(result.round, (result.sent, 0.0))
            spans[result.round] = min(first, result.sent), max(last, result.sent + result.latency / 1e3)
    return sum(last - first for first, last in spans.values())


def summarise(section: Section, shape: Shape, results: Sequence[RequestResult], seconds: float | None = None) -> Cell:
    """The cell of a record, without its floor. Only complete answers are samples; all others are failures by kind.

    Args:
        section: table of the cell.
        shape: the requests; a request without a result counts as ``not-sent``.
        results: of one attempt at the cell; the warm-up's are ignored.
        seconds: that the cell took; None: ``elapsed(results)``.

    Raises:
        DataError: if there are more results than requests.
    """
    results = measured(results)
    if len(results) > shape.requests:
        raise DataError(f"{len(results)} results of {shape.requests} requests: the results of two attempts are mixed")
    whole = [result for result in results if result.whole]
    failures = Counter(result.failure for result in results if not result.whole)
    if len(results) < shape.requests:
        failures["not-sent"] += shape.requests - len(results)
    return Cell(
        section=section,
        shape=shape,
        succeeded=len(whole),
        failures=dict(sorted(failures.items())),
        finish_reasons=dict(sorted(Counter(result.finish for result in results if result.finish).items())),
        prompt_tokens=sum(result.counted_prompt or 0 for result in whole),
        returned_tokens=sum(len(result.tokens) for result in whole),
        cached_tokens=sum(result.cached_tokens for result in whole),
        speed=_speed(whole, elapsed(results) if seconds is None else seconds) if whole else None,
        floor=None,
    )


def _speed(whole: Sequence[RequestResult], seconds: float) -> Speed:
    per_token = [value for result in whole if (value := result.per_token) is not None]
    gaps = [gap for result in whole for gap in result.gaps]
    seconds = max(seconds, 1e-9)
    return Speed(
        seconds=seconds,
        ttft=summary([result.ttft for result in whole]),
        per_token=summary(per_token) if per_token else None,
        inter_token=summary(gaps) if gaps else None,
        latency=summary([result.latency for result in whole]),
        requests_per_second=len(whole) / seconds,
        input_tokens_per_second=sum(result.counted_prompt or 0 for result in whole) / seconds,
        output_tokens_per_second=sum(len(result.tokens) for result in whole) / seconds,
        client_lag=median(result.lag for result in whole),
        client_busy=_busy(whole),
    )


def _busy(whole: Sequence[RequestResult]) -> float:
    total = sum(result.latency for result in whole)
    return sum(result.busy * result.latency for result in whole) / total if total else 0.0


def summary(values: Sequence[float]) -> Summary:
    """Percentiles by linear interpolation between order statistics (numpy's default)."""
    import numpy

    p50, p90, p99 = (float(value) for value in numpy.percentile(values, (50, 90, 99)))
    return Summary(
        samples=len(values), mean=fmean(values), minimum=min(values), p50=p50, p90=p90, p99=p99, maximum=max(values)
    )


def violations(where: str, results: Sequence[RequestResult]) -> list[Violation]:
    """One for each kind of failure, and for complete answers that cannot be believed.

    Besides the kinds in ``client.FAILURES`` the rules are ``cached``, ``same-answer``, ``not-streamed`` and ``client-bound``.

    Args:
        where: section and cell, e.g. ``cell.title``.
        results: of one cell; the warm-up's are ignored.
    """
    results = measured(results)
    whole = [result for result in results if result.whole]
    found = []
    for kind, count in sorted(Counter(result.failure for result in results if not result.whole).items()):
        example = next(result.detail for result in results if result.failure == kind)
        reason = f"{FAILURES.get(kind, 'unknown kind')}; e.g. {example}"
        found.append(_violation(kind, where, f"{count} of {len(results)} requests", reason))
    if whole:
        checks = (_cached, _same_answer, _not_streamed, _client_bound)
        found += [one for check in checks if (one := check(where, whole)) is not None]
    return found


def _violation(rule: str, where: str, figure: str, reason: str) -> Violation:
    return Violation(rule=rule, where=where, figure=figure, reason=reason)


def _cached(where: str, whole: Sequence[RequestResult]) -> Violation | None:
    """Prompts of a cell share no prefix, so more hits than by chance mean that the server has seen the prompts before."""
    cached, sent = sum(result.cached_tokens for result in whole), sum(result.prompt_tokens for result in whole)
    if cached <= CHANCE * sent:
        return None
    return _violation(
        "cached",
        where,
        f"{cached} of {sent} prompt tokens",
        "the prefix cache had them although all prompts are random and begin differently: it was not flushed since they were last sent,"
        " so TTFT is not that of these prompts",
    )


def _same_answer(where: str, whole: Sequence[RequestResult]) -> Violation | None:
    answers = [result.tokens for result in whole]
    if len(answers) < 2 or len(answers[0]) < _ALIKE or len(set(answers[0])) == 1 or len(set(answers)) > 1:
        return None  # random weights answer anything with one repeated token
    return _violation(
        "same-answer",
        where,
        f"{len(answers)} prompts, 1 answer",
        f"all random prompts got the same {len(answers[0])} tokens: they are canned, or belong to another prompt",
    )


def _not_streamed(where: str, whole: Sequence[RequestResult]) -> Violation | None:
    told = _telling(whole)
    late = sum(_in_one_piece(result) for result in told)
    if late * 2 <= len(told):
        return None
    return _violation(
        "not-streamed",
        where,
        f"{late} of {len(told)} answers in one piece",
        "the first token came with the last, so TTFT equals the latency: the server does not stream, a proxy collects,"
        " or --stream-interval is too long",
    )


def _telling(whole: Sequence[RequestResult]) -> list[RequestResult]:
    """The answers that can tell whether the server streams; none if all of them together have too few tokens."""
    found = [result for result in whole if len(result.tokens) >= _TELLING]
    return found if sum(len(result.tokens) - 1 for result in found) >= _EVIDENCE else []


def remarks(where: str, results: Sequence[RequestResult]) -> list[str]:
    """What is worth knowing of a cell and no violation: answers in one piece that are too short to tell whether the server streams.

    Args:
        where: section and cell.
        results: of one cell; the warm-up's are ignored.
    """
    whole = [result for result in measured(results) if result.whole]
    late = sum(_in_one_piece(result) for result in whole)
    if late * 2 <= len(whole) or _telling(whole):
        return []
    return [
        f"{where}: {late} of {len(whole)} answers came in one piece; their tokens are too few to tell whether the server streams, so"
        " TTFT may be the time of the whole answer"
    ]


def _in_one_piece(result: RequestResult) -> bool:
    """Whether a proxy or the server had collected the whole answer: its lines came together, in any number."""
    tokens, lines, times = len(result.tokens), len(result.arrivals), len({at for at, _ in result.arrivals})
    several_reads = tokens >= _LONG and tokens >= 4 * times and result.latency - result.ttft < _AT_ONCE * tokens
    collected = result.latency > _INSTANT * tokens and (times == 1 or several_reads)
    return tokens > 1 and (lines == 1 or collected)


def _client_bound(where: str, whole: Sequence[RequestResult]) -> Violation | None:
    busy, lag, ttft = _busy(whole), median(result.lag for result in whole), median(result.ttft for result in whole)
    limit = max(LAG_FLOOR, LAG_SHARE * ttft)
    if elapsed(whole) < LAG_SECONDS or (busy <= BUSY_LIMIT and lag <= limit):
        return None
    return _violation(
        "client-bound",
        where,
        f"generator {busy:.0%} of a core, {lag:.3g} ms late",
        f"the load generator was the bottleneck (limits: {BUSY_LIMIT:.0%} of a core, and {limit:.3g} ms where the median time to the first"
        f" token is {ttft:.4g} ms): it needs more processes, or cores that the server does not use",
    )
