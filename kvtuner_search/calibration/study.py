"""The Optuna study: shared storage, enqueued first trials, proposals, and resuming after a kill.

A trial's sampler is seeded by the number of finished trials, and samplers use only finished trials. So a study that was killed and
resumed ends with the same trials as an uninterrupted one. Trials of workers that have ended are marked as failed and ignored.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from kvtuner_search.calibration.agreement import agree, agreed, difference, open_study
from kvtuner_search.calibration.candidates import pair_name
from kvtuner_search.calibration.front import pareto_front
from kvtuner_search.calibration.membership import Membership
from kvtuner_search.calibration.objective import TrialOutcome
from kvtuner_search.calibration.proxy import affordable_point, correct, proxy_front
from kvtuner_search.calibration.samplers import RANDOM, make
from kvtuner_search.calibration.space import Choices, Space
from kvtuner_search.calibration.storage import Store, open_storage
from kvtuner_search.errors import DataError, UsageError

__all__ = ["Anchor", "FinishedTrial", "Study", "hypervolume", "open_storage", "pareto", "rung_ratio"]

SAMPLER_EVERY: Final = 3  # every third proposal is Optuna's sampler's, the others are optima of the corrected proxy
DRAWS: Final = 8  # weights drawn before a proposal is left to the sampler
TRUSTED: Final = ("fisher", "proxy", "refined", "uniform", "preset")  # origins whose affordable trials run all rungs
PAUSE: Final = 0.1  # seconds before another proposal, for each one in a row that another worker was trying
LEAST_LOSS: Final = 1e-9  # nats; the 16-bit cache itself has none
DUPLICATES: Final = 3  # finished trials, repeated proposals included, are at most this many times the requested trials


@dataclass(frozen=True)
class Anchor:
    """A setting that is tried first."""

    origin: str  # fisher, uniform, proxy, preset
    choices: Choices


@dataclass(frozen=True)
class FinishedTrial:
    """A finished trial."""

    number: int
    origin: str  # fisher, uniform, proxy, preset, refined, random, or the sampler
    choices: Choices
    outcome: TrialOutcome
    seconds: float
    duplicate: bool  # the proposal had been scored before; its outcome is that trial's


class Study:
    """One search, in a storage that other processes may share.

    Args:
        store: where trials live.
        name: study name within the storage.
        sampler: a key of SAMPLERS.
        seed: seed of all proposals.

    Raises:
        DataError: if the storage cannot be used, here and in every method, or a study of that name belongs to another program.
    """

    def __init__(self, store: Store, name: str, sampler: str, seed: int) -> None:
        self.store, self.name, self.sampler, self.seed = store, name, sampler, seed
        self._anchors: tuple[Anchor, ...] = ()
        with store.guard():
            self.study = open_study(store, name, seed, 2)
            self._agreed = open_study(store, f"{name}-agreed", seed, 1)
        self.members = Membership(store, self.study, name)

    def agree(self, key: str, content: Any) -> Any:
        """Say what holds for all workers under a key, plain JSON; returns what the first one said."""
        with self.members.guard():
            return agree(self._agreed, key, content)

    def claim(self, facts: Mapping[str, Any]) -> None:
        """Bind the study to the facts that its trials depend on.

        Raises:
            UsageError: if it is bound to something else; the message names what differs.
        """
        here = json.loads(json.dumps(facts, sort_keys=True))
        there = self.agree("facts", here)
        if there != here:
            differing = ", ".join(
                difference(name, there.get(name), here.get(name))
                for name in sorted({*there, *here})
                if there.get(name) != here.get(name)
            )
            raise UsageError(
                f"the study {self.name!r} in {self.store.name} was made with other options, another model or other data"
                f" ({differing}): use the same, or another --output, --storage or --study-name"
            )

    def publish(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Store the plan for all workers, before the first trial; returns the valid plan, which another worker may have stored earlier."""
        found: dict[str, Any] = self.agree("plan", plan)
        return found

    def plan(self) -> dict[str, Any] | None:
        """What :meth:`publish` stored."""
        with self.members.guard():
            found: dict[str, Any] | None = agreed(self._agreed, "plan")
        return found

    def settled(self, trials: int) -> list[FinishedTrial]:
        """The finished trials that all workers with the same ``trials`` choose from: those of the first worker that was done."""
        numbers = set(self.agree(f"finished {trials}", [trial.number for trial in self.finished()]))
        return [trial for trial in self.finished() if trial.number in numbers]

    def fail_abandoned(self, everyone: bool = False) -> int:
        """Register this worker and mark the trials of workers that have ended as failed; returns how many.

        Args:
            everyone: no other worker can be active, so all unfinished trials belong to workers that have ended.
        """
        with self.store.guard():
            self.members.register()
            gone = self.members.fail_abandoned(everyone)
            if not self.members.others(everyone):
                # Nobody else is at work: empty the queue, so that enqueue() fills it in the order of an undisturbed run.
                for trial in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                    self.store.backend.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            return gone

    def close(self) -> None:
        """Leave the study: trials that this worker has not finished are free for others."""
        self.members.leave()

    def enqueue(self, space: Space, anchors: Sequence[Anchor]) -> None:
        """Queue the anchors that are neither queued, running nor finished."""
        self._anchors = tuple(anchors)
        with self.members.guard():
            self._enqueue(space, anchors)

    def _enqueue(self, space: Space, anchors: Sequence[Anchor]) -> None:
        known = self._known()
        for anchor in anchors:
            if anchor.choices not in known:
                known.add(anchor.choices)
                self.study.enqueue_trial(
                    _parameters(space, anchor.choices),
                    user_attrs={"origin": anchor.origin, "choices": list(anchor.choices)},
                )

    def _known(self) -> set[Choices]:
        """Choices that are queued, running or finished."""
        states = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
        trials = self.study.get_trials(deepcopy=False, states=states)
        return {tuple(t.user_attrs["choices"]) for t in trials if "choices" in t.user_attrs}

    def finished(self) -> list[FinishedTrial]:
        """Finished trials, in order of their numbers."""
        with self.members.guard():
            return [_finished(trial) for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]

    def run(
        self,
        space: Space,
        objective: Callable[[Choices, Sequence[TrialOutcome], bool], TrialOutcome],
        trials: int,
        budgets: Sequence[int],
        advance: Callable[[FinishedTrial], None] = lambda _: None,
    ) -> None:
        """Work until the study has ``trials`` distinct finished trials.

        Args:
            space: what may be chosen.
            objective: scores choices, given all outcomes so far and whether a poor first rung may end the trial.
            trials: distinct finished trials of all workers together.
            budgets: bytes per token of the requested profiles; dearer trials violate the constraint.
            advance: called with every trial that this worker finishes.
        """
        attempt = 0
        while True:
            done = self.finished()
            distinct = [trial for trial in done if not trial.duplicate]
            if len(distinct) >= trials or len(done) >= DUPLICATES * trials:
                return
            with self.members.guard():
                proposal = self._propose(space, done, budgets, attempt)
            if proposal is None:
                attempt += 1
                time.sleep(min(attempt, 10) * PAUSE)
                continue
            attempt = 0
            trial, origin, choices = proposal
            started = time.monotonic()
            known = next((t.outcome for t in distinct if t.choices == choices), None)
            try:
                outcome = (
                    objective(choices, [t.outcome for t in distinct], origin not in TRUSTED) if known is None else known
                )
            except BaseException:
                with (
                    contextlib.suppress(DataError),
                    self.members.guard(),
                ):  # what ended the trial is what has to be said
                    self.study.tell(trial, state=TrialState.FAIL)
                raise
            seconds = round(time.monotonic() - started, 3)
            with self.members.guard():
                if known is None:  # somebody else may have finished the same meanwhile: then that counts
                    known = next((t.outcome for t in self.finished() if t.choices == choices and not t.duplicate), None)
                    outcome = outcome if known is None else known
                excess = float(outcome.cost - max(budgets))
                attributes = {
                    "outcome": [outcome.cost, list(outcome.rungs), outcome.complete],
                    "seconds": seconds,
                    "duplicate": known is not None,
                }
                trial = self._tell(trial, attributes, excess, [outcome.cost, _comparable(outcome, distinct)])
            advance(FinishedTrial(trial.number, origin, choices, outcome, seconds, known is not None))

    def _tell(
        self, trial: optuna.Trial, attributes: Mapping[str, Any], excess: float, values: Sequence[float]
    ) -> optuna.Trial:
        """Finish a trial; if somebody failed it meanwhile, another in its place, as what was found counts all the same."""
        while True:
            try:
                for name, value in attributes.items():
                    trial.set_user_attr(name, value)
                trial.set_constraint("budget", excess)
                self.study.tell(trial, values)
                return trial
            except (UpdateFinishedTrialError, ValueError):
                if not self.store.backend.get_trial(trial._trial_id).state.is_finished():
                    raise
                trial = self._again(trial)

    def _again(self, trial: optuna.Trial) -> optuna.Trial:
        """A new running trial of the same choices."""
        old = self.store.backend.get_trial(trial._trial_id)
        attributes = {name: old.user_attrs[name] for name in ("worker", "origin", "choices")}
        copy = create_trial(
            state=TrialState.RUNNING, params=old.params, distributions=old.distributions, user_attrs=attributes
        )
        study_id = self.store.backend.get_study_id_from_name(self.name)
        return optuna.Trial(self.study, self.store.backend.create_new_trial(study_id, copy))

    def _propose(
        self, space: Space, done: Sequence[FinishedTrial], budgets: Sequence[int], attempt: int
    ) -> tuple[optuna.Trial, str, Choices] | None:
        """Ask for the next trial: a queued one, the corrected proxy's optimum, or the sampler's proposal.

        None if another worker is trying the same; ``attempt`` counts how often in a row that happened.
        """
        count = len(done)
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting and self.members.fail_abandoned():
            self._enqueue(space, self._anchors)  # a worker ended while it tried one
            waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting and (self.sampler == RANDOM or attempt):
            known, budget = self._known(), budgets[count % len(budgets)]
            drawn = (self._random(space, count, budget, attempt + draw) for draw in range(DRAWS))
            choices = next((choices for choices in drawn if choices not in known), None)
            if choices is not None:
                self._enqueue(space, [Anchor("random", choices)])
        elif not waiting and count % SAMPLER_EVERY and (refined := self._refined(space, done, budgets)) is not None:
            self._enqueue(space, [Anchor("refined", refined)])
        self.study.sampler = make(self.sampler, (self.seed * 1_000_003 + count) % 2**32)
        trial = self.study.ask(
            {v.name: CategoricalDistribution([pair_name(pair) for pair in v.pairs]) for v in space.variables}
        )
        trial.set_user_attr("worker", self.members.worker.id)
        if "choices" not in trial.user_attrs:
            names = [[pair_name(pair) for pair in v.pairs] for v in space.variables]
            trial.set_user_attr("origin", self.sampler)
            trial.set_user_attr(
                "choices",
                [options.index(trial.params[v.name]) for v, options in zip(space.variables, names, strict=True)],
            )
        origin, choices = trial.user_attrs["origin"], tuple(trial.user_attrs["choices"])
        for other in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if other.number < trial.number and tuple(other.user_attrs.get("choices", ())) == choices:
                self.study.tell(trial, state=TrialState.FAIL)  # the trial with the lower number keeps it
                return None
        return trial, origin, choices

    def _refined(self, space: Space, done: Sequence[FinishedTrial], budgets: Sequence[int]) -> Choices | None:
        """The corrected proxy's optimum at one budget for weights drawn from their posterior; None if all draws were tried."""
        tried = {trial.choices for trial in done}
        correction = correct(
            space, [(t.choices, t.outcome.loss) for t in done if t.outcome.complete and not t.duplicate]
        )
        rng = np.random.default_rng([self.seed, len(done)])
        for _ in range(DRAWS):
            front = proxy_front(space, correction.draw(rng))
            budget = budgets[len(done) % len(budgets)]
            best = affordable_point(space, front, budget)
            if best is not None and best.choices not in tried:
                return best.choices
        return None

    def _random(self, space: Space, count: int, budget: int, draw: int) -> Choices:
        """Uniformly random choices, then random variables made one step cheaper until the budget holds."""
        rng = np.random.default_rng([self.seed, count, draw] if draw else [self.seed, count])
        choices = [int(rng.integers(len(v.pairs))) for v in space.variables]
        while space.cost(choices) > budget and any(choices):
            picked = int(rng.choice([i for i, choice in enumerate(choices) if choice]))
            choices[picked] -= 1
        return tuple(choices)


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


def _comparable(outcome: TrialOutcome, others: Sequence[FinishedTrial]) -> float:
    """log10 of the estimated loss on all rungs."""
    return math.log10(max(outcome.loss * (1 if outcome.complete else rung_ratio(others)), LEAST_LOSS))


def _parameters(space: Space, choices: Choices) -> dict[str, str]:
    return {v.name: pair_name(v.pairs[c]) for v, c in zip(space.variables, choices, strict=True)}


def _finished(trial: FrozenTrial) -> FinishedTrial:
    cost, rungs, complete = trial.user_attrs["outcome"]
    return FinishedTrial(
        trial.number,
        trial.user_attrs["origin"],
        tuple(trial.user_attrs["choices"]),
        TrialOutcome(int(cost), tuple(rungs), bool(complete)),
        float(trial.user_attrs["seconds"]),
        bool(trial.user_attrs["duplicate"]),
    )
