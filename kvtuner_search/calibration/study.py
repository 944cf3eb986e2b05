"""The Optuna study: shared storage, enqueued first trials, proposals, and going on after a kill.

A trial's sampler is seeded by how many trials had finished, and samplers look at finished trials only. So a study that was killed and
resumed ends with the same trials as one that was not. Trials of killed workers are marked as failed and take no part.
"""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from kvtuner_search.calibration.candidates import pair_name
from kvtuner_search.calibration.objective import Outcome
from kvtuner_search.calibration.proxy import correct, proxy_front
from kvtuner_search.calibration.space import Choices, Space
from kvtuner_search.errors import DataError, UsageError

CHUNK: Final = 60_000  # characters of one study attribute, which some databases limit to 64 KiB
SAMPLER_EVERY: Final = 3  # every third proposal is Optuna's sampler's, the others are optima of the corrected proxy
DRAWS: Final = 8  # weights drawn before a proposal is left to the sampler
TRUSTED: Final = ("fisher", "proxy", "refined", "uniform", "preset")  # origins whose affordable trials run all rungs
PRIOR_WEIGHT: Final = 0.05  # TPE's: with a weight of 1, 16 variables of 20 choices are drawn almost at random
SIGNING: Final = 2.0  # seconds after which an unsigned running trial is taken for a killed worker's
LOCK_GRACE: Final = 5  # seconds after which the journal's lock is taken from a worker that was killed while writing
LEAST_LOSS: Final = 1e-9  # nats; the 16-bit cache itself has none
DUPLICATES: Final = 3  # finished trials, repeated proposals included, are at most this many times the trials asked for


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


