"""Score a setting on the search split, rung by rung: hopeless settings stop before the last one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtuner_kernels.reference import Centres
from kvtuner_search.calibration.space import Choices, Space
from kvtuner_search.evaluation.scorer import Scorer, Scores
from kvtuner_search.evaluation.statistics import paired_log_ratio

STOP: Final = 0.68  # confidence of the interval that ends a trial: about one standard error


@dataclass(frozen=True)
class TrialOutcome:
    """What one trial found."""

    cost: int  # bytes per token (see Space.cost)
    rungs: tuple[float, ...]  # loss on tier 0, then on tiers 0 and 1 together, and so on; shorter if stopped early
    complete: bool  # all rungs were run
    kl: tuple[float, ...] = ()  # nats of each sample that was run, so that trials are compared on the same samples
    sources: tuple[float, ...] = ()  # loss of each source at the highest rung that was run

    @property
    def loss(self) -> float:
        """The loss at the highest rung that was run."""
        return self.rungs[-1]


class TrialObjective:
    """Scores settings; ``finished`` outcomes decide whether the later rungs are worth running."""

    def __init__(self, scorer: Scorer, centres: Mapping[int, Centres], space: Space, budget: int) -> None:
        self.scorer, self.centres, self.space, self.budget = scorer, centres, space, budget

    def __call__(self, choices: Choices, finished: Iterable[TrialOutcome], screen: bool) -> TrialOutcome:
        """Score one setting. It stops after the first rung if it exceeds the budget; with ``screen`` also after any at which it is worse than the best
        one of no more bytes, by an interval paired over the samples."""
        cost, setting = self.space.cost(choices), self.space.setting(choices)
        rivals = (o for o in finished if o.complete and o.cost <= cost and o.kl)
        best = min(rivals, key=lambda o: o.loss, default=None)
        scores = self.scorer.score(setting, self.centres, 0)
        rungs = [scores.loss]
        for tier in range(1, len(self.scorer.tiers)):
            if cost > self.budget or (screen and best is not None and _worse(scores, best)):
                return _outcome(cost, rungs, scores, complete=False)
            scores = scores + self.scorer.score(setting, self.centres, tier)
            rungs.append(scores.loss)
        return _outcome(cost, rungs, scores, complete=True)


def _worse(scores: Scores, rival: TrialOutcome) -> bool:
    """Whether a setting is worse than another on the samples so far, sources weighed as in the loss."""
    shares, names = scores.weights, list(scores.sources)
    weight = np.array([shares[name] / names.count(name) for name in names])
    return paired_log_ratio(scores.kl, np.array(rival.kl[: len(names)]), weight, STOP).low > 0


def _outcome(cost: int, rungs: list[float], scores: Scores, complete: bool) -> TrialOutcome:
    sources = tuple(scores.of(name).loss for name in scores.names)
    return TrialOutcome(cost, tuple(rungs), complete, tuple(map(float, scores.kl)), sources)
