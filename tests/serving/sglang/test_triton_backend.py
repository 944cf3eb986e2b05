"""The backend for GPUs, in Triton's interpreter on the CPU: a real server of a tiny model, slow but whole.

The interpreter has no bf16, so the model runs in fp16. What it cannot show are CUDA graphs and the kernels' assembly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import running
from serving_checks.bases import example_profile

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.serving.sglang.model import served_model

ROOT = Path(__file__).parents[3]
FLAGS = ["--enable-kvtuner-quant", "--kvtuner-nbits-key"]
RAW = [*FLAGS, "16", "--kvtuner-nbits-value", "16"]
LAYERS = [
    LayerSpec.parse(text) for text in ("b87665544/b76655443", "8-g64-asym-c/4-g64-asym")
]  # one in bases, one without
PROMPTS = [[5, 9, 300, 17, 2000, 41, 77], [811, 3], [5, 9, 300, 17, 2000, 41, 77, 6, 1033, 512, 98]]
COUNT = 5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model with heads of 64 channels."""
    sys.path.append(str(ROOT / "tests" / "search"))
    from tiny_models import write_model

    shape = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "head_dim": 64}
    return write_model(tmp_path_factory.mktemp("models") / "tiny", "Qwen3", **shape)


@pytest.fixture(scope="module")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a profile of both kinds of layers."""
    path = tmp_path_factory.mktemp("profiles") / "tiny.json"
    return ["--kvtuner-profile", str(example_profile(path, served_model(str(tiny)), LAYERS))]


@pytest.fixture(scope="module")
def reference(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], list[list[int]]]:
    """What the torch backend serves, which reads every prompt as stored."""
    known: dict[str, list[list[int]]] = {}

    def serve(bits: list[str]) -> list[list[int]]:
        name = " ".join(bits)
        if name not in known:
            known[name] = tokens(
                tiny, tmp_path_factory.mktemp("torch"), {}, "--attention-backend", "torch_native", *bits
            )
        return known[name]

    return serve


def tokens(model: Path, folder: Path, variables: dict[str, str], *arguments: str) -> list[list[int]]:
    """Greedy tokens after each prompt, alone and all at once, which must be the same."""
    variables = variables | {"XDG_CACHE_HOME": str(folder / "cache")}
    more = ["--dtype", "float16", "--max-total-tokens", "512", *arguments]
    with running(folder, *more, model=model, variables=variables) as server:
        alone = [server.generate(prompt, COUNT)["output_ids"] for prompt in PROMPTS]
        together = server.generate(PROMPTS, COUNT)
    assert [one["output_ids"] for one in together] == alone
    return alone


@pytest.mark.parametrize(
    ("bits", "more"),
    [(None, ["--kvtuner-as-stored", "--page-size", "64"]), (RAW, [])],
    ids=["as-stored-pages-of-64", "chunk-unquantized-pages-of-1"],
)
def test_triton_serves_what_torch_serves(
    tiny: Path,
    quantized: list[str],
    reference: Callable[[list[str]], list[list[int]]],
    bits: list[str] | None,
    more: list[str],
    tmp_path: Path,
) -> None:
    bits = bits or quantized
    found = tokens(tiny, tmp_path, {"TRITON_INTERPRET": "1"}, "--attention-backend", "triton", *bits, *more)
    assert found == reference(bits)
