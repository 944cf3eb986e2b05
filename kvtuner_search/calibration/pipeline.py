"""A calibration run from model and text to profiles: analyse, search, choose, and measure the choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.calibration.anchors import anchors, preset_pairs, uniform_pairs
from kvtuner_search.calibration.basis import fit_bases
from kvtuner_search.calibration.candidates import StorageClass, storage_classes
from kvtuner_search.calibration.objective import TrialObjective, TrialOutcome
from kvtuner_search.calibration.options import TIERS, CalibrationOptions, fingerprint
from kvtuner_search.calibration.patience import FIRST, Standstill, progress, standstill
from kvtuner_search.calibration.plan import SearchPlan, make_plan
from kvtuner_search.calibration.proxy import ProxyPoint
from kvtuner_search.calibration.space import Choices, Space, build_space
from kvtuner_search.calibration.study import Study
from kvtuner_search.calibration.trials import FinishedTrial
from kvtuner_search.data.load import default_sources, load_dataset_for
from kvtuner_search.data.types import Dataset, Sample, Split
from kvtuner_search.errors import UsageError
from kvtuner_search.evaluation.moments import Moments
from kvtuner_search.evaluation.scorer import Scorer
from kvtuner_search.models.load import LoadedModel, load_model
from kvtuner_search.models.reference_model import REFERENCE_NAME
from kvtuner_search.models.runner import Runner
from kvtuner_search.profile.presets import published
from kvtuner_search.progress import Reporter

LEAST_ERROR: Final = 0.01  # attention output error under which a layer's lone loss is extrapolated, not run


@dataclass
class CalibrationRun:
    """The state of a calibration."""

    options: CalibrationOptions
    reporter: Reporter
    loaded: LoadedModel
    data: Dataset
    scorer: Scorer  # search split
    moments: Moments
    classes: list[StorageClass]

    @property
    def shape(self) -> tuple[int, int]:
        """KV heads and head_dim."""
        return self.loaded.info.num_kv_heads, self.loaded.info.head_dim

    def total_bytes(self, bits: float) -> int:
        """Bytes per token of all layers at ``bits`` effective bits."""
        heads, head_dim = self.shape
        return int(bits * 2 * heads * head_dim * self.loaded.info.num_layers / 8)

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that a study of this run is bound to."""
        loaded = self.loaded
        dtype = str(loaded.dtype).removeprefix("torch.")
        return self.options.facts(loaded.info.model_dump(mode="json"), dtype, loaded.device.type, self.data)


def prepare(options: CalibrationOptions, reporter: Reporter) -> CalibrationRun:
    """Load model and data and score the 16-bit cache on the search split.

    Raises:
        UsageError, DataError: if something cannot be used.
    """
    with reporter.stage("load the model"):
        loaded = load_model(options.model, options.length)
    for note in loaded.notes:
        reporter.say(note)
    info = loaded.info
    classes = storage_classes(options.bits, options.group_sizes, info.head_dim, options.symmetric, options.bands)
    _check_targets(options, classes, info.num_kv_heads, info.head_dim, info.num_layers)
    if not options.sources:
        # The reference model has a chat template, and was not trained on chats (its model card).
        trained = loaded.info.id != REFERENCE_NAME
        options = replace(options, sources=default_sources(loaded.tokenizer, options.length, chats=trained))
    with reporter.stage("read the data"):
        data = load_data(options, loaded, reporter.say)
    runner = Runner(loaded)
    moments = Moments()
    with reporter.stage("score the 16-bit cache", data.search.tokens) as advance:
        tiers = split_tiers(data.search)
        scorer = Scorer(runner, tiers, batch_tokens=options.batch_tokens, observe=moments, advance=advance)
    return CalibrationRun(options, reporter, loaded, data, scorer, moments, classes)


def load_data(options: CalibrationOptions, loaded: LoadedModel, say: Callable[[str], None] = lambda _: None) -> Dataset:
    """The three splits; random token ids for a model without a tokenizer. ``say`` reports rows that were left out.

    Raises:
        UsageError, DataError: if a source cannot be used.
    """
    n = options.samples
    if loaded.tokenizer is None:
        generator = torch.Generator().manual_seed(options.seed)
        ids = torch.randint(0, loaded.model.config.vocab_size, (3, n, options.length), generator=generator).tolist()
        splits = [
            tuple(Sample("random tokens", tuple(row), ((1, options.length),), False) for row in part) for part in ids
        ]
        return Dataset(Split("search", splits[0]), Split("selection", splits[1]), Split("test", splits[2]))
    return load_dataset_for(
        options.sources,
        loaded.tokenizer,
        seed=options.seed,
        search=n,
        selection=n,
        test=n,
        length=options.length,
        say=say,
    )


def split_tiers(split: Split) -> list[list[Sample]]:
    """Samples by rung (see TIERS): at least one of each task and two of each text, then more, then the rest."""
    tiers: list[list[Sample]] = [[] for _ in TIERS]
    for part in split.by_source().values():
        count, start = len(part.samples), 0
        for tier, fraction in zip(tiers, TIERS, strict=True):
            least = 1 if start or part.samples[0].is_task else 2  # one window of text says little about the next
            end = min(max(start + least, round(count * fraction)), count)
            tier += part.samples[start:end]
            start = end
    return [tier for tier in tiers if tier]


