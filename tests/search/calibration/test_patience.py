"""Paired comparisons of trials: when a rung stops one, when a search ends, and which finalist is taken."""

from typing import Any

import numpy as np
import pytest

from kvtuner_search.calibration.choosing import cheapest, preferred, resolution
from kvtuner_search.calibration.finals import Candidate, HeldOutResult
from kvtuner_search.calibration.objective import TrialObjective, TrialOutcome
from kvtuner_search.calibration.patience import compared, noise, progress, standstill
from kvtuner_search.calibration.trials import FinishedTrial
from kvtuner_search.errors import DataError
from kvtuner_search.evaluation.scorer import Scores
from kvtuner_search.evaluation.statistics import paired_change, paired_log_ratio
from kvtuner_search.report.reading import told_apart

RNG = np.random.default_rng(0)
SAMPLES = RNG.lognormal(0, 1, 40)  # KL of the reference on each sample: very unlike
WEIGHTS = np.full(40, 1 / 40)
JITTER = 0.02 * (-1.0) ** np.arange(40)  # of which nothing is left in the mean


def outcome(factor: float, cost: int = 100, jitter: float = 1.0) -> TrialOutcome:
    """A setting whose loss is ``factor`` times the reference's, on every sample about alike."""
    kl = SAMPLES * factor * np.exp(jitter * JITTER)
    return TrialOutcome(cost, (float(kl.mean()),), True, tuple(kl))


def trials(*factors: float, origin: str = "gp") -> list[FinishedTrial]:
    first = [FinishedTrial(0, "fisher", (0,), outcome(1, jitter=0), 0.0, False)]
    rest = [FinishedTrial(i, origin, (i,), outcome(f), 0.0, False) for i, f in enumerate(factors, 1)]
    return first + rest


def test_a_ratio_is_paired_and_holds_for_few_samples() -> None:
    exact = paired_log_ratio(1.1 * SAMPLES, SAMPLES)
    assert exact.estimate == pytest.approx(np.log(1.1), rel=1e-3)
    assert exact.high - exact.low < 1e-3  # however unlike the samples are
    one = paired_log_ratio(np.array([2.0]), np.array([1.0]))
    assert (one.low, one.high) == (-np.inf, np.inf)
    two = paired_log_ratio(np.array([1.1, 1.3]), np.array([1.0, 1.0]))
    assert two.low < 0 < two.high
    weighted = paired_log_ratio(np.array([2.0, 1.0, 1.0]), np.ones(3), np.array([0.5, 0.25, 0.25]))
    assert weighted.estimate == pytest.approx(np.log(2) / 2, rel=1e-3)
    covered = 0
    for _ in range(400):
        drawn = RNG.normal(0.1, 0.2, 6)
        found = paired_log_ratio(np.exp(drawn), np.ones(6))
        covered += found.low <= 0.1 <= found.high
    assert 360 <= covered <= 396  # 95 %


def test_a_change_is_that_of_the_losses_and_its_interval_covers() -> None:
    """A mean of log ratios may say the opposite: most samples are worse, and the one that counts is better."""
    theirs = np.array([0.1, 0.1, 0.1, 10.0])
    ours = np.array([0.15, 0.15, 0.15, 9.0])
    assert paired_change(ours, theirs).estimate == pytest.approx(ours.sum() / theirs.sum() - 1)
    assert paired_change(ours, theirs).estimate < 0 < paired_log_ratio(ours, theirs).estimate
    exact = paired_change(0.9 * SAMPLES, SAMPLES)
    assert list(exact) == pytest.approx([-0.1] * 3)
    covered = 0
    for _ in range(400):
        base = RNG.lognormal(0, 0.5, 20)
        found = paired_change(base * (0.9 + RNG.normal(0, 0.1, 20)), base)
        covered += found.low <= -0.1 <= found.high
    assert 360 <= covered <= 396  # 95 %


def test_weights_of_samples_make_the_loss() -> None:
    task = np.array([False, False, True, True, True])
    scores = Scores(
        ("text", "text", "qa", "list", "list"), np.arange(1.0, 6.0), np.ones(5), np.array([9, 4, 2, 3, 5]), task, task
    )
    assert scores.sample_weights @ scores.kl == pytest.approx(scores.loss)


