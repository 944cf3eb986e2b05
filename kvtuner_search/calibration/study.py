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
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from kvtuner_search.calibration.agreement import agree, agreed, difference, open_study
from kvtuner_search.calibration.candidates import pair_name
from kvtuner_search.calibration.objective import Outcome
from kvtuner_search.calibration.proxy import correct, proxy_front
from kvtuner_search.calibration.space import Choices, Space
from kvtuner_search.calibration.storage import Store, open_storage
from kvtuner_search.calibration.workers import Worker
from kvtuner_search.errors import DataError, UsageError

__all__ = ["Anchor", "Finished", "Study", "hypervolume", "open_storage", "pareto", "rung_ratio"]

SAMPLER_EVERY: Final = 3  # every third proposal is Optuna's sampler's, the others are optima of the corrected proxy
DRAWS: Final = 8  # weights drawn before a proposal is left to the sampler
TRUSTED: Final = ("fisher", "proxy", "refined", "uniform", "preset")  # origins whose affordable trials run all rungs
PRIOR_WEIGHT: Final = 0.05  # TPE's: with a weight of 1, 16 variables of 20 choices are drawn almost at random
PAUSE: Final = 0.1  # seconds before the next proposal, for each consecutive one that another worker was already trying
LEAST_LOSS: Final = 1e-9  # nats; the 16-bit cache itself has none
DUPLICATES: Final = 3  # finished trials, repeated proposals included, are at most this many times the requested trials


@dataclass(frozen=True)
class Anchor:
    """A setting that is tried first."""

    origin: str  # fisher, uniform, proxy, preset
    choices: Choices


@dataclass(frozen=True)
class Finished:
    """A finished trial."""

    number: int
    origin: str  # fisher, uniform, proxy, preset, refined, tpe, nsga2, random
    choices: Choices
    outcome: Outcome
    seconds: float
    duplicate: bool  # the proposal had been scored before; its outcome is that trial's


