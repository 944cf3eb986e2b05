"""A real server whose prompts are FlashInfer's: the same answers as by the packed kernels, in chunks, over cached prefixes, together.

On the CPU, in Triton's interpreter; a stand-in in plain torch does FlashInfer's part.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch_flashinfer
from servers import Server, running
from serving_checks.bases import example_profile

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.serving.sglang.model import served_model

ROOT = Path(__file__).parents[3]
CHUNK = 160
COUNT = 3
LONG = [(7 * i * i + 3 * i) % 3000 + 5 for i in range(CHUNK + 140)]  # two chunks, both long enough for FlashInfer
OTHER = [*LONG[:100], *(i + 11 for i in range(150))]  # starts like the first
SHORT = [[i + n for i in range(90)] for n in (3000, 3500)]  # one batch


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    sys.path.append(str(ROOT / "tests" / "search"))
    from tiny_models import write_model

    shape = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "head_dim": 64}
    folder = tmp_path_factory.mktemp("prefill")
    model = write_model(folder / "tiny", "Qwen3", max_position_embeddings=1024, **shape)
    # One layer in fitted bases, whose first tokens FlashInfer finds in the prefix, and one without.
    layers = [LayerSpec.parse("b87665544/b76655443"), LayerSpec.parse("8-g64-asym/4-g64-asym")]
    profile = example_profile(folder / "tiny.json", served_model(str(model)), layers)
    paths = [
        torch_flashinfer.write_plugin(folder / "plugin"),
        Path(torch_flashinfer.__file__).parent,
        os.environ.get("PYTHONPATH", ""),
    ]
    variables = {
        "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, paths)), torch_flashinfer.FOLDER: str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }  # fmt: skip
    with running(
        folder / "log", "--dtype", "float16", "--max-total-tokens", "2048", "--attention-backend", "triton",
        "--chunked-prefill-size", str(CHUNK), "--kvtuner-profile", str(profile), model=model, variables=variables,
    ) as started:  # fmt: skip
        yield started


def answers(server: Server) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities: a prompt in chunks, one that starts like it, and two at once."""
    server.post("/flush_cache?timeout=60", {})
    found = [server.generate(LONG, COUNT, return_logprob=True), server.generate(OTHER, COUNT, return_logprob=True)]
    assert found[1]["meta_info"]["cached_tokens"] == 100
    found += server.generate(SHORT, COUNT, return_logprob=True)
    return [(one["output_ids"], [entry[0] for entry in one["meta_info"]["output_token_logprobs"]]) for one in found]


def test_prompts_by_flashinfer_are_answered_as_by_the_packed_kernels(server: Server) -> None:
    folder = Path(server.variables[torch_flashinfer.FOLDER])
    found = answers(server)
    asked = (folder / "batches").read_text()
    (folder / "off").touch()
    expected = answers(server)
    assert (folder / "batches").read_text() == asked
    lines = asked.splitlines()
    lines = lines[lines.index(f"[{CHUNK}] over [0]") :]
    assert lines[:3] == [f"[{CHUNK}] over [0]", f"[140] over [{CHUNK}]", "[150] over [100]"]
    assert lines[3:] in (["[90, 70] over [0, 0]", "[20] over [70]"], ["[90, 90] over [0, 0]"])
    for (tokens, logprobs), (right, right_logprobs) in zip(found, expected, strict=True):
        assert tokens == right
        assert logprobs == pytest.approx(right_logprobs, abs=0.02)
