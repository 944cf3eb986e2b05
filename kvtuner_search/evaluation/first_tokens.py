"""Means of the keys and values of first tokens, over many sequences of one token.

At position 0 they depend on the token alone. Models use it as an attention sink, so first tokens lie far from all
others, and in most layers close together; a banded side stores them relative to their mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from kvtuner_search.models.runner import Runner

MOST: Final = 4096  # distinct tokens that are run
SPECIAL: Final = 0.25  # share of special tokens in the weight of unseen starts


def first_token_weights(sequences: Sequence[Sequence[int]], special: Iterable[int] = ()) -> dict[int, float]:
    """How much each token id counts as the first of a sequence; the weights add up to one.

    The tokens that start ``sequences`` count by frequency. A start that occurred once says little about the next one, so the share
    of such starts goes to other possible ones: any token of the data, by frequency, and special tokens.

    Source of the share: I. J. Good, The population frequencies of species and the estimation of population parameters, 1953.
    """
    starts = Counter(tokens[0] for tokens in sequences)
    count = len(sequences)
    once = sum(1 for times in starts.values() if times == 1)
    unseen = (once + 1) / (count + 1)
    found: Counter[int] = Counter()
    for token, times in starts.items():
        found[token] += (1 - unseen) * times / count  # type: ignore[assignment]
    special = sorted(set(special))
    for token in special:
        found[token] += unseen * SPECIAL / len(special)  # type: ignore[assignment]
    common = Counter(token for tokens in sequences for token in tokens).most_common(MOST)
    total = sum(times for _, times in common)
    for token, times in common:
        found[token] += unseen * (1 - SPECIAL if special else 1) * times / total  # type: ignore[assignment]
    whole = sum(found.values())
    return {token: found[token] / whole for token in sorted(found)}


def special_tokens(tokenizer: Any) -> list[int]:
    """Ids that mark the beginning or end of a text or a turn, as far as the tokenizer names them."""
    if tokenizer is None:
        return []
    names = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return sorted({int(token) for token in names if token is not None})


class _Means:
    """Tap that sums the keys and values of position 0."""

    def __init__(self) -> None:
        self.weight = torch.empty(0)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight.to(key.device)
        sums = tuple(torch.einsum("n,nhd->hd", weight, x[:, 0].double()) for x in (key, value))
        old = self.layers.get(layer, (torch.zeros_like(sums[0]), torch.zeros_like(sums[1])))
        self.layers[layer] = (old[0] + sums[0], old[1] + sums[1])
        return key, value


def first_token_means(
    runner: Runner, weights: dict[int, float], batch_tokens: int, advance: Callable[[int], None] = lambda _: None
) -> dict[int, tuple[Tensor, Tensor]]:
    """Mean key and mean value of first tokens by layer, fp64 [H, D] each.

    Args:
        runner: the model.
        weights: by token id, adding up to one.
        batch_tokens: sequences of one pass.
        advance: called with the number of sequences after each pass.
    """
    tap = _Means()
    ids = torch.tensor(list(weights))
    for start in range(0, len(ids), batch_tokens):
        part = ids[start : start + batch_tokens]
        tap.weight = torch.tensor([weights[int(token)] for token in part], dtype=torch.float64)
        runner.hidden(part.unsqueeze(1), tap)
        advance(len(part))
    return tap.layers