class Study:
    """One search, in a storage that other processes may share.

    Args:
        store: where trials live.
        name: study name within the storage.
        sampler: tpe, nsga2 or random.
        seed: seed of all proposals.

    Raises:
        DataError: if the storage cannot be used, here and in every method, or a study of that name belongs to another program.
    """

    def __init__(self, store: Store, name: str, sampler: str, seed: int) -> None:
        self.store, self.name, self.sampler, self.seed = store, name, sampler, seed
        self.worker = Worker(store.file)
        self._anchors: tuple[Anchor, ...] = ()
        with store.guard():
            self.study = open_study(store, name, seed, 2)
            self._agreed = open_study(store, f"{name}-agreed", seed, 1)

    def agree(self, key: str, content: Any) -> Any:
        """Publish a value for all workers under a key, plain JSON; returns the first published value."""
        with self.store.guard():
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
        """The plan that :meth:`publish` stored."""
        with self.store.guard():
            found: dict[str, Any] | None = agreed(self._agreed, "plan")
        return found

    def settled(self, trials: int) -> list[Finished]:
        """The finished trials that all workers with the same ``trials`` choose from: those of the first worker that was done."""
        numbers = set(self.agree(f"finished {trials}", [trial.number for trial in self.finished()]))
        return [trial for trial in self.finished() if trial.number in numbers]

    def bury(self, everyone: bool = False) -> int:
        """Register this worker and mark the trials of workers that have ended as failed; returns how many.

        Args:
            everyone: no other worker can be active, so all unfinished trials belong to workers that have ended.
        """
        with self.store.guard():
            me = f"worker:{self.worker.id}"
            if me not in self.study.user_attrs:
                self.study.set_user_attr(me, self.worker.begin())
            gone = self._bury(everyone)
            if everyone or not self._others():
                # No other worker is active: empty the queue, so that enqueue() fills it in the order of an uninterrupted run.
                for trial in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                    self.store.backend.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            return gone

    def close(self) -> None:
        """Leave the study: trials that this worker has not finished become free for others."""
        with contextlib.suppress(DataError), self.store.guard():
            me = f"worker:{self.worker.id}"
            if self.study.user_attrs.get(me) is not None:
                self.study.set_user_attr(me, None)
        self.worker.end()

    def _others(self) -> list[Any]:
        """Other workers that may be active."""
        workers = {name: value for name, value in self.study.user_attrs.items() if name.startswith("worker:")}
        workers.pop(f"worker:{self.worker.id}", None)
        return [worker for worker in workers.values() if not self.worker.ended(worker)]

    def _bury(self, everyone: bool = False) -> int:
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        workers = self.study.user_attrs if running else {}
        gone = []
        for trial in running:
            name = trial.user_attrs.get("worker")
            # A worker signs a trial right after taking it: without a signature it may belong to any worker but this one.
            ended = not self._others() if name is None else self._ended(workers, name)
            if (everyone and name != self.worker.id) or ended:
                gone.append(trial)
        for trial in gone:
            self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        return len(gone)

    def _ended(self, workers: Mapping[str, Any], name: str) -> bool:
        return f"worker:{name}" in workers and self.worker.ended(workers[f"worker:{name}"])

    def enqueue(self, space: Space, anchors: Sequence[Anchor]) -> None:
        """Queue the anchors that are neither queued, running nor finished."""
        self._anchors = tuple(anchors)
        with self.store.guard():
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

    def finished(self) -> list[Finished]:
        """Finished trials, in order of their numbers."""
        with self.store.guard():
            return [_finished(trial) for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]

    def run(
        self,
        space: Space,
        objective: Callable[[Choices, Sequence[Outcome], bool], Outcome],
        trials: int,
        budgets: Sequence[int],
        advance: Callable[[Finished], None] = lambda _: None,
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
            with self.store.guard():
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
                    self.store.guard(),
                ):  # the error that ended the trial must be reported, not this one
                    self.study.tell(trial, state=TrialState.FAIL)
                raise
            seconds = round(time.monotonic() - started, 3)
            with self.store.guard():
                if self.store.backend.get_trial(trial._trial_id).state.is_finished():
                    trial = self._again(trial)  # another worker marked it as failed meanwhile: its outcome still counts
                trial.set_user_attr("outcome", [outcome.cost, list(outcome.rungs), outcome.complete])
                trial.set_user_attr("seconds", seconds)
                trial.set_user_attr("duplicate", known is not None)
                trial.set_constraint("budget", float(outcome.cost - max(budgets)))
                self.study.tell(trial, [outcome.cost, _comparable(outcome, distinct)])
            advance(Finished(trial.number, origin, choices, outcome, seconds, known is not None))

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
        self, space: Space, done: Sequence[Finished], budgets: Sequence[int], attempt: int
    ) -> tuple[optuna.Trial, str, Choices] | None:
        """Ask for the next trial: a queued one, the corrected proxy's optimum, or the sampler's proposal.

        None if another worker is trying the same; ``attempt`` counts how often in a row that happened.
        """
        count = len(done)
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting and self._bury():
            self._enqueue(space, self._anchors)  # a worker ended while trying one
            waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting and (self.sampler == "random" or attempt):
            known, budget = self._known(), budgets[count % len(budgets)]
            drawn = (self._random(space, count, budget, attempt + draw) for draw in range(DRAWS))
            choices = next((choices for choices in drawn if choices not in known), None)
            if choices is not None:
                self._enqueue(space, [Anchor("random", choices)])
        elif not waiting and count % SAMPLER_EVERY and (refined := self._refined(space, done, budgets)) is not None:
            self._enqueue(space, [Anchor("refined", refined)])
        self.study.sampler = self._sampler(count)
        trial = self.study.ask(
            {v.name: CategoricalDistribution([pair_name(pair) for pair in v.pairs]) for v in space.variables}
        )
        trial.set_user_attr("worker", self.worker.id)
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

    def _refined(self, space: Space, done: Sequence[Finished], budgets: Sequence[int]) -> Choices | None:
        """The corrected proxy's optimum at one budget for weights drawn from their posterior; None if all draws were tried."""
        tried = {trial.choices for trial in done}
        correction = correct(
            space, [(t.choices, t.outcome.loss) for t in done if t.outcome.complete and not t.duplicate]
        )
        rng = np.random.default_rng([self.seed, len(done)])
        for _ in range(DRAWS):
            front = proxy_front(space, correction.draw(rng))
            budget = budgets[len(done) % len(budgets)]
            best = next(
                (p.choices for p in reversed(front) if p.nbytes <= budget and space.cost(p.choices) <= budget), None
            )
            if best is not None and best not in tried:
                return best
        return None

    def _random(self, space: Space, count: int, budget: int, draw: int) -> Choices:
        """Uniformly random choices, then random variables made one step cheaper until the budget holds."""
        rng = np.random.default_rng([self.seed, count, draw] if draw else [self.seed, count])
        choices = [int(rng.integers(len(v.pairs))) for v in space.variables]
        while space.cost(choices) > budget and any(choices):
            picked = int(rng.choice([i for i, choice in enumerate(choices) if choice]))
            choices[picked] -= 1
        return tuple(choices)

    def _sampler(self, count: int) -> BaseSampler:
        seed = (self.seed * 1_000_003 + count) % 2**32
        if self.sampler == "nsga2":
            return NSGAIISampler(population_size=20, seed=seed)
        with warnings.catch_warnings():
            # Both settings are deprecated and have no successor yet; pyproject keeps Optuna below 6, which removes them.
            warnings.simplefilter("ignore", FutureWarning)
            return TPESampler(
                multivariate=True,
                seed=seed,
                n_startup_trials=10,
                gamma=lambda finished: min(math.ceil(finished / 5), 25),
                prior_weight=PRIOR_WEIGHT,
            )


