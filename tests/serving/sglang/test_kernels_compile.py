"""The kernels compile, without a GPU, in a process that has imported SGLang, which replaces some of Triton's functions, and with the Triton that
comes with it, which is older than the one that the other tests compile with."""

import pytest
import sglang.srt.utils.common  # noqa: F401 - for what it does to Triton
import triton

from kvtuner_kernels.compilation import compile_variant, variants
from kvtuner_kernels.layout import LayerSpec


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("4-g128-asym/4-g128-asym", (4, 7, 128)),
        ("2-g64-sym-c-r/4-g64-asym-r", (4, 7, 128)),
        ("b65443322/b54433221", (4, 7, 128)),
        ("b65443000/b54300000", (2, 7, 64)),  # more than one band without bits
        ("16/b44000000", (4, 7, 128)),
    ],
)
def test_every_kernel_compiles_for_sm_90(spec: str, shape: tuple[int, int, int]) -> None:
    assert triton.next_power_of_2.__module__.startswith("sglang"), "SGLang no longer does so: this test shows nothing"
    for variant in variants(LayerSpec.parse(spec), *shape):
        assert compile_variant(variant, 90).spilled == 0, variant.name
