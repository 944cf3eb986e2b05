"""The adapter's test report: its figures as data, and which of them cannot be. No torch.

The report names hardware, layout and model, but no prompts or answers for its throughput, batch and memory tables. There the floor is that of
one token in answer to one, so whatever is flagged is impossible for every longer request too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvtuner_search.bench import hardware
from kvtuner_search.bench.floors import Bounds, Setup, bounds, model_facts, number
from kvtuner_search.bench.judge import NO_ANSWER, above, below, whole, with_causes
from kvtuner_search.bench.record import Hardware, Shape, Violation
from kvtuner_search.errors import DataError
from kvtuner_search.profile.canonical import first_error

# config.json of Qwen/Qwen2.5-7B on the Hugging Face hub, as far as floors depend on it.
_QWEN: Final[dict[str, Any]] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
CONFIGS: Final = {"Qwen2.5-7B": _QWEN}
_BITS: Final = {"fp16": 16, "kv8": 8, "kv4": 4, "kv2": 2}  # of memory_estimates_gb
_LINEAR: Final = 0.1  # how far slopes of memory over bits may differ: scales and minima, and rounding to whole GB

Time = Annotated[float, Field(gt=0, allow_inf_nan=False)]  # ms
Size = Annotated[int, Field(ge=1, le=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Gpus(_Part):
    """Its hardware."""

    gpus: Size
    gpu: Annotated[str, Field(min_length=1, max_length=200)]
    nodes: Size = 1


class Parallel(_Part):
    """Tensor and pipeline ranks."""

    tp: Size
    pp: Size


class Bits(_Part):
    """Of the cache."""

    key_bits: Annotated[int, Field(ge=1, le=32)]
    value_bits: Annotated[int, Field(ge=1, le=32)]


class Ttft(_Part):
    """A row of the TTFT table, ms."""

    prompt_tokens: Size
    mean: Time
    min: Time
    max: Time


class Throughput(_Part):
    """A row of the concurrency table."""

    concurrency: Size
    req_per_s: Time
    mean_latency_ms: Time
    success: Fraction | None = None


class Long(_Part):
    """A row of the long-sequence grid."""

    input: Size
    output: Size
    latency_ms: Time
    tok_per_s: Time


class Batch(_Part):
    """A row of the batch table."""

    batch: Size
    total_ms: Time
    mean_latency_ms: Time
    req_per_s: Time
    succeeded: int | None = None


class Used(_Part):
    """Memory of one GPU, MiB."""

    gpu: int
    used: Time
    total: Time


class Stress(_Part):
    """Rounds of long prompts."""

    rounds: Size
    mean_latency_ms: Time
    success: Fraction | None = None
    gpu_memory_mib: Time | None = None
    fluctuation_mib: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class LayoutComparison(_Part):
    """A row of single node against distributed: a number, or a range such as 2.3-3.0."""

    metric: str
    single_tp2: float | str
    tp2_pp2: float | str


class Targets(_Part):
    """Its monitoring targets."""

    ttft_ms_below: Time | None = None
    success_rate_above: Fraction | None = None
    gpu_memory_below: Fraction | None = None


class AdapterReport(_Part):
    """The report. Tables that are missing are empty; what is not listed here is not judged."""

    model: str
    hardware: Gpus
    parallel: Parallel
    quantization: Bits
    ttft_ms: list[Ttft] = []
    throughput: list[Throughput] = []
    long_sequence: list[Long] = []
    batch: list[Batch] = []
    gpu_memory_mib: list[Used] = []
    memory_stress: Stress | None = None
    single_node_vs_distributed: list[LayoutComparison] = []
    memory_estimates_gb: dict[str, Time] = {}
    monitoring_targets: Targets | None = None


@dataclass(frozen=True)
class Verdict:
    """The verdict on a report."""

    violations: list[Violation]  # impossible figures
    remarks: list[str]  # figures that show less than they seem to


def recognise(content: object) -> bool:
    """Whether parsed JSON looks like the adapter's report."""
    return isinstance(content, dict) and "format" not in content and {"hardware", "parallel", "model"} <= content.keys()


def parse(content: object, source: str) -> AdapterReport:
    """The report in parsed JSON; ``source`` is what errors call it.

    Raises:
        DataError: if a field is missing or of another kind.
    """
    try:
        return AdapterReport.model_validate(content)
    except ValidationError as error:
        raise DataError(
            f"{source}: {first_error(error, 'report')}: it is not a test report of this form; restore it"
        ) from error


