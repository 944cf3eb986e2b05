"""The fitted basis: what it must be for bits to be worth what is predicted."""

import pytest
import torch
from torch import Tensor

from kvtuner_kernels.bands import BasisError, basis
from kvtuner_kernels.places import BANDS
from kvtuner_search.calibration.basis import fit_side, mixing
from kvtuner_search.evaluation.information import SideSums

HEADS = 2


def make_sums(head_dim: int, tokens: int = 4000, seed: int = 0) -> tuple[SideSums, Tensor, Tensor]:
    """Sums of keys with outliers and of gradients that look another way, and both [N, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(1, -1.5, head_dim)
    turn = torch.linalg.qr(torch.randn(HEADS, head_dim, head_dim, generator=generator, dtype=torch.float64))[0]
    keys = torch.einsum(
        "hij,nhj->nhi", turn, torch.randn(tokens, HEADS, head_dim, generator=generator) * scale.double()
    )
    keys += torch.linspace(-50, 50, head_dim)
    gradients = torch.randn(tokens, HEADS, head_dim, generator=generator).double() * torch.linspace(0.01, 2, head_dim)
    sums, weight = SideSums.zero(keys), torch.full((tokens,), 1 / tokens, dtype=torch.float64)
    sums.add(keys, weight)
    sums.add_gradient(gradients, weight)
    return sums, keys, gradients


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96])
def test_bands_have_unit_mean_square_and_come_in_order_of_worth(head_dim: int) -> None:
    sums, keys, _ = make_sums(head_dim)
    first = torch.full((HEADS, head_dim), 7.0, dtype=torch.float64)
    joined, worth = fit_side(sums, first)
    assert joined.shape == (HEADS, head_dim + 2, head_dim)
    assert joined.dtype == torch.float32
    found = basis(joined)
    assert torch.allclose(found.mean, keys.mean(0).float(), atol=1e-4)
    assert torch.allclose(joined[:, -1], first.float())
    y = torch.einsum("hij,nhj->nhi", found.matrix.double(), keys - keys.mean(0))
    square = y.square().mean(0).view(HEADS, BANDS, -1)
    assert torch.allclose(square.mean(-1), torch.ones(HEADS, BANDS, dtype=torch.float64), rtol=0.01)
    if (
        head_dim // BANDS & (head_dim // BANDS - 1) == 0
    ):  # Hadamard's matrix makes the channels of a band alike, one by one
        assert torch.allclose(square, torch.ones_like(square), rtol=0.01)
    bands = torch.tensor(worth.by_head)
    assert bands.shape == (HEADS, BANDS)
    assert bool((bands[:, :-1] >= bands[:, 1:]).all())
    assert worth.bands == pytest.approx(bands.sum(0).tolist())


def test_worth_is_what_dropping_a_band_costs_in_the_metric() -> None:
    sums, keys, _ = make_sums(64)
    joined, worth = fit_side(sums, keys.mean(0))
    found, metric = basis(joined), sums.gradient
    y = torch.einsum("hij,nhj->nhi", found.matrix.double(), keys - keys.mean(0))
    for band in range(BANDS):
        only = torch.zeros_like(y)
        only[..., band * 8 : band * 8 + 8] = y[..., band * 8 : band * 8 + 8]
        error = torch.einsum("hij,nhj->nhi", found.inverse.double(), only)
        cost = torch.einsum("nhd,hde,nhe->h", error, metric, error) / len(keys)
        assert cost.tolist() == pytest.approx([head[band] for head in worth.by_head], rel=0.02)
    total = torch.einsum("hde,hde->", metric, sums.square - torch.einsum("hd,he->hde", sums.mean, sums.mean))
    assert sum(worth.bands) == pytest.approx(float(total), rel=0.01)


def test_a_unit_error_of_any_channel_of_a_band_costs_the_same() -> None:
    """The basis is the metric's root but for each band's deviation, so that one step a band is right."""
    sums, keys, _ = make_sums(64)
    joined, _ = fit_side(sums, keys.mean(0))
    inverse = basis(joined).inverse.double()
    cost = (inverse.mT @ sums.gradient @ inverse).diagonal(dim1=-2, dim2=-1).view(HEADS, BANDS, -1)
    assert torch.allclose(cost, cost.mean(-1, keepdim=True).expand_as(cost), rtol=0.02)


@pytest.mark.parametrize("size", [1, 2, 8, 10, 12, 16, 24, 32])
def test_mixing_is_orthogonal_and_spreads_every_channel(size: int) -> None:
    found = mixing(size)
    assert torch.allclose(found @ found.mT, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert float(found.abs().max()) <= (2 / size) ** 0.5 + 1e-12


def test_what_is_constant_or_unused_can_be_inverted_all_the_same() -> None:
    (still, keys, _), unused = make_sums(16), make_sums(16)[0]
    mean = still.mean / still.weight
    still.square = torch.einsum("hd,he->hde", mean, mean) * still.weight
    unused.gradient.zero_()
    for each in (still, unused):
        joined, worth = fit_side(each, keys.mean(0))
        assert bool(basis(joined).inverse.isfinite().all())
        assert sum(worth.bands) < 1e-4


def test_directions_that_few_tokens_have_not_shown_are_not_blown_up() -> None:
    """Four tokens in 16 channels: a fifth token, like the others, still lies within a few deviations."""
    sums, _, _ = make_sums(16, tokens=4)
    matrix = basis(fit_side(sums, torch.zeros(HEADS, 16, dtype=torch.float64))[0]).matrix
    few, more = make_sums(16, tokens=4)[1], make_sums(16, tokens=400, seed=0)[1]
    y = torch.einsum("hij,nhj->nhi", matrix.double(), more - few.mean(0))
    assert float(y.square().mean().sqrt()) < 30


def test_sums_that_are_not_finite_are_refused() -> None:
    sums, keys, _ = make_sums(16)
    with pytest.raises(BasisError, match="not finite"):
        fit_side(sums, torch.full_like(keys[0], float("nan")))
