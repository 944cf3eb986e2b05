"""The record of one benchmark run: what was measured, on what, and whether it can be believed. Neither torch nor SGLang is imported here.

Speed is only kept beside a correctness check of the same run that passed, and a figure under its physical floor is a violation, not a result.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from kvtuner_search.profile.fields import Count, Digest, Measure, Name, Number, Positive, Strict

FORMAT: Final = "kvtuner-bench"
VERSION: Final = 1

Section = Literal["ttft", "throughput", "long", "batch", "memory"]
SECTIONS: Final[tuple[Section, ...]] = ("ttft", "throughput", "long", "batch", "memory")
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=2048)]
Large = Annotated[int, Field(ge=1, le=2**53)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Hardware(Strict):
    """What the server runs on, as far as the floors depend on it."""

    name: Name
    """Name of one device, e.g. NVIDIA H200, or of the processor."""
    count: Positive
    """Devices that the server uses: tensor x pipeline ranks."""
    bandwidth: Rate
    """Greatest memory bandwidth of one device, bytes/s."""
    flops: Rate
    """Greatest dense 16-bit rate of one device, operations/s (a multiply-add is two)."""
    memory: Count | None = None
    """Memory of one device, bytes."""
    on_chip: Count = 0
    """Caches, shared memory and registers of one device, bytes: what they keep from step to step need not be read again."""
    boost: Annotated[float, Field(ge=1, le=4)] = 1.35
    """How far the clock can rise above the one that `flops` is stated at."""
    source: Text
    """Where bandwidth and rate are from: a data sheet, or `given`."""


class Environment(Strict):
    """On what, and with which versions."""

    hardware: Hardware | None
    """None: unknown, so no floor could be drawn; the record says so."""
    client: Text
    """Processor and cores of the machine that sent the requests."""
    versions: dict[Name, Name]
    """Package -> version: at least sglang (the server's own account) and kvtuner-search."""

    @model_validator(mode="after")
    def _versioned(self) -> Self:
        missing = [name for name in ("sglang", "kvtuner-search") if name not in self.versions]
        if missing:
            raise ValueError(f"no version of {' and '.join(missing)}: a figure belongs to the versions that gave it")
        return self


class Model(Strict):
    """What the floors need to know of the model."""

    name: Name
    """Name, without folders."""
    layers: Positive
    """Decoder layers."""
    hidden_size: Positive
    """Channels of the residual stream."""
    heads: Positive
    """Query heads."""
    kv_heads: Positive
    """Key-value heads."""
    head_dim: Positive
    """Channels of a head."""
    vocabulary: Positive
    """Entries of the output embedding."""
    weight_bytes: Large
    """Bytes of weights that one decode step reads, over all ranks: everything but the input embedding's unused rows."""
    multiplications: Large
    """Multiply-adds of one token outside attention, over all ranks."""
    whole_context: bool = True
    """Every layer attends to the whole context; False for sliding windows and the like: the floors then leave attention and cache out."""
    dummy_weights: bool
    """Random weights (`--load-format dummy`): speed means something, answers do not."""


class Served(Strict):
    """The server, by its own account."""

    version: Name
    """SGLang's version."""
    arguments: list[Text]
    """What it was started with; paths cut to their last part. Empty for a server that was pointed at."""
    started: bool
    """Started by this run, or pointed at."""
    attention_backend: Name
    """SGLang's attention backend."""
    dtype: Name
    """Dtype of the model."""
    quantization: Name | None
    """Of weights."""
    tensor_parallel: Positive
    """Ranks that share the heads."""
    pipeline_parallel: Positive
    """Stages that share the layers."""
    nodes: Positive
    """Machines, or launchers that stand for them."""
    page_size: Positive
    """Tokens of a page of the cache."""
    prefix_cache: bool
    """Whether the radix cache is on."""
    speculative: Name | None
    """Algorithm of speculative decoding."""
    draft_tokens: Positive
    """Most tokens that one step can yield for a request; 1 without speculative decoding."""
    token_capacity: Positive
    """Tokens that the KV cache holds."""
    cache_gib: Amount | None = None
    """Memory of the first rank's cache, GiB, by its own account."""


class Cache(Strict):
    """How the KV cache is stored. Mandatory, also for a 16-bit cache."""

    profile: Name
    """Name of the profile; `16-bit` for a stock server."""
    digest: Digest | None
    """Digest of the profile; None only for a stock server, whose cache is 16-bit."""
    effective_bits: Annotated[float, Field(gt=0, le=32)]
    """Bits of a stored number, everything counted."""
    bytes_per_token: Positive
    """Of all layers and ranks."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.digest is None) != (self.profile == "16-bit"):
            raise ValueError(
                f"profile {self.profile} with digest {self.digest}: a profile needs its digest, and only 16-bit has none"
            )
        return self


class Check(Strict):
    """One thing that had to hold before any speed was believed."""

    name: Name
    """E.g. answers, counting, profile, likelihood."""
    passed: bool
    """Whether it held."""
    detail: Text
    """What was seen."""


class Summary(Strict):
    """Percentiles of one quantity over the requests that succeeded; linear interpolation between order statistics."""

    samples: Positive
    """Requests (or gaps between tokens) behind the figures."""
    mean: Amount
    """Arithmetic mean."""
    minimum: Amount
    """Least."""
    p50: Amount
    """Median."""
    p90: Amount
    """90th percentile."""
    p99: Amount
    """99th percentile; with fewer than 100 samples this is near the greatest."""
    maximum: Amount
    """Greatest."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        order = (self.minimum, self.p50, self.p90, self.p99, self.maximum)
        inside = self.minimum * (1 - 1e-9) <= self.mean <= self.maximum * (1 + 1e-9)  # a mean is rounded
        if list(order) != sorted(order) or not inside:
            raise ValueError(f"mean {self.mean:g} and percentiles {order} are of no one sample")
        return self


class Speed(Strict):
    """What the clock said. Milliseconds, and tokens that came back."""

    seconds: Amount
    """From the first request sent to the last token received."""
    ttft: Summary | None
    """Time to the first token, ms; None without streaming."""
    per_token: Summary | None
    """(latency - ttft) / (tokens - 1) of each request, ms; None where no request returned two tokens."""
    inter_token: Summary | None = None
    """Each gap between two tokens of a request, ms; tokens that came together share the wait. Samples are gaps. None where none was kept."""
    latency: Summary
    """From sending a request to its last token, ms."""
    requests_per_second: Amount
    """Requests that succeeded / seconds."""
    input_tokens_per_second: Amount
    """Prompt tokens of requests that succeeded / seconds."""
    output_tokens_per_second: Amount
    """Tokens returned by requests that succeeded / seconds."""
    client_lag: Amount | None = None
    """By how much the load generator's own event loop was late, ms: median over requests of the mean lag during each. Above its limit the cell is client-bound."""
    client_busy: Amount | None = None
    """Share of a core that the load generator's event loop used, weighted by latency; of each process if there were several."""


class Floor(Strict):
    """What the hardware cannot do better than, for the requests of a cell. docs/bench-floors.md derives it."""

    ttft: Amount
    """Least time to the first token, ms."""
    per_token: Amount
    """Least time of one more token of a request, ms, as if it ran alone: towards a cell's end it may."""
    latency: Amount
    """Least latency of a request, ms."""
    output_tokens_per_second: Amount
    """Greatest throughput."""
    requests_per_second: Amount
    """Greatest rate."""
    bound: Text
    """What binds, in words: e.g. reading 14.1 GB of weights at 4.8 TB/s."""


class Violation(Strict):
    """A figure that cannot be, or an answer that is not what was asked for."""

    rule: Name
    """Id of the rule, e.g. below-floor, http-status, no-tokens, miscounted, stalled, dropped, cached."""
    where: Text
    """Section and cell."""
    figure: Text
    """What was reported, with its unit."""
    reason: Text
    """Why it cannot be, and what usually causes it."""


class Shape(Strict):
    """What a cell asked for."""

    requests: Positive
    """Requests, warm-up excluded."""
    concurrency: Positive
    """Most in flight."""
    input_tokens: Positive
    """Of each prompt."""
    output_tokens: Positive
    """Of each answer."""


class Reading(Strict):
    """State of an idle server whose prefix cache was flushed."""

    free_tokens: Count | None
    """Slots of the cache that no request holds; None where the server does not tell."""
    device_bytes: Count | None
    """Memory in use on the first device; None where it cannot be seen."""


class Cell(Strict):
    """One row of a table."""

    section: Section
    """Its table."""
    shape: Shape
    """What was asked for."""
    succeeded: Count
    """Requests whose answer was whole: status 200, every token that was asked for, ended by length."""
    failures: dict[Name, Positive]
    """Kind -> requests."""
    finish_reasons: dict[Name, Positive]
    """Reason -> requests, as the server gave it."""
    prompt_tokens: Count
    """Tokens of the prompts that succeeded, as the server counted them."""
    returned_tokens: Count
    """Tokens that came back, counted one by one."""
    cached_tokens: Count
    """Prompt tokens that the prefix cache had."""
    speed: Speed | None
    """None where nothing succeeded, or a correctness check of the run failed."""
    floor: Floor | None
    """None where the hardware is unknown."""
    free_tokens: tuple[Count, Count] | None = None
    """Free slots of the cache before and after, prefix cache flushed; memory section."""
    device_bytes: tuple[Count, Count] | None = None
    """Memory in use on the first device before and after; memory section."""
    readings: list[Reading] = []
    """Before the first round and after each; memory section."""

    @property
    def success_rate(self) -> float:
        """Fraction of the requests that succeeded."""
        return self.succeeded / self.shape.requests

    @property
    def title(self) -> str:
        """Section and shape, for messages."""
        s = self.shape
        return f"{self.section} {s.input_tokens} in, {s.output_tokens} out, {s.concurrency} at a time"

    @model_validator(mode="after")
    def _counted(self) -> Self:
        if self.succeeded + sum(self.failures.values()) != self.shape.requests:
            raise ValueError(
                f"{self.title}: {self.succeeded} succeeded and {self.failures} failed of {self.shape.requests}"
            )
        if self.speed is not None and not self.succeeded:
            raise ValueError(f"{self.title}: speed without a request that succeeded")
        return self


class Scrape(Strict):
    """One of the server's own Prometheus series over the run."""

    name: Name
    """Metric with its labels."""
    samples: Positive
    """Readings."""
    minimum: Number
    """Least reading."""
    maximum: Number
    """Greatest reading."""
    last: Number
    """Last reading."""


class Gate(Strict):
    """One service-level objective, judged."""

    name: Name
    """As in `--slo`, e.g. ttft_p99 or throughput.latency_mean; docs/bench-records.md lists them."""
    relation: Literal["at most", "at least"]
    """How the value must lie to the limit."""
    limit: Number
    """What was asked for, in the unit of its name: ms, a fraction, requests/s or tokens/s."""
    value: Number | None
    """The worst cell's (of a peak: the best cell's); None where nothing was measured, which fails."""
    where: Text
    """The cell, or why there is no value."""
    passed: bool
    """Whether it holds."""


class Record(Strict):
    """One run of `bench`. The raw requests lie beside it (bench/files.py)."""

    format: Literal["kvtuner-bench"] = "kvtuner-bench"
    """Says what the file is."""
    version: Literal[1] = 1
    """Of this schema."""
    created: Name
    """UTC, ISO 8601."""
    command: Annotated[str, Field(min_length=1, max_length=4096)]
    """The command, without this machine's folders."""
    preset: Name
    """quick, seed, full, or custom."""
    environment: Environment
    """Mandatory."""
    model: Model
    """What was served."""
    served: Served
    """How."""
    cache: Cache
    """With which cache."""
    correctness: list[Check]
    """At least one; if any failed there is no speed in the record."""
    cells: list[Cell]
    """Tables of the report."""
    quality: list[Measure] = []
    """Offline quality of the same profile, where it was measured or is part of the profile."""
    scrapes: list[Scrape] = []
    """The server's metrics."""
    cross_check: dict[Name, Number] = {}
    """The same load through SGLang's own client: figure -> ours over theirs."""
    gates: list[Gate] = []
    """Service-level objectives."""
    violations: list[Violation] = []
    """Why this is not a result; empty for a good run."""

    @property
    def correct(self) -> bool:
        """Whether every correctness check passed."""
        return all(check.passed for check in self.correctness)

    @property
    def passed(self) -> bool:
        """Correct, physically possible, and within its objectives."""
        return self.correct and not self.violations and all(gate.passed for gate in self.gates)

    @model_validator(mode="after")
    def _no_speed_on_red(self) -> Self:
        if not self.correctness:
            raise ValueError("no correctness check: a record of speed needs one of the same run")
        failed = [check.name for check in self.correctness if not check.passed]
        if failed and any(cell.speed is not None for cell in self.cells):
            raise ValueError(f"speed beside a correctness check that failed ({', '.join(failed)}): leave speed out")
        return self
