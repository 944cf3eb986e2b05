"""The warm-up runs every kernel that serving takes, and refuses one that differs from the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvtuner_kernels import warm_up as module
from kvtuner_kernels.layout import RAW, LayerSpec, TensorSpec
from kvtuner_kernels.quantize import store
from kvtuner_kernels.warm_up import KernelError, Layer, Use, warm_up

PLAIN = LayerSpec.parse("4-g64-asym/4-g64-asym")
BANDED = LayerSpec.parse("b65443322/b54433221")
USE = Use(heads=1, group=2, head_dim=64, dtype=torch.float16, batches=(1, 3))
CPU = torch.device("cpu")


@pytest.mark.parametrize("use", [USE, replace(USE, as_stored=True), replace(USE, as_stored=True, splits=8)], ids=str)
def test_every_distinct_layer_is_run_as_serving_does(monkeypatch: pytest.MonkeyPatch, use: Use) -> None:
    """Bands are stored with positions, as prompts are, and without, as decoded tokens are: two variants of the kernel."""
    asked = set()

    def watched(*arguments, **options):  # type: ignore[no-untyped-def]
        asked.add((arguments[4], arguments[6] is None))
        return store(*arguments, **options)

    monkeypatch.setattr(module, "store", watched)
    other = LayerSpec(RAW, TensorSpec(2, 64, centred=True))
    assert warm_up([PLAIN, PLAIN, other, BANDED], use, CPU) == 3
    assert asked == {(PLAIN, True), (other, True), (BANDED, True), (BANDED, False)}


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


@pytest.mark.parametrize("name", ["decode", "extend", "gather"])
def test_a_kernel_that_takes_a_first_token_for_any_other_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Or does so with one of its two sides."""
    kernel = getattr(module, name)

    def unmarked(*arguments, **options):  # type: ignore[no-untyped-def]
        at = next(i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.dtype == torch.uint8)
        rows = arguments[at].clone()
        digits = BANDED.digits(64)[1]
        assert digits is not None
        rows[:, 2 * (digits.word + 8 // digits.bits) - 1] &= 127  # the top bit of the values' scale
        return kernel(*arguments[:at], rows, *arguments[at + 1 :], **options)

    monkeypatch.setattr(module, name, unmarked)
    with pytest.raises(KernelError, match=f"{name} .*is off by"):
        warm_up([BANDED], USE, CPU)


@pytest.mark.parametrize(
    ("name", "field", "layer"),
    [
        ("extend", "soft_cap", Layer(PLAIN, soft_cap=0.5)),
        ("extend", "window", Layer(PLAIN, window=24)),
        ("decode", "sinks", Layer(PLAIN, sinks=True)),
    ],
)
def test_caps_windows_and_sinks_are_compared_too(
    monkeypatch: pytest.MonkeyPatch, name: str, field: str, layer: Layer
) -> None:
    use = replace(USE, batches=(1,))
    assert warm_up([layer, PLAIN, layer], use, CPU) == 2
    kernel = getattr(module, name)
    none = {"soft_cap": 0.0, "window": 0, "sinks": None}[field]
    monkeypatch.setattr(module, name, lambda *given, **named: kernel(*given, **named | {field: none}))
    with pytest.raises(KernelError, match=f"{name} .*is off by"):
        warm_up([layer], use, CPU)
