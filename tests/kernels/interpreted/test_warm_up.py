"""The warm-up runs every kernel that serving takes, and refuses one that differs from the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvtuner_kernels import warm_up as module
from kvtuner_kernels.layout import RAW, LayerSpec, TensorSpec
from kvtuner_kernels.warm_up import KernelError, Use, warm_up

PLAIN = LayerSpec.parse("4-g64-asym/4-g64-asym")
USE = Use(heads=1, group=2, head_dim=64, dtype=torch.float16, batches=(1, 3))
CPU = torch.device("cpu")


@pytest.mark.parametrize("use", [USE, replace(USE, as_stored=True), replace(USE, as_stored=True, splits=8)], ids=str)
def test_every_distinct_layer_is_run(use: Use) -> None:
    layers = [PLAIN, PLAIN, LayerSpec(RAW, TensorSpec(2, 64, centred=True))]
    assert warm_up(layers, use, CPU) == 2


@pytest.mark.parametrize(
    ("name", "said"), [("decode", "decode"), ("extend", "extend by 1"), ("gather", "gather of keys")]
)
@pytest.mark.parametrize("as_stored", [False, True])
def test_a_kernel_that_differs_from_the_reference_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, said: str, as_stored: bool
) -> None:
    kernel = getattr(module, name)

    def swapped(*arguments, **options):  # type: ignore[no-untyped-def]
        found = kernel(*arguments, **options)
        return found.flip(-1) if isinstance(found, Tensor) else [side.flip(-1) for side in found]

    monkeypatch.setattr(module, name, swapped)
    with pytest.raises(KernelError, match=rf"{said} of 4-g64-asym/4-g64-asym with 1 KV heads of 64 is off by"):
        warm_up([PLAIN], replace(USE, as_stored=as_stored), CPU)
