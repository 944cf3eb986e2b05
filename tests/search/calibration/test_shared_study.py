"""What several workers of one study agree on, and that none spoils another's work."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState
from test_space import CLASSES, make_space

from kvtuner_search.calibration import agreement, membership, workers
from kvtuner_search.calibration.anchors import anchors, uniform_pairs
from kvtuner_search.calibration.objective import TrialOutcome
from kvtuner_search.calibration.options import CalibrationOptions, fingerprint
from kvtuner_search.calibration.proxy import proxy_front
from kvtuner_search.calibration.space import Choices
from kvtuner_search.calibration.study import Study, open_storage
from kvtuner_search.calibration.trials import Anchor
from kvtuner_search.data import DEFAULT_SOURCES
from kvtuner_search.data.types import Sample, Split
from kvtuner_search.errors import UsageError
from kvtuner_search.models.load import ModelOptions
from kvtuner_search.models.reference_model import REFERENCE_NAME

WORKER = Path(__file__).with_name("study_worker.py")
SPACE = make_space(12)
BUDGET = SPACE.nbytes([len(v.pairs) // 2 for v in SPACE.variables])
ANCHORS = anchors(SPACE, proxy_front(SPACE), uniform_pairs(CLASSES), [], [BUDGET])


def score(choices: Choices, *_: object) -> TrialOutcome:
    noise = int(hashlib.sha256(repr(choices).encode()).hexdigest()[:6], 16) / 2**24
    loss = float(SPACE.features(choices).sum()) * (1 + noise)
    return TrialOutcome(SPACE.cost(choices), (loss, loss), True)


def storages(tmp_path: Path) -> list[str]:
    return [str(tmp_path / "study.journal"), f"sqlite:///{tmp_path}/study.db"]


def join(storage: str, sampler: str = "tpe") -> Study:
    study = Study(open_storage(storage), "test", sampler, 7)
    study.fail_abandoned()
    return study


@pytest.mark.parametrize("kind", [0, 1])
def test_of_two_plans_the_first_one_holds_for_both(kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (join(storages(tmp_path)[kind]) for _ in range(2))
    plans = [{"fingerprint": name, "centres": [name * 70_000]} for name in ("a", "b")]
    real, asked = agreement.agreed, []

    def too_early(study: object, key: str) -> object:
        asked.append(key)
        return None if len(asked) == 1 else real(study, key)  # type: ignore[arg-type]

    assert first.publish(plans[0]) == plans[0]
    monkeypatch.setattr(agreement, "agreed", too_early)  # both found nothing before either had said anything
    assert second.publish(plans[1]) == plans[0]
    assert len(asked) == 2
    monkeypatch.undo()
    assert first.plan() == second.plan() == join(storages(tmp_path)[kind]).plan() == plans[0]


def split(exact: bool = False, tokens: tuple[int, ...] = (1, 2, 3)) -> Split:
    return Split("search", (Sample("qa", tokens, ((1, 3),), is_task=exact),))


OPTIONS = CalibrationOptions()
FACTS = OPTIONS.facts({"id": "m"}, "float32", "cpu", [split()])


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (OPTIONS.facts({"id": "n"}, "float32", "cpu", [split()]), "model: id"),
        (OPTIONS.facts({"id": "m"}, "bfloat16", "cpu", [split()]), "dtype float32, here bfloat16"),
        (OPTIONS.facts({"id": "m"}, "float32", "cuda", [split()]), "device cpu, here cuda"),
        (OPTIONS.facts({"id": "m"}, "float32", "cpu", [split(tokens=(1, 2, 4))]), "data: search"),
        (OPTIONS.facts({"id": "m"}, "float32", "cpu", [split(exact=True)]), "data: search"),
        (replace(OPTIONS, seed=1).facts({"id": "m"}, "float32", "cpu", [split()]), "seed 0, here 1"),
        (replace(OPTIONS, bands=False).facts({"id": "m"}, "float32", "cpu", [split()]), "space: bands"),
        (replace(OPTIONS, target_bits=(3.0,)).facts({"id": "m"}, "float32", "cpu", [split()]), "target bits"),
        (
            replace(OPTIONS, model=ModelOptions(random_weights=True)).facts({"id": "m"}, "float32", "cpu", [split()]),
            "random weights False, here True",
        ),
        (FACTS | {"version": "0.0.9"}, "version .*, here 0.0.9"),
        (FACTS | {"layout": 1}, "layout 2, here 1"),
    ],
)
def test_a_study_is_of_one_model_data_and_program(facts: dict[str, object], says: str, tmp_path: Path) -> None:
    assert fingerprint(facts) != fingerprint(FACTS)
    study = join(storages(tmp_path)[0])
    study.claim(FACTS)
    study.claim(dict(reversed(FACTS.items())))
    with pytest.raises(UsageError, match=f"made with other options, another model or other data .{says}") as raised:
        join(storages(tmp_path)[0]).claim(facts)
    assert "\n" not in str(raised.value)


def test_a_study_with_the_former_names_of_storage_classes_is_refused(tmp_path: Path) -> None:
    former = {name: value for name, value in FACTS.items() if name != "names of storage classes"}
    join(storages(tmp_path)[0]).claim(former)
    with pytest.raises(
        UsageError, match=r"\(names of storage classes None, here 4-g64-asym\): use .* another --output"
    ):
        join(storages(tmp_path)[0]).claim(FACTS)


def test_dtype_auto_is_what_it_comes_to(tiny_model: Path) -> None:
    from kvtuner_search.calibration.pipeline import prepare
    from kvtuner_search.progress import Reporter

    facts = []
    for dtype in ("auto", "float32", "bfloat16"):
        options = replace(OPTIONS, model=ModelOptions(str(tiny_model), dtype=dtype, device="cpu"), sources=("list",))
        facts.append(prepare(replace(options, samples=1, length=200), Reporter(quiet=True)).facts)
    assert facts[0] == facts[1]
    assert facts[2] == facts[1] | {"dtype": "bfloat16"}


def test_conversations_are_read_by_default_unless_the_model_was_not_trained_on_them(tiny_model: Path) -> None:
    """Both have a chat template, with the same tokenizer; the embedded reference model has seen no chats."""
    from kvtuner_search.calibration.pipeline import prepare
    from kvtuner_search.progress import Reporter

    for source, expected in ((str(tiny_model), (*DEFAULT_SOURCES, "chat")), (REFERENCE_NAME, DEFAULT_SOURCES)):
        options = replace(OPTIONS, model=ModelOptions(source, device="cpu"), samples=1)
        run = prepare(options, Reporter(quiet=True))
        assert run.options.sources == expected
        assert tuple(run.data.search.by_source()) == expected


@pytest.mark.parametrize("kind", [0, 1])
def test_no_choices_are_scored_by_two_workers(kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside each trial of one worker another one takes a trial: with the same seed, number of trials and proposals."""
    storage = storages(tmp_path)[kind]
    first, second = join(storage), join(storage)
    with monkeypatch.context() as patch:
        patch.setattr(Study, "_known", lambda _: set())  # both find each anchor missing, and queue it in turn
        for anchor in ANCHORS:
            first.enqueue(SPACE, [anchor])
            second.enqueue(SPACE, [anchor])
    scored: list[Choices] = []

    def inner(choices: Choices, *_: object) -> TrialOutcome:
        scored.append(choices)
        return score(choices)

    def outer(choices: Choices, outcomes: Sequence[TrialOutcome], screen: bool) -> TrialOutcome:
        scored.append(choices)
        second.run(SPACE, inner, len(outcomes) + 1, [BUDGET])
        return score(choices)

    first.run(SPACE, outer, 30, [BUDGET])
    assert len(scored) == len(set(scored)) >= 30
    assert {anchor.choices for anchor in ANCHORS} <= set(scored)
    assert not first.study.get_trials(states=(TrialState.RUNNING,))


