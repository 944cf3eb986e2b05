"""Score a setting on the search split, rung by rung: hopeless settings stop after the first tier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from kvtuner_kernels.reference import Centres
from kvtuner_search.calibration.space import Choices, Space
from kvtuner_search.evaluation.scorer import Scorer

MARGIN: Final = (
    1.1  # a setting stops early if another one of no more bytes has a first-rung loss this many times smaller
)


@dataclass(frozen=True)
class TrialOutcome:
    """What one trial found."""

    cost: int  # bytes per token (see Space.cost)
    rungs: tuple[float, ...]  # loss on tier 0, then on tiers 0 and 1 together, and so on; shorter if stopped early
    complete: bool  # all rungs were run

    @property
    def loss(self) -> float:
        """The loss at the highest rung that was run."""
        return self.rungs[-1]


class TrialObjective:
    """Scores settings; ``finished`` outcomes decide whether the later rungs are worth running."""

    def __init__(self, scorer: Scorer, centres: Mapping[int, Centres], space: Space, budget: int) -> None:
        self.scorer, self.centres, self.space, self.budget = scorer, centres, space, budget

    def __call__(self, choices: Choices, finished: Iterable[TrialOutcome], screen: bool) -> TrialOutcome:
        """Score one setting. It stops after the first rung if it exceeds the budget or, with ``screen``, looks poor there."""
        cost, setting = self.space.cost(choices), self.space.setting(choices)
        scores = self.scorer.score(setting, self.centres, 0)
        rungs = [scores.loss]
        best = min((o.rungs[0] for o in finished if o.complete and o.cost <= cost), default=float("inf"))
        if cost > self.budget or (screen and rungs[0] > MARGIN * best):
            return TrialOutcome(cost, tuple(rungs), complete=len(self.scorer.tiers) == 1)
        for tier in range(1, len(self.scorer.tiers)):
            scores = scores + self.scorer.score(setting, self.centres, tier)
            rungs.append(scores.loss)
        return TrialOutcome(cost, tuple(rungs), complete=True)
