"""Models whose layers are of several kinds: what is refused before a server starts, and how many tokens fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.errors import ServingError
from kvtuner_search.profile.kinds import FULL_KIND, LayerKind
from kvtuner_search.serving.capacity import share_of_windows, stage_bytes
from kvtuner_search.serving.sglang import kinds
from kvtuner_search.serving.sglang.kinds import attended, check_layers, check_pools, pool_ratio
from kvtuner_search.serving.sglang.model import served_model
from tests.search.serving import serve_command
from tests.search.serving.serve_command import Run, folder, plan

command = serve_command.command  # a fixture

GEMMA2: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 8192,
    "sliding_window": 4096, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 64, "rope_theta": 10000.0,
}  # fmt: skip
GPT_OSS = {
    key: value for key, value in GEMMA2.items() if key not in ("attn_logit_softcapping", "query_pre_attn_scalar")
} | {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "sliding_window": 128}
MISTRAL = GEMMA2 | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "attn_logit_softcapping": None}
QWEN2 = MISTRAL | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2,
}  # fmt: skip
COHERE2 = MISTRAL | {"architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2"}
UNIFORM = ["--enable-kvtuner-quant", "--kvtuner-nbits-key", "8", "--kvtuner-nbits-value", "4"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MISTRAL, "layer 0 is sliding:4096 by its config.json, but SGLang's MistralForCausalLM attends to all tokens"),
        (QWEN2, "layer 2 is sliding:4096 by its config.json, but SGLang's Qwen2ForCausalLM attends to all tokens"),
        (COHERE2, "layer 0 is sliding:4096 by its config.json, but SGLang's Cohere2ForCausalLM attends in windows that are one"),
    ],
)  # fmt: skip
def test_classes_that_attend_otherwise_are_refused_before_a_start(
    command: Run, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    model = folder(tmp_path / "model", config)
    code, out, err = command(*UNIFORM, "--model-path", model, "--dry-run")
    assert (code, out) == (2, "")
    assert said in err
    assert "give --context-length 4096 or less" in err
    code, _, _ = command(*UNIFORM, "--model-path", model, "--dry-run", "--context-length", "4096")
    assert code == 0  # the window never acts


def test_one_pool_keeps_every_token(command: Run, tmp_path: Path) -> None:
    model = folder(tmp_path / "gemma2", GEMMA2)
    data = plan(command, *UNIFORM, "--model-path", model)
    assert data["capacity"]["window_tokens_ratio"] is None
    assert data["capacity"]["tokens_per_gib"] == 2**30 // data["stages"][0]["bytes_per_token"]
    _, out, _ = command(*UNIFORM, "--model-path", model, "--dry-run")
    assert "layers 0, 2: sliding:4096, layers 1, 3: full" in out
    assert "keeps every token of these layers too" in out


@pytest.mark.parametrize(("more", "ratio"), [([], 0.8), (["--swa-full-tokens-ratio", "0.25"], 0.25)])
def test_a_pool_of_windows_takes_its_share(command: Run, tmp_path: Path, more: list[str], ratio: float) -> None:
    model = folder(tmp_path / "gpt-oss", GPT_OSS)
    data = plan(command, *UNIFORM, "--model-path", model, *more)
    stage = data["stages"][0]
    cost = stage["bytes_per_token"] - (1 - ratio) * stage["bytes_per_token_windows"]
    assert data["capacity"]["window_tokens_ratio"] == ratio
    assert data["capacity"]["tokens_per_gib"] == int(2**30 // cost)
    _, out, _ = command(*UNIFORM, "--model-path", model, "--dry-run", *more)
    assert f"whose pool has {ratio:g} slots for each slot of the full layers" in out
    data = plan(command, *UNIFORM, "--model-path", model, "--disable-hybrid-swa-memory")
    assert data["capacity"]["tokens_per_gib"] == 2**30 // stage["bytes_per_token"]


def test_an_impossible_ratio(command: Run, tmp_path: Path) -> None:
    model = folder(tmp_path / "gpt-oss", GPT_OSS)
    code, _, err = command(*UNIFORM, "--model-path", model, "--dry-run", "--swa-full-tokens-ratio", "1.5")
    assert (code, "--swa-full-tokens-ratio 1.5: give a fraction above 0, at most 1" in err) == (2, True)


def test_which_models_have_two_pools(tmp_path: Path) -> None:
    gemma, oss = (served_model(str(folder(tmp_path / name, c))) for name, c in (("gemma", GEMMA2), ("oss", GPT_OSS)))
    assert [pool_ratio(model, False, False, None) for model in (gemma, oss)] == [None, 0.8]
    assert pool_ratio(gemma, True, False, 0.5) is None  # SGLang does not let it
    assert pool_ratio(gemma.model_copy(update={"architecture": "AfmoeForCausalLM"}), True, False, 0.5) == 0.5
    assert pool_ratio(oss.model_copy(update={"layer_kinds": None}), False, False, None) is None


def test_stages_know_what_their_windows_take() -> None:
    layers = [LayerSpec(), LayerSpec.parse("4-g64-asym/4-g64-asym"), LayerSpec.parse("8-g64-asym/8-g64-asym")]
    own = [LayerKind("sliding", 128), FULL_KIND, LayerKind("sliding", 128)]
    first, second = stage_bytes(layers, [2, 1], 2, 64, own)
    assert (first.windows, first.windows_raw) == (layers[0].bytes_per_token(2, 64), 512)
    assert (second.windows, second.windows_raw) == (second.stored, 512)
    assert share_of_windows(first.stored, first.windows, 0.5) == first.stored - 256
    assert share_of_windows(first.stored, first.windows, None) == first.stored


class Attention(SimpleNamespace):
    """As much of SGLang's as is compared."""


