"""Compare a quantized cache with the 16-bit one, token by token: KL divergence, likelihood, and exact answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtuner_kernels.reference import Centres
from kvtuner_search.data.types import Sample
from kvtuner_search.errors import DataError
from kvtuner_search.evaluation.stored import Setting, stored_cache
from kvtuner_search.models.attention import Observer, Tap
from kvtuner_search.models.runner import Runner

CHUNK_NUMBERS: Final = 2**26  # rows x vocabulary of one chunk of log-probabilities (256 MiB in fp32)
MAX_PADDING: Final = 0.05  # of a batch's tokens
KEPT_BYTES: Final = 2**29  # 16-bit log-probabilities are kept up to this size, otherwise recomputed from hidden states
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Sums over each sample's scored tokens; all arrays have one entry a sample."""

    sources: tuple[str, ...]  # name of each sample's source
    kl: Floats  # sum of KL(16 bit || stored), nats
    nll: Floats  # sum of negative log-likelihoods of the actual tokens, nats
    tokens: NDArray[np.int64]  # scored tokens
    exact: NDArray[np.bool_]  # every scored token is the most likely one
    is_task: NDArray[np.bool_]  # whether exactness means anything

    def __add__(self, other: Scores) -> Scores:
        """Both sets of samples."""
        return Scores(
            self.sources + other.sources,
            np.concatenate((self.kl, other.kl)),
            np.concatenate((self.nll, other.nll)),
            np.concatenate((self.tokens, other.tokens)),
            np.concatenate((self.exact, other.exact)),
            np.concatenate((self.is_task, other.is_task)),
        )

    def of(self, source: str) -> Scores:
        """The samples of one source."""
        keep = np.array([name == source for name in self.sources])
        return Scores(
            tuple(name for name in self.sources if name == source),
            self.kl[keep],
            self.nll[keep],
            self.tokens[keep],
            self.exact[keep],
            self.is_task[keep],
        )

    @property
    def names(self) -> list[str]:
        """The sources, each once, in order."""
        return list(dict.fromkeys(self.sources))

    @property
    def weights(self) -> dict[str, float]:
        """Share of each source in the loss: tasks together weigh as much as text together, and sources of one kind weigh the same."""
        tasks = {name: bool(self.of(name).is_task.all()) for name in self.names}
        kinds = len(set(tasks.values()))
        return {name: 1 / kinds / list(tasks.values()).count(kind) for name, kind in tasks.items()}

    @property
    def sample_weights(self) -> Floats:
        """[samples] By how much each sample's KL counts in the loss, which is the sum of both, multiplied."""
        weight = {name: share / self.of(name).tokens.sum() for name, share in self.weights.items()}
        return np.array([weight[name] for name in self.sources])

    @property
    def loss(self) -> float:
        """What the search minimises: KL in nats a scored token of each source, averaged with ``weights``."""
        parts = ((self.of(name), weight) for name, weight in self.weights.items())
        return float(sum(weight * part.kl.sum() / part.tokens.sum() for part, weight in parts))


@dataclass(frozen=True)
class _Batch:
    samples: tuple[Sample, ...]  # by row
    tokens: Tensor  # int64 [B, T], padded on the right
    valid: Tensor  # bool [B, T]: no padding
    rows: Tensor  # int64 [n]: index into B*T of the position before each scored token
    targets: Tensor  # int64 [n]
    owner: NDArray[np.int64]  # [n]: sample index within the tier
    hidden: Tensor  # [n, E] of the 16-bit cache
    log_probabilities: Tensor | None  # fp32 [n, vocabulary] of the 16-bit cache, if kept


