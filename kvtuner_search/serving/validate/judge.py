"""Hold the figures to the thresholds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from kvtuner_search.profile.fields import Measure
from kvtuner_search.profile.validation import Capacity, Check, Greedy, OfflineAgreement, Semantics, TaskResult, holds
from kvtuner_search.serving.validate.options import Limits


def judge(
    limits: Limits,
    likelihood: Sequence[Measure],
    tasks: Sequence[TaskResult],
    greedy: Greedy,
    capacity: Capacity,
    semantics: Semantics,
    offline: Sequence[OfflineAgreement],
) -> list[Check]:
    """One check for each threshold that is set and, for likelihood and accuracy, each source and task."""
    return [
        Check(
            name=name, relation=relation, limit=limit, value=value, passed=holds(value, relation, limit), reason=reason
        )
        for name, relation, limit, value, reason in _rows(
            limits, likelihood, tasks, greedy, capacity, semantics, offline
        )
        if limit is not None
    ]


_Row = tuple[str, Literal["at most", "at least"], float | None, float | None, str]


def _rows(
    limits: Limits,
    likelihood: Sequence[Measure],
    tasks: Sequence[TaskResult],
    greedy: Greedy,
    capacity: Capacity,
    semantics: Semantics,
    offline: Sequence[OfflineAgreement],
) -> Iterator[_Row]:
    for measure in likelihood:
        yield f"nll.{measure.data}", "at most", limits.max_nll_increase, measure.ci_high, ""
    drop = None if limits.max_accuracy_drop is None else -limits.max_accuracy_drop
    for task in tasks:
        yield f"accuracy.{task.data}", "at least", drop, task.ci_low, ""
    yield "greedy", "at least", limits.min_agreement, greedy.ci_low, ""
    share = capacity.ratio / capacity.predicted if capacity.comparable else None
    yield "capacity", "at least", limits.min_capacity, share, capacity.reason
    if semantics.difference is not None and semantics.baseline_difference is not None:
        excess = semantics.difference - semantics.baseline_difference
        yield "decode-semantics", "at most", limits.max_path_difference, excess, ""
    for row in offline:
        if row.cache == "profile":
            text = max(abs(row.ci_low), abs(row.ci_high))
            decode = max(abs(row.decode_low), abs(row.decode_high))
            yield "offline.nll", "at most", limits.max_offline_difference, text, ""
            yield "offline.decode", "at most", limits.max_offline_difference, decode, ""
            yield "offline.tokens", "at least", limits.min_offline_tokens, row.token_agreement, ""
