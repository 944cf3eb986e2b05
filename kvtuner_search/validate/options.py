"""The options of a validation, and its thresholds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Auto = Literal["auto"]  # what rounding explains, measured in the same run: kvtuner_search.validate.explained


@dataclass(frozen=True)
class Limits:
    """Thresholds; None drops the check. If a figure has an interval, the end that counts against the profile is judged."""

    max_nll_increase: float | None = 0.05  # nats a token, of each source
    max_accuracy_drop: float | None = 0.05  # fraction of prompts, of each task
    min_capacity: float | None = 0.99  # of the predicted ratio
    min_agreement: float | None = (
        None  # mean fraction of greedy tokens before the first difference from the stock server
    )
    max_path_difference: float | Auto | None = (
        "auto"  # nats a token, decode against extend; a number: beyond the stock server's
    )
    max_offline_difference: float | Auto | None = (
        "auto"  # nats a token, server against offline, on held-out text and on continuations; a number: of the means alone
    )
    min_offline_tokens: float | Auto | None = "auto"  # of the greedily chosen tokens
    min_offline_effect: float | None = 0.5  # of the profile's effect, token by token, that the server must show


@dataclass(frozen=True)
class ValidationOptions:
    """One run of ``validate``."""

    profile: Path
    model: str  # folder, hub id or ``reference``
    url: str | None  # of a running server with the profile; None starts one
    baseline_url: str | None  # of a running stock server; None starts one
    baseline_from: Path | None  # folder of a run whose stock server's answers are reused
    server_arguments: tuple[str, ...]  # for both servers that are started
    server_python: str  # interpreter of the environment that has the engine
    sources: tuple[str, ...]
    samples: int  # sequences of each source
    length: int  # most tokens of a sequence
    tasks: tuple[str, ...]
    task_prompts: int  # of each task
    greedy_prompts: int
    greedy_tokens: int
    seed: int
    concurrency: int  # requests in flight
    timeout: float  # seconds for a request
    start_timeout: float  # seconds until a server is ready
    offline: bool
    device: str  # of the offline evaluation
    batch_tokens: int  # of the offline evaluation
    hardware: str | None  # hardware of servers given by their URL
    limits: Limits
    folder: Path
    resume: bool
    overwrite: bool
    command: str  # for the block
    api_key: str | None = field(
        default=None, repr=False
    )  # of both servers; None: that of the server arguments, if they have one
