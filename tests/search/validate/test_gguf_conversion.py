"""A GGUF file becomes a folder that transformers loads.

The gguf package is no dependency: these tests fetch it from the package index, as the script does, and so are among the slow ones, which run
when they are asked for. Without a network they fail.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvtuner_search.errors import DataError

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[3] / "scripts" / "gguf_folder.py"
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS = 2, 64, 96, 4, 2
TOKENS = ["<s>", "</s>", *map(chr, range(ord("a"), ord("z") + 1)), "ab", "abc", "Ġ", "Ċ"]
MERGES = ["a b", "ab c"]
Weights = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The script, with the gguf package that it fetched."""
    spec = importlib.util.spec_from_file_location("gguf_folder", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gguf_folder"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    with module.gguf_importable(tmp_path_factory.mktemp("packages")):
        yield module


def write(file: Path, output: str | None = None) -> Weights:
    """A random Llama in Q4_1 with an embedding in Q4_1; the output matrix is left out, ``finer`` (the same in Q8_0) or ``another``.

    Returns:
        What the file stands for: dequantized matrices by their GGUF names.
    """
    import gguf

    rng, q4, q8 = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    stands_for: Weights = {}

    def add(name: str, matrix: np.ndarray[Any, Any], kind: Any) -> None:
        packed = gguf.quantize(matrix, kind)
        stands_for[name] = gguf.dequantize(packed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)

    def draw(*shape: int) -> np.ndarray[Any, Any]:
        return rng.normal(0, 0.2, shape).astype(np.float32)

    embedding = draw(len(TOKENS), HIDDEN)
    add("token_embd.weight", embedding, q4)
    if output is not None:
        add("output.weight", embedding if output == "finer" else draw(len(TOKENS), HIDDEN), q8)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    kv = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN), ("attn_k", kv, HIDDEN), ("attn_v", kv, HIDDEN), ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", INNER, HIDDEN), ("ffn_up", INNER, HIDDEN), ("ffn_down", HIDDEN, INNER),
        ):  # fmt: skip
            add(f"blk.{layer}.{name}.weight", draw(rows, columns), q4)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands_for


def as_bfloat16(matrix: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(matrix.copy()).to(torch.bfloat16)


@pytest.mark.parametrize(("output", "source"), [(None, "token_embd.weight"), ("finer", "output.weight")])
def test_one_matrix_serves_as_embedding_and_output(
    script: ModuleType, tmp_path: Path, output: str | None, source: str
) -> None:
    """Also where the file holds it twice; the finer copy is kept."""
    stands_for = write(tmp_path / "tiny.gguf", output)
    out = tmp_path / "model"
    script.make(out, tmp_path / "tiny.gguf", script.SMOLLM2)
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["model.embed_tokens.weight"], as_bfloat16(stands_for[source]))
    assert "lm_head.weight" not in weights
    down = stands_for["blk.1.ffn_down.weight"]
    assert torch.equal(weights["model.layers.1.mlp.down_proj.weight"], as_bfloat16(down))
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["tie_word_embeddings"], config["dtype"]) == (
        ["LlamaForCausalLM"],
        True,
        "bfloat16",
    )
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("abcb", add_special_tokens=False)["input_ids"]
    assert [TOKENS[i] for i in ids] == ["abc", "b"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"
    assert tokenizer.eos_token == "</s>"
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits
    assert logits.shape == (1, 2, len(TOKENS))
    assert bool(logits.isfinite().all())
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {(out / "config.json").stat().st_mode & 0o777}


def test_another_output_matrix_is_kept(script: ModuleType, tmp_path: Path) -> None:
    stands_for = write(tmp_path / "tiny.gguf", "another")
    script.make(tmp_path / "model", tmp_path / "tiny.gguf", script.SMOLLM2)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], as_bfloat16(stands_for["output.weight"]))
    assert torch.equal(weights["model.embed_tokens.weight"], as_bfloat16(stands_for["token_embd.weight"]))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("data", [b"", b"GGUF" + bytes(200), b"no model at all" * 20])
def test_a_file_that_is_no_model_is_refused(script: ModuleType, tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"broken\.gguf cannot be read \(.+\): give a GGUF file"):
        script.make(tmp_path / "model", file, script.SMOLLM2)
    assert not (tmp_path / "model").exists()
