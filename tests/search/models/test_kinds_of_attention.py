"""Layers of several kinds, against transformers' own eager attention, on texts longer than their windows."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from model_kinds import CHUNK, KINDS, kinds_of, write_kind
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.errors import DataError
from kvtuner_search.evaluation.generation import PackedCache
from kvtuner_search.evaluation.stored import PrefilledCache, stored_cache
from kvtuner_search.models.attention import Attends, mark_layers
from kvtuner_search.models.load import ModelOptions, load_model
from kvtuner_search.models.runner import Runner

LENGTHS = (40, 3 * CHUNK, 27)
ALL = list(KINDS)


@pytest.fixture(params=ALL, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    return write_kind(tmp_path_factory.mktemp("kinds") / name.replace(" ", ""), name)


@pytest.fixture(scope="module")
def runner(folder: Path) -> Runner:
    return Runner(load_model(ModelOptions(source=str(folder), dtype="float32")))


def some_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, padded on the right, and which are no padding."""
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(3, 8192, valid.shape, generator=torch.Generator().manual_seed(1))
    return tokens * valid, valid


def test_hidden_states_are_those_of_transformers(folder: Path, runner: Runner, name: str) -> None:
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    tokens, valid = some_tokens()
    assert list(map(str, runner.loaded.info.kinds)) == kinds_of(name)
    with torch.inference_mode():
        expected = stock.model(input_ids=tokens, attention_mask=valid.long(), use_cache=False).last_hidden_state
        close = partial(torch.allclose, rtol=0, atol=2e-5 * float(expected[valid].abs().max()))
        found = runner.hidden(tokens)
        assert close(found[valid], expected[valid])
        short = tokens[:1, : LENGTHS[0]]  # without padding
        assert close(runner.hidden(short), stock.model(input_ids=short, use_cache=False).last_hidden_state)
        logits = stock(input_ids=short, use_cache=False).logits
        assert torch.allclose(
            runner.logits(runner.hidden(short)), logits, rtol=0, atol=2e-5 * float(logits.abs().max())
        )
        if KINDS[name][2].strip("f"):
            wrong = [kind._replace(window=kind.window and kind.window + 1) for kind in runner.loaded.info.kinds]
            mark_layers(runner.loaded.model, wrong)
            with pytest.raises(DataError, match=r"attends in a window or chunk of .* in transformers, by config.json"):
                runner.hidden(short)
            mark_layers(runner.loaded.model, runner.loaded.info.kinds)


