"""The signed-off block that ``validate`` writes into a profile: what was measured on a server, and whether it holds.

It names the digest of the profile without the block, so a block that was copied to another profile is detected.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kvtuner_search.profile.fields import (
    MAX_MEASURES,
    MAX_NOTES,
    Count,
    DataInfo,
    Digest,
    Measure,
    Name,
    Number,
    Positive,
    Strict,
    Text,
    Versions,
)

Verdict = Literal["pass", "fail"]


class Check(Strict):
    """One threshold and the value compared with it."""

    name: Name
    """What is judged, e.g. nll.recall or capacity."""
    relation: Literal["at most", "at least"]
    """The required relation of the value to the limit."""
    limit: Number
    """The threshold, as the user set it or by default."""
    value: Number | None
    """The value compared with it: for a figure with an interval the end that counts against the profile; absent if it could not be measured."""
    passed: bool
    """Whether the threshold holds; it does not if the value could not be measured."""
    reason: Annotated[str, Field(max_length=2048)] = ""
    """Why nothing could be measured."""

    @model_validator(mode="after")
    def _judged(self) -> Self:
        if self.passed != holds(self.value, self.relation, self.limit):
            raise ValueError(f"{self.name}: {self.value} {self.relation} {self.limit} is not {self.passed}")
        return self


def holds(value: float | None, relation: Literal["at most", "at least"], limit: float) -> bool:
    """Whether a check passes; a value that is missing does not."""
    return value is not None and (value <= limit if relation == "at most" else value >= limit)


class ServerRecord(Strict):
    """The measured server, as it reports itself."""

    version: Name
    """The engine's version."""
    started: bool
    """True: started by `validate` itself. False: a running server given by its URL."""
    attention_backend: Name
    """The engine's attention backend."""
    dtype: Name
    """Dtype of the model."""
    tensor_parallel: Positive
    """Ranks that share the KV heads."""
    pipeline_parallel: Positive
    """Stages that share the layers."""
    page_size: Positive
    """Tokens of a page of the cache."""


class Semantics(Strict):
    """How attention was made to read cached rows as stored while likelihood was measured, as in decode."""

    method: Literal["as-stored-extend", "token-by-token", "decode"]
    """as-stored-extend: the server says that a prompt's own keys and values are read as stored. token-by-token: each token was a request of its own on top of cached rows, so only the newest token's own key and value were read unquantized. decode: the cache stores exactly what attention would read (16 bits)."""
    tokens: Count
    """Tokens that the server chose in decode and then scored again as a prompt; 0 if that was not done."""
    difference: Number | None = None
    """Mean absolute difference between the two log-likelihoods of those tokens, nats a token."""
    baseline_difference: Number | None = None
    """The same on the stock server, whose two paths differ by rounding alone."""


class TaskResult(Measure):
    """Accuracy by generation on one task, prompt by prompt against the stock server; the interval is Agresti and Min's for paired proportions."""

    lost: Count
    """Prompts that the stock server answered right and this one wrong."""
    gained: Count
    """Prompts that the stock server answered wrong and this one right."""

    @property
    def has_interval(self) -> bool:
        """True: this interval follows from counts, and has a width from one prompt on."""
        return True


class Greedy(Strict):
    """Greedy continuations of the same prompts by both servers."""

    prompts: Positive
    """Prompts."""
    tokens: Positive
    """Tokens that each was continued by."""
    identical: Count
    """Prompts whose continuations agree in every token."""
    agreement: Number
    """Mean fraction of the tokens before the first that differs."""
    ci_low: Number
    """Lower end of the interval of `agreement`, by bootstrap over prompts."""
    ci_high: Number
    """Upper end of the same interval."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Confidence level of the interval."""
    first_divergence: Annotated[list[Count], Field(min_length=1, max_length=2**16)]
    """Index of the first token that differs, prompt by prompt; `tokens` where none does."""


class Capacity(Strict):
    """How many tokens each server says its cache holds."""

    baseline_tokens: Positive
    """The stock server's."""
    tokens: Positive
    """The profile's server's."""
    ratio: Number
    """tokens / baseline_tokens."""
    predicted: Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)]
    """What the layout predicts at equal memory: bytes per token of the 16-bit cache over those of the profile, on the heaviest rank."""
    comparable: bool
    """Whether both servers had the same memory to fill and no cap on tokens."""
    reason: Annotated[str, Field(max_length=2048)] = ""
    """Why the capacities cannot be compared."""

    @model_validator(mode="after")
    def _divided(self) -> Self:
        if not math.isclose(self.ratio, self.tokens / self.baseline_tokens, rel_tol=1e-9):
            raise ValueError(f"ratio {self.ratio} is not {self.tokens} / {self.baseline_tokens}")
        return self


class OfflineAgreement(Strict):
    """A server against the offline evaluation of the same cache on the same tokens."""

    cache: Literal["profile", "16bit"]
    """Which cache: the profile's, or the 16-bit one, whose figures show what rounding alone does."""
    samples: Positive
    """Sequences whose likelihood was compared."""
    tokens: Positive
    """Tokens that were scored."""
    nll_difference: Number
    """Mean negative log-likelihood by the server minus the same offline, nats a token."""
    ci_low: Number
    """Lower end of its interval, paired over samples."""
    ci_high: Number
    """Upper end of the same interval."""
    generated: Count
    """Tokens that the server chose greedily and that the offline model scored after the same tokens."""
    token_agreement: Number
    """Fraction of them that the offline model ranks first too."""
    decode_difference: Number
    """Mean negative log-likelihood of those tokens by the server's decode minus the same offline, nats a token."""
    decode_low: Number
    """Lower end of its interval, paired over prompts."""
    decode_high: Number
    """Upper end of the same interval."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Confidence level of both intervals."""


class Validation(Strict):
    """What `validate` measured with the same prompts on a stock server and on one with the profile."""

    profile_digest: Digest
    """Digest of the profile without this block."""
    verdict: Verdict
    """pass if every check passed."""
    checks: Annotated[list[Check], Field(min_length=1, max_length=MAX_MEASURES)]
    """The thresholds."""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    """When the measurement ended, UTC."""
    tool: Name
    """Name and version of the writer."""
    command: Name
    """The command, folders left out of paths."""
    server: ServerRecord
    """The profile's server."""
    versions: Versions = {}
    """Versions of the libraries that the figures depend on, where known."""
    hardware: Name
    """What the servers ran on."""
    semantics: Semantics
    """How decode semantics were ensured."""
    likelihood: Annotated[list[Measure], Field(max_length=MAX_MEASURES)] = []
    """Held-out negative log-likelihood by source, through both servers."""
    tasks: Annotated[list[TaskResult], Field(max_length=MAX_MEASURES)] = []
    """Accuracy by generation, by task."""
    greedy: Greedy | None = None
    """Greedy agreement of both servers."""
    capacity: Capacity | None = None
    """Token capacity of both servers."""
    offline: Annotated[list[OfflineAgreement], Field(max_length=16)] = []
    """Agreement with the offline evaluation."""
    data: Annotated[list[DataInfo], Field(max_length=MAX_MEASURES)] = []
    """The prompts of each source."""
    notes: Annotated[list[Text], Field(max_length=MAX_NOTES)] = []
    """What a reader must know, e.g. what was not held out."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.verdict == "pass") != all(check.passed for check in self.checks):
            raise ValueError(f"verdict {self.verdict} does not follow from the checks")
        names = [check.name for check in self.checks]
        if len(set(names)) != len(names):
            raise ValueError("a check is given twice")
        return self
