"""The figures, comparisons and sentences of a calibration record that the terminal and the HTML report share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final, NamedTuple

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_search.calibration.front import pareto_front
from kvtuner_search.calibration.record import CalibrationRecord, Compared, Side, TargetRecord, Trial
from kvtuner_search.profile.fields import Measure
from kvtuner_search.profile.schema import ModelInfo
from kvtuner_search.profile.text import size

REFERENCE_LABEL: Final = (
    "This is the embedded reference model, a test instrument: its profile does not apply to any other model."
)
OFFLINE_LABEL: Final = "Quality was measured offline, with attention reading every key and value as stored. No server was started; speed was not measured."
RIVALS: Final = {  # origin -> its name in a sentence; anything else was found by the search itself
    "fisher": "best allocation by worth alone",
    "proxy": "proxy's optimum",
    "uniform": "best uniform setting",
    "random": "random search",
    "preset": "published preset",
    "plain": "plain uniform setting",
}
GAIN: Final = 0.05  # of the loss: about what trials gain on real models (docs/log.md)
EQUAL_BITS: Final = 0.005  # relative difference of effective bits below which two settings count as equally large


class Interval(NamedTuple):
    """A value and its confidence interval."""

    value: float
    low: float
    high: float


class HistoryPoint(NamedTuple):
    """One point of a search history."""

    number: int  # trial number
    value: float  # loss in nats, or effective bits if the goal is a loss
    best: float  # best value so far, this trial included
    origin: str


class TrialCount(NamedTuple):
    """Counts of the trials of one origin."""

    origin: str
    complete: int  # all rungs were run
    stopped: int  # ended after an early rung
    repeated: int  # proposals that had been scored before
    seconds: float | None  # median of a complete trial


def raw_bytes(model: ModelInfo) -> int:
    """Bytes per token of the 16-bit cache."""
    return int(model.num_layers) * LayerSpec().bytes_per_token(model.num_kv_heads, model.head_dim)


def effective_bits(model: ModelInfo, nbytes: float) -> float:
    """Stored bits per cached number of ``nbytes`` bytes per token."""
    return 16 * nbytes / raw_bytes(model)


def shape(model: ModelInfo) -> str:
    """Layers, KV heads and channels in words."""
    parts = ((model.num_layers, "layer"), (model.num_kv_heads, "KV head"), (model.head_dim, "channel"))
    layers, heads, channels = (f"{count:,} {name}{'' if count == 1 else 's'}" for count, name in parts)
    return f"{layers}, {heads} of {channels}"


def specs(row: Compared) -> list[LayerSpec]:
    """The LayerSpec of every layer of a compared setting."""
    return [LayerSpec.parse(text) for text in row.layers]


def measures(row: Compared, metric: str) -> dict[str, Interval]:
    """The metric's value by source; the interval is that of the value, not of its change."""
    return {
        m.data: Interval(m.value, m.baseline + m.ci_low, m.baseline + m.ci_high)
        for m in row.measures
        if m.metric == metric
    }


def loss_interval(row: Compared) -> Interval:
    """The loss, the mean KL of the sources, with its interval.

    The record has it as ``loss_low`` and ``loss_high``; without them the sources' intervals are combined in quadrature, each side
    separately, because the sources are independent samples.
    """
    if row.loss_low is not None and row.loss_high is not None:
        return Interval(row.loss, row.loss_low, row.loss_high)
    parts = measures(row, "kl").values()
    if not parts:
        return Interval(row.loss, row.loss, row.loss)
    below = math.hypot(*(part.value - part.low for part in parts)) / len(parts)
    above = math.hypot(*(part.high - part.value for part in parts)) / len(parts)
    return Interval(row.loss, row.loss - below, row.loss + above)


def confidence(record: CalibrationRecord) -> str:
    """The confidence of the intervals, e.g. ``95 %``."""
    levels = {m.confidence for target in record.targets for m in target.chosen.measures}
    return " or ".join(f"{100 * level:g} %" for level in sorted(levels))


def test_samples(record: CalibrationRecord) -> tuple[int, int]:
    """Samples and tokens of the test split."""
    rows = [row for row in record.data if row.split == "test"]
    return sum(row.samples for row in rows), sum(row.tokens for row in rows)


def number(value: float | None, sign: str = "", digits: int = 3) -> str:
    """Significant digits, trailing zeros included; ``sign`` may be ``+``. A dash for missing values."""
    if value is None:
        return "–"
    return format(value, f"{sign}#.{digits}g").rstrip(".") if value else "0"


def change(interval: Interval, digits: int = 3) -> str:
    """A signed interval: ``-0.00317 [-0.00590, -0.000701]``."""
    value, low, high = (number(part, "+", digits) for part in interval)
    return f"{value} [{low}, {high}]"


