"""Score a profile on a model without a server: attention reads every key and value as the profile stores it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtuner_kernels.layout import LayerSpec, effective_bits
from kvtuner_kernels.reference import Centres
from kvtuner_search.data import load_evaluation
from kvtuner_search.errors import UsageError
from kvtuner_search.evaluation.scorer import Scorer
from kvtuner_search.evaluation.statistics import measures
from kvtuner_search.evaluation.stored import Setting
from kvtuner_search.models.load import LoadedModel
from kvtuner_search.models.runner import Runner
from kvtuner_search.profile.canonical import load
from kvtuner_search.profile.schema import Profile
from kvtuner_search.progress import Reporter
from kvtuner_search.transforms import read_transforms


def open_profile(path: Path) -> tuple[Profile, dict[int, Centres]]:
    """A profile, and its centring vectors and bases by layer.

    Raises:
        ProfileError: if the profile or its transforms file cannot be used.
    """
    profile = load(path)
    return profile, read_transforms(path, profile)


def evaluate(
    loaded: LoadedModel,
    settings: Sequence[tuple[str, Setting, dict[int, Centres]]],
    sources: Sequence[str],
    *,
    samples: int,
    length: int,
    seed: int,
    batch_tokens: int,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Measures of each (name, setting, centres) against the 16-bit cache, as plain JSON.

    Raises:
        UsageError: if the model has no tokenizer.
        DataError: if a source cannot be used.
    """
    if loaded.tokenizer is None:
        raise UsageError(f"{loaded.info.id} has no tokenizer: evaluation needs text")
    split = load_evaluation(sources, loaded.tokenizer, seed=seed, samples=samples, length=length, say=reporter.say)
    with reporter.stage("16-bit cache", split.tokens) as advance:
        scorer = Scorer(Runner(loaded), [split.samples], batch_tokens=batch_tokens, advance=advance)
    found = []
    for name, setting, centres in settings:
        with reporter.stage(name, split.tokens) as advance:
            scores = scorer.score_all(setting, centres, advance)
        found.append(
            {
                "name": name,
                "effective_bits": effective_bits(setting, loaded.info.num_kv_heads, loaded.info.head_dim),
                "loss": scores.loss,
                "measures": [m.model_dump() for m in measures(scores, scorer.baseline_all(), "test")],
                "data": [
                    {"name": n, "samples": len(p.samples), "tokens": p.tokens, "digest": p.digest}
                    for n, p in split.by_source().items()
                ],
            }
        )
    return found


def uniform(spec: LayerSpec, layers: int) -> Setting:
    """The same spec in every layer.

    Raises:
        UsageError: for a spec that is centred or banded, for which only a calibration can give what it needs.
    """
    if spec.key.banded or spec.value.banded:
        raise UsageError(
            f"{spec} has bands, whose basis only a calibration can fit: calibrate, or give a spec without bands"
        )
    if spec.key.centred or spec.value.centred:
        raise UsageError(f"{spec} is centred, which needs vectors from a calibration: leave -c out")
    return (spec,) * layers