def open_storage(where: str) -> BaseStorage:
    """A journal file (a path), or anything that Optuna takes as a storage URL.

    Raises:
        DataError: if the journal is damaged or the database cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if "://" in where:
            return optuna.storages.get_storage(where)
        path = Path(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = JournalFileOpenLock(where, grace_period=LOCK_GRACE)
        _drop_torn_line(path, lock)
        return JournalStorage(JournalFileBackend(where, lock_obj=lock))
    except OSError as error:
        raise UsageError(
            f"cannot open the study {where}: {error.strerror or error}: choose a folder that can be written to"
        ) from error
    except (KeyError, ValueError, ImportError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        raise DataError(
            f"cannot read the study {where}: {type(error).__name__}: {_one_line(error)}: delete it, or name another one"
        ) from error


def _drop_torn_line(path: Path, lock: JournalFileOpenLock) -> None:
    """A writer that was killed may have left half a line at the end of the journal, or its lock."""
    if not path.exists():
        return
    lock.acquire()  # waits for a writer, and LOCK_GRACE at most for a dead one
    try:
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            with path.open("r+b") as stream:
                stream.truncate(data.rfind(b"\n") + 1)
    finally:
        lock.release()


class Study:
    """One search, in a storage that other processes may share.

    Args:
        storage: where trials live.
        name: study name within the storage.
        sampler: tpe, nsga2 or random.
        seed: seed of all proposals.
    """

    def __init__(self, storage: BaseStorage, name: str, sampler: str, seed: int) -> None:
        self.storage, self.name, self.sampler, self.seed = storage, name, sampler, seed
        try:
            self.study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=["minimize", "minimize"],
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(seed),
            )
        except (KeyError, ValueError, optuna.exceptions.OptunaError) as error:
            raise DataError(
                f"the study {name!r} cannot be read: {_one_line(error)}: delete it, or name another one"
            ) from error

    def publish(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Store what every worker must agree on, before the first trial; returns what holds, which another may have stored before."""
        known = self.plan()
        if known is not None:
            return known
        text = json.dumps(plan, sort_keys=True)
        chunks = [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
        for index, chunk in enumerate(chunks):
            self.study.set_user_attr(f"plan:{index}", chunk)
        self.study.set_user_attr("plan", len(chunks))  # last: a torn plan does not count
        return plan

    def plan(self) -> dict[str, Any] | None:
        """What :meth:`publish` stored, if it was finished."""
        attributes = self.study.user_attrs
        if "plan" not in attributes:
            return None
        found: dict[str, Any] = json.loads("".join(attributes[f"plan:{index}"] for index in range(attributes["plan"])))
        return found

    def bury(self) -> int:
        """Register this worker and mark trials whose process on this host is gone as failed; returns how many."""
        me = [socket.gethostname(), os.getpid(), _started(os.getpid())]
        self.study.set_user_attr(f"worker:{me[0]}:{me[1]}", me)
        workers = [value for name, value in self.study.user_attrs.items() if name.startswith("worker:")]
        others = [worker for worker in workers if worker != me and _alive(worker)]
        deadline = time.monotonic() + SIGNING
        while True:
            running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if all("worker" in trial.user_attrs for trial in running) or time.monotonic() > deadline:
                break
            time.sleep(0.05)  # a live worker signs a trial right after asking for it
        gone = [trial for trial in running if not _alive(trial.user_attrs.get("worker"))]
        for trial in gone:
            self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        if not others:
            # Nobody else is at work: empty the queue, so that enqueue() fills it in the order of an undisturbed run.
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return len(gone)

    def enqueue(self, space: Space, anchors: Sequence[Anchor]) -> None:
        """Queue the anchors that are neither queued, running nor finished."""
        trials = self.study.get_trials(
            deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
        )
        known = {tuple(t.user_attrs["choices"]) for t in trials if "choices" in t.user_attrs}
        for anchor in anchors:
            if anchor.choices not in known:
                known.add(anchor.choices)
                self.study.enqueue_trial(
                    _parameters(space, anchor.choices),
                    user_attrs={"origin": anchor.origin, "choices": list(anchor.choices)},
                )

    def finished(self) -> list[Finished]:
        """Finished trials, in order of their numbers."""
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
            budgets: bytes per token that profiles are wanted for; dearer trials violate the constraint.
            advance: called with every trial that this worker finishes.
        """
        while True:
            done = self.finished()
            distinct = [trial for trial in done if not trial.duplicate]
            if len(distinct) >= trials or len(done) >= DUPLICATES * trials:
                return
            trial, origin, choices = self._propose(space, done, budgets)
            started = time.monotonic()
            known = next((t.outcome for t in distinct if t.choices == choices), None)
            outcome = (
                objective(choices, [t.outcome for t in distinct], origin not in TRUSTED) if known is None else known
            )
            seconds = round(time.monotonic() - started, 3)
            trial.set_user_attr("outcome", [outcome.cost, list(outcome.rungs), outcome.complete])
            trial.set_user_attr("seconds", seconds)
            trial.set_user_attr("duplicate", known is not None)
            trial.set_constraint("budget", float(outcome.cost - max(budgets)))
            self.study.tell(trial, [outcome.cost, _comparable(outcome, distinct)])
            advance(Finished(trial.number, origin, choices, outcome, seconds, known is not None))

    def _propose(
        self, space: Space, done: Sequence[Finished], budgets: Sequence[int]
    ) -> tuple[optuna.Trial, str, Choices]:
        """Ask for the next trial: a queued one, the corrected proxy's optimum, or what the sampler says."""
        count = len(done)
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting and self.sampler == "random":
            self.enqueue(space, [Anchor("random", self._random(space, count, budgets[count % len(budgets)]))])
        elif not waiting and count % SAMPLER_EVERY and (refined := self._refined(space, done, budgets)) is not None:
            self.enqueue(space, [Anchor("refined", refined)])
        self.study.sampler = self._sampler(count)
        trial = self.study.ask(
            {v.name: CategoricalDistribution([pair_name(pair) for pair in v.pairs]) for v in space.variables}
        )
        trial.set_user_attr("worker", [socket.gethostname(), os.getpid(), _started(os.getpid())])
        if "choices" not in trial.user_attrs:
            names = [[pair_name(pair) for pair in v.pairs] for v in space.variables]
            trial.set_user_attr("origin", self.sampler)
            trial.set_user_attr(
                "choices",
                [options.index(trial.params[v.name]) for v, options in zip(space.variables, names, strict=True)],
            )
        return trial, trial.user_attrs["origin"], tuple(trial.user_attrs["choices"])

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

    def _random(self, space: Space, count: int, budget: int) -> Choices:
        """Uniformly random choices, then random variables made one step cheaper until the budget holds."""
        rng = np.random.default_rng([self.seed, count])
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
            # Both settings are deprecated and have no successor yet; pyproject holds Optuna below 6, where they go.
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
        outcomes: what was found; the loss of an early stop is multiplied by ``scale`` (see rung_ratio).
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
    """How the loss of all rungs relates to that of the first: the median over complete trials."""
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
    """log10 of the loss that all rungs would give."""
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


def _alive(worker: Any) -> bool:
    """Whether the process may still be there. Processes on other hosts cannot be seen and count as alive."""
    if not isinstance(worker, list):
        return False  # killed between asking and signing
    host, pid, started = worker
    return bool(host != socket.gethostname() or (started is not None and _started(int(pid)) == started))


def _started(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, which tells a reused process id apart."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _one_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