def measured_change(measure: Measure) -> Interval:
    """The change of a measure from the 16-bit cache."""
    return Interval(measure.value - measure.baseline, measure.ci_low, measure.ci_high)


def paired(row: Compared) -> Interval:
    """Loss of the chosen setting less this one's; below zero means that the chosen one is better."""
    found = row.chosen_minus_this
    return Interval(found.estimate, found.low, found.high)


def searched(origin: str) -> bool:
    """Whether a setting was proposed by the search, not enqueued or found otherwise."""
    return origin not in RIVALS


def verdict_words(row: Compared) -> str:
    """What the chosen setting is, against this one."""
    return "undecided" if row.verdict == "inconclusive" else row.verdict


def bytes_change(row: Compared, chosen: Compared) -> str:
    """Bytes per token of the chosen setting against this one's: ``-12 %``."""
    more = 100 * (chosen.bytes_per_token / row.bytes_per_token - 1)
    return f"{more:+.{0 if abs(more) >= 1 else 1}f} %" if more else "equal"


def best_rival(record: CalibrationRecord, target: TargetRecord, origin: str) -> Compared | None:
    """The rival of that origin within the budget with the least loss on the test split; where the goal is a loss, the smallest that meets it there."""
    rows = [row for row in target.rivals if row.origin == origin]
    if target.target_bits is not None:
        fitting = [row for row in rows if row.effective_bits <= target.target_bits]
        return min(fitting, key=lambda row: (row.loss, row.bytes_per_token), default=None)
    fitting = [row for row in rows if row.loss <= bound(record)]
    return min(fitting, key=lambda row: (row.bytes_per_token, row.loss), default=None)


def findings(record: CalibrationRecord, target: TargetRecord) -> list[str]:
    """Sentences on whether the search paid: who found the chosen setting, and how it stands against each kind of rival."""
    chosen = target.chosen
    who = f"{chosen.name}, {chosen.origin}"
    if searched(chosen.origin) or chosen.origin == record.options.sampler:  # `--sampler random`
        said = [f"The search found the chosen setting ({who})."]
    else:
        said = [f"The search did not beat the {RIVALS[chosen.origin]}: that is the chosen setting ({who})."]
    for origin in ("fisher", "proxy", "uniform", "random", "preset"):
        rival = best_rival(record, target, origin)
        if origin == chosen.origin:
            continue
        if origin == "uniform" and uniform(chosen):
            said.append("It is itself a uniform setting: every layer is stored in the same classes.")
        elif origin == "random" and any(trial.layers == chosen.layers for trial in record.random_trials):
            said.append("The random search found the same setting.")
        elif rival is not None:
            compare = _by_loss if target.target_bits is not None else _by_size
            said.append(compare(chosen, rival, f"{RIVALS[origin]} ({rival.name})"))
    if target.resolution is not None:
        said.append(told_apart(target.resolution, record.options.samples))
    return said


def told_apart(resolution: float, samples: int) -> str:
    """Whether the samples that the choice was made on are enough for the gains that trials may find."""
    said = f"The selection split tells losses apart that differ by {resolution:.1%}"
    if resolution <= GAIN:
        return f"{said}: enough to see a gain of {GAIN:.0%}."
    # The width of an interval falls with the square root of the samples.
    return f"{said}; to see a gain of {GAIN:.0%}, give about --samples {math.ceil(samples * (resolution / GAIN) ** 2)} ({samples} here)."


def uniform(row: Compared) -> bool:
    """Whether all layers have the same bits, group sizes, signs and bands; transforms and clips may differ."""
    sides = [
        [(side.bits, side.group_size, side.symmetric, side.bands) for side in (s.key, s.value)] for s in specs(row)
    ]
    return all(side == sides[0] for side in sides)


def _by_loss(chosen: Compared, rival: Compared, name: str) -> str:
    """How the chosen setting's loss stands against a rival's."""
    verbs = {"better": "It beats", "worse": "It is worse than", "same": "It equals"}
    verb = verbs.get(rival.verdict, "It is not shown to differ from")
    share = ""
    if rival.verdict in ("better", "worse") and rival.loss > 0:
        share = f" by {100 * abs(1 - chosen.loss / rival.loss):.0f} %"
    return f"{verb} the {name}{share}: KL {number(chosen.loss)} against {number(rival.loss)} {_where(chosen, rival)}."


def _by_size(chosen: Compared, rival: Compared, name: str) -> str:
    """How the chosen setting's size stands against that of a rival that meets the same loss."""
    less = 1 - chosen.bytes_per_token / rival.bytes_per_token
    verb = f"It takes {100 * abs(less):.1f} % {'fewer' if less > 0 else 'more'} bytes than"
    losses = f"KL {number(chosen.loss)} against {number(rival.loss)}"
    return f"{verb if less else 'It takes as many bytes as'} the {name}: {losses} {_where(chosen, rival)}."


