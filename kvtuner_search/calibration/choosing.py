"""Choose a setting for each target on the selection split, and measure it and its rivals on the test split, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kvtuner_kernels.layout import UNIFORM_BITS, LayerSpec
from kvtuner_search.calibration.candidates import StorageClass, pair_name
from kvtuner_search.calibration.finals import Candidate, HeldOutResult, HeldOutScorer, finalists
from kvtuner_search.calibration.patience import UNTRIED
from kvtuner_search.calibration.pipeline import CalibrationRun
from kvtuner_search.calibration.plan import SearchPlan
from kvtuner_search.calibration.space import Space
from kvtuner_search.calibration.trials import FinishedTrial, pareto
from kvtuner_search.errors import DataError
from kvtuner_search.evaluation.scorer import Scorer, Scores
from kvtuner_search.evaluation.statistics import paired_loss

RIVALS: Final = ("fisher", "uniform", "proxy", "preset", "random")


@dataclass(frozen=True)
class TargetResult:
    """One budget, and the setting chosen for it."""

    label: str  # for example 4.0 bits
    bits: float | None  # None if the loss was bounded instead
    chosen: HeldOutResult  # on the test split
    rivals: list[HeldOutResult]
    resolution: float | None = None  # see resolution()


def choose(
    run: CalibrationRun, plan: SearchPlan, space: Space, found: Sequence[FinishedTrial], random: Sequence[FinishedTrial]
) -> tuple[list[TargetResult], Scorer]:
    """The targets, and the test split's scorer.

    Raises:
        DataError: if no finished trial fits a target.
    """
    goals: list[tuple[str, float | None]] = [(f"{bits:g} bits", bits) for bits in run.options.target_bits]
    if run.options.max_loss is not None:
        goals = [(f"loss {run.options.max_loss:g}", None)]
    finals = [_finalists(run, space, found, random, label, bits) for label, bits in goals]
    select = _judge(run, plan, "selection")
    with run.reporter.stage("choose", _distinct(finals)) as advance:
        judged = [[select(c, advance) for c in final] for final in finals]
    winners = [_winner(run, results) for results in judged]
    rivals = []
    for results, winner in zip(judged, winners, strict=True):
        others = [r.candidate for r in results if r.candidate.origin in RIVALS] + plain_settings(run)
        rivals.append([c for c in others if c.setting != winner.setting])
    test = _judge(run, plan, "test")
    with run.reporter.stage("test", _distinct([winners, *rivals])) as advance:
        targets = [
            TargetResult(
                label, bits, test(winner, advance), [test(c, advance) for c in others], resolution(results, winner)
            )
            for (label, bits), winner, others, results in zip(goals, winners, rivals, judged, strict=True)
        ]
    return targets, test.scorer


def _distinct(groups: Iterable[Iterable[Candidate]]) -> int:
    return len({c.setting for group in groups for c in group})


def _judge(run: CalibrationRun, plan: SearchPlan, name: str) -> HeldOutScorer:
    split = run.data.selection if name == "selection" else run.data.test
    with run.reporter.stage(f"score the 16-bit cache ({name})", split.tokens) as advance:
        scorer = Scorer(run.scorer.runner, [split.samples], batch_tokens=run.options.batch_tokens, advance=advance)
    return HeldOutScorer(scorer, plan.centres)


def _finalists(
    run: CalibrationRun,
    space: Space,
    found: Sequence[FinishedTrial],
    random: Sequence[FinishedTrial],
    label: str,
    bits: float | None,
) -> list[Candidate]:
    def candidate(trial: FinishedTrial, origin: str) -> Candidate:
        pair = space.uniform_pair(trial.choices)
        name = pair_name(pair) if pair else f"trial {trial.number}"
        loss = trial.outcome.loss if trial.outcome.complete else None
        return Candidate(name, origin, space.setting(trial.choices), trial.outcome.cost, loss)

    if bits is None:
        return [candidate(t, t.origin) for t in pareto(found)]
    limit = run.total_bytes(bits)
    affordable: Callable[[FinishedTrial], bool] = lambda t: t.outcome.cost <= limit  # noqa: E731
    final = finalists(space, found, random, candidate, affordable)
    if not final:
        raise DataError(f"no finished trial fits {label}: raise --trials, or the budget")
    return final


def _winner(run: CalibrationRun, judged: Sequence[HeldOutResult]) -> Candidate:
    bound = run.options.max_loss
    if bound is None:
        return preferred(judged, run.options.robust).candidate
    return cheapest(judged, bound, run.options.robust).candidate


def cheapest(judged: Sequence[HeldOutResult], bound: float, robust: bool = True) -> HeldOutResult:
    """The cheapest finalist whose loss on the selection split is at most ``bound``, in nats a token.

    Args:
        judged: finalists on the selection split.
        bound: the user's bound on the loss.
        robust: each source's own loss must hold it, not only that of all samples together.

    Raises:
        DataError: if none holds it.
    """

    def loss(result: HeldOutResult) -> float:
        scores = result.scores
        return max(scores.loss, *(scores.of(name).loss for name in scores.names)) if robust else scores.loss

    fitting = [r for r in judged if loss(r) <= bound]
    if not fitting:
        least = min(map(loss, judged), default=float("inf"))
        where = " on every source" if robust else ""
        raise DataError(
            f"no scored setting has a loss of at most {bound:g}{where} (the smallest is {least:.4g}): raise --trials or --max-loss"
            f"{', or give --no-robust to bound the mean over sources' * robust}"
        )
    return min(fitting, key=lambda r: (r.candidate.cost, r.scores.loss))


def preferred(judged: Sequence[HeldOutResult], robust: bool = True) -> HeldOutResult:
    """The finalist to take, by its scores on the selection split.

    Args:
        judged: finalists on the selection split.
        robust: take another one than the optimum that needs no trial (the better one of fisher's and the proxy's) only if it is better by a paired
            interval that excludes zero, and worse by such an interval on no source.
    """
    safe = _untried(judged)
    if not robust or safe is None:
        return min(judged, key=_worth)
    return min([safe, *(r for r in judged if _surely_better(r.scores, safe.scores))], key=_worth)


def _worth(result: HeldOutResult) -> tuple[float, int]:
    return _evidence(result), result.candidate.cost


def _untried(judged: Sequence[HeldOutResult]) -> HeldOutResult | None:
    """The best of the few optima that need no trial: too few for luck to choose."""
    return min((r for r in judged if r.candidate.origin in UNTRIED), key=_worth, default=None)


def resolution(judged: Sequence[HeldOutResult], winner: Candidate) -> float | None:
    """The relative difference of losses that the selection split tells apart at 95 %: half the width of the paired interval between the optimum that
    needs no trial and the choice, or the best other finalist if that is the choice. None if there is no such pair."""
    safe = _untried(judged)
    if safe is None or safe.scores.loss <= 0:
        return None
    others = [r for r in judged if r.candidate.setting != safe.candidate.setting]
    chosen = [r for r in others if r.candidate.setting == winner.setting]
    other = min(chosen or others, key=_evidence, default=None)
    if other is None:
        return None
    interval = paired_loss(other.scores, safe.scores)
    return (interval.high - interval.low) / 2 / safe.scores.loss


def _surely_better(ours: Scores, theirs: Scores) -> bool:
    """By a paired interval over all sources, and worse on none by one of its own."""
    if paired_loss(ours, theirs).high >= 0:
        return False
    return all(paired_loss(ours.of(name), theirs.of(name)).low <= 0 for name in ours.names)


def _evidence(result: HeldOutResult) -> float:
    """The criterion for finalists: the loss on search and selection split together, which halves the noise of either."""
    searched = result.candidate.search_loss
    return result.scores.loss if searched is None else (result.scores.loss + searched) / 2


def plain_settings(run: CalibrationRun) -> list[Candidate]:
    """Uniform per-token settings over the whole head, asymmetric, without any transform."""
    heads, head_dim = run.shape
    rows = []
    for key, value in UNIFORM_BITS:
        spec = LayerSpec(StorageClass(key, False, head_dim).spec(), StorageClass(value, False, head_dim).spec())
        setting = (spec,) * run.loaded.info.num_layers
        rows.append(
            Candidate(f"plain {spec.name}", "plain", setting, sum(s.bytes_per_token(heads, head_dim) for s in setting))
        )
    return rows
