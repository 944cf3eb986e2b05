"""Proposals of Optuna's samplers, made from finished trials alone.

Samplers look at a study's failed and unfinished trials, at their numbers, and at states that they store as pickles. A study that was killed and resumed would
propose something else than one that was not, and whoever can write to its storage could run code. So a sampler works in a study in memory, to which
finished trials are added in order; of its states only whole numbers (of a generation) are kept with a trial, and the rest is computed anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial

from kvtuner_search.calibration.samplers import make


@dataclass(frozen=True)
class Lesson:
    """A finished trial, as a sampler sees it."""

    number: int
    parameters: Mapping[str, Any]
    values: tuple[float, ...]
    state: Mapping[str, int] = field(default_factory=dict)  # what the sampler noted when it proposed the trial
    excess: float | None = None  # bytes over the budget, where the sampler knows of it


class Proposals:
    """One sampler at work.

    Args:
        name: a key of SAMPLERS.
        seed: of the search.
        distributions: of its variables.
        objectives: how many values a lesson has.
    """

    def __init__(self, name: str, seed: int, distributions: Mapping[str, BaseDistribution], objectives: int) -> None:
        self._name, self._seed, self._distributions = name, seed, dict(distributions)
        self._directions = [StudyDirection.MINIMIZE] * objectives
        self._learnt: dict[int, FrozenTrial] = {}

    def learn(self, lessons: Sequence[Lesson]) -> None:
        """Add the trials that were not added before, in the order given."""
        for lesson in lessons:
            if lesson.number in self._learnt:
                continue
            state: dict[str, Any] = dict(lesson.state)
            if state:  # a sampler of generations may have to begin one here
                again = self._ask(0)[1]
                if all(again.get(key) == value for key, value in state.items()):
                    state = again
            self._learnt[lesson.number] = create_trial(
                params=dict(lesson.parameters),
                distributions=self._distributions,
                values=list(lesson.values),
                system_attrs=state,
                constraints=None if lesson.excess is None else {"budget": lesson.excess},
            )

    def propose(self, count: int, attempt: int = 0) -> tuple[dict[str, Any], dict[str, int]]:
        """Values of all variables, and what to keep with the trial.

        Args:
            count: finished trials; with the same ones and the same count the same is proposed.
            attempt: how often another worker was found to try the same.
        """
        drawn = Random(f"{self._name} {self._seed} {count} {attempt}")  # two samplers' first draws are not the same
        parameters, state = self._ask(drawn.getrandbits(32))
        return parameters, {key: value for key, value in state.items() if type(value) is int}

    def _ask(self, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        study = optuna.create_study(directions=self._directions, sampler=make(self._name, seed))
        study.add_trials(self._learnt.values())
        trial = study.ask(self._distributions)
        return dict(trial.params), dict(study.get_trials(deepcopy=False)[-1].system_attrs)
