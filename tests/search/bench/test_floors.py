"""Floors: against hand calculation, against a server that loses no time, and facts of models against their stored weights."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtuner_search.bench.floors import Setup, bounds, floor, floor_of, model_facts
from kvtuner_search.bench.record import Hardware, Model, Shape
from kvtuner_search.errors import DataError
from tests.search.bench.ideal_server import BF16, H200, QWEN, RTX_4090, record, serve, setup

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = ROOT / "kvtuner_search" / "models" / "reference"
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
EXACT = 1 + 1e-9


def shape(n: int, tokens: int = 1, at_once: int = 1, requests: int | None = None) -> Shape:
    return Shape(requests=requests or at_once, concurrency=at_once, input_tokens=n, output_tokens=tokens)


def test_first_token_of_ten_reads_the_weights_once() -> None:
    """By hand: 7.07 G weights of 2 bytes over two tensor ranks; stages follow each other; four chips of 130 MB keep some."""
    weights = 2 * (28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944) + 3584 * 152064)
    floor = floor_of(setup(RTX_4090, 2, 2), shape(10))
    assert floor.ttft == pytest.approx(1e3 * (weights - 4 * 0.13e9) / (2 * 1008e9 * 1.03))
    assert floor.ttft == floor.latency == pytest.approx(6.56, abs=0.005)
    assert floor.bound.startswith(
        "first token: reading 14.1 GB of weights, less 0.52 GB kept on chip, at 2 x 1008 GB/s + 3%;"
    )


def test_first_token_of_a_thousand_needs_their_multiplications_on_all_devices() -> None:
    """By hand: two operations a multiply-add; the output embedding for one token; attention of each token to those before it and itself."""
    head = 3584 * 152064
    operations = 2 * (1000 * (QWEN.multiplications - head) + head) + 4 * 28 * 28 * 128 * 1000 * 1001 / 2
    floor = floor_of(setup(RTX_4090, 2, 2), shape(1000))
    assert floor.ttft == pytest.approx(1e3 * operations / (4 * 165.2e12 * 1.35))
    assert "13.3 T operations at 4 x 165.2 TFLOP/s + 35%" in floor.bound


def test_more_stages_shorten_no_token() -> None:
    one, two = (floor_of(setup(H200, 1, stages), shape(100, 100)) for stages in (1, 2))
    kept = 1e3 * H200.on_chip / (4.8e12 * 1.03)  # by the second chip
    assert two.per_token == pytest.approx(one.per_token - kept)
    assert floor_of(setup(H200, 2, 1), shape(100, 100)).per_token == pytest.approx(one.per_token / 2, rel=0.01)


def test_measured_decode_lies_above_its_floor_and_not_far() -> None:
    """docs/serving.md: 64 requests of 16k on one H200, K4V4, 8.92 ms a step. Prompts are made to cost nothing here."""
    free = H200.model_copy(update={"flops": 1e20})
    step = 64 * bounds(setup(free, cache_bytes=15232), shape(16384, 17, 64)).request / 17
    assert 0.6 * 8.92e-3 < step < 8.92e-3


@st.composite
def cells(draw: st.DrawFn) -> tuple[Setup, Shape, list[int]]:
    tp, pp = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 4))
    ratio = draw(st.sampled_from([1.0, 30.0, 400.0, 1e6]))  # operations a byte: which of the two binds
    on_chip = draw(st.sampled_from([0, 10**6, 10**9]))  # none, little, and more than the weights
    model = Model(
        name="drawn",
        layers=4,
        hidden_size=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocabulary=draw(st.sampled_from([64, 4096])),
        weight_bytes=draw(st.sampled_from([10**6, 10**8])),
        multiplications=draw(st.sampled_from([10**6, 10**8])),
        dummy_weights=False,
        whole_context=draw(st.booleans()),
    )
    hardware = Hardware(name="drawn", count=tp * pp, bandwidth=1e9, flops=1e9 * ratio, on_chip=on_chip, source="drawn")
    s = Setup(model, hardware, tp, pp, draw(st.sampled_from([1, 10**4, 10**6])), draw(st.sampled_from([1, 1, 3])))
    n, count = draw(st.integers(1, 60)), draw(st.sampled_from([1, 2, 7, 24]))
    cached = draw(st.lists(st.integers(0, n - 1), min_size=count, max_size=count))
    return s, shape(n, draw(st.sampled_from([1, 2, 12, 40])), draw(st.sampled_from([1, 3, 24])), count), cached


@given(cells())
@settings(deadline=None, max_examples=300)
def test_no_server_beats_a_floor(drawn: tuple[Setup, Shape, list[int]]) -> None:
    """Whatever binds, and however hits of the prefix cache are spread: the ideal server stays at or above every floor."""
    s, asked, cached = drawn
    done = serve(s, asked, cached)
    b = bounds(s, asked, sum(cached))
    assert len(done) == asked.requests
    for request in done:
        # A difference of two times is exact to the last digit of the times, not of itself.
        assert b.ttft <= (request.first - request.sent) * EXACT + 1e-12
        assert b.ttft + b.decode <= (request.last - request.sent) * EXACT + 1e-12
        assert b.decode <= (request.last - request.first) * EXACT + 1e-12
    assert asked.requests * b.request <= max(request.last for request in done) * EXACT


@pytest.mark.parametrize(("n", "tokens"), [(1, 1), (10, 1), (2000, 1), (100, 50), (4000, 200)])
@pytest.mark.parametrize("tp", [1, 2])
def test_an_ideal_server_reaches_the_floors_of_one_request(n: int, tokens: int, tp: int) -> None:
    """So the floors are not merely low: time without loss is exactly theirs, up to the one step where reading stops to bind."""
    s = setup(tp=tp)
    [done] = serve(s, shape(n, tokens))
    floor = floor_of(s, shape(n, tokens))
    assert 1e3 * (done.first - done.sent) == pytest.approx(floor.ttft)
    assert 1e3 * (done.last - done.sent) == pytest.approx(floor.latency)
    assert tokens / done.last == pytest.approx(floor.output_tokens_per_second)


@pytest.mark.parametrize("at_once", [8, 64, 256])
def test_an_ideal_server_comes_near_the_greatest_throughput(at_once: int) -> None:
    s, asked = setup(), shape(500, 200, at_once)
    seconds = max(request.last for request in serve(s, asked))
    most = floor_of(s, asked).output_tokens_per_second
    assert 0.6 * most < asked.requests * asked.output_tokens / seconds <= most * EXACT


def test_several_copies_of_the_model_answer_more_but_no_sooner() -> None:
    one = setup()
    two = replace(one, hardware=one.hardware.model_copy(update={"count": 2}))
    asked = shape(2000, 100, 512)
    assert floor_of(two, asked).latency == floor_of(one, asked).latency
    assert floor_of(two, asked).requests_per_second == pytest.approx(2 * floor_of(one, asked).requests_per_second)


def test_hits_lower_floors_and_speculation_divides_steps() -> None:
    asked = shape(4000, 101)
    whole, hit, drafted = (
        floor_of(setup(), asked),
        floor_of(setup(), asked, 3999),
        floor_of(setup(draft_tokens=5), asked),
    )
    assert hit.ttft == floor_of(setup(), shape(10)).ttft
    assert hit.ttft < whole.ttft
    assert hit.per_token == whole.per_token == pytest.approx(5 * drafted.per_token, rel=1e-3)


@pytest.mark.parametrize(
    ("dtype", "quantization", "factor"), [("bfloat16", None, 1), ("float16", None, 2), ("bfloat16", "fp8", 4)]
)
def test_faster_data_types_lower_what_arithmetic_binds(dtype: str, quantization: str | None, factor: int) -> None:
    served = record([], setup()).served.model_copy(update={"dtype": dtype, "quantization": quantization})
    found, plain = floor(QWEN, served, BF16, H200, shape(16000)), floor_of(setup(), shape(16000))
    assert found.ttft == pytest.approx(plain.ttft / factor)


def test_facts_of_the_reference_model_are_those_of_its_stored_weights() -> None:
    """Everything in the files but norms and biases; the embedding is tied and read as the output's."""
    config = json.loads((REFERENCE / "config.json").read_text())
    stored = json.loads((REFERENCE / "model.safetensors.index.json").read_text())["metadata"]["total_parameters"]
    norms, biases = (2 * 16 + 1) * 256, 16 * (256 + 2 * 128)
    model = model_facts(config, name="reference", dtype="bfloat16")
    assert model.multiplications == stored - norms - biases
    assert model.weight_bytes == 2 * model.multiplications
    assert model.whole_context