class Scorer:
    """Scores settings on samples that are divided into tiers (the rungs of a multi-fidelity search).

    Args:
        runner: the model.
        tiers: samples by tier; scoring up to tier ``r`` uses tiers 0 to r.
        batch_tokens: padded tokens of one forward pass.
        observe: tap for the 16-bit pass, e.g. to measure moments; it must return keys and values as they are.
        advance: called with the number of tokens after each forward pass of the 16-bit cache.
    """

    def __init__(
        self,
        runner: Runner,
        tiers: Sequence[Sequence[Sample]],
        *,
        batch_tokens: int = 4096,
        observe: Observer | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.runner, self.tiers = runner, [tuple(tier) for tier in tiers]
        for tier in self.tiers:
            for sample in tier:
                runner.check_tokens(sample.tokens, f"source {sample.source}")
        scored = sum(sample.scored_tokens for tier in self.tiers for sample in tier)
        keep = scored * runner.vocabulary * 4 <= KEPT_BYTES
        self._batches = [
            [self._prepare(tier, group, observe, keep, advance) for group in _groups(tier, batch_tokens)]
            for tier in self.tiers
        ]
        self.baseline = [self._score_tier(index, None) for index in range(len(self.tiers))]

    def score(self, setting: Setting, centres: Mapping[int, Centres], tier: int) -> Scores:
        """Scores of one tier with the cache stored as ``setting`` says."""
        return self._score_tier(tier, stored_cache(setting, centres))

    def score_all(
        self, setting: Setting, centres: Mapping[int, Centres], advance: Callable[[int], None] = lambda _: None
    ) -> Scores:
        """Scores of all tiers; ``advance`` is called with the number of tokens after each forward pass."""
        return self.score_through(stored_cache(setting, centres), advance)

    def score_through(self, tap: Tap, advance: Callable[[int], None] = lambda _: None) -> Scores:
        """Scores of all tiers with attention reading what ``tap`` returns."""
        parts = [self._score_tier(tier, tap, advance) for tier in range(len(self.tiers))]
        return sum(parts[1:], parts[0])

    def baseline_all(self) -> Scores:
        """Scores of the 16-bit cache on all tiers; the KL is zero."""
        return sum(self.baseline[1:], self.baseline[0])

    def score_hidden(self, tier: int, states: Callable[[int, Tensor], Tensor]) -> Scores:
        """Scores of one tier from last hidden states [B, T, E], computed by ``states(batch index, token ids)``."""
        parts = [
            (batch, states(index, batch.tokens).flatten(0, 1)[batch.rows])
            for index, batch in enumerate(self._batches[tier])
        ]
        return self._collect(self.tiers[tier], [(batch, hidden) for batch, hidden in parts])

    def token_batches(self, tier: int) -> list[Tensor]:
        """Token ids [B, T] of the forward passes of one tier."""
        return [batch.tokens for batch in self._batches[tier]]

    def batches(self) -> Iterator[tuple[Tensor, Tensor, tuple[Sample, ...]]]:
        """Every forward pass: token ids [B, T], which of them are not padding, and the samples row by row."""
        for batches in self._batches:
            for batch in batches:
                yield batch.tokens, batch.valid, batch.samples

    def observe(self, observer: Observer, tiers: int, advance: Callable[[int], None]) -> None:
        """One pass of the 16-bit cache over the first ``tiers`` tiers through ``observer``."""
        for batches in self._batches[:tiers]:
            for batch in batches:
                observer.begin(batch.valid)
                self.runner.hidden(batch.tokens, observer)
                advance(batch.tokens.numel())

    def _score_tier(self, tier: int, tap: Tap | None, advance: Callable[[int], None] = lambda _: None) -> Scores:
        if tap is None:
            return self._collect(self.tiers[tier], [(batch, batch.hidden) for batch in self._batches[tier]])

        def states(_: int, tokens: Tensor) -> Tensor:
            hidden = self.runner.hidden(tokens, tap)
            advance(tokens.numel())
            return hidden

        return self.score_hidden(tier, states)

    def _prepare(
        self,
        tier: Sequence[Sample],
        members: Sequence[int],
        observe: Observer | None,
        keep: bool,
        advance: Callable[[int], None],
    ) -> _Batch:
        device = self.runner.loaded.device
        width = max(len(tier[index].tokens) for index in members)
        tokens = torch.zeros(len(members), width, dtype=torch.int64)
        valid = torch.zeros_like(tokens, dtype=torch.bool)
        rows: list[int] = []
        targets: list[int] = []
        owner: list[int] = []
        for row, index in enumerate(members):
            sample = tier[index]
            tokens[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
            valid[row, : len(sample.tokens)] = True
            for start, end in sample.scored:
                rows += range(row * width + start - 1, row * width + end - 1)
                targets += sample.tokens[start:end]
                owner += [index] * (end - start)
        tokens = tokens.to(device)
        if observe is not None:
            observe.begin(valid)
        hidden = self.runner.hidden(tokens, observe).flatten(0, 1)
        at = torch.tensor(rows, device=hidden.device)
        hidden = hidden[at]
        if not bool(torch.isfinite(hidden).all()):
            raise DataError(
                f"hidden states of {self.runner.loaded.info.id} on {tier[members[0]].source} are not finite in"
                f" {str(hidden.dtype).removeprefix('torch.')}: give another --dtype, or restore the checkpoint"
            )
        advance(tokens.numel())
        return _Batch(
            tuple(tier[index] for index in members),
            tokens,
            valid,
            at,
            torch.tensor(targets, device=hidden.device),
            np.array(owner),
            hidden,
            self.runner.log_probabilities(hidden) if keep else None,
        )

    @torch.inference_mode()
    def _collect(self, tier: Sequence[Sample], parts: Sequence[tuple[_Batch, Tensor]]) -> Scores:
        kl, nll = np.zeros(len(tier)), np.zeros(len(tier))
        wrong = np.zeros(len(tier), dtype=np.int64)
        for batch, hidden in parts:
            token_kl, token_nll, right = self._compare(batch, hidden)
            np.add.at(kl, batch.owner, token_kl)
            np.add.at(nll, batch.owner, token_nll)
            np.add.at(wrong, batch.owner, ~right)
        return Scores(
            tuple(sample.source for sample in tier),
            kl,
            nll,
            np.array([sample.scored_tokens for sample in tier]),
            wrong == 0,
            np.array([sample.is_task for sample in tier]),
        )

    def _compare(self, batch: _Batch, hidden: Tensor) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        step = max(1, CHUNK_NUMBERS // self.runner.vocabulary)
        kl, nll, right = [], [], []
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            got = self.runner.log_probabilities(hidden[part])
            if batch.log_probabilities is None:
                expected = self.runner.log_probabilities(batch.hidden[part])
            else:
                expected = batch.log_probabilities[part]
            targets = batch.targets[part]
            nll.append(-got.gather(1, targets.unsqueeze(1)).squeeze(1))
            right.append(got.argmax(1) == targets)
            kl.append(_kl(expected, got))
        return (
            torch.cat(kl).double().cpu().numpy(),
            torch.cat(nll).double().cpu().numpy(),
            torch.cat(right).cpu().numpy(),
        )


def _kl(expected: Tensor, got: Tensor) -> Tensor:
    """KL(expected || got) of log-probabilities [n, vocabulary], nats [n]; rounding may leave it slightly below zero."""
    return (expected.exp() * (expected - got)).sum(-1).clamp_min_(0)


def _groups(tier: Sequence[Sample], batch_tokens: int) -> list[list[int]]:
    """Sample indices in batches of similar length: at most ``batch_tokens`` padded tokens (or one sample), little of it padding."""
    groups: list[list[int]] = []
    real = 0
    for index in sorted(range(len(tier)), key=lambda i: (len(tier[i].tokens), i)):
        length = len(tier[index].tokens)
        padded = length * (len(groups[-1]) + 1) if groups else 0
        if groups and padded <= min(batch_tokens, (real + length) * (1 + MAX_PADDING)):
            groups[-1].append(index)
            real += length
        else:
            groups.append([index])
            real = length
    return groups