class Tiers:
    """A scorer of three tiers of five samples that counts what it is asked."""

    def __init__(self, factor: float) -> None:
        self.factor, self.tiers, self.asked = factor, [()] * 3, []

    def score(self, setting: Any, centres: Any, tier: int) -> Scores:
        self.asked.append(tier)
        part = slice(5 * tier, 5 * tier + 5)
        kl = SAMPLES[part] * self.factor * np.exp(JITTER[part])
        ones = np.ones(5, dtype=np.int64)
        return Scores(("text",) * 5, kl, kl, ones, ones > 1, ones > 1)


class Free:
    """A space in which everything costs its first choice."""

    def cost(self, choices: tuple[int, ...]) -> int:
        return choices[0]

    def setting(self, choices: tuple[int, ...]) -> tuple[int, ...]:
        return choices


@pytest.mark.parametrize(
    ("factor", "cost", "screen", "rungs"),
    [
        (1.2, 100, True, 1),
        (1.0, 100, True, 3),
        (1.2, 100, False, 3),
        (1.2, 90, True, 3),
        (0.9, 100, True, 3),
        (0.5, 200, True, 1),
    ],
)
def test_a_rung_stops_what_is_worse_on_the_same_samples(factor: float, cost: int, screen: bool, rungs: int) -> None:
    """Not what is as good, cheaper or trusted; always what is over the budget."""
    scorer = Tiers(factor)
    score = TrialObjective(scorer, {}, Free(), 150)  # type: ignore[arg-type]
    rival = TrialOutcome(100, (1.0, 1.0, float(SAMPLES[:15].mean())), True, tuple(SAMPLES[:15]))
    stopped = TrialOutcome(100, (0.01,), False, tuple(SAMPLES[:5] / 100))  # better, as far as it went
    found = score((cost,), [stopped, rival], screen)
    assert len(found.rungs) == len(scorer.asked) == rungs
    assert found.complete == (rungs == 3)
    assert len(found.kl) == 5 * rungs
    assert len(found.sources) == 1
    assert found.sources[0] == pytest.approx(found.loss)


def test_a_search_ends_when_its_last_trials_gain_less_than_the_samples_tell_apart() -> None:
    better = trials(*[1.05] * 4, 0.9, *[0.95] * 6)
    assert standstill(better[:7], [100], 4, WEIGHTS) is None  # a gain of 10 % among the last four
    found = standstill(better, [100], 4, WEIGHTS)
    assert found is not None
    assert found.trials == 12
    assert found.gain == 0
    assert 0 < found.noise < 0.05
    assert "ended after 12 trials" in str(found)
    assert standstill(better, [100], 0, WEIGHTS) is None  # never
    assert standstill(trials(*[1.1] * 3), [100], 4, WEIGHTS) is None  # fewer proposals than that
    assert standstill(trials(*[1.1] * 9, origin="uniform"), [100], 4, WEIGHTS) is None  # none of them a proposal
    assert standstill([], [100], 4, WEIGHTS) is None
    assert standstill(better, [100, 50], 4, WEIGHTS) is None  # nothing fits one of the budgets yet


def test_progress_tells_the_best_against_the_optimum_and_uniform() -> None:
    found = trials(1.05, 0.9)
    uniform = FinishedTrial(3, "uniform", (3,), outcome(2), 0.0, False)
    text = progress([*found, uniform], 100, WEIGHTS)
    ours, fisher, theirs = (t.outcome.loss for t in (found[2], found[0], uniform))
    assert text.startswith(f"best {ours:.4f} nats (gp); fisher {fisher:.4f}: -10 % [-")
    assert f"; uniform {theirs:.4f}: -55 % [-" in text
    assert progress([], 100, WEIGHTS) == ""
    assert progress(found[:1], 100, WEIGHTS) == f"best {fisher:.4f} nats (fisher)"
    estimate, low, high = compared(found[2].outcome, found[0].outcome, WEIGHTS)
    assert low < estimate < high < 0
    assert noise(found, 100, WEIGHTS) == pytest.approx((high - low) / 2)
    assert noise(found[:1], 100, WEIGHTS) == 0