def test_facts_of_qwen() -> None:
    assert model_facts(CONFIG, name="Qwen2.5-7B", dtype="bfloat16", dummy=True) == QWEN
    assert model_facts(CONFIG, name="q", dtype="float32").weight_bytes == 2 * QWEN.weight_bytes


@pytest.mark.parametrize(
    ("quantization", "config", "bits"),
    [
        ("fp8", None, 8),
        ("w8a8_int8", None, 8),
        ("modelopt_fp4", None, 4),
        ("gguf", None, 1),
        ("awq", {"quant_method": "awq", "bits": 4}, 4),
        (None, {"quant_method": "gptq", "bits": 3}, 3),
        (None, {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4}}}}, 4),
        (None, {"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
    ],
)  # fmt: skip
def test_quantized_weights_take_the_least_bits_that_are_named(
    quantization: str | None, config: dict[str, Any] | None, bits: int
) -> None:
    content = CONFIG if config is None else CONFIG | {"quantization_config": config}
    model = model_facts(content, name="q", dtype="bfloat16", quantization=quantization)
    assert model.weight_bytes == QWEN.multiplications * bits // 8


def test_of_a_mixture_the_visited_experts_count() -> None:
    config = CONFIG | {
        "model_type": "qwen3_moe",
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "num_experts": 128,
    }
    dense = model_facts(CONFIG, name="q", dtype="bfloat16").multiplications
    found = model_facts(config | {"mlp_only_layers": [0]}, name="q", dtype="bfloat16").multiplications
    assert found == dense - 27 * 3 * 3584 * (18944 - 8 * 768)
    mixtral = CONFIG | {"model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8}
    assert model_facts(mixtral, name="q", dtype="bfloat16").multiplications == dense + 28 * 3 * 3584 * 18944


@pytest.mark.parametrize(
    ("changes", "whole"),
    [
        ({"sliding_window": 4096, "use_sliding_window": False}, True),
        ({"sliding_window": 4096}, False),
        ({"layer_types": ["full_attention"] * 28, "sliding_window": 4096}, True),
        ({"layer_types": ["full_attention", "sliding_attention"] * 14}, False),
        ({"attention_chunk_size": 8192}, False),
    ],
)
def test_windows_leave_the_cache_out(changes: dict[str, Any], whole: bool) -> None:
    model = model_facts(CONFIG | changes, name="q", dtype="bfloat16")
    assert model.whole_context is whole
    s = setup(model=model)
    assert (bounds(s, shape(30000, 2)).decode > bounds(s, shape(10, 2)).decode) is whole
    assert (s.prompt_operations(1, 1e9) > s.prompt_operations(1, 0)) is whole


def test_of_an_unknown_class_the_output_embedding_counts_only() -> None:
    model = model_facts(CONFIG | {"model_type": "jamba"}, name="j", dtype="bfloat16")
    assert (model.multiplications, model.whole_context) == (3584 * 152064, False)
    assert 0 < floor_of(setup(model=model), shape(100, 10)).ttft < floor_of(setup(), shape(100, 10)).ttft


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [None, 0, -1, "3584", True, 2**40])
def test_a_field_that_cannot_be_is_named(field: str, value: object) -> None:
    with pytest.raises(DataError, match=field.removeprefix("num_hidden_").removesuffix("_size")):
        model_facts(CONFIG | {field: value}, name="q", dtype="bfloat16")


def test_median_of_an_ideal_run_is_what_the_judge_compares() -> None:
    """The median time per token at some concurrency is no less than the floor of a request alone."""
    s, asked = setup(), shape(200, 20, 16, 64)
    done = serve(s, asked)
    median = statistics.median((request.last - request.first) / 19 for request in done)
    assert 1e3 * median >= floor_of(s, asked).per_token
