"""Scores against a naive computation, and the intervals."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_kernels.reference import Centres, as_stored, pack_rows, unpack_rows
from kvtuner_search.data.types import Sample
from kvtuner_search.evaluation import scorer as scorer_module
from kvtuner_search.evaluation.scorer import Scorer, Scores
from kvtuner_search.evaluation.statistics import measures, paired_loss, paired_ratio
from kvtuner_search.evaluation.stored import centres_file, load_centres, stored_cache
from kvtuner_search.models.load import ModelOptions, load_model
from kvtuner_search.models.runner import Runner

ROUGH = LayerSpec(TensorSpec(2, 16), TensorSpec(2, 16, symmetric=True))


@pytest.fixture(scope="module")
def runner(tiny_model: Path) -> Runner:
    return Runner(load_model(ModelOptions(source=str(tiny_model), dtype="float32")))


def some_samples(count: int = 5) -> list[Sample]:
    rng = np.random.default_rng(0)
    found = []
    for index in range(count):
        length = int(rng.integers(9, 30))
        tokens = tuple(int(t) for t in rng.integers(0, 8192, length))
        spans = ((1, length),) if index % 2 else ((3, 5), (length - 2, length))
        found.append(Sample("text" if index % 2 else "task", tokens, spans, is_task=index % 2 == 0))
    return found


@pytest.mark.parametrize("kept", [True, False])
def test_scores_equal_a_naive_computation(runner: Runner, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kept:
        monkeypatch.setattr(scorer_module, "KEPT_BYTES", 0)
        monkeypatch.setattr(scorer_module, "CHUNK_NUMBERS", 3 * 8192)
    samples, setting = some_samples(), (ROUGH,) * 4
    scores = Scorer(runner, [samples[:2], samples[2:]], batch_tokens=64).score_all(setting, {})
    for index, sample in enumerate(samples):
        tokens = torch.tensor([sample.tokens])
        base, stored = (
            runner.log_probabilities(runner.hidden(tokens, tap)[0]) for tap in (None, stored_cache(setting, {}))
        )
        at = [position - 1 for start, end in sample.scored for position in range(start, end)]
        target = tokens[0][[position + 1 for position in at]]
        kl = (base[at].exp() * (base[at] - stored[at])).sum().item()
        nll = -stored[at].gather(1, target[:, None]).sum().item()
        assert scores.kl[index] == pytest.approx(kl, rel=1e-3)
        assert scores.nll[index] == pytest.approx(nll, rel=1e-4)
        assert scores.exact[index] == bool((stored[at].argmax(1) == target).all())
    assert scores.tokens.tolist() == [sample.scored_tokens for sample in samples]
    assert scores.loss == pytest.approx(
        np.mean([scores.of(s).kl.sum() / scores.of(s).tokens.sum() for s in ("task", "text")])
    )


def test_tasks_count_as_much_as_text(runner: Runner) -> None:
    samples = some_samples()
    extra = [Sample("second task", s.tokens, s.scored, is_task=True) for s in samples[:2]]
    scores = Scorer(runner, [samples + extra]).score_all((ROUGH,) * 4, {})
    assert scores.weights == {"task": 0.25, "text": 0.5, "second task": 0.25}
    parts = {name: scores.of(name).kl.sum() / scores.of(name).tokens.sum() for name in scores.names}
    assert scores.loss == pytest.approx(0.5 * parts["text"] + 0.25 * (parts["task"] + parts["second task"]))
    assert paired_loss(scores, Scorer(runner, [samples + extra]).baseline_all()).estimate == pytest.approx(scores.loss)


def test_the_16_bit_cache_has_no_loss(runner: Runner) -> None:
    scorer = Scorer(runner, [some_samples()])
    assert scorer.score_all((LayerSpec(),) * 4, {}).loss < 1e-9
    assert scorer.baseline_all().loss == 0.0


def test_more_bits_lose_less(runner: Runner) -> None:
    scorer = Scorer(runner, [some_samples()])
    losses = [
        scorer.score_all((LayerSpec(TensorSpec(bits, 16), TensorSpec(bits, 16)),) * 4, {}).loss for bits in (8, 4, 2)
    ]
    assert 0 < losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("spec", ["4-g16-asym-c-r-x0.9", "2-g16-sym-r", "8-g16-asym"])
def test_what_is_scored_is_what_packed_rows_hold(spec: str) -> None:
    side = TensorSpec.parse(spec)
    generator = torch.Generator().manual_seed(5)
    key, value = torch.randn(2, 9, 2, 16, generator=generator).bfloat16()
    centre = torch.randn(2, 16, generator=generator) if side.centred else None
    rows = pack_rows(key, value, LayerSpec(side, side), Centres(centre, centre))
    stored = unpack_rows(rows, LayerSpec(side, side), 2, 16, Centres(centre, centre))
    assert torch.equal(as_stored(key, side, centre), stored[0].bfloat16())
    assert torch.equal(as_stored(value, side, centre), stored[1].bfloat16())


def test_centres_survive_the_file() -> None:
    setting = (
        LayerSpec(TensorSpec(4, 16, centred=True)),
        LayerSpec(),
        LayerSpec(TensorSpec(), TensorSpec(4, 16, centred=True)),
    )
    centres = {i: Centres(torch.full((2, 16), float(i)), torch.full((2, 16), -float(i))) for i in range(3)}
    data = centres_file(setting, centres)
    assert data == centres_file(setting, centres)
    back = load_centres(data, 3)
    assert back[0].key is not None
    assert torch.equal(back[0].key, torch.zeros(2, 16))
    assert back[0].value is None
    assert back[1] == Centres()
    assert back[2].value is not None
    assert back[2].key is None


def make_scores(kl: list[float], exact: list[bool]) -> Scores:
    count = len(kl)
    return Scores(
        ("recall",) * count, np.array(kl), np.array(kl) + 1, np.full(count, 10), np.array(exact), np.full(count, True)
    )


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for repeat in range(200):
        difference = rng.normal(0.3, 1.0, 40)
        interval = paired_ratio(difference, np.ones(40), seed=repeat)
        hits += interval.low <= 0.3 <= interval.high
    assert 175 <= hits <= 199  # 95 % of 200 is 190; the bootstrap of 40 samples is a little narrow


def test_measures_are_paired_and_only_tasks_have_accuracy() -> None:
    base = make_scores([0.0] * 6, [True] * 6)
    ours = make_scores([1.0] * 6, [True] * 3 + [False] * 3)
    found = {m.metric: m for m in measures(ours, base, "test")}
    assert found["kl"].value == pytest.approx(0.1)
    assert (found["kl"].ci_low, found["kl"].ci_high) == pytest.approx((0.1, 0.1))  # every sample differs by the same
    assert found["accuracy"].delta == pytest.approx(-0.5)
    assert found["accuracy"].ci_low < -0.5 < found["accuracy"].ci_high
    assert paired_loss(ours, ours) == (0.0, 0.0, 0.0)
    assert paired_loss(base, ours).high < 0
