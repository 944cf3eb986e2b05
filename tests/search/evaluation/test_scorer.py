"""Scores against a naive computation, and the intervals."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kvtuner_kernels.bands import basis, join_basis
from kvtuner_kernels.layout import LayerSpec, LayoutError, TensorSpec
from kvtuner_kernels.reference import Centres, as_stored, pack_rows, unpack_rows
from kvtuner_search.data.types import Sample
from kvtuner_search.evaluation import scorer as scorer_module
from kvtuner_search.evaluation.generation import PackedCache
from kvtuner_search.evaluation.scorer import Scorer, Scores
from kvtuner_search.evaluation.statistics import measures, paired_loss, paired_ratio
from kvtuner_search.evaluation.stored import stored_cache
from kvtuner_search.models.load import ModelOptions, load_model
from kvtuner_search.models.runner import Runner
from kvtuner_search.transforms import centres_file, load_centres, transform_of

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


def make_basis(seed: int) -> torch.Tensor:
    """A basis of two heads of 16 channels whose first tokens lie far away."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.linalg.qr(torch.randn(2, 16, 16, generator=generator))[0] * torch.logspace(-0.5, 0.5, 16)[:, None]
    return join_basis(matrix, torch.randn(2, 16, generator=generator), 20 + torch.randn(2, 16, generator=generator))


BANDED = LayerSpec.parse("b65443322/b44332211")
MIXED = LayerSpec.parse("b33333333/4-g16-asym-c")


def test_a_spec_gets_the_part_of_a_basis_that_it_needs() -> None:
    joined = make_basis(0)
    centred, banded = TensorSpec(4, 16, centred=True), BANDED.key
    assert transform_of(banded, joined) is joined
    mean = transform_of(centred, joined)
    assert mean is not None
    assert torch.equal(mean, basis(joined).mean)
    assert transform_of(TensorSpec(4, 16), joined) is None
    assert transform_of(TensorSpec(), joined) is None
    assert transform_of(centred, mean) is mean  # a centring vector alone
    moved = transform_of(banded, joined, torch.device("meta"))
    assert moved is not None
    assert moved.device.type == "meta"
    assert (
        transform_of(banded, joined, torch.device("meta")) is moved
    )  # moved once, as what follows from it is kept by tensor
    assert transform_of(banded, joined, torch.device("cpu")) is joined


def test_bases_and_the_means_in_them_survive_the_file() -> None:
    centres = {i: Centres(make_basis(i), make_basis(10 + i)) for i in range(3)}
    back = load_centres(centres_file((BANDED, MIXED, LayerSpec()), centres), 3)
    for got, expected in (
        (back[0].key, centres[0].key),
        (back[0].value, centres[0].value),
        (back[1].key, centres[1].key),
    ):
        assert got is not None
        assert expected is not None
        assert torch.equal(got, expected)
    assert back[1].value is not None
    assert back[1].value.shape == (2, 16)
    assert back[2] == Centres()


@pytest.mark.parametrize("spec", [BANDED, MIXED, LayerSpec.parse("16/b80000000")])
def test_a_banded_cache_is_what_packed_rows_hold_first_tokens_apart(spec: LayerSpec) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 9, 2, 16, generator=generator).bfloat16() for _ in range(3))
    key[:, 0] += 20
    value[:, 0] += 20
    centres = Centres(make_basis(2), make_basis(3))
    found = stored_cache([spec], {0: centres})(0, query, key, value)
    needed = Centres(transform_of(spec.key, centres.key), transform_of(spec.value, centres.value))
    for row in range(2):
        rows = pack_rows(key[row], value[row], spec, needed, torch.arange(9) == 0)
        for got, stored in zip(found, unpack_rows(rows, spec, 2, 16, needed), strict=True):
            assert torch.equal(got[row], stored.bfloat16())
    for side, held, x in ((spec.key, needed.key, key), (spec.value, needed.value, value)):
        if side.banded:
            blind = as_stored(x, side, held)
            assert (blind[:, 0] - x[:, 0]).norm() > 2 * (
                as_stored(x, side, held, first=torch.arange(9) == torch.zeros(2, 1))[:, 0] - x[:, 0]
            ).norm()
    with pytest.raises(LayoutError, match="needs a basis"):
        stored_cache([spec], {0: Centres(make_basis(2)[:, -2], make_basis(2)[:, -2])})(0, query, key, value)


def test_generation_reads_the_same_cache_and_knows_first_tokens(runner: Runner) -> None:
    """Prompts of two lengths, then two tokens one by one: what is read back equals the whole sequence stored at once."""
    setting = (BANDED, MIXED, LayerSpec(), BANDED)
    centres = {i: Centres(make_basis(i), make_basis(10 + i)) for i in range(4)}
    sequences = torch.arange(50, 64).view(2, 7)
    lengths = torch.tensor([5, 3])
    cache = PackedCache(setting, centres, 7)
    at = torch.arange(5).expand(2, 5)
    cache.begin(at)
    hidden = [runner.hidden(sequences[:, :5], cache)[torch.arange(2), lengths - 1]]
    for step in range(2):
        at = (lengths + step).unsqueeze(1)
        cache.begin(at)
        hidden.append(runner.hidden(sequences.gather(1, at), cache, positions=at)[:, 0])
    whole = runner.hidden(sequences, stored_cache(setting, centres))
    for step, got in enumerate(hidden):
        assert torch.allclose(got, whole[torch.arange(2), lengths - 1 + step], atol=1e-4)


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
