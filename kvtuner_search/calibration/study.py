"""The Optuna study: shared storage, enqueued first trials, proposals, and resuming after a kill.

A trial's sampler is seeded by the number of finished trials, and samplers use only finished trials. So a study that was killed and
resumed ends with the same trials as an uninterrupted one. Trials of workers that have ended are marked as failed and ignored.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from kvtuner_search.calibration.agreement import agree, agreed, difference, open_study
from kvtuner_search.calibration.membership import Membership
from kvtuner_search.calibration.objective import TrialOutcome
from kvtuner_search.calibration.proposals import Lesson, Proposals
from kvtuner_search.calibration.proxy import affordable_point, correct, proxy_front
from kvtuner_search.calibration.samplers import RANDOM, sampler
from kvtuner_search.calibration.space import Choices, Space
from kvtuner_search.calibration.storage import Store, open_storage
from kvtuner_search.calibration.trials import (
    Anchor,
    FinishedTrial,
    comparable,
    finished_trial,
    outcome_attributes,
    relative_loss,
)
from kvtuner_search.calibration.variables import Variables, variables_of
from kvtuner_search.errors import DataError, UsageError

__all__ = ["Study", "open_storage"]

OBJECTIVE: Final = "KL divergence, nats a token"
DRAWS: Final = 8  # draws of which the first new setting is taken
TRUSTED: Final = ("fisher", "proxy", "refined", "uniform", "preset")  # origins whose affordable trials run all rungs
PAUSE: Final = 0.1  # seconds before another proposal, for each one in a row that another worker was trying
DUPLICATES: Final = 3  # finished trials, repeated proposals included, are at most this many times the requested trials


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
        self._variables: Variables | None = None
        self._proposals: Proposals | None = None
        with store.guard():
            self.study = open_study(store, name, seed)
            self._agreed = open_study(store, f"{name}-agreed", seed)
            if self.study.metric_names is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ExperimentalWarning)
                    self.study.set_metric_names([OBJECTIVE])  # which Optuna's dashboard shows
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

    def settled(self, trials: int, patience: int) -> list[FinishedTrial]:
        """The finished trials that all workers with the same ``trials`` and ``patience`` choose from: those of the first worker that was done."""
        key = f"finished {trials} with patience {patience}"
        numbers = set(self.agree(key, [trial.number for trial in self.finished()]))
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
                parameters = self._variables_of(space).encode(anchor.choices, anchor.origin)
                if anchor.goal is None and sampler(self.sampler).over != "pairs":
                    parameters = None  # weights say nothing without a budget
                self.study.enqueue_trial(dict(parameters or {}), user_attrs=_attributes(anchor))

    def _known(self) -> set[Choices]:
        """Choices that are queued, running or finished."""
        states = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
        trials = self.study.get_trials(deepcopy=False, states=states)
        return {tuple(t.user_attrs["choices"]) for t in trials if "choices" in t.user_attrs}

    def finished(self) -> list[FinishedTrial]:
        """Finished trials, in order of their numbers."""
        with self.members.guard():
            return [
                finished_trial(trial) for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            ]

    def run(
        self,
        space: Space,
        objective: Callable[[Choices, Sequence[TrialOutcome], bool], TrialOutcome],
        trials: int,
        budgets: Sequence[int],
        advance: Callable[[FinishedTrial], None] = lambda _: None,
        enough: Callable[[Sequence[FinishedTrial]], bool] = lambda _: False,
    ) -> None:
        """Work until the study has ``trials`` distinct finished trials.

        Args:
            space: what may be chosen.
            objective: scores choices, given all outcomes so far and whether a poor first rung may end the trial.
            trials: distinct finished trials of all workers together.
            budgets: bytes per token of the requested profiles; dearer trials violate the constraint.
            advance: called with every trial that this worker finishes.
            enough: given the distinct finished trials, whether no more are wanted.
        """
        attempt = 0
        while True:
            done = self.finished()
            distinct = [trial for trial in done if not trial.duplicate]
            if len(distinct) >= trials or len(done) >= DUPLICATES * trials or enough(distinct):
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
                attributes = {**outcome_attributes(outcome), "seconds": seconds, "duplicate": known is not None}
                trial = self._tell(trial, attributes, excess, 10 ** comparable(outcome, distinct))
            advance(FinishedTrial(trial.number, origin, choices, outcome, seconds, known is not None))

    def _tell(self, trial: optuna.Trial, attributes: Mapping[str, Any], excess: float, loss: float) -> optuna.Trial:
        """Finish a trial; if somebody failed it meanwhile, another in its place, as what was found counts all the same."""
        while True:
            try:
                for name, value in attributes.items():
                    trial.set_user_attr(name, value)
                trial.set_constraint("budget", excess)
                self.study.tell(trial, loss)
                return trial
            except (UpdateFinishedTrialError, ValueError):
                if not self.store.backend.get_trial(trial._trial_id).state.is_finished():
                    raise
                trial = self._again(trial)

    def _again(self, trial: optuna.Trial) -> optuna.Trial:
        """A new running trial of the same choices."""
        old = self.store.backend.get_trial(trial._trial_id)
        attributes = {name: old.user_attrs[name] for name in ("worker", "origin", "choices", "goal", "state")}
        return self._running(
            create_trial(
                state=TrialState.RUNNING, params=old.params, distributions=old.distributions, user_attrs=attributes
            )
        )

    def _propose(
        self, space: Space, done: Sequence[FinishedTrial], budgets: Sequence[int], attempt: int
    ) -> tuple[optuna.Trial, str, Choices] | None:
        """Ask for the next trial: a queued one, the corrected proxy's optimum, or the sampler's proposal.

        None if another worker is trying the same; ``attempt`` counts how often in a row that happened.
        """
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting and self.members.fail_abandoned():
            self._enqueue(space, self._anchors)  # a worker ended while it tried one
            waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        trial = self._take(space) if waiting else self._begin(self._next(space, done, budgets, attempt))
        if trial is None:
            return None
        origin, choices = trial.user_attrs["origin"], tuple(trial.user_attrs["choices"])
        for other in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if other.number < trial.number and tuple(other.user_attrs.get("choices", ())) == choices:
                self.study.tell(trial, state=TrialState.FAIL)  # the trial with the lower number keeps it
                return None
        return trial, origin, choices

    def _take(self, space: Space) -> optuna.Trial | None:
        """The next queued trial; None if another worker was faster and the queue is empty."""
        trial = self.study.ask()
        if "choices" not in trial.user_attrs:
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        fixed = self.store.backend.get_trial(trial._trial_id).system_attrs.get("fixed_params", {})
        for name, distribution in self._variables_of(space).distributions.items():
            if name in fixed:
                trial._suggest(name, distribution)
        trial.set_user_attr("worker", self.members.worker.id)
        return trial

    def _begin(self, anchor: Anchor) -> optuna.Trial:
        """A running trial of a new proposal, signed from the beginning."""
        assert self._variables is not None, "whoever proposed knows the variables"
        parameters = dict(anchor.parameters or {})
        return self._running(
            create_trial(
                state=TrialState.RUNNING,
                params=parameters,
                distributions={name: d for name, d in self._variables.distributions.items() if name in parameters},
                user_attrs={**_attributes(anchor), "worker": self.members.worker.id},
            )
        )

    def _running(self, template: FrozenTrial) -> optuna.Trial:
        """A new running trial like the template."""
        study_id = self.store.backend.get_study_id_from_name(self.name)
        return optuna.Trial(self.study, self.store.backend.create_new_trial(study_id, template))

    def _next(self, space: Space, done: Sequence[FinishedTrial], budgets: Sequence[int], attempt: int) -> Anchor:
        """The next proposal: the corrected proxy's optimum, or the sampler's."""
        row, variables = sampler(self.sampler), self._variables_of(space)
        count, goal = len(done), budgets[len(done) % len(budgets)]
        if row.optuna is None or (count % row.every and not attempt):
            refined = self._refined(space, done, goal, attempt)
            if refined is not None:
                return Anchor("refined", refined, goal, variables.encode(refined, "refined"))
        if self._proposals is None:
            name = self.sampler if row.optuna is not None else RANDOM
            self._proposals = Proposals(name, self.seed, variables.distributions, 2 if row.over == "pairs" else 1)
        self._proposals.learn(self._lessons(done, max(budgets)))
        tried = {trial.choices for trial in done}
        # Other draws where the allocation was tried; a repetition costs nothing, and tells the sampler of a plateau.
        for draw in range(DRAWS):
            parameters, state = self._proposals.propose(count, attempt * DRAWS + draw)
            choices = variables.decode(parameters, goal)
            if choices is None:
                break
            if choices not in tried or draw == DRAWS - 1:
                return Anchor(self.sampler if row.optuna is not None else RANDOM, choices, goal, parameters, state)
        raise DataError(f"no setting of this model fits {goal:,} bytes a token: raise the budget")

    def _lessons(self, done: Sequence[FinishedTrial], most: int) -> list[Lesson]:
        """What the sampler is told of finished trials."""
        if sampler(self.sampler).over == "pairs":
            return [
                Lesson(
                    t.number,
                    t.parameters,
                    # By the trials before it alone: so the same after a kill, when all are learnt at once.
                    (float(t.outcome.cost), comparable(t.outcome, done[:index])),
                    t.state,
                    float(t.outcome.cost - most),
                )
                for index, t in enumerate(done)
                if t.parameters
            ]
        firsts: dict[int | None, TrialOutcome] = {}  # what trials of the same goal are compared with
        for trial in done:
            if trial.outcome.complete and trial.outcome.loss > 0:
                firsts.setdefault(trial.goal, trial.outcome)
        return [
            Lesson(t.number, t.parameters, (relative_loss(t.outcome, firsts[t.goal]),), t.state)
            for t in done
            if t.parameters and t.goal in firsts
        ]

    def _variables_of(self, space: Space) -> Variables:
        """The variables of this study, for the space that it is first asked with."""
        if self._variables is None:
            self._variables = variables_of(space, sampler(self.sampler).over)
        return self._variables

    def _refined(self, space: Space, done: Sequence[FinishedTrial], goal: int, attempt: int) -> Choices | None:
        """The corrected proxy's optimum at one budget for weights drawn from their posterior; None if all draws were tried."""
        tried = {trial.choices for trial in done}
        correction = correct(
            space, [(t.choices, t.outcome.loss) for t in done if t.outcome.complete and not t.duplicate]
        )
        rng = np.random.default_rng([self.seed, len(done), attempt] if attempt else [self.seed, len(done)])
        for _ in range(DRAWS):
            best = affordable_point(space, proxy_front(space, correction.draw(rng)), goal)
            if best is not None and best.choices not in tried:
                return best.choices
        return None


def _attributes(anchor: Anchor) -> dict[str, Any]:
    """What a trial's user attributes say of it before it is scored."""
    return {
        "origin": anchor.origin,
        "choices": list(anchor.choices),
        "goal": anchor.goal,
        "state": dict(anchor.state),
    }
