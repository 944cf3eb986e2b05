"""Every kernel compiles for each NVIDIA generation, without a GPU, within its registers and its shared memory."""

import re

import pytest
import torch

from kvtuner_kernels.compilation import CAPABILITIES, Features, compile_variant, layouts, variants
from kvtuner_kernels.layout import BITS, LayerSpec
from kvtuner_kernels.tuning import shared_memory_of

QWEN = (4, 7, 128)
GEMMA = (1, 4, 256)  # Gemma 3 270M
GPT_OSS = (8, 8, 64)
NOTHING = Features()


def check(
    spec: str,
    shape: tuple[int, int, int],
    capability: int,
    dtype: torch.dtype,
    only: str | tuple[str, ...] = "",
    features: Features = NOTHING,
) -> None:
    shared = shared_memory_of(capability // 10, capability % 10)
    for variant in variants(LayerSpec.parse(spec), *shape, dtype, shared, capability >= 90, features):
        if not variant.name.startswith(only):
            continue
        resources = compile_variant(variant, capability, dtype)
        print(f"{spec} {shape} sm_{capability} {variant.name}: {resources}")
        assert resources.spilled == 0, variant.name
        assert resources.shared <= shared, variant.name


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_four_bits_everywhere(capability: int) -> None:
    check("4-g128-asym/4-g128-asym", QWEN, capability, torch.bfloat16)


@pytest.mark.parametrize(
    "spec", ["8-g128-asym/8-g128-asym", "2-g128-asym/2-g128-asym", "16/16", "8-g64-asym-c-r/4-g64-sym"]
)
def test_decode_of_other_widths(spec: str) -> None:
    check(spec, QWEN, 90, torch.bfloat16, only="decode")


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("b65543332/b65443333", QWEN),
        ("b44433321/b44433311", (1, 7, 128)),
        ("b65543332/b65443332", (2, 7, 64)),
        ("b65543332/b65443332", (8, 4, 96)),
        ("b65543332/b65443332", (4, 2, 256)),
    ],
)
def test_codes_taken_out_by_position_lie_as_the_matrix_instruction_holds_them(
    spec: str, shape: tuple[int, int, int]
) -> None:
    """A warp has a head or a run of tokens to itself, and assembly for several registers sees a left operand's (planes.py)."""
    decode = next(v for v in variants(LayerSpec.parse(spec), *shape) if v.name == "decode")
    text = layouts(decode, 90)
    mma = re.search(
        r"^#(\w+) = #ttg.nvidia_mma<.*warpsPerCTA = \[4, 1, 1\], instrShape = \[1, 16, 8\]", text, re.MULTILINE
    )
    assert mma is not None
    held = f"#ttg.dot_op<{{opIdx = 0, parent = #{mma[1]}, kWidth = 2}}>"
    packed = [line for line in text.splitlines() if "elementwise_inline_asm" in line]
    wide = [line for line in packed if int(re.search(r"packed_element = (\d+)", line)[1]) > 2]  # type: ignore[index]
    assert len(wide) >= 4
    for line in wide:
        assert line.count(held) == 2, line  # what goes in and what comes out
        assert re.search(r"tensor<4x", line), line


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_heads_of_256_channels_under_a_soft_cap_with_a_window(capability: int) -> None:
    only = ("decode", "merge", "extend")
    features = Features(soft_cap=50.0, window=512)
    check("4-g256-asym/4-g256-asym", GEMMA, capability, torch.bfloat16, only, features)


@pytest.mark.parametrize("capability", [80, 90])
def test_sinks_of_a_layer_in_bands_with_a_window(capability: int) -> None:
    features = Features(window=128, sinks=True)
    check("b65443322/b54433221", GPT_OSS, capability, torch.bfloat16, ("merge", "extend", "result"), features)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "features",
    [
        Features(soft_cap=50.0, window=512),
        Features(window=128, sinks=True),
        Features(window=512, sinks=True, masked=True),
        Features(soft_cap=50.0, window=512, sinks=True, masked=True),
        Features(soft_cap=50.0, window=512, sinks=True, masked=True, as_stored=True),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("4-g256-asym/4-g256-asym", GEMMA),
        ("b65443322/b54433221", GEMMA),
        ("4-g64-asym/4-g64-asym", GPT_OSS),
        ("4-g64-asym-c-r/4-g64-asym-c-r", GPT_OSS),
        ("b65443322/b54433221", GPT_OSS),
    ],
)
def test_layers_of_every_kind(
    spec: str, shape: tuple[int, int, int], features: Features, capability: int, dtype: torch.dtype
) -> None:
    check(spec, shape, capability, dtype, ("decode", "merge", "extend", "result"), features)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("key", BITS)
@pytest.mark.parametrize("value", BITS)
def test_every_pair(capability: int, dtype: torch.dtype, key: int, value: int) -> None:
    names = ["16" if bits == 16 else f"{bits}-g128-asym" for bits in (key, value)]
    check("/".join(names), QWEN, capability, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_every_head_dim(head_dim: int, heads: int) -> None:
    check(f"8-g{head_dim}-asym-c-r/4-g{head_dim}-asym-c-r", (heads, 8, head_dim), 90, torch.bfloat16)


@pytest.mark.parametrize("capability", [80, 90])
def test_bands(capability: int) -> None:
    check("b65443322/b54433221", QWEN, capability, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", ["b65443322/b54433221", "b88888888/b88888888", "16/b44332211"])
def test_bands_of_other_widths(capability: int, dtype: torch.dtype, spec: str) -> None:
    check(spec, QWEN, capability, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_bands_of_every_head_dim(head_dim: int, heads: int) -> None:
    check("b65443322/b54433221", (heads, 8, head_dim), 90, torch.bfloat16)
