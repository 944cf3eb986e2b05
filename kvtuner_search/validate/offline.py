"""The same tokens through the offline evaluation: does the server compute what calibration measured?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kvtuner_kernels.reference import Centres
from kvtuner_search.data import Split
from kvtuner_search.evaluation.scorer import Scorer
from kvtuner_search.evaluation.statistics import CONFIDENCE, paired_ratio
from kvtuner_search.evaluation.stored import Setting, stored_cache
from kvtuner_search.models.attention import Tap
from kvtuner_search.models.load import LoadedModel
from kvtuner_search.models.runner import Runner
from kvtuner_search.profile.validation import OfflineAgreement
from kvtuner_search.progress import Reporter
from kvtuner_search.validate.measure import ServerAnswers


@dataclass(frozen=True)
class _Generated:
    """The offline model's scores of one server's continuations, given the same tokens before each."""

    same: NDArray[np.int64]  # [prompts]: tokens that the offline model ranks first too
    logprobs: NDArray[np.float64]  # [prompts]: sum of its log-probabilities of the tokens, nats


def compare(
    loaded: LoadedModel,
    setting: Setting,
    centres: Mapping[int, Centres],
    split: Split,
    greedy: Sequence[tuple[int, ...]],
    ours: ServerAnswers,
    baseline: ServerAnswers,
    *,
    batch_tokens: int,
    reporter: Reporter,
) -> list[OfflineAgreement]:
    """The profile's server against the offline evaluation of the profile, and the stock server against the 16-bit cache."""
    runner = Runner(loaded)
    with reporter.stage("offline, 16 bit", split.tokens) as advance:
        scorer = Scorer(runner, [split.samples], batch_tokens=batch_tokens, advance=advance)
    with reporter.stage("offline, profile", split.tokens) as advance:
        scores = scorer.score_all(setting, centres, advance)
    found = []
    rows: list[tuple[Literal["profile", "16bit"], ServerAnswers, NDArray[np.float64], Tap | None]] = [
        ("profile", ours, scores.nll, stored_cache(setting, centres)),
        ("16bit", baseline, scorer.baseline_all().nll, None),
    ]
    for cache, outcome, nll, tap in rows:
        with reporter.stage(f"offline, continuations, {cache}", len(greedy)) as advance:
            generated = _continuations(runner, greedy, outcome.continuations, tap, advance)
        found.append(_agreement(cache, outcome, nll, scores.tokens.astype(np.float64), generated))
    return found


def _continuations(
    runner: Runner,
    prompts: Sequence[tuple[int, ...]],
    continuations: Sequence[tuple[int, ...]],
    tap: Tap | None,
    advance: Callable[..., None],
) -> _Generated:
    same, logprobs = [], []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        tokens = torch.tensor([prompt + continuation])
        hidden = runner.hidden(tokens, tap)[0, len(prompt) - 1 : -1]  # the position before each generated token
        found = runner.log_probabilities(hidden)
        chosen = torch.tensor(continuation, device=found.device)
        same.append(int((found.argmax(1) == chosen).sum()))
        logprobs.append(float(found.gather(1, chosen.unsqueeze(1)).double().sum()))
        advance()
    return _Generated(np.array(same), np.array(logprobs))


def _agreement(
    cache: Literal["profile", "16bit"],
    outcome: ServerAnswers,
    nll: NDArray[np.float64],
    tokens: NDArray[np.float64],
    generated: _Generated,
) -> OfflineAgreement:
    lengths = np.array([len(tokens) for tokens in outcome.continuations], dtype=np.float64)
    scored = paired_ratio(outcome.nll - nll, tokens)
    decoded = paired_ratio(generated.logprobs - np.array([part.sum() for part in outcome.decoded]), lengths)
    return OfflineAgreement(
        cache=cache,
        samples=len(nll),
        tokens=int(tokens.sum()),
        nll_difference=scored.estimate,
        ci_low=scored.low,
        ci_high=scored.high,
        generated=int(lengths.sum()),
        token_agreement=float(generated.same.sum() / lengths.sum()),
        decode_difference=decoded.estimate,
        decode_low=decoded.low,
        decode_high=decoded.high,
        confidence=CONFIDENCE,
    )
