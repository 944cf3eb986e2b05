"""Fit the basis in which one side of a layer is stored, and compute the worth of its bands.

With the Fisher information F as metric and C the covariance about the mean, an error e of the side costs ``e^T F e`` nats a token, to second
order. In the basis ``U^T F^(1/2)``, U being the eigenvectors of ``F^(1/2) C F^(1/2)``, channels are uncorrelated, every channel's error costs
the same, and an eigenvalue is the cost of dropping its channel. The ordered eigenvalues, cut into bands, decide the bit allocation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from kvtuner_kernels.bands import join_basis
from kvtuner_kernels.places import BANDS
from kvtuner_kernels.reference import Centres
from kvtuner_search.evaluation.first_tokens import first_token_means, first_token_weights, special_tokens
from kvtuner_search.evaluation.information import SideSums, gather_information
from kvtuner_search.evaluation.scorer import Scorer

METRIC_FLOOR: Final = 1e-6  # least eigenvalue of the metric, relative to the largest
SPREAD_FLOOR: Final = 1e-8  # least variance of a direction, relative to the mean channel's
ENOUGH: Final = 16  # tokens a channel from which on moments need no ridge
LEAST: Final = 1e-20  # where a side is constant, or nothing depends on it


@dataclass(frozen=True)
class SideWorth:
    """Cost in nats a token of dropping each band of one side of a layer, by head; band 0 is worth most."""

    by_head: tuple[tuple[float, ...], ...]  # [H][BANDS]

    @property
    def bands(self) -> tuple[float, ...]:
        """All heads together: [BANDS]."""
        return tuple(map(sum, zip(*self.by_head, strict=True)))


@dataclass(frozen=True)
class LayerWorth:
    """Both sides of a layer."""

    keys: SideWorth
    values: SideWorth


def fit_side(sums: SideSums, first_mean: Tensor) -> tuple[Tensor, SideWorth]:
    """A side's basis tensor fp32 [H, D + 2, D], as a transforms file holds it, and the worth of its bands.

    Args:
        sums: of the side.
        first_mean: fp64 [H, D], mean of first tokens.

    Raises:
        BasisError: if a number is not finite.
    """
    mean, square, gradient = (
        t.cpu() / by for t, by in ((sums.mean, sums.weight), (sums.square, sums.weight), (sums.gradient, 1.0))
    )
    heads, head_dim = mean.shape
    # Directions seen in few tokens look narrower, or less important, than they are.
    ridge = min(1.0, max(0.0, head_dim / max(sums.tokens, 1.0) - 1 / ENOUGH)) ** 2
    spread = _ridged(square - mean.unsqueeze(-1) * mean.unsqueeze(-2), ridge, SPREAD_FLOOR)
    root = _root(_ridged(gradient, ridge, 0.0))
    eigenvalues, vectors = torch.linalg.eigh(root @ spread @ root)
    worth = eigenvalues.flip(-1).clamp_min(0).view(heads, BANDS, -1).sum(-1)
    turned = _within_bands(head_dim) @ vectors.flip(-1).mT @ root
    variance = torch.einsum("hij,hjk,hik->hi", turned, spread, turned).view(heads, BANDS, -1).mean(-1)
    matrix = turned / variance.sqrt().repeat_interleave(head_dim // BANDS, -1).unsqueeze(-1)
    return join_basis(matrix, mean, first_mean.cpu()), SideWorth(tuple(tuple(row) for row in worth.tolist()))


def _ridged(moment: Tensor, ridge: float, floor: float) -> Tensor:
    """[H, D, D] with its diagonal raised by the fraction ``ridge`` of itself and ``floor`` of its mean."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    return moment + torch.diag_embed(ridge * diagonal + floor * diagonal.mean(-1, keepdim=True) + LEAST)


def _root(moment: Tensor) -> Tensor:
    """Symmetric square root of [H, D, D], without directions that count for nothing."""
    eigenvalues, vectors = torch.linalg.eigh(moment)
    kept = torch.maximum(eigenvalues, eigenvalues[:, -1:] * METRIC_FLOOR).clamp_min(LEAST)
    found: Tensor = vectors * kept.sqrt().unsqueeze(-2) @ vectors.mT
    return found


def _within_bands(head_dim: int) -> Tensor:
    """Block-diagonal orthogonal [D, D], fp64: makes the channels of a band alike, so that one step suits them all."""
    return torch.kron(torch.eye(BANDS, dtype=torch.float64), mixing(head_dim // BANDS))


def mixing(size: int) -> Tensor:
    """Orthogonal [size, size], fp64, that spreads every channel over all: Hadamard's for a power of two, else Hartley's.

    Source: R. Bracewell, Discrete Hartley transform, J. Opt. Soc. Am. 73, 1983.
    """
    if size & (size - 1) == 0:
        found = torch.ones(1, 1, dtype=torch.float64)
        while len(found) < size:
            found = torch.cat((torch.cat((found, found), 1), torch.cat((found, -found), 1)))
        return found / math.sqrt(size)
    angle = torch.outer(*[torch.arange(size, dtype=torch.float64)] * 2) * (2 * math.pi / size)
    return (angle.cos() + angle.sin()) / math.sqrt(size)


def fit_bases(
    scorer: Scorer,
    tokenizer: Any,
    seed: int,
    batch_tokens: int,
    stage: Callable[..., Any],
) -> tuple[dict[int, Centres], list[LayerWorth]]:
    """Both sides of every layer: the basis tensors, and the worth of their bands.

    Args:
        scorer: search split.
        tokenizer: of the model; None if it has none.
        seed: of the labels that gradients are taken for.
        batch_tokens: tokens of one pass.
        stage: opens a progress stage and yields the function that advances it (see Reporter.stage).
    """
    sequences = [sample.tokens for tier in scorer.tiers for sample in tier]
    weights = first_token_weights(sequences, special_tokens(tokenizer))
    with stage("gradients", sum(tokens.numel() for tokens, _, _ in scorer.batches())) as advance:
        information = gather_information(scorer, seed, advance)
    with stage("first tokens", len(weights)) as advance:
        first = first_token_means(scorer.runner, weights, batch_tokens, advance)
    centres, worth = {}, []
    with stage("fit bases", len(first)) as advance:
        for layer in range(len(scorer.runner.layers)):
            (key, keys), (value, values) = (
                fit_side(sums, mean) for sums, mean in zip(information.layers[layer], first[layer], strict=True)
            )
            centres[layer] = Centres(key, value)
            worth.append(LayerWorth(keys, values))
            advance()
    return centres, worth