class Loaded(SimpleNamespace):
    """A model of modules that each hold one attention layer."""


def loaded(sizes: list[int | None], cap: float = 0.0, **more: Any) -> Any:
    return Loaded(
        held=[
            (Attention(layer_id=index, sliding_window_size=size, logit_cap=cap), SimpleNamespace(**more))
            for index, size in enumerate(sizes)
        ]
    )


@pytest.fixture(autouse=True)
def _layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "attention_layers", lambda model: iter(model.held))


WINDOWS = [LayerKind("sliding", 16), FULL_KIND, LayerKind("sliding", 16)]


def test_sglang_counts_a_window_without_the_token_itself() -> None:
    assert [attended(SimpleNamespace(sliding_window_size=n)) for n in (None, -1, 15)] == [
        FULL_KIND, FULL_KIND, LayerKind("sliding", 16),
    ]  # fmt: skip
    assert [WINDOWS[0].within(context) for context in (None, 17, 16)] == [WINDOWS[0], WINDOWS[0], FULL_KIND]


def test_a_model_that_attends_as_the_profile_says() -> None:
    check_layers(loaded([15, -1, 15]), WINDOWS, range(3), 256, None, False)
    check_layers(loaded([None, None, None]), WINDOWS, range(3), 16, None, False)  # no window acts
    check_layers(loaded([15, -1, 15], 50.0, sinks=object()), WINDOWS, range(3), 256, 50.0, True)
    check_layers(loaded([-1]), [FULL_KIND] * 3, range(3), 256, None, False)  # the others' modules are not seen
    check_layers(loaded([8191, -1, -1]), [FULL_KIND] * 3, range(3), 8192, None, False)


@pytest.mark.parametrize(
    ("model", "cap", "sinks", "said"),
    [
        (loaded([-1, -1, 15]), 0, False, "layer 0: SGLang's Loaded attends to all tokens, the profile says sliding:16: give --context-length 16 or less"),
        (loaded([15, 15, 15]), 0, False, "layer 1: SGLang's Loaded attends in a window of 16 tokens, the profile says full: calibrate the model as it is"),
        (loaded([15, -1, 16]), 0, False, "layer 2: SGLang's Loaded attends in a window of 17 tokens, the profile says sliding:16"),
        (loaded([15, -1, 15]), 50, False, r"layer 0: SGLang's Loaded caps its scores at 0, config.json at 50"),
        (loaded([15, -1, 15], 30.0), None, False, r"layer 0: SGLang's Loaded caps its scores at 30, config.json at 0"),
        (loaded([15, -1, 15]), 0, True, "layer 0: SGLang's Loaded has no attention sinks, the profile's model has some"),
        (loaded([15, -1, 15], sinks=object()), 0, False, "layer 0: SGLang's Loaded has attention sinks, the profile's model has none"),
        (loaded([15, -1]), 0, False, "layers 2 of SGLang's Loaded are no modules of the model"),
    ],
)  # fmt: skip
def test_a_layer_that_differs_stops_the_rank(model: Any, cap: float | None, sinks: bool, said: str) -> None:
    with pytest.raises(ServingError, match=said):
        check_layers(model, WINDOWS, range(3), 256, cap, sinks)


def test_chunks_are_no_windows() -> None:
    with pytest.raises(ServingError, match="attends in a window of 16 tokens, the profile says chunked:16"):
        check_layers(loaded([15]), [LayerKind("chunked", 16)], range(1), 256, None, False)


def test_a_pool_that_forgets_what_a_layer_reads() -> None:
    check_pools(loaded([15, -1]), {0: True, 1: False})
    with pytest.raises(ServingError, match="layer 1: SGLang's Loaded attends to all tokens, but its pool forgets"):
        check_pools(loaded([15, -1]), {0: True, 1: True})
    with pytest.raises(ServingError, match=r"layer 0: .* in a window of 16 tokens, but its pool keeps"):
        check_pools(loaded([15, -1]), {0: False, 1: False})
