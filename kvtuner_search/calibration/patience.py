"""How far a search has come: its best setting against those that needed no trial, and whether more trials are worth their time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtuner_search.calibration.objective import TrialOutcome
from kvtuner_search.calibration.trials import FinishedTrial
from kvtuner_search.evaluation.statistics import Interval, paired_change

UNTRIED: Final = ("fisher", "proxy")  # optima known before any trial; the first that there is, is the one to beat
FIRST: Final = (*UNTRIED, "uniform", "preset")  # origins of settings that are tried first


class Standstill(NamedTuple):
    """Why a search ends before its last trial."""

    trials: int  # distinct ones so far
    gain: float  # of the last ones, relative to the loss
    noise: float  # relative differences that the samples tell apart, 95 %

    def __str__(self) -> str:
        least = f"differences of {self.noise:.1%}" if math.isfinite(self.noise) else "no differences"
        return (
            f"ended after {self.trials} trials: the last ones gained {self.gain:.1%}, and these samples tell {least} apart"
            " (--resume --patience 0 goes on)"
        )


def compared(ours: TrialOutcome, theirs: TrialOutcome, weights: NDArray[np.float64]) -> Interval:
    """Relative difference of the losses of two complete trials, paired over the samples; negative means that ours is better.

    Args:
        weights: [samples] by how much each sample's KL counts in the loss (Scores.sample_weights).
    """
    if theirs.loss <= 0:
        return Interval(0.0, -math.inf, math.inf)
    return paired_change(weights * ours.kl, weights * theirs.kl)


def best(trials: Sequence[FinishedTrial], budget: float, origin: str | None = None) -> FinishedTrial | None:
    """The complete trial of least loss within the budget, of one origin or of all."""
    fitting = (t for t in trials if t.outcome.complete and t.outcome.cost <= budget and origin in (None, t.origin))
    return min(fitting, key=lambda t: (t.outcome.loss, t.number), default=None)


def reference(trials: Sequence[FinishedTrial], budget: float) -> FinishedTrial | None:
    """The optimum that needed no trial, at the budget."""
    return next((t for origin in UNTRIED if (t := best(trials, budget, origin)) is not None), None)


def standstill(
    trials: Sequence[FinishedTrial], budgets: Sequence[int], patience: int, weights: NDArray[np.float64]
) -> Standstill | None:
    """Whether the last ``patience`` distinct trials gained less at every budget than the samples can tell apart; None if the search is to go on.

    Args:
        trials: distinct finished ones, in order.
        budgets: bytes per token.
        patience: 0 never ends a search. The settings that are tried first do not count.
        weights: see :func:`compared`.
    """
    proposed = [index for index, trial in enumerate(trials) if trial.origin not in FIRST]
    if not patience or len(proposed) < patience:
        return None
    before = trials[: proposed[-patience]]
    gains, noises = [], []
    for budget in budgets:
        old, new = best(before, budget), best(trials, budget)
        if old is None or new is None:
            return None
        gains.append(1 - new.outcome.loss / old.outcome.loss if old.outcome.loss > 0 else 0.0)
        noises.append(noise(trials, budget, weights))
        if gains[-1] > noises[-1]:
            return None
    return Standstill(len(trials), max(gains), max(noises))


def noise(trials: Sequence[FinishedTrial], budget: float, weights: NDArray[np.float64]) -> float:
    """The relative difference that the samples tell apart: half the width of the interval between the optimum that needed no trial and the best other
    setting; 0 where nothing else was run to the end."""
    first = reference(trials, budget)
    other = best([t for t in trials if first is None or t.choices != first.choices], budget)
    if first is None or other is None:
        return 0.0
    interval = compared(other.outcome, first.outcome, weights)
    return (interval.high - interval.low) / 2


def progress(trials: Sequence[FinishedTrial], budget: float, weights: NDArray[np.float64]) -> str:
    """The best setting within a budget, and the optima that needed no trial and the best uniform one: their losses, and by how much that of the best
    differs, with its paired interval."""
    ours = best(trials, budget)
    if ours is None:
        return ""
    parts = [f"best {ours.outcome.loss:.4f} nats ({ours.origin})"]
    for origin in (*UNTRIED, "uniform"):
        rival = best(trials, budget, origin)
        if rival is None or rival.choices == ours.choices or rival.outcome.loss <= 0:
            continue
        estimate, low, high = (100 * end for end in compared(ours.outcome, rival.outcome, weights))
        interval = f" [{low:+.0f}, {high:+.0f}]" if math.isfinite(high) else ""
        parts.append(f"{origin} {rival.outcome.loss:.4f}: {estimate:+.0f} %{interval}")
    return "; ".join(parts)
