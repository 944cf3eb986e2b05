"""How much the model's output depends on each direction of its keys and values, and their covariance: one pass with gradients.

The second moment of the gradient of the log-likelihood with respect to a key, with labels drawn from the model itself, is the Fisher
information: to second order it gives the cost of an error of that key in KL divergence, whatever later layers do with the key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Self

import torch
from torch import Tensor

from kvtuner_search.errors import DataError
from kvtuner_search.evaluation.scorer import CHUNK_NUMBERS, Scorer
from kvtuner_search.models.runner import Runner

SIDES: Final = ("key", "value")


@dataclass
class SideSums:
    """Weighted sums over the tokens of one side of a layer, position 0 left out; fp64 on the model's device."""

    weight: float  # sum of the tokens' weights
    weight_square: float  # sum of their squares
    mean: Tensor  # [H, D] sum of w x
    square: Tensor  # [H, D, D] sum of w x x^T
    gradient: (
        Tensor  # [H, D, D] sum of w g g^T: with weights that add up to one, nats a token for each unit of squared error
    )

    @classmethod
    def zero(cls, like: Tensor) -> Self:
        """Empty sums for keys or values [..., H, D]."""
        mean = torch.zeros(like.shape[-2:], dtype=torch.float64, device=like.device)
        square = mean.unsqueeze(-1).repeat(1, 1, like.shape[-1])
        return cls(0.0, 0.0, mean, square, square.clone())

    @property
    def tokens(self) -> float:
        """Effective number of tokens of equal weight (L. Kish, Survey Sampling, 1965)."""
        return self.weight**2 / self.weight_square if self.weight_square else 0.0

    def add(self, x: Tensor, weight: Tensor) -> None:
        """Add ``x`` [N, H, D] of weights fp64 [N]."""
        wide = x.double()
        scaled = wide * weight[:, None, None]
        self.weight += float(weight.sum())
        self.weight_square += float(weight.square().sum())
        self.mean += scaled.sum(0)
        self.square += _products(scaled, wide)

    def add_gradient(self, gradient: Tensor, weight: Tensor) -> None:
        """Add the gradients [N, H, D] by the tokens."""
        wide = gradient.double()
        self.gradient += _products(wide * weight[:, None, None], wide)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a b^T over tokens: [N, H, D] twice to [H, D, D]."""
    return a.permute(1, 2, 0) @ b.transpose(0, 1)


@dataclass
class Information:
    """Tap for a pass with gradients (see Runner.differentiate); it leaves keys and values as they are."""

    layers: dict[int, tuple[SideSums, SideSums]] = field(default_factory=dict)  # keys and values
    _weight: Tensor | None = None  # fp64 [B, T]

    def begin(self, weight: Tensor) -> None:
        """Announce a batch: weights fp64 [B, T] of its tokens, 0 for padding."""
        self._weight = weight.clone()
        self._weight[:, 0] = 0  # the first token is stored about a point of its own

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        assert self._weight is not None, "begin() comes before the pass"
        whole = self._weight.to(key.device)
        kept = whole > 0
        weight = whole[kept]
        if layer not in self.layers:
            self.layers[layer] = (SideSums.zero(key), SideSums.zero(value))
        for sums, x in zip(self.layers[layer], (key, value), strict=True):
            sums.add(x.detach()[kept], weight)
            x.register_hook(_adding(sums, kept, weight))  # type: ignore[no-untyped-call]
        return key, value


def _adding(sums: SideSums, kept: Tensor, weight: Tensor) -> Callable[[Tensor], None]:
    """A gradient hook for keys or values [B, T, H, D], of which those that are ``kept`` [B, T] count with ``weight`` [N]."""

    def add(gradient: Tensor) -> None:
        sums.add_gradient(gradient[kept], weight)

    return add


def gather_information(scorer: Scorer, seed: int, advance: Callable[[int], None] = lambda _: None) -> Information:
    """One pass with gradients over all samples of a scorer.

    Every position of a sample gets a label, scored or not. Sources weigh as in the loss (Scores.weights), a source's tokens alike, and all
    weights add up to one.

    Args:
        scorer: search split.
        seed: of the labels.
        advance: called with the number of tokens after each batch.

    Raises:
        DataError: if a gradient is not finite.
    """
    runner, shares = scorer.runner, scorer.baseline_all().weights
    labels = dict.fromkeys(shares, 0)
    for tier in scorer.tiers:
        for sample in tier:
            labels[sample.source] += len(sample.tokens)
    found, generator = Information(), torch.Generator().manual_seed(seed)
    for tokens, valid, samples in scorer.batches():
        each = torch.tensor([shares[s.source] / labels[s.source] for s in samples], dtype=torch.float64)
        found.begin(each.unsqueeze(1) * valid)
        runner.differentiate(tokens, found, partial(label_gradient, runner, valid=valid, generator=generator))
        advance(tokens.numel())
    for layer, sides in found.layers.items():
        for name, sums in zip(SIDES, sides, strict=True):
            if not bool(sums.gradient.isfinite().all()):
                raise DataError(
                    f"a gradient of layer {layer} with respect to its {name}s is not finite: load the model with --dtype bfloat16 or float32,"
                    " or leave bands out with --no-bands"
                )
    return found


def label_gradient(runner: Runner, hidden: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient, with respect to the last hidden states [B, T, E], of the negative log-likelihood of labels drawn from the model, summed over positions.

    Args:
        hidden: last hidden states.
        valid: bool [B, T], positions that get a label; the others' gradient is zero.
        generator: on the CPU, so that labels do not depend on the device's own generator.
    """
    flat = hidden.flatten(0, 1)
    found = torch.zeros_like(flat)
    rows = valid.flatten().nonzero().squeeze(1).to(flat.device)
    step = max(1, CHUNK_NUMBERS // runner.vocabulary)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        state = flat[part].detach().requires_grad_()
        with torch.enable_grad():
            logits = runner.logits(state)
        residual = logits.detach().float().softmax(-1)
        upto = residual.cumsum(-1)
        drawn = torch.rand(len(part), 1, generator=generator).to(upto.device) * upto[:, -1:]
        label = torch.searchsorted(upto, drawn, right=True).clamp_max_(residual.shape[-1] - 1)
        residual.scatter_add_(1, label, torch.full_like(drawn, -1.0))
        (gradient,) = torch.autograd.grad(logits, state, residual.to(logits.dtype))
        found[part] = gradient.to(found.device)
    return found.view_as(hidden)
