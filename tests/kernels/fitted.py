"""What a layer needs from the transforms file, made up: centring vectors, and well-conditioned random bases."""

import torch

from kvtuner_kernels.bands import join_basis
from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_kernels.reference import Centres


def made_up(spec: LayerSpec, heads: int, head_dim: int) -> Centres:
    """Centres with what each side of ``spec`` asks for. First tokens lie far from all others."""
    return Centres(*(_side(side, heads, head_dim) for side in (spec.key, spec.value)))


def _side(side: TensorSpec, heads: int, head_dim: int) -> torch.Tensor | None:
    if side.banded:
        turned, _ = torch.linalg.qr(torch.randn(heads, head_dim, head_dim))
        matrix = turned * torch.rand(heads, head_dim, 1).add(0.5)
        return join_basis(matrix, torch.randn(heads, head_dim) * 0.5, torch.randn(heads, head_dim) * 4)
    return torch.randn(heads, head_dim) if side.centred else None