def setup_of(report: AdapterReport, given: Hardware | None = None, config: dict[str, Any] | None = None) -> Setup:
    """Model, layout and hardware that the report names.

    Args:
        report: the report.
        given: hardware in place of what the table has for the report's GPU.
        config: content of the model's config.json; None: one of CONFIGS, by name.

    Raises:
        DataError: if the model or the GPU is not known.
    """
    config = config or CONFIGS.get(report.model.removesuffix("-Instruct").rpartition("/")[2])
    if config is None:
        raise DataError(f"no shape is known for {report.model!r}: name its config.json with --model")
    machine = given or hardware.find(report.hardware.gpu)
    if machine is None:
        raise DataError(f"no bandwidth and rate are known for {report.hardware.gpu!r}: give them with --hardware")
    model = model_facts(config, name=report.model, dtype="bfloat16")
    bits = report.quantization.key_bits + report.quantization.value_bits  # without scales: the report names none
    return Setup(
        model=model,
        hardware=machine.model_copy(update={"count": report.hardware.gpus}),
        tensor_parallel=report.parallel.tp,
        pipeline_parallel=report.parallel.pp,
        cache_bytes=model.layers * model.kv_heads * model.head_dim * bits // 8,
    )


def judge(report: AdapterReport, setup: Setup) -> Verdict:
    """Every figure that cannot be, and what the others do not show."""
    violations = [
        *_ttft(report.ttft_ms, setup),
        *_throughput(report.throughput, setup),
        *_long(report.long_sequence, setup),
        *_batch(report.batch, setup),
    ]
    least, why = _least(setup)
    if report.memory_stress is not None:
        value = report.memory_stress.mean_latency_ms
        violations += _one(below("memory stress", "latency", value, least, why))
    if report.monitoring_targets is not None and (target := report.monitoring_targets.ttft_ms_below) and target < least:
        text = f"at least {number(least)} ms is needed ({why}): no server on this hardware meets it"
        violations.append(_violation("unreachable", "monitoring targets", f"ttft below {target:g} ms", text))
    violations += _comparison(report, least, why)
    violations += _estimates(report.memory_estimates_gb)
    return Verdict(violations, list(_remarks(report)))


def _one(violation: Violation | None) -> list[Violation]:
    return [] if violation is None else [violation]


def _violation(rule: str, where: str, figure: str, reason: str) -> Violation:
    return Violation(rule=rule, where=where, figure=figure, reason=reason)


def _bounds(setup: Setup, prompt: int, answer: int, at_once: int = 1) -> Bounds:
    return bounds(setup, Shape(requests=at_once, concurrency=at_once, input_tokens=prompt, output_tokens=answer))


def _least(setup: Setup) -> tuple[float, str]:
    """Least time of any answer, ms: one token to a prompt of one."""
    b = _bounds(setup, 1, 1)
    return 1e3 * b.ttft, f"{b.ttft_bound}, for a single token"


def _ttft(rows: Sequence[Ttft], setup: Setup) -> Iterator[Violation]:
    for row in rows:
        b = _bounds(setup, row.prompt_tokens, 1)
        figures = {name: getattr(row, name) for name in ("mean", "min", "max")}
        under = {name: value for name, value in figures.items() if below("", "ttft", value, 1e3 * b.ttft, "")}
        if under:
            found = below(
                f"ttft of {row.prompt_tokens} tokens", "ttft", max(under.values()), 1e3 * b.ttft, b.ttft_bound
            )
            told = ", ".join(f"{name} {value:g}" for name, value in under.items())
            yield from (violation.model_copy(update={"figure": f"ttft {told} ms"}) for violation in _one(found))


def _throughput(rows: Sequence[Throughput], setup: Setup) -> Iterator[Violation]:
    least, why = _least(setup)
    for row in rows:
        where = f"throughput, {row.concurrency} at a time"
        latency = below(where, "latency", row.mean_latency_ms, least, why)
        yield from _one(latency)
        yield from _rate(where, row.req_per_s, row.concurrency, setup, latency)


def _batch(rows: Sequence[Batch], setup: Setup) -> Iterator[Violation]:
    least, why = _least(setup)
    for row in rows:
        where = f"batch of {row.batch}"
        latency = below(where, "latency", row.mean_latency_ms, least, why)
        yield from _one(latency)
        yield from _one(below(f"{where}, total", "latency", row.total_ms, least, why))
        yield from _rate(where, row.req_per_s, row.batch, setup, latency)


def _rate(where: str, rate: float, at_once: int, setup: Setup, latency: Violation | None) -> Iterator[Violation]:
    """A rate of requests: too high by itself, or for the same requests as an impossible latency."""
    b = _bounds(setup, 1, 1, at_once)
    found = above(where, "requests/s", rate, 1 / b.request, b.request_bound)
    if found is None and latency is not None:
        found = _violation(
            "same-requests",
            where,
            f"{rate:,.6g} requests/s",
            f"it counts the same requests as the mean {latency.figure}, which is impossible: what was counted were not answers. By itself the"
            f" rate is possible for answers of one token only, at most {number(1 / b.request)}",
        )
    yield from _one(found)


