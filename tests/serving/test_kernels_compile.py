"""The kernels compile with the Triton that comes with SGLang, which is older than the one the other tests compile with."""

import pytest
import torch

from kvtuner_kernels.compilation import compile_variant, variants
from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.tuning import shared_memory_of

HOPPER = (9, 0)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("4-g64-asym/4-g64-asym", (4, 7, 128)),
        ("b65443322/b54433221", (4, 7, 128)),
        ("b65443000/b54300000", (2, 7, 64)),  # more than one band without bits
        ("16/b44000000", (4, 7, 128)),
    ],
)
def test_every_kernel_of_a_layer(spec: str, shape: tuple[int, int, int]) -> None:
    found = variants(LayerSpec.parse(spec), *shape, torch.bfloat16, shared_memory_of(*HOPPER), True)
    assert "decode" in {variant.name for variant in found}
    for variant in found:
        assert compile_variant(variant, HOPPER[0] * 10 + HOPPER[1], torch.bfloat16).spilled == 0, variant.name
