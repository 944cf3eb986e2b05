"""Compare the figures with the thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal

from kvtuner_search.profile.fields import Measure
from kvtuner_search.profile.validation import Capacity, Check, Greedy, Semantics, TaskResult, holds
from kvtuner_search.validate.explained import Explained, worse
from kvtuner_search.validate.options import Limits

UNEXPLAINED: Final = (
    0.05  # nats a token, decode against extend without an offline evaluation and without a threshold on likelihood
)


def judge(
    limits: Limits,
    likelihood: Sequence[Measure],
    tasks: Sequence[TaskResult],
    greedy: Greedy,
    capacity: Capacity,
    semantics: Semantics,
    explained: Explained | None,
) -> list[Check]:
    """One check for each threshold that is set and, for likelihood and accuracy, each source and task.

    Args:
        explained: both servers against the offline evaluation; None if nothing was computed offline.
    """
    rows = [
        *_quality(limits, likelihood, tasks, greedy, capacity),
        *_path(limits, semantics, explained),
        *(_offline(limits, semantics, explained) if explained is not None else ()),
    ]
    return [
        Check(
            name=name, relation=relation, limit=limit, value=value, passed=holds(value, relation, limit), reason=reason
        )
        for name, relation, limit, value, reason in rows
        if limit is not None
    ]


_Row = tuple[str, Literal["at most", "at least"], float | None, float | None, str]


def _quality(
    limits: Limits,
    likelihood: Sequence[Measure],
    tasks: Sequence[TaskResult],
    greedy: Greedy,
    capacity: Capacity,
) -> Iterator[_Row]:
    for measure in likelihood:
        yield f"nll.{measure.data}", "at most", limits.max_nll_increase, measure.ci_high, ""
    for task in tasks:
        yield _accuracy(limits.max_accuracy_drop, task)
    yield "greedy", "at least", limits.min_agreement, greedy.ci_low, ""
    share = capacity.ratio / capacity.predicted if capacity.comparable else None
    yield "capacity", "at least", limits.min_capacity, share, capacity.reason


def _accuracy(most: float | None, task: TaskResult) -> _Row:
    """A stock server that answers less than the threshold right has nothing to lose: the check could not fail, so it does not hold."""
    name, limit = f"accuracy.{task.data}", None if most is None else -most
    if most is not None and task.baseline < most:
        reason = (
            f"the stock server answers only {task.baseline:.1%} right, so no drop could reach the threshold: give a task, or options of it, that the"
            " model can do"
        )
        return name, "at least", limit, None, reason
    return name, "at least", limit, task.ci_low, ""


def _path(limits: Limits, semantics: Semantics, explained: Explained | None) -> Iterator[_Row]:
    limit = limits.max_path_difference
    if semantics.difference is None or semantics.baseline_difference is None:
        return
    if limit == "auto" and explained is not None:
        bound = explained.path()
        yield "decode-semantics", "at most", bound.limit, bound.value, ""
        return
    if limit == "auto":
        # Likelihood was read from extend. Decode's is off by no more than this difference, so together they may cost twice the threshold.
        limit = UNEXPLAINED if limits.max_nll_increase is None else limits.max_nll_increase
    excess = semantics.difference - semantics.baseline_difference
    yield "decode-semantics", "at most", limit, excess, ""


def _offline(limits: Limits, semantics: Semantics, explained: Explained) -> Iterator[_Row]:
    whole = semantics.method != "token-by-token"  # there the newest token's own key and value were read unquantized
    if limits.max_offline_difference == "auto":
        bounds = {"offline.nll": explained.nll(), "offline.decode": explained.decode_nll()}
        if whole:
            bounds["offline.distance"] = explained.distance()
        bounds["offline.decode-distance"] = explained.decode_distance()
        bounds["offline.stock-distance"] = explained.stock_distance()
        for name, bound in bounds.items():
            yield name, "at most", bound.limit, bound.value, ""
    else:
        row = explained.profile.agreement("profile")
        yield "offline.nll", "at most", limits.max_offline_difference, worse(row.ci_low, row.ci_high), ""
        yield "offline.decode", "at most", limits.max_offline_difference, worse(row.decode_low, row.decode_high), ""
    tokens = explained.tokens()
    least = tokens.limit if limits.min_offline_tokens == "auto" else limits.min_offline_tokens
    yield "offline.tokens", "at least", least, tokens.value, ""
    effect = explained.effect() if whole else None
    if effect is not None:
        yield "offline.effect", "at least", limits.min_offline_effect, effect.low, ""
