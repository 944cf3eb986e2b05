"""The study survives kills, loses nothing, repeats nothing, and ends the same."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial
from study_worker import main as work
from test_space import make_space

from kvtuner_search.calibration.finals import Candidate, finalists
from kvtuner_search.calibration.objective import TrialOutcome
from kvtuner_search.calibration.samplers import SAMPLERS
from kvtuner_search.calibration.space import Space
from kvtuner_search.calibration.study import Study, open_storage
from kvtuner_search.calibration.trials import (
    Anchor,
    FinishedTrial,
    finished_trial,
    hypervolume,
    outcome_attributes,
    pareto,
)
from kvtuner_search.errors import DataError, UsageError

WORKER = Path(__file__).with_name("study_worker.py")
TRIALS = 44


def finished(storage: Path) -> list[FinishedTrial]:
    return Study(open_storage(str(storage)), "test", "tpe", 7).finished()


def strip(trials: list[FinishedTrial]) -> list[tuple[object, ...]]:
    """What must not depend on kills: everything but numbers and times."""
    return [(t.origin, t.choices, t.outcome, t.duplicate, t.goal, dict(t.parameters), dict(t.state)) for t in trials]


def start(storage: Path, *arguments: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), str(storage), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ten_kills_lose_at_most_the_running_trial_and_change_nothing(sampler: str, tmp_path: Path) -> None:
    killed = tmp_path / "killed.journal"
    output, _ = start(killed, sampler, TRIALS, 0.1, 10).communicate(timeout=300)
    counts = [int(line) for line in output.split()]
    assert len(counts) == 10
    assert counts == sorted(counts)  # nothing that was finished is lost
    assert 0 < counts[-1] < TRIALS  # the kills fell into the middle of the work, on a busy machine near its beginning
    seen = finished(killed)
    work(str(killed), sampler, TRIALS, 0.0)
    ended = finished(killed)
    assert ended[: len(seen)] == seen
    distinct = [t.choices for t in ended if not t.duplicate]
    assert len(distinct) == len(set(distinct)) == TRIALS
    work(str(tmp_path / "whole.journal"), sampler, TRIALS, 0.0)
    assert strip(ended) == strip(finished(tmp_path / "whole.journal"))


def test_a_finished_study_is_left_alone(tmp_path: Path) -> None:
    storage = tmp_path / "study.journal"
    work(str(storage), "tpe", 12, 0.0)
    before = storage.read_bytes()
    work(str(storage), "tpe", 12, 0.0)
    assert [t.number for t in finished(storage)] == list(range(12))
    assert storage.read_bytes()[: len(before)] == before


@pytest.mark.parametrize("sampler", ["sepcma", "pairs"])  # whose proposals seldom repeat in so small a space
def test_two_workers_share_the_trials(sampler: str, tmp_path: Path) -> None:
    storage = tmp_path / "study.journal"
    processes = [start(storage, sampler, TRIALS, 0.02) for _ in range(2)]
    assert [p.wait(300) for p in processes] == [0, 0]
    trials = finished(storage)
    distinct = [t.choices for t in trials if not t.duplicate]
    assert TRIALS <= len(distinct) <= TRIALS + 1  # the other worker may have been in the middle of one
    assert len({t.choices for t in trials if t.origin == "uniform"}) == 10


def test_a_torn_line_is_dropped_and_damage_is_reported(tmp_path: Path) -> None:
    storage = tmp_path / "study.journal"
    work(str(storage), "tpe", 5, 0.0)
    whole = storage.read_bytes()
    storage.write_bytes(whole + b'{"op_code": 5, "trial')
    assert len(finished(storage)) == 5
    assert storage.read_bytes()[: len(whole)] == whole
    storage.write_bytes(whole[:200] + b"\x00garbage\n" + whole[200:])
    with pytest.raises(DataError, match=r"study\.journal.*delete it"):
        finished(storage)


def test_a_storage_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sqlite"):
        open_storage(f"sqlite:///{tmp_path}/no/such/folder/study.db")
    with pytest.raises(UsageError, match="cannot open"):
        open_storage("/dev/null/study.journal")


def test_a_plan_is_there_only_when_it_is_whole(tmp_path: Path) -> None:
    study = Study(open_storage(str(tmp_path / "s")), "test", "tpe", 0)
    assert study.plan() is None
    plan = {"layers": ["x" * 70_000, 1.25], "fingerprint": "f"}
    study.publish(plan)
    assert Study(open_storage(str(tmp_path / "s")), "test", "tpe", 0).plan() == plan


def test_anchors_are_queued_once(tmp_path: Path) -> None:
    study, space = Study(open_storage(str(tmp_path / "s")), "test", "tpe", 0), make_space(2)
    for _ in range(2):
        study.enqueue(space, [Anchor("uniform", (0, 0)), Anchor("proxy", (1, 1))])
    assert len(study.study.get_trials()) == 2


def make_trial(number: int, cost: int, loss: float, complete: bool = True, duplicate: bool = False) -> FinishedTrial:
    return FinishedTrial(number, "tpe", (number,), TrialOutcome(cost, (loss,), complete), 0.0, duplicate)


def test_an_optimum_that_is_uniform_stays_the_one_to_beat() -> None:
    """Not among the four best, and among the two best uniform settings."""
    trials = [
        FinishedTrial(at, origin, (at,), TrialOutcome(100, (loss,), True), 0.0, False)
        for at, (origin, loss) in enumerate([("fisher", 0.9), *(("gp", 0.1 * i) for i in range(1, 6))])
    ]
    space = SimpleNamespace(uniform_pair=lambda choices: choices == (0,))
    found = finalists(
        cast(Space, space), trials, [], lambda t, origin: Candidate(str(t.number), origin, cast(Any, t.choices), 100), lambda _: True
    )  # fmt: skip
    assert [c.origin for c in found if c.name == "0"] == ["fisher"]


def test_losses_of_many_samples_fit_the_columns_of_any_database() -> None:
    """MySQL's text column ends at 65,535 bytes."""
    outcome = TrialOutcome(100, (0.1, 0.2), True, tuple(np.random.default_rng(0).random(7001) * 1e-5), (0.1, 0.3))
    attributes = outcome_attributes(outcome) | {
        "origin": "gp", "choices": [1], "seconds": 1.0, "duplicate": False, "goal": None, "state": {},
    }  # fmt: skip
    assert max(len(json.dumps(value)) for value in attributes.values()) < 60_000
    kept = {name: json.loads(json.dumps(value)) for name, value in attributes.items()}
    assert finished_trial(create_trial(value=0.2, user_attrs=kept)).outcome == outcome
    few = outcome_attributes(TrialOutcome(100, (0.1,), False, (), ()))
    assert not [name for name in few if name.startswith("kl")]