def test_two_random_searches_draw_different_settings(tmp_path: Path) -> None:
    first, second = (join(storages(tmp_path)[0], "random") for _ in range(2))

    def outer(choices: Choices, outcomes: Sequence[TrialOutcome], screen: bool) -> TrialOutcome:
        second.run(SPACE, score, len(outcomes) + 1, [BUDGET])
        return score(choices)

    first.run(SPACE, outer, 12, [BUDGET])
    trials = first.finished()
    assert {trial.origin for trial in trials} == {"random"}
    # None was proposed by a sampler that learns, which would be no random search.
    assert all("choices" in trial.user_attrs and not trial.user_attrs["state"] for trial in first.study.trials)
    assert len({repr(trial.parameters) for trial in trials}) == len(trials)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("where", ["here", "container"])
def test_a_live_trial_is_left_alone_and_a_dead_one_is_done_again(
    kind: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = storages(tmp_path)[kind]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(WORKER), storage, "tpe", "30", "300"], env=environment)
    try:
        me = Study(open_storage(storage), "test", "tpe", 7)

        def running() -> list[int]:
            return [t.number for t in me.study.get_trials(states=(TrialState.RUNNING,)) if "worker" in t.user_attrs]

        deadline = time.monotonic() + 120
        while not running():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        if where == "container":  # of the same host name, with process ids of its own
            monkeypatch.setattr(workers, "_namespace", lambda: "pid:[1]")
        assert me.fail_abandoned() == 0
        me.enqueue(SPACE, ANCHORS)
        me.run(SPACE, score, 3, [BUDGET])
        assert running() == [0]
        process.send_signal(signal.SIGKILL)
        process.wait()
        me.run(SPACE, score, 30, [BUDGET])
    finally:
        process.kill()
        process.wait()
    assert running() == []
    assert me.study.trials[0].state == TrialState.FAIL
    done = {trial.choices for trial in me.finished()}
    assert {anchor.choices for anchor in ANCHORS} <= done  # the one that the killed worker had too