def test_one_sample_tells_nothing_apart_and_says_so() -> None:
    one = [TrialOutcome(100, (loss,), True, (loss,)) for loss in (1.0, 0.5)]
    first, other = (
        FinishedTrial(i, origin, (i,), o, 0.0, False)
        for i, (origin, o) in enumerate(zip(("fisher", "gp"), one, strict=True))
    )
    assert progress([first, other], 100, np.ones(1)) == "best 0.5000 nats (gp); fisher 1.0000: -50 %"
    found = standstill([first, other], [100], 1, np.ones(1))
    assert found is not None
    assert "gained 50.0%, and these samples tell no differences apart" in str(found)


def judged(origin: str, factors: dict[str, float], search: float | None = None, spread: float = 0.02) -> HeldOutResult:
    """A finalist whose loss on each source is a factor times the reference's."""
    rng = np.random.default_rng(len(origin))
    names = tuple(name for name in factors for _ in range(20))
    base = np.tile(SAMPLES[:20], len(factors))
    kl = base * np.repeat(list(factors.values()), 20) * np.exp(rng.normal(0, spread, len(base)))
    ones = np.ones(len(base), dtype=np.int64)
    return HeldOutResult(
        Candidate(origin, origin, (origin,), 1, search),  # type: ignore[arg-type]
        Scores(names, kl, kl, ones, ones > 1, ones > 1),
    )


BASE = judged("fisher", {"text": 1.0, "recall": 1.0}, spread=0.0)


def test_a_finalist_has_to_be_better_for_certain_and_worse_on_no_source() -> None:
    good = judged("gp", {"text": 0.9, "recall": 0.95})
    lopsided = judged("cmaes", {"text": 0.7, "recall": 1.1})
    unsure = judged("tpe", {"text": 0.97, "recall": 0.97}, spread=0.5)
    assert preferred([good, BASE]) is good
    assert preferred([lopsided, BASE]) is BASE
    assert preferred([lopsided, BASE], robust=False) is lopsided
    assert preferred([unsure, BASE]) is BASE
    assert preferred([lopsided, good, unsure, BASE]) is good
    proxy = judged("proxy", {"text": 0.8, "recall": 0.8})
    assert preferred([BASE, proxy]) is proxy
    assert preferred([proxy, BASE, good]) is proxy  # the better one of the two optima is the one to beat
    slightly = judged("proxy", {"text": 0.999, "recall": 0.999}, spread=0.0)
    assert preferred([BASE, slightly]) is slightly  # of two, without proof
    assert preferred([good, lopsided]) is lopsided  # with neither, the least loss


def test_the_report_says_whether_the_samples_are_enough() -> None:
    good, unsure = judged("gp", {"text": 0.9}), judged("tpe", {"text": 1.0}, spread=0.5)
    fine, coarse = resolution([BASE, good], good.candidate), resolution([BASE, unsure], BASE.candidate)
    assert fine is not None
    assert coarse is not None
    assert 0 < fine < 0.05 < coarse
    assert resolution([BASE], BASE.candidate) is None
    assert resolution([good, unsure], good.candidate) is None
    assert (
        told_apart(0.03, 8) == "The selection split tells losses apart that differ by 3.0%: enough to see a gain of 5%."
    )
    assert "give about --samples 32 (8 here)" in told_apart(0.1, 8)


def test_a_bound_on_the_loss_holds_on_every_source() -> None:
    even, lopsided = judged("gp", {"text": 1.0, "recall": 1.0}), judged("cmaes", {"text": 0.1, "recall": 1.6})
    mean, worst = lopsided.scores.loss, lopsided.scores.of("recall").loss
    bound = (even.scores.loss * 1.1 + worst) / 2
    assert mean < even.scores.loss * 1.1 < bound < worst
    assert cheapest([lopsided, even], bound) is even
    assert cheapest([lopsided, even], bound, robust=False) is lopsided
    with pytest.raises(DataError, match=r"at most 0\.001 on every source .* or give --no-robust"):
        cheapest([lopsided, even], 0.001)
    with pytest.raises(DataError, match=r"at most 0\.001 \(the smallest"):
        cheapest([lopsided, even], 0.001, robust=False)
