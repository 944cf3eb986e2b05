"""Bases, and keys and values to be stored in them, whose products are exact in fp32 in whatever order they are added up.

Hardware and libraries choose the order by the number of tokens and heads; here rows must be the same bits however tokens are batched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtuner_kernels.bands import join_basis
from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_kernels.reference import Centres


def eighths(*shape: int, generator: torch.Generator) -> Tensor:
    """Random multiples of 1/8 in [-4, 4), exact in every dtype."""
    return torch.randint(-32, 32, shape, generator=generator) / 8


def exact_basis(heads: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """A basis tensor whose matrix is a Hadamard's, rows in random order and with random signs, over 8; ``head_dim`` a power of two."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < head_dim:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    order = torch.stack([torch.randperm(head_dim, generator=generator) for _ in range(heads)])
    signs = torch.randint(0, 2, (heads, head_dim, 1), generator=generator) * 2 - 1
    mean, first = eighths(heads, head_dim, generator=generator), 4 * eighths(heads, head_dim, generator=generator)
    return join_basis(hadamard[order] * signs / 8, mean, first)


def made_up_centres(specs: Sequence[LayerSpec], heads: int, head_dim: int, seed: int = 0) -> dict[int, Centres]:
    """What the layers need from a transforms file, exact as above, by layer."""
    generator = torch.Generator().manual_seed(seed)

    def side(spec: TensorSpec) -> Tensor | None:
        if spec.banded:
            return exact_basis(heads, head_dim, generator)
        return eighths(heads, head_dim, generator=generator) if spec.centred else None

    return {layer: Centres(side(spec.key), side(spec.value)) for layer, spec in enumerate(specs)}
