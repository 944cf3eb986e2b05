"""Limits that no server can beat on given hardware: least TTFT, time per token and latency, greatest throughput. Pure Python, no torch.

Only unavoidable work counts: the weights and the cache are read from memory, and the multiplications are done. Communication, launches,
sampling, scheduling and the network take more, so a correct server stays well above; docs/bench-floors.md derives every formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from kvtuner_search.bench.record import Cache, Floor, Hardware, Model, Served, Shape
from kvtuner_search.errors import DataError
from kvtuner_search.profile.model_config import model_info, text_config

# Data sheets round down. A floor that is never too high allows for it.
BANDWIDTH_HEADROOM: Final = 1.03  # H200: 4.8 TB/s on the data sheet, 4.92 by its bus of 6144 bits at 3.2 GHz
# Data types whose multiplications are faster than the dense bf16 rate with fp32 accumulation.
_QUANTIZED_RATE: Final = 4.0  # fp4 on Blackwell, int4 on Ampere; fp8 and int8 are twice as fast
_FLOAT16_RATE: Final = 2.0  # fp16 accumulation on GeForce

# Decoders with grouped-query attention and a gated MLP of three matrices, in which every weight except the input embedding is read for every token.
_DENSE: Final = ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
_MIXTURE: Final = ("mixtral", "qwen2_moe", "qwen3_moe")  # the same with experts


@dataclass(frozen=True)
class Setup:
    """Everything except the requests that a floor depends on."""

    model: Model
    hardware: Hardware
    tensor_parallel: int
    pipeline_parallel: int
    cache_bytes: int  # of one token, over all layers and ranks
    draft_tokens: int = 1  # most tokens that one step yields for a request
    rate: float = 1.0  # of multiplications, over the dense bf16 rate

    @classmethod
    def of(cls, model: Model, served: Served, cache: Cache, hardware: Hardware) -> Setup:
        """The setup that a record describes."""
        quantized = _QUANTIZED_RATE if served.quantization else 1.0
        return cls(
            model,
            hardware,
            served.tensor_parallel,
            served.pipeline_parallel,
            cache.bytes_per_token,
            served.draft_tokens,
            max(quantized, _FLOAT16_RATE if served.dtype == "float16" else 1.0),
        )

    @property
    def ranks(self) -> int:
        """Devices that hold the model once."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def devices(self) -> int:
        """All devices: more than ranks where the model is served several times over."""
        return max(self.ranks, self.hardware.count)

    @property
    def bandwidth(self) -> float:
        """Of one device, bytes/s, with headroom."""
        return self.hardware.bandwidth * BANDWIDTH_HEADROOM

    @property
    def operations(self) -> float:
        """Of one device, operations/s, at its highest clock."""
        return self.hardware.flops * self.hardware.boost * self.rate

    @property
    def kept(self) -> int:
        """Bytes that the chips of the model's ranks can keep from one step to the next without reading them again."""
        return self.ranks * self.hardware.on_chip

    def pass_seconds(self, cache_rows: float) -> float:
        """Reading the weights and ``cache_rows`` rows of the cache once. Stages run one after the other, so only tensor ranks share it."""
        rows = cache_rows if self.model.whole_context else 0.0
        read = self.model.weight_bytes + rows * self.cache_bytes - self.kept
        return max(0.0, read) / (self.tensor_parallel * self.bandwidth)

    def prompt_operations(self, computed: float, pairs: float) -> float:
        """For a prompt of which ``computed`` tokens are not cache hits; its output embedding is multiplied for the last token only.

        Args:
            computed: tokens.
            pairs: of a query's and a key's token, for attention.
        """
        head = self.model.vocabulary * self.model.hidden_size
        body = max(0, self.model.multiplications - head)
        return 2 * (body * computed + head) + self.attention(pairs)

    def attention(self, pairs: float) -> float:
        """Operations of both of attention's products, over all layers."""
        m = self.model
        return 4.0 * m.layers * m.heads * m.head_dim * pairs if m.whole_context else 0.0


@dataclass(frozen=True)
class Bounds:
    """The figures of record.Floor in seconds, and the limit behind each."""

    ttft: float
    step: float  # one decode step of a request that runs alone, at the length of its prompt
    decode: float  # all tokens after the first
    request: float  # of the server's time for each request, at the cell's concurrency
    ttft_bound: str
    step_bound: str
    request_bound: str