def analyse(run: CalibrationRun, study: Study | None, least_error: float = LEAST_ERROR) -> SearchPlan:
    """Measure sensitivity, or take it from a study that is being resumed or joined.

    Raises:
        UsageError: if the study was made with other options, another model or other data.
    """
    mine = fingerprint(run.facts)
    if study is not None:
        study.claim(run.facts)
    content = study.plan() if study is not None else None
    if content is None:
        measured = min(2, len(run.scorer.tiers))
        fitted = None
        if any(candidate.banded for candidate in run.classes):
            options = run.options
            fitted = fit_bases(run.scorer, run.loaded.tokenizer, options.seed, options.batch_tokens, run.reporter.stage)
        plan = make_plan(
            mine,
            run.scorer,
            run.moments,
            run.classes,
            tiers=measured,
            least_error=least_error,
            stage=run.reporter.stage,
            fitted=fitted,
        )
        content = plan.to_json()
        if study is not None:
            content = study.publish(content)
    if content["fingerprint"] != mine:  # of the stored plan, whoever stored it
        raise UsageError(
            "the study's plan was made with other options, another model or other data: use the same, or another --output or --storage"
        )
    return SearchPlan.from_json(content, *run.shape)


def make_space(run: CalibrationRun, plan: SearchPlan) -> Space:
    """Prune and group."""
    heads, head_dim = run.shape
    keep = uniform_pairs(run.classes)
    for preset in presets(run):
        keep += [pair for pair in preset if pair not in keep]
    return build_space(plan.options, heads, head_dim, keep, run.options.grouping, run.options.stages)


def presets(run: CalibrationRun) -> list[list[tuple[StorageClass, StorageClass]]]:
    """Published presets for this model, in the search's classes."""
    rows = [preset_pairs(layers, run.classes) for _, layers in published(run.loaded.info)]
    return [found for found in rows if found is not None]


def budgets(run: CalibrationRun, front: Sequence[ProxyPoint]) -> list[int]:
    """Costs that the search aims at: the targets, or where the proxy's front crosses fractions of ``max_loss``, as it may promise too much."""
    if run.options.max_loss is None:
        return [run.total_bytes(bits) for bits in run.options.target_bits]
    near = [
        next((p.nbytes for p in front if p.loss <= run.options.max_loss * factor), front[-1].nbytes)
        for factor in (2.0, 1.0, 0.5)
    ]
    return sorted(set(near))


def search(
    run: CalibrationRun, plan: SearchPlan, space: Space, front: Sequence[ProxyPoint], study: Study, rival: Study | None
) -> tuple[list[FinishedTrial], list[FinishedTrial]]:
    """Run the study, and the random search that it is compared with, to the end."""
    goals = budgets(run, front)
    objective = TrialObjective(run.scorer, plan.centres, space, max(goals))
    weights = run.scorer.baseline_all().sample_weights
    for label, each, first in (
        ("search", study, anchors(space, front, uniform_pairs(run.classes), presets(run), goals)),
        ("random search", rival, []),
    ):
        if each is None:
            continue
        each.fail_abandoned()
        each.enqueue(space, first)
        done = [t for t in each.finished() if not t.duplicate]
        ended: list[Standstill] = []
        # The random search makes as many proposals as the sampler, which may have ended early, and at least one;
        # it tries no optimum or uniform setting first.
        made = len([t for t in study.finished() if not t.duplicate and t.origin not in FIRST])
        trials = run.options.trials if each is study else max(1, min(run.options.trials, made))
        with run.reporter.stage(label, trials) as advance:
            advance(len(done))

            def tell(trial: FinishedTrial, advance: Callable[..., None] = advance) -> None:
                advance(0 if trial.duplicate else 1)

            def enough(
                distinct: Sequence[FinishedTrial],
                advance: Callable[..., None] = advance,
                ended: list[Standstill] = ended,
                patience: int = run.options.patience if each is study else 0,
            ) -> bool:
                advance(0, progress(distinct, min(goals), weights))
                found = standstill(distinct, goals, patience, weights)
                ended += [found] if found is not None else []
                return found is not None

            others = [t.outcome for t in study.finished()] if each is rival else []

            def score(
                choices: Choices, outcomes: Sequence[TrialOutcome], screen: bool, others: list[TrialOutcome] = others
            ) -> TrialOutcome:
                return objective(choices, [*others, *outcomes], screen)

            each.run(space, score, trials, goals, tell, enough)
        distinct = [t for t in each.finished() if not t.duplicate]
        if ended:
            run.reporter.say(f"{label} {ended[0]}")
        elif len(distinct) < trials:
            run.reporter.say(f"{label} ended after {len(distinct)} trials: further proposals repeated earlier settings")
        for goal in goals if each is study else ():
            if found := progress(distinct, goal, weights):
                run.reporter.say(f"{label}{f', {goal:,} bytes a token' if len(goals) > 1 else ''}: {found}")
    return study.finished(), rival.finished() if rival is not None else []


def _check_targets(
    options: CalibrationOptions, classes: Sequence[StorageClass], heads: int, head_dim: int, layers: int
) -> None:
    if not 1 <= options.stages <= layers:
        raise UsageError(f"--pp {options.stages} is not between 1 and the model's {layers} layers")
    if options.max_loss is not None and not options.max_loss > 0:
        raise UsageError(f"--max-loss {options.max_loss} is not positive: it is a KL divergence in nats")
    pairs = [(k, v) for k in classes for v in classes if k.banded == v.banded]
    bits = [LayerSpec(k.spec(), v.spec()).effective_bits(heads, head_dim) for k, v in pairs]
    for target in options.target_bits:
        if target < min(bits):
            names = [str(c) for c in classes if not c.banded] + ["bands"] * any(c.banded for c in classes)
            raise UsageError(
                f"--target-bits {target:g} is below {min(bits):g}, the least that {', '.join(names)} can store: raise it,"
                " or allow fewer --bits or larger --group-size"
            )