def _where(chosen: Compared, rival: Compared) -> str:
    mine, other = chosen.effective_bits, rival.effective_bits
    if math.isclose(mine, other, rel_tol=EQUAL_BITS):
        return f"at equal effective bits ({mine:.3f})"
    return f"at {mine:.3f} against {other:.3f} effective bits"


def bound(record: CalibrationRecord) -> float:
    """The loss that was asked for, nats a token; without a bound nothing is within it."""
    return -math.inf if record.options.max_loss is None else record.options.max_loss


def affordable(record: CalibrationRecord, target: TargetRecord, trial: Trial) -> bool:
    """Whether a trial is complete, new, and meets the target on the search split."""
    if not trial.complete or trial.duplicate:
        return False
    if target.target_bits is not None:
        return effective_bits(record.model, trial.cost) <= target.target_bits
    return trial.loss <= bound(record)


def history(record: CalibrationRecord, target: TargetRecord, trials: Sequence[Trial]) -> list[HistoryPoint]:
    """Trials that meet the target, in order, with the best so far: by loss, or by effective bits where the goal is a loss."""
    steps: list[HistoryPoint] = []
    for trial in sorted(trials, key=lambda t: t.number):
        if affordable(record, target, trial):
            value = trial.loss if target.target_bits is not None else effective_bits(record.model, trial.cost)
            best = min(value, steps[-1].best) if steps else value
            steps.append(HistoryPoint(trial.number, value, best, trial.origin))
    return steps


def front(model: ModelInfo, trials: Sequence[Trial]) -> list[tuple[float, float]]:
    """(effective bits, loss) of complete trials that no other one beats on both, cheapest first."""
    found = pareto_front((t for t in trials if t.complete), lambda t: t.bytes_per_token, lambda t: t.loss)
    return [(effective_bits(model, t.bytes_per_token), t.loss) for t in found]


def trial_counts(record: CalibrationRecord) -> list[TrialCount]:
    """How the trials went, by origin, in order of first appearance."""
    rows = []
    trials = [*record.trials, *record.random_trials]
    for origin in dict.fromkeys(t.origin for t in trials):
        mine = [t for t in trials if t.origin == origin]
        fresh = [t for t in mine if not t.duplicate]
        complete = [t for t in fresh if t.complete]
        seconds = statistics.median(t.seconds for t in complete) if complete else None
        rows.append(TrialCount(origin, len(complete), len(fresh) - len(complete), len(mine) - len(fresh), seconds))
    return rows


def cost(record: CalibrationRecord) -> str:
    """Time and memory of the run."""
    environment = record.environment
    memory = f"{size(environment.peak_memory_bytes)} of memory"
    if environment.peak_gpu_memory_bytes is not None:
        memory += f" and {size(environment.peak_gpu_memory_bytes)} of GPU memory"
    total = sum(record.seconds.values())
    return f"{total:.1f} seconds in all; at most {memory}; on {environment.device}."


def storage_classes(record: CalibrationRecord, side: Side) -> list[str]:
    """Names of the storage classes that were measured for ``keys`` or ``values`` in some layer, dearest first, without 16 bits."""
    head_dim = record.model.head_dim
    cost: dict[str, float] = {}
    for layer in record.sensitivity:
        for name, (spec, _) in layer.side(side).items():
            if name not in cost:
                cost[name] = TensorSpec.parse(spec).effective_bits(head_dim)
    return sorted((name for name in cost if cost[name] != 16), key=lambda name: (-cost[name], name))


def alone_losses(record: CalibrationRecord, side: Side, name: str) -> list[float | None]:
    """Layer-alone KL (nats) of a storage class by layer; None where it was not measured."""
    found = [layer.side(side).get(name) for layer in record.sensitivity]
    return [None if entry is None else entry.loss for entry in found]


def band_worth(record: CalibrationRecord, side: Side) -> list[list[float] | None]:
    """By layer: nats a token that each band of ``keys`` or ``values`` would cost if it were stored in no bits; None if not recorded."""
    return [layer.worth.side(side) if layer.worth else None for layer in record.sensitivity]


def head_worth(record: CalibrationRecord, side: Side) -> list[list[list[float]] | None]:
    """The same for each KV head."""
    return [layer.worth_by_head.side(side) if layer.worth_by_head else None for layer in record.sensitivity]


def has_bands(row: Compared) -> bool:
    """Whether a compared setting stores anything in bands."""
    return any(side.banded for spec in specs(row) for side in (spec.key, spec.value))


def chosen_class(record: CalibrationRecord, row: Compared, side: Side) -> list[str | None]:
    """The storage class of every layer's keys or values in a compared setting; None if it was not measured."""
    picked = [spec.key if side == "keys" else spec.value for spec in specs(row)]
    return [
        next((name for name, (text, _) in layer.side(side).items() if text == str(spec)), None)
        for layer, spec in zip(record.sensitivity, picked, strict=True)
    ]