def test_a_trial_that_is_not_signed_yet_is_left_to_whoever_may_be_alive(tmp_path: Path) -> None:
    me, other = (join(storages(tmp_path)[0]) for _ in range(2))
    me.enqueue(SPACE, ANCHORS[:1])
    other.study.ask()  # and before it signs, it is stopped for as long as you like
    assert me.fail_abandoned() == 0
    other.close()
    assert me.fail_abandoned() == 1


def test_a_trial_that_is_not_signed_is_of_nobody_who_has_one(tmp_path: Path) -> None:
    me, other, killed = (join(storages(tmp_path)[0]) for _ in range(3))
    me.enqueue(SPACE, ANCHORS[:2])
    killed.study.ask()
    killed.close()

    def outer(choices: Choices, outcomes: Sequence[TrialOutcome], screen: bool) -> TrialOutcome:
        assert choices == ANCHORS[1].choices
        assert me.fail_abandoned() == 1  # the other is alive, but at work on this one
        return score(choices)

    other.run(SPACE, outer, 1, [BUDGET])


@pytest.mark.parametrize("kind", [0, 1])
def test_the_trial_of_a_worker_that_is_silent_is_done_again_and_counts_once(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker on another machine falls silent in the middle of a trial; when it is given up, it comes back after all."""
    monkeypatch.setattr(membership, "BEAT", 0.05)
    monkeypatch.setattr(workers, "BEAT", 0.05)
    monkeypatch.setattr(workers, "SILENCE", 0.5)
    storage = storages(tmp_path)[kind]
    other = join(storage)
    other.enqueue(SPACE, ANCHORS)
    me = Study(open_storage(storage), "test", "tpe", 7)
    me.members.worker.locks = None  # as on a database server, and
    monkeypatch.setattr(workers, "_namespace", lambda: f"pid:[{threading.get_ident()}]")  # each of them elsewhere

    def outer(choices: Choices, *_: object) -> TrialOutcome:
        if not outcomes:
            me.fail_abandoned()
            time.sleep(1)  # twice what it takes to be given up, but its signs of life are heard
            assert me.fail_abandoned() == 0
            other.members.leaving.set()
            deadline = time.monotonic() + 60
            while me.fail_abandoned() == 0:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            me.enqueue(SPACE, ANCHORS)
            me.run(SPACE, score, len(ANCHORS), [BUDGET])
            outcomes.extend(me.finished())
        return score(choices)

    outcomes: list[object] = []
    other.run(SPACE, outer, len(ANCHORS), [BUDGET])
    done = me.finished()
    assert len(done) == len(ANCHORS) + 1
    assert sorted(t.choices for t in done if not t.duplicate) == sorted({a.choices for a in ANCHORS})
    assert [t.choices for t in done if t.duplicate] == [ANCHORS[0].choices]
    assert not me.study.get_trials(states=(TrialState.RUNNING,))


def test_whoever_has_the_folder_leaves_a_worker_alone_that_is_seen_at_work(tmp_path: Path) -> None:
    """It joined through --storage, which takes no lock on the folder."""
    storage = storages(tmp_path)[0]
    other = join(storage)
    other.enqueue(SPACE, ANCHORS)

    def outer(choices: Choices, *_: object) -> TrialOutcome:
        me = Study(open_storage(storage), "test", "tpe", 7)
        assert me.fail_abandoned(everyone=True) == 0
        assert [t.state for t in me.study.get_trials()].count(TrialState.WAITING) == len(ANCHORS) - 1
        me.close()
        return score(choices)

    other.run(SPACE, outer, 1, [BUDGET])
    assert workers.at_work(Path(storage))
    other.close()
    assert not workers.at_work(Path(storage))


def test_a_trial_that_somebody_failed_counts_all_the_same(tmp_path: Path) -> None:
    me = join(storages(tmp_path)[0])
    me.enqueue(SPACE, ANCHORS)

    def failed(choices: Choices, outcomes: Sequence[TrialOutcome], screen: bool) -> TrialOutcome:
        (trial,) = me.study.get_trials(states=(TrialState.RUNNING,))
        me.study.tell(trial.number, state=TrialState.FAIL)
        return score(choices)

    me.run(SPACE, failed, 2, [BUDGET])
    assert [t.choices for t in me.finished()] == [anchor.choices for anchor in ANCHORS[:2]]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_trial_that_ends_in_an_error_is_free_again(error: type[BaseException], tmp_path: Path) -> None:
    me = join(storages(tmp_path)[0])
    me.enqueue(SPACE, ANCHORS[:1])

    def fail(*_: object) -> TrialOutcome:
        raise error

    with pytest.raises(error):
        me.run(SPACE, fail, 1, [BUDGET])
    assert not me.study.get_trials(states=(TrialState.RUNNING,))
    me.enqueue(SPACE, ANCHORS[:1])
    me.run(SPACE, score, 1, [BUDGET])
    assert [t.choices for t in me.finished()] == [ANCHORS[0].choices]


def test_workers_choose_from_the_same_trials(tmp_path: Path) -> None:
    first, second = (join(storages(tmp_path)[0]) for _ in range(2))
    first.enqueue(SPACE, [Anchor(a.origin, a.choices) for a in ANCHORS])
    first.run(SPACE, score, 4, [BUDGET])
    settled = first.settled(4, 0)
    second.run(SPACE, score, 5, [BUDGET])  # it was in the middle of one more
    assert len(second.finished()) == 5
    assert second.settled(4, 0) == settled == first.settled(4, 0)
    assert len(second.settled(5, 0)) == len(second.settled(4, 9)) == 5  # who searches longer chooses from more
