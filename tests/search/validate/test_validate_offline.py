"""Agreement with the offline evaluation: none of it is lost on the way, and a server that computes something else is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.data import load_evaluation
from kvtuner_search.evaluation.scorer import Scorer
from kvtuner_search.evaluation.stored import stored_cache
from kvtuner_search.models.attention import Tap
from kvtuner_search.models.load import ModelOptions, load_model
from kvtuner_search.models.runner import Runner
from kvtuner_search.profile.validation import OfflineAgreement
from kvtuner_search.progress import Reporter
from kvtuner_search.serving.validate.measure import Outcome
from kvtuner_search.serving.validate.offline import compare

SETTING = (LayerSpec.parse("4-g16-asym/2-g16-asym"),) * 4
NEW = 5  # tokens of a continuation


@pytest.fixture(scope="module")
def case(tiny_model: Path):  # type: ignore[no-untyped-def]
    """A model, prompts, and what two servers would answer that compute just what the offline evaluation does."""
    loaded = load_model(ModelOptions(source=str(tiny_model), dtype="float32", device="cpu"))
    runner = Runner(loaded)
    split = load_evaluation(["list", "arithmetic"], loaded.tokenizer, seed=0, samples=3, length=300)
    prompts = [sample.tokens[:20] for sample in split.samples]
    scorer = Scorer(runner, [split.samples])

    def server(nll: np.ndarray, tap: Tap | None) -> Outcome:
        continuations, decoded = [], []
        for prompt in prompts:
            tokens, logprobs = list(prompt), []
            for _ in range(NEW):
                row = runner.log_probabilities(runner.hidden(torch.tensor([tokens]), tap)[0, -1:])[0]
                tokens.append(int(row.argmax()))
                logprobs.append(float(row.max()))
            continuations.append(tuple(tokens[len(prompt) :]))
            decoded.append(np.array(logprobs))
        return Outcome(nll, [], continuations, decoded, [], [])

    ours = server(scorer.score_all(SETTING, {}).nll, stored_cache(SETTING, {}))
    baseline = server(scorer.baseline_all().nll, None)

    def agree(mine: Outcome = ours, stock: Outcome = baseline) -> list[OfflineAgreement]:
        return compare(
            loaded, SETTING, {}, split, prompts, mine, stock, batch_tokens=512, reporter=Reporter(quiet=True)
        )

    return agree, ours, baseline


def test_a_server_that_computes_the_same_agrees(case) -> None:  # type: ignore[no-untyped-def]
    agree, _, _ = case
    for row, cache in zip(agree(), ("profile", "16bit"), strict=True):
        assert row.cache == cache
        assert row.nll_difference == pytest.approx(0, abs=1e-9)
        assert row.token_agreement == 1
        assert row.generated == 6 * NEW
        assert row.decode_difference == pytest.approx(0, abs=1e-5)


def test_a_server_that_reads_another_cache_does_not(case) -> None:  # type: ignore[no-untyped-def]
    """The stock server in the profile's place: keys and values unquantized."""
    agree, ours, baseline = case
    row = agree(mine=baseline)[0]
    assert abs(row.nll_difference) > 1e-3
    assert row.token_agreement < 1
    expected = (baseline.nll - ours.nll).sum() / row.tokens
    assert row.nll_difference == pytest.approx(expected)


def test_decode_is_compared_apart_from_likelihood(case) -> None:  # type: ignore[no-untyped-def]
    agree, ours, _ = case
    row = agree(mine=replace(ours, decoded=[part - 0.25 for part in ours.decoded]))[0]
    assert row.nll_difference == pytest.approx(0, abs=1e-9)
    assert row.decode_difference == pytest.approx(0.25, abs=1e-5)
    assert row.decode_low == pytest.approx(0.25, abs=1e-5)
