"""Finalists of a search, their scores on a held-out split, and how they compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvtuner_kernels.layout import bytes_per_token, effective_bits
from kvtuner_kernels.reference import Centres
from kvtuner_search.calibration.record import Compared, Difference
from kvtuner_search.calibration.space import Space
from kvtuner_search.calibration.trials import FinishedTrial
from kvtuner_search.evaluation.scorer import Scorer, Scores
from kvtuner_search.evaluation.statistics import Interval, measures, paired_loss
from kvtuner_search.evaluation.stored import Setting

FINALISTS = 4  # searched settings that are scored on the selection split for each target


@dataclass(frozen=True)
class Candidate:
    """A setting and where it came from."""

    name: str  # for example: trial 31, 4-g64-sym/4-g64-sym
    origin: str  # the sampler, refined, fisher, proxy, uniform, preset, random, stored by others
    setting: Setting
    cost: int
    search_loss: float | None = None


@dataclass(frozen=True)
class HeldOutResult:
    """A candidate on a held-out split."""

    candidate: Candidate
    scores: Scores


class HeldOutScorer:
    """Scores settings on one held-out split, each setting once."""

    def __init__(self, scorer: Scorer, centres: Mapping[int, Centres]) -> None:
        self.scorer, self.centres = scorer, centres
        self._seen: dict[Setting, Scores] = {}

    def __call__(self, candidate: Candidate, advance: Callable[[], None]) -> HeldOutResult:
        if candidate.setting not in self._seen:
            self._seen[candidate.setting] = self.scorer.score_all(candidate.setting, self.centres)
            advance()
        return HeldOutResult(candidate, self._seen[candidate.setting])


def finalists(
    space: Space,
    found: Sequence[FinishedTrial],
    random: Sequence[FinishedTrial],
    candidate: Callable[[FinishedTrial, str], Candidate],
    affordable: Callable[[FinishedTrial], bool],
) -> list[Candidate]:
    """The best searched settings, and the best of each kind of rival, by their loss on the search split."""

    def best(trials: Sequence[FinishedTrial], count: int) -> list[FinishedTrial]:
        fitting = [t for t in trials if t.outcome.complete and not t.duplicate and affordable(t)]
        return sorted(fitting, key=lambda t: (t.outcome.loss, t.outcome.cost, t.number))[:count]

    picked = [candidate(t, t.origin) for t in best(found, FINALISTS)]
    # Before uniform settings: where an optimum is one of those, it stays the optimum that trials have to beat.
    for origin in ("fisher", "proxy", "preset"):
        picked += [candidate(t, origin) for t in best([t for t in found if t.origin == origin], 1)]
    uniform = [t for t in found if space.uniform_pair(t.choices)]
    picked += [candidate(t, "uniform") for t in best(uniform, 2)]
    picked += [
        candidate(t, "random")
        for t in sorted(filter(affordable, random), key=lambda t: (not t.outcome.complete, t.outcome.loss))[:1]
    ]
    return list({c.setting: c for c in reversed(picked)}.values())[::-1]


def verdict(interval: Interval) -> Literal["same", "better", "worse", "inconclusive"]:
    """What an interval of ``chosen - rival`` says about the chosen setting."""
    if interval.low == interval.high == 0:
        return "same"
    return "better" if interval.high < 0 else "worse" if interval.low > 0 else "inconclusive"


def row(result: HeldOutResult, chosen: HeldOutResult, baseline: Scores, kv_heads: int, head_dim: int) -> Compared:
    """One line of the comparison on the test split."""
    interval = paired_loss(chosen.scores, result.scores)
    own = paired_loss(result.scores, baseline)
    setting = result.candidate.setting
    return Compared(
        name=result.candidate.name,
        origin=result.candidate.origin,
        bytes_per_token=bytes_per_token(setting, kv_heads, head_dim),
        effective_bits=effective_bits(setting, kv_heads, head_dim),
        layers=[str(layer) for layer in setting],
        search_loss=result.candidate.search_loss,
        loss=result.scores.loss,
        loss_low=own.low,
        loss_high=own.high,
        measures=measures(result.scores, baseline, "test"),
        chosen_minus_this=Difference(**interval._asdict()),
        verdict=verdict(interval),
    )
