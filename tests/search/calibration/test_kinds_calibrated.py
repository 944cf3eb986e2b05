"""Models with layers of several kinds, calibrated, checked and evaluated on texts longer than their windows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from model_kinds import CHUNK, WINDOW, kinds_of, write_kind

from kvtuner_kernels.layout import RAW
from kvtuner_kernels.reference import as_stored
from kvtuner_search.calibration.candidates import StorageClass
from kvtuner_search.calibration.sensitivity import Sensitivity
from kvtuner_search.cli.main import run
from kvtuner_search.data.types import Sample
from kvtuner_search.evaluation.moments import Moments
from kvtuner_search.evaluation.scorer import Scorer
from kvtuner_search.models.attention import Attends
from kvtuner_search.models.load import ModelOptions, load_model
from kvtuner_search.models.runner import Runner
from kvtuner_search.profile.canonical import load
from kvtuner_search.profile.kinds import LayerKind

DATA = ("--data", "list", "--length", "170", "--quiet")


@pytest.mark.parametrize("name", ["Gemma 2", "Gemma 3", "gpt-oss", "Llama 4", "Qwen2", "SmolLM3"])
def test_calibrate_check_and_evaluate(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = write_kind(tmp_path / "model", name), tmp_path / "out"
    search = ("--samples", "1", "--trials", "2", "--patience", "1", "--grouping", "off", "--no-random-baseline")
    options = ("--model", str(model), "--output", str(output), "--target-bits", "5", *search, *DATA)
    assert run(["calibrate", *options]) == 0
    file = output / "model-5.00bit.json"
    profile = load(file)
    assert list(map(str, profile.model.kinds)) == kinds_of(name)
    assert profile.storage.effective_bits <= 5
    assert run(["check", str(file), "--model", str(model)]) == 0
    capsys.readouterr()
    plain = ("--uniform", "8-g16-asym/8-g16-asym", "--json", "--samples", "1")
    assert run(["evaluate", "--model", str(model), "--profile", str(file), *plain, *DATA]) == 0
    found = json.loads(capsys.readouterr().out)
    losses = [setting["loss"] for setting in found]
    assert all(loss > 0 for loss in losses)


def test_sensitivity_measures_what_the_layer_reads(tmp_path: Path) -> None:
    """Against transformers' own function of each layer, over a mask that is written out: windows, chunks, caps, sinks and scales."""
    for name in ("Gemma 2", "gpt-oss", "Llama 4"):
        runner = Runner(load_model(ModelOptions(source=str(write_kind(tmp_path / name, name)), dtype="float32")))
        tokens = torch.randint(3, 8192, (1, 44), generator=torch.Generator().manual_seed(3))  # all queries are measured
        sample, moments = Sample("text", tuple(tokens[0].tolist()), ((1, 44),), is_task=False), Moments()
        scorer = Scorer(runner, [[sample]], observe=moments)
        measured = Sensitivity([StorageClass(16), StorageClass(2, False, 16)], moments, moments.centres())
        scorer.observe(measured, 1, lambda _: None)
        seen: dict[int, tuple[torch.Tensor, ...]] = {}

        def tap(
            layer: int, *given: torch.Tensor, seen: dict[int, tuple[torch.Tensor, ...]] = seen
        ) -> tuple[torch.Tensor, torch.Tensor]:
            seen[layer] = tuple(x.transpose(1, 2) for x in given)
            return given[1], given[2]

        runner.hidden(tokens, tap)
        layers = runner.loaded.model.model.layers
        eager = sys.modules[type(layers[0].self_attn).__module__].eager_attention_forward
        at = torch.arange(44)
        for layer, kind in enumerate(kinds_of(name)):
            mask = at <= at[:, None]
            if kind == f"sliding:{WINDOW}":
                mask &= at > at[:, None] - WINDOW
            elif kind == f"chunked:{CHUNK}":
                mask &= at // CHUNK == at[:, None] // CHUNK
            hidden = torch.zeros(44, 44).masked_fill(~mask, -torch.inf)[None, None]
            module, (query, key, value) = layers[layer].self_attn, seen[layer]
            more = {"softcap": module.attn_logit_softcapping} if name == "Gemma 2" else {}
            (spec,) = [s for s in measured.keys[layer] if not s.raw and not s.centred and not s.rotated]
            with torch.inference_mode():
                stored = as_stored(key.transpose(1, 2), spec).transpose(1, 2)
                exact, wrong = (
                    eager(module, query, k, value, hidden, scaling=module.scaling, **more)[0] for k in (key, stored)
                )
            expected = float((wrong - exact).norm() / exact.norm())
            assert measured.errors(layer)[spec, RAW].e_o == pytest.approx(expected, rel=1e-3)


def test_rows_outside_of_the_window_cost_nothing(tmp_path: Path) -> None:
    """Keys and values that no later query reads may be stored in any way: the last token's state is the same to the bit."""
    runner = Runner(load_model(ModelOptions(source=str(write_kind(tmp_path / "m", "Mistral")), dtype="float32")))
    tokens = torch.randint(3, 8192, (1, 60), generator=torch.Generator().manual_seed(4))
    whole = runner.hidden(tokens)
    reach = 4 * (WINDOW - 1) + 1  # tokens on which the last one depends, over four layers
    for outside in (60 - reach, 60 - reach + 1):

        def tap(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, outside: int = outside
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return key, torch.cat((value[:, :outside] * 0, value[:, outside:]), 1)

        assert torch.equal(runner.hidden(tokens, tap)[:, -1], whole[:, -1]) == (outside == 60 - reach)


def test_a_query_sees_its_window() -> None:
    at = torch.arange(40)
    for kind in ("sliding", "chunked"):
        how = Attends(1.0, LayerKind.parse(f"{kind}:8"))
        for row in range(40):
            seen = how.visible(at[row : row + 1], at)[0].nonzero().flatten().tolist()
            first = max(0, row - 7) if kind == "sliding" else row // 8 * 8
            assert seen == list(range(first, row + 1))
            assert how.first(row) == first