def bounds(setup: Setup, shape: Shape, cached_tokens: int = 0, answered: int | None = None) -> Bounds:
    """The least times of a cell's requests, in seconds.

    Args:
        setup: model, layout and hardware.
        shape: the cell's requests.
        cached_tokens: prompt tokens that the prefix cache had, over all requests that were answered.
        answered: requests that were answered; None: all.
    """
    n, tokens = shape.input_tokens, shape.output_tokens
    answered = shape.requests if answered is None else max(1, answered)
    most_cached = min(cached_tokens, n - 1)  # of one request; a server computes at least the last token
    mean_cached = min(cached_tokens / answered, n - 1.0)

    # One request, alone, with as many cache hits as one request can have.
    computed = n - most_cached
    prompt = setup.prompt_operations(computed, computed * most_cached + computed * (computed + 1) / 2)
    read, work = setup.pass_seconds(0), prompt / (setup.ranks * setup.operations)
    ttft = max(read, work)
    ttft_bound = _reading(setup, 0) if read >= work else _computing(setup, prompt, setup.ranks)

    steps = math.ceil((tokens - 1) / setup.draft_tokens)
    decode = _decode(setup, n, steps)
    step = _decode(setup, n, 1)

    # All requests: the greatest of three lower bounds on the server's time for each.
    running = min(shape.requests, shape.concurrency)
    latency = (ttft + decode) / running  # Little's law
    generated = (tokens - 1) * (2 * setup.model.multiplications) + setup.attention((tokens - 1) * (n + tokens / 2))
    # For a given number of hits, prompts need least attention if some hit entirely and the others not at all.
    operations = setup.prompt_operations(n - mean_cached, (n - mean_cached) * (n + 1) / 2) + generated
    arithmetic = operations / (setup.devices * setup.operations)
    memory = _traffic(setup, running, n - mean_cached, steps) / (setup.devices * setup.bandwidth)
    request = max(latency, arithmetic, memory)
    if request == latency:
        binds = f"a request takes {number(1e3 * (ttft + decode))} ms, and {running} {'run' if running > 1 else 'runs'} at a time"
    elif request == arithmetic:
        binds = f"{_computing(setup, operations, setup.devices)} for each request"
    else:
        binds = f"reading weights and cache at {_rate(setup, setup.devices)}, {running} requests in a step"
    step_bound = _reading(setup, n)
    if setup.draft_tokens > 1:
        step_bound += f", for up to {setup.draft_tokens} tokens a step"
    return Bounds(ttft, step, decode, request, ttft_bound, step_bound, binds)


def floor(
    model: Model,
    served: Served,
    cache: Cache,
    hardware: Hardware,
    shape: Shape,
    cached_tokens: int = 0,
    answered: int | None = None,
) -> Floor:
    """The floors of a cell: no correctly measured figure is below its times or above its rates.

    Args:
        model: bytes read and multiplications for a token.
        served: tensor and pipeline ranks, speculative decoding, dtype and quantization.
        cache: bytes of a token.
        hardware: capabilities of the devices.
        shape: the cell's requests.
        cached_tokens: prompt tokens that the prefix cache had, over all requests that were answered.
        answered: requests that were answered; None: all.
    """
    return floor_of(Setup.of(model, served, cache, hardware), shape, cached_tokens, answered)


def floor_of(setup: Setup, shape: Shape, cached_tokens: int = 0, answered: int | None = None) -> Floor:
    """The same for a setup."""
    b = bounds(setup, shape, cached_tokens, answered)
    later = shape.output_tokens - 1
    return Floor(
        ttft=1e3 * b.ttft,
        per_token=1e3 * (b.decode / later if later else b.step / setup.draft_tokens),
        latency=1e3 * (b.ttft + b.decode),
        output_tokens_per_second=shape.output_tokens / b.request,
        requests_per_second=1 / b.request,
        bound=f"first token: {b.ttft_bound}; each step: {b.step_bound}; throughput: {b.request_bound}",
    )


def _decode(setup: Setup, prompt_tokens: int, steps: int) -> float:
    """Seconds of a request's decode steps, running alone. Step i reads the cache's ``prompt_tokens + i`` rows at least, i from 0."""
    if steps == 0:
        return 0.0
    rows = prompt_tokens + (steps - 1) / 2  # on average
    work = 2 * setup.model.multiplications + setup.attention(rows + 1)
    return steps * max(setup.pass_seconds(rows), work / (setup.tensor_parallel * setup.operations))


def _traffic(setup: Setup, running: int, own_rows: float, steps: int) -> float:
    """Bytes that all devices read for one request: its share of the weights, and its own rows of the cache at every decode step.

    Rows of a common prefix are left out, because a kernel may read them once for all. If the chips could keep all weights, this gives no bound.
    """
    weights = setup.model.weight_bytes - setup.kept
    if weights <= 0:
        return 0.0
    rows = steps * (own_rows + (steps - 1) / 2) if setup.model.whole_context else 0.0
    return (1 + steps) * weights / running + rows * setup.cache_bytes


def _reading(setup: Setup, rows: int) -> str:
    text = f"reading {_bytes(setup.model.weight_bytes)} of weights"
    if rows and setup.model.whole_context:
        text += f" and {_bytes(rows * setup.cache_bytes)} of cache"
    if setup.kept:
        text += f", less {_bytes(setup.kept)} kept on chip,"
    return f"{text} at {_rate(setup, setup.tensor_parallel)}"


