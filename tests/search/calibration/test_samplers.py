"""The table of samplers: each can be made, proposes settings of a study's kind, and has its line in the help."""

from __future__ import annotations

import statistics

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from kvtuner_search.calibration.proposals import Lesson, Proposals
from kvtuner_search.calibration.samplers import SAMPLERS, Sampler, described, make
from kvtuner_search.cli.calibrate import command
from kvtuner_search.errors import UsageError

WEIGHTS = {f"x{i}": FloatDistribution(-1, 1) for i in range(4)}
PAIRS = {f"x{i}": CategoricalDistribution(["a", "b", "c"]) for i in range(4)}


def search(name: str, trials: int, kept: list[Lesson] | None = None) -> list[Lesson]:
    """Finished trials of a sampler on a made-up loss; it goes on after those that were ``kept``."""
    pairs = SAMPLERS[name].over == "pairs"
    proposals = Proposals(name, 3, PAIRS if pairs else WEIGHTS, 2 if pairs else 1)
    lessons = list(kept or [])
    while len(lessons) < trials:
        proposals.learn(lessons)
        parameters, state = proposals.propose(len(lessons))
        if pairs:
            counts = ["".join(parameters.values()).count(letter) for letter in "ac"]
            lesson = Lesson(len(lessons), parameters, (counts[0], counts[1] + 0.5), state, float(counts[0] - 1))
        else:
            lesson = Lesson(len(lessons), parameters, (sum((x - 0.3) ** 2 for x in parameters.values()),), state)
        lessons.append(lesson)
    return lessons


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_proposes_the_same_from_the_same_trials_and_after_a_kill(name: str) -> None:
    whole = search(name, 34)
    assert len({repr(sorted(lesson.parameters.items())) for lesson in whole}) > 10
    assert search(name, 34) == whole
    assert search(name, 34, whole[:21]) == whole
    assert all(type(value) is int for lesson in whole for value in lesson.state.values())


@pytest.mark.parametrize(
    "name", [name for name, row in SAMPLERS.items() if row.over != "pairs" and name not in ("random", "refined")]
)
def test_each_sampler_learns(name: str) -> None:
    """The later half of its trials is better than the earlier, and what it proposes depends on the losses."""
    values = [lesson.values[0] for lesson in search(name, 60)]
    assert statistics.median(values[40:]) < statistics.median(values[:10])


def test_a_worker_that_is_too_late_is_proposed_something_else() -> None:
    for name in SAMPLERS:
        if SAMPLERS[name].over != "pairs":
            proposals = Proposals(name, 3, WEIGHTS, 1)
            assert proposals.propose(0, 0) != proposals.propose(0, 1)


def test_an_unknown_sampler_is_refused_with_the_choice() -> None:
    with pytest.raises(UsageError, match=f"^'absent' is not a sampler: choose from {', '.join(SAMPLERS)}$"):
        make("absent", 0)


def test_a_new_row_is_offered_and_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMPLERS, "uniform", Sampler("a test", "RandomSampler"))  # type: ignore[arg-type]
    assert type(make("uniform", 3)).__name__ == "RandomSampler"
    assert described().endswith("; uniform: a test")


def test_help_lists_every_sampler() -> None:
    option = next(option for option in command.params if option.name == "sampler")
    assert list(option.type.choices) == list(SAMPLERS)
    assert described() in option.help
