"""One row of an ablation. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvtuner_search.bench.record import Amount, Text
from kvtuner_search.profile.fields import Count, Digest, Measure, Name, Number, Positive, Strict


class Figure(Strict):
    """A quality figure over several sources together, against the 16-bit cache on the same samples."""

    samples: Positive
    """Sequences or prompts."""
    baseline: Number
    """The 16-bit cache's value."""
    value: Number
    """This row's."""
    ci_low: Number
    """Lower end of the interval of value - baseline, paired over samples."""
    ci_high: Number
    """Upper end of the same interval."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Confidence level of the interval."""
    lost: Count | None = None
    """For accuracy: prompts that were right with 16 bits and are wrong now."""
    gained: Count | None = None
    """For accuracy: the other way round."""


class Quality(Strict):
    """A row's loss of quality, offline."""

    nll: Figure
    """Mean negative log-likelihood, nats a token, of all text sources together; of the tasks if there is no text. Bootstrap interval."""
    kl: Figure
    """Mean KL divergence from the 16-bit model on the same tokens, nats. Bootstrap interval."""
    accuracy: Figure | None
    """Prompts of all tasks together with every answer token right under teacher forcing; None without tasks. Agresti and Min's interval."""
    measures: list[Measure]
    """The same source by source."""


class SpeedCell(Strict):
    """One cell of the benchmark."""

    section: Literal["ttft", "throughput"]
    """Its table."""
    input_tokens: Positive
    """Of each prompt."""
    output_tokens: Positive
    """Of each answer."""
    concurrency: Positive
    """Most requests in flight."""
    requests: Positive
    """Requests that succeeded."""
    ttft_ms: Amount
    """Median time to the first token, ms."""
    tokens_per_second: Amount
    """Tokens returned a second."""


class AblationSpeed(Strict):
    """A row on a server."""

    cells: list[SpeedCell]
    """The measured cells; empty if `reason` says why."""
    token_capacity: Count
    """Tokens that the server's cache holds, as it reports; 0 if it never did."""
    record: Name | None
    """The benchmark's own record, relative to the ablation's folder."""
    reason: Text = ""
    """Why there is no speed."""


class AblationRow(Strict):
    """One way of storing the cache."""

    name: Name
    """Of the row."""
    family: Name
    """The choice that it varies."""
    specs: Text
    """KEY/VALUE of all layers, or `by layer`."""
    effective_bits: Amount | None
    """Stored bits per cached number, including metadata and padding; None if there is nothing to measure."""
    context: Positive | None
    """Tokens in the cache for which the bits were counted; None where they do not depend on it."""
    capacity: Amount | None
    """Tokens that fit, over those of a 16-bit cache in the same memory: 16 / effective bits."""
    servable: bool
    """Whether packed rows can hold it."""
    quality: Quality | None
    """None where there is nothing to measure."""
    speed: AblationSpeed | None = None
    """None without a server."""
    reason: Text = ""
    """Why there is no quality, or no speed."""


class Ablation(Strict):
    """One table."""

    format: Literal["kvtuner-ablation"] = "kvtuner-ablation"
    """Identifies the kind of file."""
    version: Literal[1] = 1
    """Of this schema."""
    created: Name
    """UTC, ISO 8601."""
    command: Text
    """The command, without this machine's folders."""
    model: Name
    """Hub id or folder name."""
    head_dim: Positive
    """Channels of a head: one group of the rows that name no group size."""
    data: dict[Name, Digest]
    """Source -> digest of what was evaluated."""
    samples: Positive
    """Of each source."""
    length: Positive
    """Most tokens of a sample."""
    centring: dict[Name, Digest]
    """Source -> digest of what the centring vectors were computed on; empty if no row is centred."""
    versions: dict[Name, Name]
    """Package -> version."""
    device: Name
    """What quality was computed on."""
    dtype: Name
    """In which dtype."""
    rows: list[AblationRow]
    """In the order of the table, the 16-bit cache first."""
    notes: list[Text]
    """What a reader must know."""