def _computing(setup: Setup, operations: float, devices: int) -> str:
    rate = setup.hardware.flops * setup.rate / 1e12
    return f"{operations / 1e12:.3g} T operations at {devices} x {rate:.4g} TFLOP/s + {setup.hardware.boost - 1:.0%}"


def _rate(setup: Setup, devices: int) -> str:
    return f"{devices} x {setup.hardware.bandwidth / 1e9:.4g} GB/s + {BANDWIDTH_HEADROOM - 1:.0%}"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def number(value: float) -> str:
    """Three digits, or all before the point: ``6.56``, ``3,281``."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def model_facts(
    config: dict[str, Any], *, name: str, dtype: str, quantization: str | None = None, dummy: bool = False
) -> Model:
    """The facts about a model that floors need, from its config.json. Biases and norms are left out; for a mixture only the experts that a token visits count.

    For an unknown class only the output embedding counts, and the cache does not: the floors are low, but true.

    Args:
        config: content of config.json.
        name: the model's name in messages.
        dtype: of the weights as served, e.g. bfloat16.
        quantization: of the weights as served, e.g. fp8 or awq; also read from config.
        dummy: random weights.

    Raises:
        DataError: if a field is missing or out of range.
    """
    text = text_config(config)
    info = model_info(config, f"config.json of {name}", name)
    hidden, vocabulary = _count(text, "hidden_size", name), _count(text, "vocab_size", name)
    head = hidden * vocabulary
    kind = text.get("model_type")
    known = kind in _DENSE or kind in _MIXTURE
    weights = head
    if known:
        attention = 2 * hidden * info.head_dim * (info.num_attention_heads + info.num_kv_heads)
        weights += info.num_layers * attention + sum(
            3 * hidden * width for width in _widths(text, info.num_layers, name)
        )
    return Model(
        name=name,
        layers=info.num_layers,
        hidden_size=hidden,
        heads=info.num_attention_heads,
        kv_heads=info.num_kv_heads,
        head_dim=info.head_dim,
        vocabulary=vocabulary,
        weight_bytes=max(1, weights * _bits(config, dtype, quantization) // 8),
        multiplications=weights,
        dummy_weights=dummy,
        whole_context=known and not _windowed(text),
    )


def _widths(text: dict[str, Any], layers: int, name: str) -> list[int]:
    """Of each layer: the channels inside the MLP that a token passes, over all experts that it visits."""
    kind = text["model_type"]
    if kind in _DENSE:
        return layers * [_count(text, "intermediate_size", name)]
    visited = _count(text, "num_experts_per_tok", name)
    if kind == "mixtral":
        return layers * [visited * _count(text, "intermediate_size", name)]
    experts = visited * _count(text, "moe_intermediate_size", name)
    if kind == "qwen2_moe":
        experts += _count(text, "shared_expert_intermediate_size", name)
    period, dense = text.get("decoder_sparse_step") or 1, text.get("mlp_only_layers") or ()
    return [
        _count(text, "intermediate_size", name) if index in dense or (index + 1) % period else experts
        for index in range(layers)
    ]


def _bits(config: dict[str, Any], dtype: str, quantization: str | None) -> int:
    """Least bits of a stored weight. A quantization that names no bits may have as little as one."""
    stored = config.get("quantization_config") or text_config(config).get("quantization_config")
    method = quantization or (stored.get("quant_method") if isinstance(stored, dict) else None)
    if not method:
        return 32 if dtype == "float32" else 16
    named = _named_bits(stored)
    if named:
        return min(named)
    eight = any(part in str(method) for part in ("fp8", "int8")) and not str(method).startswith("w4")
    return 8 if eight else 4 if "fp4" in str(method) else 1


def _named_bits(part: object) -> list[int]:
    """Every bit-width that a quantization_config names, of weights or activations."""
    if isinstance(part, list):
        return [bits for item in part for bits in _named_bits(item)]
    if not isinstance(part, dict):
        return []
    own = [value for key in ("bits", "num_bits", "w_bit") if type(value := part.get(key)) is int and 0 < value <= 16]
    return own + [bits for value in part.values() for bits in _named_bits(value)]


def _windowed(text: dict[str, Any]) -> bool:
    """Whether some layer attends to less than the whole context."""
    types = text.get("layer_types")
    if isinstance(types, list) and types:
        return set(map(str, types)) != {"full_attention"}
    if text.get("attention_chunk_size") is not None:
        return True
    return text.get("sliding_window") is not None and text.get("use_sliding_window") is not False


def _count(text: dict[str, Any], field: str, name: str) -> int:
    value = text.get(field)
    if type(value) is not int or not 0 < value <= 2**31:
        raise DataError(f"config.json of {name}: {field}={value!r} is not a positive integer: so it has no floor")
    return value
