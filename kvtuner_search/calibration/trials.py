"""Trials, before and after they are scored, and figures over many of them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from optuna.trial import FrozenTrial

from kvtuner_search.calibration.front import pareto_front
from kvtuner_search.calibration.objective import TrialOutcome
from kvtuner_search.calibration.space import Choices
from kvtuner_search.calibration.variables import Parameters

PIECE: Final = 2500  # numbers of one attribute: some databases limit it to 64 KiB
LEAST_LOSS: Final = 1e-9  # nats; the 16-bit cache itself has none


@dataclass(frozen=True)
class Anchor:
    """A setting that is tried first."""

    origin: str  # fisher, uniform, proxy, preset; or of a later proposal
    choices: Choices
    goal: int | None = None  # the budget that it was made for
    parameters: Parameters | None = None  # values of the search's variables that stand for it
    state: Mapping[str, int] = field(default_factory=dict)  # what the sampler notes with it


@dataclass(frozen=True)
class FinishedTrial:
    """A finished trial."""

    number: int
    origin: str  # fisher, uniform, proxy, preset, refined, random, or the sampler
    choices: Choices
    outcome: TrialOutcome
    seconds: float
    duplicate: bool  # the proposal had been scored before; its outcome is that trial's
    goal: int | None = None  # the budget that it was proposed for
    parameters: Parameters = field(
        default_factory=dict
    )  # values of the search's variables; empty if no values stand for it
    state: Mapping[str, int] = field(default_factory=dict)  # what the sampler noted with it


def hypervolume(outcomes: Sequence[TrialOutcome], scale: float, corner: tuple[float, float]) -> float:
    """Area that outcomes dominate below ``corner`` (cost, loss), in units of cost times decades of loss.

    Args:
        outcomes: outcomes of trials; the loss of an early stop is multiplied by ``scale`` (see rung_ratio).
    """
    area, edge = 0.0, math.log10(corner[1])
    points = [(o.cost, math.log10(max(o.loss * (1 if o.complete else scale), LEAST_LOSS))) for o in outcomes]
    inside = (point for point in points if point[0] < corner[0] and point[1] < edge)
    for cost, loss in pareto_front(inside, lambda point: point[0], lambda point: point[1]):
        area += (corner[0] - cost) * (edge - loss)
        edge = loss
    return area


def rung_ratio(trials: Sequence[FinishedTrial]) -> float:
    """Ratio of the loss on all rungs to that on the first: the median over complete trials."""
    ratios = [t.outcome.loss / t.outcome.rungs[0] for t in trials if t.outcome.complete and t.outcome.rungs[0] > 0]
    return statistics.median(ratios) if ratios else 1.0


def pareto(trials: Sequence[FinishedTrial]) -> list[FinishedTrial]:
    """Complete trials that no other complete trial beats on both cost and loss, cheapest first."""
    whole = sorted((t for t in trials if t.outcome.complete and not t.duplicate), key=lambda t: t.number)
    return pareto_front(whole, lambda t: t.outcome.cost, lambda t: t.outcome.loss)


def comparable(outcome: TrialOutcome, others: Sequence[FinishedTrial]) -> float:
    """log10 of the estimated loss on all rungs."""
    return math.log10(max(outcome.loss * (1 if outcome.complete else rung_ratio(others)), LEAST_LOSS))


def relative_loss(outcome: TrialOutcome, reference: TrialOutcome) -> float:
    """Logarithm of a loss over that of a complete reference, at the highest rung that was run."""
    rung = len(outcome.rungs) - 1
    return math.log(max(outcome.loss, LEAST_LOSS) / max(reference.rungs[rung], LEAST_LOSS))


def outcome_attributes(outcome: TrialOutcome) -> dict[str, Any]:
    """An outcome as user attributes of a trial, each of its own, so that Optuna's dashboard shows and sorts them."""
    return {
        "bytes": outcome.cost,
        "rungs": list(outcome.rungs),
        "complete": outcome.complete,
        **{f"kl {i // PIECE}": list(outcome.kl[i : i + PIECE]) for i in range(0, len(outcome.kl), PIECE)},
        "sources": list(outcome.sources),
    }


def finished_trial(trial: FrozenTrial) -> FinishedTrial:
    """A finished trial of a study, read from its storage."""
    attributes = trial.user_attrs
    rungs, sources = (tuple(attributes[name]) for name in ("rungs", "sources"))
    names = itertools.takewhile(attributes.__contains__, (f"kl {piece}" for piece in itertools.count()))
    kl = tuple(itertools.chain.from_iterable(attributes[name] for name in names))
    return FinishedTrial(
        trial.number,
        attributes["origin"],
        tuple(attributes["choices"]),
        TrialOutcome(int(attributes["bytes"]), rungs, bool(attributes["complete"]), kl, sources),
        float(attributes["seconds"]),
        bool(attributes["duplicate"]),
        attributes["goal"],
        trial.params,
        attributes["state"],
    )
