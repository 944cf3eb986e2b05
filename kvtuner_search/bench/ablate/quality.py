"""The offline half of an ablation: every row on the same samples, paired with the 16-bit cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvtuner_kernels.layout import effective_bits
from kvtuner_kernels.reference import Centres
from kvtuner_search.bench.ablate.rows import AblationRow, Figure, Quality
from kvtuner_search.bench.ablate.simulate import SimulatedCache
from kvtuner_search.bench.ablate.variants import BASELINE, StorageVariant
from kvtuner_search.data import load_evaluation
from kvtuner_search.data.load import load_dataset_for
from kvtuner_search.data.types import Split
from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.evaluation.moments import Moments
from kvtuner_search.evaluation.scorer import Scorer, Scores
from kvtuner_search.evaluation.statistics import CONFIDENCE, measures, paired_proportions, paired_ratio
from kvtuner_search.evaluation.stored import stored_cache
from kvtuner_search.models.load import LoadedModel
from kvtuner_search.models.runner import Runner
from kvtuner_search.progress import Reporter

NOT_SERVED: Final = "not in serving: packed rows of layout version 1 cannot hold it"


class QualityBench:
    """A model and the data of one ablation. The 16-bit pass runs when the first row needs it.

    Args:
        loaded: the model.
        sources, samples, length, seed: the evaluation data, as in ``evaluate``.
        centring: sources of the centring vectors; evaluated sequences are left out of them. None: no row needs any.
        batch_tokens: padded tokens of one forward pass.

    Raises:
        UsageError: if the model has no tokenizer.
        DataError: if a source cannot be used.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sources: Sequence[str],
        centring: Sequence[str] | None,
        *,
        samples: int,
        length: int,
        seed: int,
        batch_tokens: int,
        reporter: Reporter,
    ) -> None:
        if loaded.tokenizer is None:
            raise UsageError(f"{loaded.info.id} has no tokenizer: an ablation needs text")
        self.loaded, self.reporter, self.batch_tokens = loaded, reporter, batch_tokens
        self.split = load_evaluation(
            sources, loaded.tokenizer, seed=seed, samples=samples, length=length, say=reporter.say
        )
        self.centring = Split("search", ())
        if centring is not None:
            drawn = load_dataset_for(
                centring, loaded.tokenizer, seed=seed, search=samples, selection=0, test=0, length=length
            )
            evaluated = {sample.tokens for sample in self.split.samples}
            kept = tuple(sample for sample in drawn.search.samples if sample.tokens not in evaluated)
            if not kept:
                raise DataError(
                    "every sequence for the centring vectors is also evaluated: name other data with --centring-data"
                )
            self.centring = Split("search", kept)
        self._scorer: Scorer | None = None
        self._centres: dict[int, Centres] | None = None

    def centres(self) -> dict[int, Centres]:
        """Mean key and value of each layer over the centring data."""
        if self._centres is None:
            with self.reporter.stage("centring vectors", self.centring.tokens) as advance:
                moments = Moments()
                Scorer(
                    Runner(self.loaded),
                    [self.centring.samples],
                    batch_tokens=self.batch_tokens,
                    observe=moments,
                    advance=advance,
                )
            self._centres = moments.centres()
        return self._centres

    def row(
        self, variant: StorageVariant, context: int, title: str, centres: Mapping[int, Centres] | None = None
    ) -> AblationRow:
        """Measure one row.

        Args:
            variant: the row.
            context: tokens in the cache, for rows whose bits depend on it.
            title: of its progress.
            centres: centring vectors that come with a profile; otherwise those of the centring data.
        """
        info = self.loaded.info
        if variant.setting is None and variant.scheme is None:
            return AblationRow(
                name=variant.name,
                family=variant.family,
                specs="",
                effective_bits=None,
                context=None,
                capacity=None,
                servable=False,
                quality=None,
                reason=variant.reason,
            )
        if variant.scheme is not None:
            bits = variant.scheme.effective_bits(info.head_dim, context)
        else:
            assert variant.setting is not None
            bits = effective_bits(variant.setting, info.num_kv_heads, info.head_dim)
        return AblationRow(
            name=variant.name,
            family=variant.family,
            specs=variant.specs,
            effective_bits=bits,
            context=None if variant.scheme is None else context,
            capacity=16 / bits,
            servable=variant.scheme is None,
            quality=self._quality(variant, title, centres),
            reason="" if variant.scheme is None else NOT_SERVED,
        )

    def _quality(self, variant: StorageVariant, title: str, centres: Mapping[int, Centres] | None) -> Quality:
        if self._scorer is None:
            with self.reporter.stage("16-bit pass, to compare with", self.split.tokens) as advance:
                self._scorer = Scorer(
                    Runner(self.loaded), [self.split.samples], batch_tokens=self.batch_tokens, advance=advance
                )
        baseline = self._scorer.baseline_all()
        if variant.name == BASELINE:
            return quality(baseline, baseline)
        if variant.centred and centres is None:
            centres = self.centres()
        with self.reporter.stage(title, self.split.tokens) as advance:
            if variant.scheme is not None:
                scores = self._scorer.score_through(SimulatedCache(variant.scheme), advance)
            else:
                assert variant.setting is not None
                scores = self._scorer.score_through(stored_cache(variant.setting, centres or {}), advance)
        return quality(scores, baseline)


def quality(scores: Scores, baseline: Scores) -> Quality:
    """All figures of a row: likelihood of the texts, KL of everything, accuracy of the tasks."""
    text = ~scores.is_task if not scores.is_task.all() else scores.is_task
    tokens = scores.tokens.astype(np.float64)
    every = np.ones_like(text)
    accuracy = None
    if scores.is_task.any():
        ours, base = scores.exact[scores.is_task], baseline.exact[scores.is_task]
        lost, gained = int((base & ~ours).sum()), int((ours & ~base).sum())
        interval = paired_proportions(lost, gained, len(ours))
        accuracy = Figure(
            samples=len(ours),
            baseline=float(base.mean()),
            value=float(ours.mean()),
            ci_low=interval.low,
            ci_high=interval.high,
            confidence=CONFIDENCE,
            lost=lost,
            gained=gained,
        )
    return Quality(
        nll=_ratio(scores.nll, baseline.nll, tokens, text),
        kl=_ratio(scores.kl, baseline.kl, tokens, every),
        accuracy=accuracy,
        measures=measures(scores, baseline, "test"),
    )


def _ratio(
    value: NDArray[np.float64], base: NDArray[np.float64], tokens: NDArray[np.float64], keep: NDArray[np.bool_]
) -> Figure:
    value, base, tokens = value[keep], base[keep], tokens[keep]
    interval = paired_ratio(value - base, tokens)
    return Figure(
        samples=len(tokens),
        baseline=float(base.sum() / tokens.sum()),
        value=float(value.sum() / tokens.sum()),
        ci_low=interval.low,
        ci_high=interval.high,
        confidence=CONFIDENCE,
    )
