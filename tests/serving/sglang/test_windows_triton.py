"""The backend for GPUs, in Triton's interpreter on the CPU, on models whose layers have windows: in one pool, and in two."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from offline_packed import OfflinePacked
from servers import running
from serving_checks.bases import example_profile
from window_models import WINDOW, write_window_model

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.serving.sglang.model import served_model

CLEAR = 0.02  # logits; fp16 moves a margin by less
COUNT = 5
LAYERS = [LayerSpec.parse(text) for text in ("b87665544/b76655443", "8-g64-asym-c/4-g64-asym")]
SHAPE = {
    "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "num_dense_layers": 2,
    "hybrid_layer_pattern": [1, 0],
}  # fmt: skip
DRAWN = random.Random(5)
PROMPTS = [[DRAWN.randrange(5, 8000) for _ in range(length)] for length in (WINDOW - 2, 35, 50)]


@pytest.mark.parametrize(("name", "more"), [("gemma3", ["--page-size", "16"]), ("afmoe", [])])
def test_triton_serves_what_the_offline_reference_says(name: str, more: list[str], tmp_path: Path) -> None:
    """Decode starts within the window and leaves it; a cached prefix is longer than the window."""
    model = write_window_model(tmp_path / name, name, torch.float16, **SHAPE)
    profile = example_profile(tmp_path / "windows.json", served_model(str(model)), LAYERS)
    reference = OfflinePacked(profile, torch.float16, model)
    expected = [reference.greedy(prompt, COUNT) for prompt in PROMPTS]
    clear = [index for index, one in enumerate(expected) if min(one.margins) > CLEAR]
    assert len(clear) > 1, "choose another seed"
    variables = {"TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with running(
        tmp_path / "log", "--kvtuner-profile", str(profile), "--kvtuner-as-stored", "--attention-backend", "triton", "--dtype",
        "float16", "--max-total-tokens", "512", *more, model=model, variables=variables,
    ) as server:  # fmt: skip
        for _ in range(2):
            found = [server.generate(PROMPTS[index], COUNT) for index in clear]
            assert [one["output_ids"] for one in found] == [expected[index].tokens for index in clear]
        assert found[-1]["meta_info"]["cached_tokens"] > WINDOW