def hypervolume(outcomes: Sequence[Outcome], scale: float, corner: tuple[float, float]) -> float:
    """Area that outcomes dominate below ``corner`` (cost, loss), in units of cost times decades of loss.

    Args:
        outcomes: outcomes of trials; the loss of an early stop is multiplied by ``scale`` (see rung_ratio).
    """
    area, edge = 0.0, math.log10(corner[1])
    points = sorted(
        (o.cost, math.log10(max(o.loss * (1 if o.complete else scale), LEAST_LOSS)))
        for o in outcomes
        if o.cost < corner[0]
    )
    for cost, loss in points:
        if loss < edge:
            area += (corner[0] - cost) * (edge - loss)
            edge = loss
    return area


def rung_ratio(trials: Sequence[Finished]) -> float:
    """Ratio of the loss on all rungs to that on the first: the median over complete trials."""
    ratios = [t.outcome.loss / t.outcome.rungs[0] for t in trials if t.outcome.complete and t.outcome.rungs[0] > 0]
    return statistics.median(ratios) if ratios else 1.0


def pareto(trials: Sequence[Finished]) -> list[Finished]:
    """Complete trials that no other complete trial beats on both cost and loss, cheapest first."""
    front: list[Finished] = []
    for trial in sorted(
        (t for t in trials if t.outcome.complete and not t.duplicate),
        key=lambda t: (t.outcome.cost, t.outcome.loss, t.number),
    ):
        if not front or trial.outcome.loss < front[-1].outcome.loss:
            front.append(trial)
    return front


def _comparable(outcome: Outcome, others: Sequence[Finished]) -> float:
    """log10 of the estimated loss on all rungs."""
    return math.log10(max(outcome.loss * (1 if outcome.complete else rung_ratio(others)), LEAST_LOSS))


def _parameters(space: Space, choices: Choices) -> dict[str, str]:
    return {v.name: pair_name(v.pairs[c]) for v, c in zip(space.variables, choices, strict=True)}


def _finished(trial: FrozenTrial) -> Finished:
    cost, rungs, complete = trial.user_attrs["outcome"]
    return Finished(
        trial.number,
        trial.user_attrs["origin"],
        tuple(trial.user_attrs["choices"]),
        Outcome(int(cost), tuple(rungs), bool(complete)),
        float(trial.user_attrs["seconds"]),
        bool(trial.user_attrs["duplicate"]),
    )