@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_that_is_one_off_is_told_from_the_right_one(
    folder: Path, runner: Runner, name: str, off: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison with transformers above would fail with it."""
    tokens, valid = some_tokens()
    right, visible = runner.hidden(tokens)[valid], Attends.reached

    def reached(how: Attends, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        kind = how.kind._replace(window=how.kind.window and how.kind.window + off)
        return visible(replace(how, kind=kind), rows, columns)

    monkeypatch.setattr(Attends, "reached", reached)
    monkeypatch.setattr(Attends, "first", lambda *_: 0)
    moved = float((runner.hidden(tokens)[valid] - right).abs().max() / right.abs().max())
    assert moved > 1e-3 if KINDS[name][2].strip("f") else moved == 0


def test_decoding_from_a_cache_is_one_pass(runner: Runner) -> None:
    """A prompt and then single tokens, at positions that differ by row, give the hidden states of the whole sequence: windows, chunks and
    Llama 4's scaled queries follow the positions, and slots of padding stay hidden."""
    tokens, _ = some_tokens()
    whole = runner.hidden(tokens)
    prompts = torch.tensor((9, CHUNK, 14))
    cache = PackedCache((LayerSpec(),) * 4, {}, tokens.shape[1])
    width = int(prompts.max())
    cache.begin(torch.arange(width).expand(3, width))
    runner.hidden(tokens[:, :width], cache)
    row = torch.arange(3)
    for step in range(min(LENGTHS) - width):
        at = prompts + step
        cache.begin(at[:, None])
        found = runner.hidden(tokens[row, at][:, None], cache, positions=at[:, None])[:, 0]
        assert torch.allclose(found, whole[row, at], rtol=0, atol=2e-5 * float(whole.abs().max()))


def test_a_pass_of_several_tokens_over_a_cache_is_one_pass(runner: Runner) -> None:
    tokens, _ = some_tokens()
    whole, cache = runner.hidden(tokens), PackedCache((LayerSpec(),) * 4, {}, tokens.shape[1])
    for start in range(0, tokens.shape[1], 6):
        at = torch.arange(start, start + 6).expand(3, 6)
        cache.begin(at)
        found = runner.hidden(tokens[:, start : start + 6], cache, positions=at)
        assert torch.allclose(found, whole[:, start : start + 6], rtol=0, atol=2e-5 * float(whole.abs().max()))


def test_copies_of_a_sequence_are_at_its_positions(runner: Runner) -> None:
    """PrefilledCache gives attention every token twice, of which each query sees one."""
    tokens, _ = some_tokens()
    tap = PrefilledCache(stored_cache((LayerSpec(),) * 4, {}))
    tap.begin(torch.tensor((20, 0, 48)))
    whole = runner.hidden(tokens)
    assert torch.allclose(runner.hidden(tokens, tap), whole, rtol=0, atol=2e-5 * float(whole.abs().max()))


def test_a_pass_can_start_in_the_middle(runner: Runner, name: str) -> None:
    """Each layer keeps its kind, its rotary embedding and its mask."""
    tokens, _ = some_tokens()
    assert runner.can_resume
    inputs, whole = runner.layer_inputs(tokens), runner.hidden(tokens)
    for layer, state in enumerate(inputs):
        assert torch.equal(runner.hidden_from(layer, state), whole)


def test_gradients_are_those_of_transformers(folder: Path, runner: Runner) -> None:
    """Of a weighted sum of hidden states, with respect to every key and value; keys outside all windows of later tokens have none."""
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    tokens = some_tokens()[0][:1, : LENGTHS[0]]
    weight = torch.randn(1, LENGTHS[0], 64, generator=torch.Generator().manual_seed(2))
    weight[:, :-1] = 0  # only the last token counts
    found: dict[int, torch.Tensor] = {}

    def tap(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        value.register_hook(lambda gradient: found.__setitem__(layer, gradient))
        return key, value

    runner.differentiate(tokens, tap, lambda hidden: weight)
    values: dict[int, torch.Tensor] = {}
    for layer, module in enumerate(stock.model.layers):

        def keep(_: object, __: object, output: torch.Tensor, layer: int = layer) -> torch.Tensor:
            output = output if output.requires_grad else output.requires_grad_()
            output.retain_grad()
            values[layer] = output
            return output

        module.self_attn.v_proj.register_forward_hook(keep)
    stock.requires_grad_(False)
    (stock.model(input_ids=tokens, use_cache=False).last_hidden_state * weight).sum().backward()
    for layer in range(4):
        expected = values[layer].grad
        assert expected is not None
        assert torch.allclose(found[layer].flatten(2), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    unseen = found[3][0].flatten(1).abs().sum(1) == 0
    assert int(unseen.sum()) == LENGTHS[0] - runner.loaded.info.kinds[3].kept(
        LENGTHS[0]
    )  # none of the four ends with a chunked layer


def test_experts_in_mxfp4_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    """gpt-oss as it is published: blocks and scales in place of the experts' weights."""
    folder = write_kind(tmp_path / "m", "gpt-oss")
    file, made = folder / "model.safetensors", torch.Generator().manual_seed(5)
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = tensors.pop(name).shape  # [E, in, out]; blocks are [E, out, in / 32, 16]
        shape = (experts, columns, rows // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=made, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 126, shape, generator=made, dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(ModelOptions(source=str(folder), dtype="bfloat16"))
    stock = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.bfloat16)
    expected = dict(stock.named_parameters())
    for name, weight in loaded.model.named_parameters():
        assert torch.equal(weight, expected[name])
    assert loaded.model.model.layers[0].mlp.experts.gate_up_proj.unique().numel() > 15  # sixteen codes, several scales
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataError):
        load_model(ModelOptions(source=str(folder), dtype="bfloat16"))
