"""First tokens: what counts how much, and that one-token sequences give what longer ones have at position 0."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvtuner_search.evaluation.first_tokens import SPECIAL, first_token_means, first_token_weights, special_tokens
from kvtuner_search.models.load import ModelOptions, load_model
from kvtuner_search.models.runner import Runner


def test_what_starts_every_sequence_counts_most() -> None:
    weights = first_token_weights([(1, 5, 6, 7), (1, 8, 9, 5), (1, 5, 5, 2)])
    assert sum(weights.values()) == pytest.approx(1)
    assert list(weights) == sorted(weights)
    unseen = 1 / 4  # no start occurred once
    assert weights[1] == pytest.approx(1 - unseen + unseen * 3 / 12)
    assert weights[5] == pytest.approx(unseen * 4 / 12)
    assert weights[5] > weights[6] > 0


def test_starts_that_all_differ_say_nothing_so_every_token_and_special_ones_count() -> None:
    weights = first_token_weights([(1, 5, 6), (2, 5, 5)], special=[0, 9, 9])
    assert weights[0] == weights[9] == pytest.approx(SPECIAL / 2)
    assert weights[5] == pytest.approx((1 - SPECIAL) * 3 / 6)
    assert weights[1] == weights[2] == weights[6] == pytest.approx((1 - SPECIAL) / 6)


def test_special_tokens_are_those_that_the_tokenizer_names() -> None:
    assert special_tokens(SimpleNamespace(bos_token_id=7, eos_token_id=3)) == [3, 7]
    assert special_tokens(SimpleNamespace(bos_token_id=None, eos_token_id=7)) == [7]
    assert special_tokens(None) == []


def test_means_are_those_at_position_0_of_any_sequence(tiny_model: Path) -> None:
    runner = Runner(load_model(ModelOptions(source=str(tiny_model), dtype="float32")))
    tokens = torch.tensor([[11, 4, 9, 2], [500, 4, 1, 1], [77, 8, 8, 8]])
    weights = {11: 0.5, 77: 0.125, 500: 0.375}
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def tap(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen[layer] = key[:, 0], value[:, 0]
        return key, value

    runner.hidden(tokens, tap)
    passes: list[int] = []
    found = first_token_means(runner, weights, 2, passes.append)
    assert passes == [2, 1]
    share = torch.tensor([0.5, 0.375, 0.125])
    for layer in range(4):
        for mean, x in zip(found[layer], seen[layer], strict=True):
            assert mean.dtype == torch.float64
            assert torch.allclose(mean.float(), torch.einsum("n,nhd->hd", share, x), atol=1e-5)