def _long(rows: Sequence[Long], setup: Setup) -> Iterator[Violation]:
    for row in rows:
        where = f"long sequence, {row.input} in, {row.output} out"
        b = _bounds(setup, row.input, row.output)
        least = b.ttft + b.decode
        yield from _one(below(where, "latency", row.latency_ms, 1e3 * least, whole(b, row.output)))
        took = f"{row.output} tokens take {number(1e3 * least)} ms or more"
        found = above(where, "tokens/s", row.tok_per_s, row.output / least, took)
        requested = 1e3 * row.output / row.latency_ms
        if found is not None and abs(row.tok_per_s / requested - 1) < 0.02:
            told = f"it is the {row.output} requested tokens over {row.latency_ms:g} ms"
            found = found.model_copy(update={"reason": f"{told}; {found.reason}"})
        yield from _one(found)
    for prompt in sorted({row.input for row in rows}):
        grid = sorted((row.output, row.latency_ms) for row in rows if row.input == prompt)
        (few, short), (many, long) = grid[0], grid[-1]
        if many >= 2 * few and long < short * many / few / 2:
            yield _violation(
                "flat-latency",
                f"long sequence, {prompt} in",
                f"{many} tokens in {long:g} ms, {few} in {short:g}",
                with_causes(
                    f"{many / few:.3g} times the tokens take {long / short:.3g} times as long: time that does not grow with the answer is not"
                    " spent on generating it",
                    "tokens/s",
                ),
            )


def _comparison(report: AdapterReport, least: float, why: str) -> Iterator[Violation]:
    """Single node against distributed. A stage less does not shorten a token's path, so one floor holds for both columns."""
    peaks = [row.req_per_s for row in report.throughput]
    for row in report.single_node_vs_distributed:
        for column, value in (("TP=2", row.single_tp2), ("TP=2 x PP=2", row.tp2_pp2)):
            where = f"single node against distributed, {column}"
            numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", str(value))]
            if row.metric == "mean_ttft_ms" and numbers:
                yield from _one(below(where, "ttft", max(numbers), least, why))
            elif row.metric == "peak_req_per_s" and value in peaks:
                said = "it is a row of the throughput table again, whose latencies are impossible"
                yield _violation("same-requests", where, f"{value:g} requests/s", f"{said}: {NO_ANSWER}")


def _estimates(estimates: dict[str, float]) -> Iterator[Violation]:
    """Weights do not depend on the cache's bits, so memory is a constant plus something proportional to them."""
    known = sorted((_BITS[name], gigabytes) for name, gigabytes in estimates.items() if name in _BITS)
    slopes = [(few[0], many[0], (many[1] - few[1]) / (many[0] - few[0])) for few, many in pairwise(known)]
    costs = [cost for _, _, cost in slopes]
    if len(costs) > 1 and max(costs) - min(costs) > _LINEAR * max(costs):
        told = ", ".join(f"{cost:.3g} from {few} to {many} bits" for few, many, cost in slopes)
        yield _violation(
            "not-linear",
            "memory estimates",
            ", ".join(f"{gigabytes:g} GB at {bits} bits" for bits, gigabytes in known),
            f"weights stay as they are, so each bit of the cache costs the same, but here a bit costs {told} (GB): they were not"
            " computed from one model and one number of tokens",
        )


def _remarks(report: AdapterReport) -> Iterator[str]:
    used = {(gpu.used, gpu.total) for gpu in report.gpu_memory_mib}
    for amount, total in sorted(used):
        yield (
            f"gpu memory {amount:g} of {total:g} MiB: {amount / total:.3f} of the device is what a server sets aside when it starts"
            " (--mem-fraction-static), whatever the cache's bits: it shows neither that the cache is packed nor how much of it is in use."
            " Token capacity would"
        )
    if report.memory_stress is not None and used:
        yield "memory stress, fluctuation: reserved memory does not change, so this says nothing about leaks. Free slots would"
    singles = [row for row in report.single_node_vs_distributed if row.metric == "peak_req_per_s"]
    for row in singles:
        yield f"single node, {row.single_tp2} requests/s: neither concurrency nor tokens are given, so it cannot be judged by itself"
    if report.throughput or report.batch:
        yield "throughput and batch: tokens in and out are not given, so the floor is that of one token in answer to one; a row above it is not thereby shown to be true"
