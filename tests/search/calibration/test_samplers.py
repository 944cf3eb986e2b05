"""The table of samplers: each can be made, proposes settings of a study's kind, and has its line in the help."""

from __future__ import annotations

import optuna
import pytest
from optuna.distributions import CategoricalDistribution

from kvtuner_search.calibration.samplers import SAMPLERS, Sampler, described, make
from kvtuner_search.cli.calibrate import command
from kvtuner_search.errors import UsageError


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_proposes_what_a_study_asks_for(name: str) -> None:
    """Categorical variables, two objectives and a constraint, past the trials that a sampler starts with; and the same again for the same seed."""
    drawn: list[list[str]] = []
    for _ in range(2):
        study = optuna.create_study(directions=["minimize", "minimize"])
        drawn.append([])
        for number in range(24):
            study.sampler = make(name, number)
            trial = study.ask({f"x{i}": CategoricalDistribution(["a", "b", "c"]) for i in range(3)})
            trial.set_constraint("budget", float(number % 2))
            drawn[-1].append("".join(trial.params.values()))
            study.tell(trial, [drawn[-1][-1].count("a"), drawn[-1][-1].count("c") + 0.5])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 3


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
