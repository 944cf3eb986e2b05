"""The pass with gradients against autograd by hand, and what it leaves behind."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtuner_search.data.types import Sample
from kvtuner_search.errors import DataError
from kvtuner_search.evaluation.information import Information, gather_information, label_gradient
from kvtuner_search.evaluation.scorer import Scorer
from kvtuner_search.models.attention import tapped
from kvtuner_search.models.load import ModelOptions, load_model
from kvtuner_search.models.runner import Runner

SAMPLES = [
    Sample("text", tuple(range(40, 61)), ((1, 21),), False),
    Sample("text", tuple(range(900, 917)), ((1, 17),), False),
    Sample("task", tuple(range(7, 20)), ((10, 13),), True),
]


@pytest.fixture(scope="module")
def scorer(tiny_model: Path) -> Scorer:
    runner = Runner(load_model(ModelOptions(source=str(tiny_model), dtype="float32")))
    return Scorer(runner, [SAMPLES[:1], SAMPLES[1:]], batch_tokens=64)


@pytest.fixture(scope="module")
def found(scorer: Scorer) -> Information:
    return gather_information(scorer, seed=3)


def by_hand(scorer: Scorer, seed: int) -> dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]:
    """Mean, covariance and gradient moment [H, D(, D)] of each layer and side, sample by sample, without padding, by plain autograd."""
    model: Any = scorer.runner.loaded.model
    generator = torch.Generator().manual_seed(seed)
    weight = {"text": 0.5 / (21 + 17), "task": 0.5 / 13}
    gathered: dict[tuple[int, int], list[tuple[Tensor, Tensor, float]]] = {}
    for tokens, valid, samples in scorer.batches():
        drawn = torch.rand(int(valid.sum()), generator=generator)
        for row, sample in enumerate(samples):
            seen: dict[int, tuple[Tensor, Tensor]] = {}

            def tap(
                layer: int, query: Tensor, key: Tensor, value: Tensor, seen: dict[int, tuple[Tensor, Tensor]] = seen
            ) -> tuple[Tensor, Tensor]:
                key.retain_grad()
                value.retain_grad()
                seen[layer] = key, value
                return key, value

            count = len(sample.tokens)
            at = int(valid[:row].sum())
            embedded = model.get_input_embeddings()(tokens[row : row + 1, :count]).detach().requires_grad_()
            with tapped(tap):
                log_p = model(inputs_embeds=embedded, use_cache=False).logits[0].log_softmax(-1)
            upto = log_p.detach().exp().cumsum(-1)
            labels = [
                int((upto[i] <= u * upto[i, -1]).sum()) for i, u in enumerate(drawn[at : at + count])
            ]  # the first label whose sum is above
            loss = -sum(log_p[i, label] for i, label in enumerate(labels))
            assert isinstance(loss, Tensor)
            torch.autograd.backward(loss)
            for layer, sides in seen.items():
                for side, x in enumerate(sides):
                    assert x.grad is not None
                    gathered.setdefault((layer, side), []).append(
                        (x.detach()[0, 1:].double(), x.grad[0, 1:].double(), weight[sample.source])
                    )
    result = {}
    for where, parts in gathered.items():
        total = sum(w * len(x) for x, _, w in parts)
        mean = sum((w * x).sum(0) for x, _, w in parts) / total
        assert isinstance(mean, Tensor)
        spread = sum(w * torch.einsum("nhd,nhe->hde", x - mean, x - mean) for x, _, w in parts) / total
        moment = sum(w * torch.einsum("nhd,nhe->hde", g, g) for _, g, w in parts)
        assert isinstance(spread, Tensor)
        assert isinstance(moment, Tensor)
        result[where] = mean, spread, moment
    return result


def test_moments_are_those_of_autograd_by_hand(scorer: Scorer, found: Information) -> None:
    expected = by_hand(scorer, seed=3)
    assert len(expected) == 8
    for (layer, side), (mean, spread, moment) in expected.items():
        sums = found.layers[layer][side]
        assert torch.allclose(sums.mean / sums.weight, mean, rtol=1e-5, atol=1e-6)
        own = sums.mean / sums.weight
        got = sums.square / sums.weight - torch.einsum("hd,he->hde", own, own)
        assert torch.allclose(got, spread, rtol=1e-4, atol=1e-4 * float(spread.abs().max()))
        assert float(moment.diagonal(dim1=-2, dim2=-1).min()) > 0
        assert torch.allclose(sums.gradient, moment, rtol=1e-3, atol=1e-4 * float(moment.abs().max()))


def test_the_first_token_and_padding_have_no_weight(found: Information) -> None:
    sums = found.layers[0][0]
    text, task = 0.5 / 38, 0.5 / 13  # sources count half each, a source's tokens alike
    assert sums.weight == pytest.approx((20 + 16) * text + 12 * task)
    assert sums.weight_square == pytest.approx((20 + 16) * text**2 + 12 * task**2)
    assert 36 < sums.tokens < 48


def test_a_seed_gives_the_same_sums_and_another_seed_other_labels(scorer: Scorer, found: Information) -> None:
    again, other = gather_information(scorer, seed=3), gather_information(scorer, seed=4)
    for layer in range(4):
        for side in (0, 1):
            first = found.layers[layer][side]
            assert torch.equal(again.layers[layer][side].gradient, first.gradient)
            assert torch.equal(other.layers[layer][side].square, first.square)
            assert not torch.equal(other.layers[layer][side].gradient, first.gradient)


def test_the_model_is_left_as_it_was(scorer: Scorer) -> None:
    runner, tokens = scorer.runner, torch.arange(5, 15).view(1, 10)
    before = runner.hidden(tokens)
    forwards = [layer.forward for layer in runner.layers]
    with torch.inference_mode():  # a caller's mode is in nobody's way
        gather_information(scorer, seed=0)
    assert [layer.forward for layer in runner.layers] == forwards
    assert all("forward" not in vars(layer) for layer in runner.layers)
    assert all(p.grad is None and not p.requires_grad for p in runner.loaded.model.parameters())
    assert torch.equal(runner.hidden(tokens), before)
    assert not runner.hidden(tokens).requires_grad
    assert not torch.are_deterministic_algorithms_enabled()


def test_labels_follow_the_models_own_distribution(scorer: Scorer) -> None:
    """The mean gradient over labels is zero, and that of the positions without a label exactly so."""
    runner = scorer.runner
    hidden = runner.hidden(torch.arange(30, 38).view(1, 8)).clone()
    valid = torch.tensor([[True, False] * 4])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([label_gradient(runner, hidden, valid, generator)[0] for _ in range(400)])
    assert float(draws[:, 1::2].abs().max()) == 0
    labelled = draws[:, ::2]
    typical = labelled.square().mean(0).sqrt()
    assert float((labelled.mean(0) / typical).abs().mean()) < 2 / math.sqrt(400)
    assert float(typical.min()) > 0


def test_gradients_that_are_not_finite_are_refused(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(runner: Runner, hidden: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
        return torch.full_like(hidden, float("nan"))

    monkeypatch.setattr("kvtuner_search.evaluation.information.label_gradient", broken)
    with pytest.raises(DataError, match=r"layer 0 with respect to its (keys|values) is not finite.*--no-bands"):
        gather_information(scorer, seed=0)