def test_front_and_hypervolume() -> None:
    trials = [
        make_trial(0, 10, 0.1),
        make_trial(1, 20, 0.01),
        make_trial(2, 20, 0.02),
        make_trial(3, 5, 0.001, complete=False),
        make_trial(4, 30, 0.05),
    ]
    assert [t.number for t in pareto(trials)] == [0, 1]
    outcomes = [t.outcome for t in trials if t.outcome.complete]
    assert hypervolume(outcomes, 1.0, (40, 1.0)) == pytest.approx((40 - 10) * 1 + (40 - 20) * 1)  # a decade each
    early = [TrialOutcome(10, (0.05,), False)]
    assert hypervolume(early, 2.0, (40, 1.0)) == pytest.approx(30)
    assert hypervolume([TrialOutcome(50, (0.1,), True)], 1.0, (40, 1.0)) == 0


def test_optuna_alone_reads_the_study_with_names_for_people(tmp_path: Path) -> None:
    """As optuna-dashboard does, which is given the journal's path."""
    storage = tmp_path / "study.journal"
    work(str(storage), "tpe", 34, 0.0)
    alone = optuna.load_study(
        study_name="test", storage=optuna.storages.JournalStorage(JournalFileBackend(str(storage)))
    )
    assert alone.metric_names == ["KL divergence, nats a token"]
    proposed = [t for t in alone.get_trials(states=(TrialState.COMPLETE,)) if t.user_attrs["origin"] == "tpe"]
    assert proposed
    for trial in proposed:
        assert {"keys over values", "contrast"} <= set(trial.params)
        assert all(-1 <= value <= 1 for value in trial.params.values())
        assert trial.user_attrs["goal"] >= trial.user_attrs["bytes"]
    assert any(not trial.user_attrs["complete"] for trial in proposed)
    found = [t for t in finished(storage) if t.outcome.complete]
    shown = [t for t in alone.get_trials(states=(TrialState.COMPLETE,)) if t.user_attrs["complete"]]
    assert [t.value for t in shown] == pytest.approx([t.outcome.loss for t in found])
    budget = max(t.goal or 0 for t in found)
    assert alone.best_value == pytest.approx(min(t.outcome.loss for t in found if t.outcome.cost <= budget))


def test_a_study_of_an_earlier_layout_is_refused_in_one_line(tmp_path: Path) -> None:
    """It had two objectives and a category for each layer."""
    storage = tmp_path / "study.journal"
    old = optuna.create_study(
        study_name="test", storage=open_storage(str(storage)).backend, directions=["minimize"] * 2
    )
    old.set_user_attr("kvtuner", "2, 2")
    old.enqueue_trial({"layer 0": "4-g64-asym/2-g64-asym"})
    with pytest.raises(DataError, match="another version of this one: choose another --study-name") as raised:
        finished(storage)
    assert "\n" not in str(raised.value)
