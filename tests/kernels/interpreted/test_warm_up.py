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


@pytest.mark.parametrize("as_stored", [False, True])
def test_variants_of_a_kind_of_layer_are_those_that_serving_calls(
    monkeypatch: pytest.MonkeyPatch, as_stored: bool
) -> None:
    """A window is extend's; decode gets a window's slots."""
    asked = set()

    def watch(name: str) -> None:
        kernel = getattr(module, name)

        def watched(*arguments, **options):  # type: ignore[no-untyped-def]
            asked.add((name, options.get("window", 0), options["soft_cap"], options["sinks"] is not None))
            return kernel(*arguments, **options)

        monkeypatch.setattr(module, name, watched)

    watch("decode")
    watch("extend")
    use = replace(USE, as_stored=as_stored)
    assert warm_up([Layer(BANDED, window=20, soft_cap=5.0, sinks=True)], use, CPU) == 1
    assert asked == {("decode", 0, 5.0, True), ("extend", 20, 5.0, True)}


@pytest.mark.parametrize(
    ("name", "what"),
    [("decode", "sinks"), ("decode", "soft_cap"), ("extend", "sinks"), ("extend", "soft_cap"), ("extend", "window")],
)
def test_a_kernel_without_what_the_layer_has_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, what: str) -> None:
    kernel = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: kernel(*a, **{**k, what: None if what == "sinks" else 0}))
    with pytest.raises(KernelError, match=f"{name} .*is off by"):
        warm_up([Layer(PLAIN, window=20, soft_cap=2.0, sinks=True)], USE, CPU)


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


def test_layers_that_differ_in_what_is_done_to_scores_are_warmed_up_apart() -> None:
    capped = Layer(PLAIN, soft_cap=0.5)
    assert warm_up([capped, PLAIN, Layer(PLAIN), capped], replace(USE, batches=(1,)), CPU) == 2
