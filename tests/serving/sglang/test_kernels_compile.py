"""The kernels compile, without a GPU, in a process that has imported SGLang, which replaces some of Triton's functions."""

import pytest
import sglang.srt.utils.common  # noqa: F401 - for what it does to Triton
import triton

from kvtuner_kernels.compilation import compile_variant, variants
from kvtuner_kernels.layout import LayerSpec


@pytest.mark.parametrize("spec", ["4-g128-asym/4-g128-asym", "2-g64-sym-c-r/4-g64-asym-r"])
def test_every_kernel_compiles_for_sm_90(spec: str) -> None:
    assert triton.next_power_of_2.__module__.startswith("sglang"), "SGLang no longer does so: this test shows nothing"
    for variant in variants(LayerSpec.parse(spec), 4, 7, 128):
        assert compile_variant(variant, 90).spilled == 0, variant.name
