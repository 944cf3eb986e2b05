"""The record of one benchmark run: measurements, hardware, and validity. Neither torch nor SGLang is imported here.

Speed is kept only with a passed correctness check of the same run, and a figure below its physical floor is a violation, not a result.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from kvtuner_search.profile.fields import Count, Digest, Measure, Name, Number, Positive, Strict
from kvtuner_search.serving.engine import engine_among, engines

FORMAT: Final = "kvtuner-bench"
VERSION: Final = 1
RENAMED: Final = {"seed": "legacy"}  # presets of earlier versions -> what they are called now

Section = Literal["ttft", "throughput", "long", "batch", "memory"]
SECTIONS: Final[tuple[Section, ...]] = ("ttft", "throughput", "long", "batch", "memory")
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=2048)]
Large = Annotated[int, Field(ge=1, le=2**53)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Hardware(Strict):
    """The server's hardware, as far as the floors depend on it."""

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
    """Caches, shared memory and registers of one device, bytes; data kept there from step to step need not be read again."""
    boost: Annotated[float, Field(ge=1, le=4)] = 1.35
    """Highest clock over the one that `flops` is stated at."""
    source: Text
    """Source of bandwidth and rate: a data sheet, or `given`."""


class Environment(Strict):
    """Hardware and versions."""

    hardware: Hardware | None
    """None: unknown, so there are no floors; the record says so."""
    client: Text
    """Processor and cores of the machine that sent the requests."""
    versions: dict[Name, Name]
    """Package -> version: at least kvtuner-search and the engine, e.g. sglang (as the server reports it)."""

    @model_validator(mode="after")
    def _versioned(self) -> Self:
        missing = ["kvtuner-search"] if "kvtuner-search" not in self.versions else []
        if engine_among(self.versions) is None:
            missing = [*engines(), *missing]
        if missing:
            raise ValueError(
                f"no version of {' and '.join(missing)}: a record needs the versions that produced its figures"
            )
        return self


class Model(Strict):
    """The facts about the model that floors need."""

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
    """Bytes of weights that one decode step reads, over all ranks: everything except the input embedding's unused rows."""
    multiplications: Large
    """Multiply-adds of one token outside attention, over all ranks."""
    whole_context: bool = True
    """Every layer attends to the whole context; False for sliding windows and the like: the floors then leave attention and cache out."""
    dummy_weights: bool
    """Random weights (`--load-format dummy`): speed is meaningful, answers are not."""


class Served(Strict):
    """The server, as it reports itself."""

    version: Name
    """The engine's version."""
    arguments: list[Text]
    """Its arguments, with paths cut to their last part. Empty for a server given by its URL."""
    started: bool
    """Whether this run started it; otherwise it was given by its URL."""
    attention_backend: Name
    """The engine's attention backend."""
    dtype: Name
    """Dtype of the model."""
    quantization: Name | None
    """Of weights."""
    tensor_parallel: Positive
    """Ranks that share the heads."""
    pipeline_parallel: Positive
    """Stages that share the layers."""
    nodes: Positive
    """Machines, or launchers that represent them."""
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
    """Memory of the first rank's cache, GiB, as the server reports it."""


class Cache(Strict):
    """How the KV cache is stored. Mandatory, even for a 16-bit cache."""

    profile: Name
    """Name of the profile; `16-bit` for a stock server."""
    digest: Digest | None
    """Digest of the profile; None only for a stock server, whose cache is 16-bit."""
    effective_bits: Annotated[float, Field(gt=0, le=32)]
    """Bits of a stored number, including metadata and padding."""
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
    """A check that had to pass before any speed was measured."""

    name: Name
    """E.g. answers, counting, profile, likelihood."""
    passed: bool
    """Whether it held."""
    detail: Text
    """The observation."""


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
    """99th percentile; with fewer than 100 samples this is close to the maximum."""
    maximum: Amount
    """Greatest."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        order = (self.minimum, self.p50, self.p90, self.p99, self.maximum)
        inside = self.minimum * (1 - 1e-9) <= self.mean <= self.maximum * (1 + 1e-9)  # a mean is rounded
        if list(order) != sorted(order) or not inside:
            raise ValueError(f"mean {self.mean:g} and percentiles {order} cannot come from one sample")
        return self


class Speed(Strict):
    """Measured times in milliseconds, and rates of returned tokens."""

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
    """Lag of the load generator's own event loop, ms: median over requests of the mean lag during each. Above its limit the cell is client-bound."""
    client_busy: Amount | None = None
    """Share of a core that the load generator's event loop used, weighted by latency; of each process if there were several."""


class Floor(Strict):
    """Limits of the hardware for the requests of a cell. docs/bench-floors.md derives them."""

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
    """The binding limits in words, e.g. reading 14.1 GB of weights at 4.8 TB/s."""


class Violation(Strict):
    """An impossible figure, or an answer that is not as requested."""

    rule: Name
    """Id of the rule, e.g. below-floor, http-status, no-tokens, miscounted, stalled, dropped, cached."""
    where: Text
    """Section and cell."""
    figure: Text
    """The reported value, with its unit."""
    reason: Text
    """Why it is impossible, and the usual causes."""


class Shape(Strict):
    """The requests of a cell."""

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
    """Slots of the cache that no request holds; None if the server does not tell."""
    device_bytes: Count | None
    """Memory in use on the first device; None if it cannot be read."""


class Cell(Strict):
    """One row of a table."""

    section: Section
    """Its table."""
    shape: Shape
    """The requests."""
    succeeded: Count
    """Requests with a complete answer: status 200, every requested token, ended by length."""
    failures: dict[Name, Positive]
    """Kind -> requests."""
    finish_reasons: dict[Name, Positive]
    """Reason -> requests, as the server gave it."""
    prompt_tokens: Count
    """Tokens of the prompts that succeeded, as the server counted them."""
    returned_tokens: Count
    """Returned tokens, counted one by one."""
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
    """The required relation of the value to the limit."""
    limit: Number
    """The requested limit, in the unit of its name: ms, a fraction, requests/s or tokens/s."""
    value: Number | None
    """The worst cell's value (for a peak: the best cell's); None if nothing was measured, which fails."""
    where: Text
    """The cell, or why there is no value."""
    passed: bool
    """Whether it holds."""


class Record(Strict):
    """One run of `bench`. The raw requests lie beside it (bench/files.py)."""

    format: Literal["kvtuner-bench"] = "kvtuner-bench"
    """Identifies the kind of file."""
    version: Literal[1] = 1
    """Of this schema."""
    created: Name
    """UTC, ISO 8601."""
    command: Annotated[str, Field(min_length=1, max_length=4096)]
    """The command, without this machine's folders."""
    preset: Name
    """quick, legacy, full, or custom."""
    environment: Environment
    """Mandatory."""
    model: Model
    """The served model."""
    served: Served
    """How."""
    cache: Cache
    """The cache."""
    correctness: list[Check]
    """At least one; if any failed there is no speed in the record."""
    cells: list[Cell]
    """Tables of the report."""
    quality: list[Measure] = []
    """Offline quality of the same profile, if it was measured or is part of the profile."""
    scrapes: list[Scrape] = []
    """The server's metrics."""
    cross_check: dict[Name, Number] = {}
    """The same load through the engine's own client: figure -> ours over theirs."""
    gates: list[Gate] = []
    """Service-level objectives."""
    violations: list[Violation] = []
    """Why this is not a result; empty for a good run."""

    @field_validator("preset")
    @classmethod
    def _of_today(cls, preset: str) -> str:
        return RENAMED.get(preset, preset)

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
