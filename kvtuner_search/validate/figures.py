"""Figures with intervals from the answers of two servers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from kvtuner_search.data import Split
from kvtuner_search.evaluation.statistics import CONFIDENCE, paired_proportions, paired_ratio
from kvtuner_search.profile.fields import Measure
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.validation import Capacity, Greedy, TaskResult
from kvtuner_search.servers.facts import Facts, memory_differs
from kvtuner_search.serving.capacity import heads_per_rank, stage_bytes
from kvtuner_search.serving.engine import engine
from kvtuner_search.validate.prompts import TaskPrompt


def likelihood(split: Split, ours: NDArray[np.float64], baseline: NDArray[np.float64]) -> list[Measure]:
    """Mean NLL of each source under both servers, and the interval of the paired difference a token.

    Args:
        ours, baseline: [samples] sums over each sample's scored tokens, nats.
    """
    found = []
    for name in split.by_source():
        keep = np.array([sample.source == name for sample in split.samples])
        tokens = np.array([sample.scored_tokens for sample in split.samples], dtype=np.float64)[keep]
        interval = paired_ratio(ours[keep] - baseline[keep], tokens)
        found.append(
            Measure(
                metric="nll",
                data=name,
                split="test",
                samples=len(tokens),
                tokens=int(tokens.sum()),
                baseline=float(baseline[keep].sum() / tokens.sum()),
                value=float(ours[keep].sum() / tokens.sum()),
                ci_low=interval.low,
                ci_high=interval.high,
                confidence=CONFIDENCE,
            )
        )
    return found


def task_results(prompts: Sequence[TaskPrompt], ours: Sequence[bool], baseline: Sequence[bool]) -> list[TaskResult]:
    """Accuracy of each task under both servers, with the prompts that flipped.

    Args:
        ours, baseline: whether each prompt was answered right.
    """
    rows = list(zip(prompts, ours, baseline, strict=True))
    found = []
    for name, group in groupby(rows, key=lambda row: row[0].task):
        part = list(group)
        lost = sum(b and not a for _, a, b in part)
        gained = sum(a and not b for _, a, b in part)
        interval = paired_proportions(lost, gained, len(part))
        found.append(
            TaskResult(
                metric="accuracy",
                data=name,
                split="test",
                samples=len(part),
                tokens=sum(prompt.max_new_tokens for prompt, _, _ in part),
                baseline=sum(b for _, _, b in part) / len(part),
                value=sum(a for _, a, _ in part) / len(part),
                ci_low=interval.low,
                ci_high=interval.high,
                confidence=CONFIDENCE,
                lost=lost,
                gained=gained,
            )
        )
    return found


def greedy_agreement(ours: Sequence[Sequence[int]], baseline: Sequence[Sequence[int]]) -> Greedy:
    """How far the greedy continuations of the same prompts agree; all have the same length."""
    length = len(ours[0])
    first = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), length)
        for x, y in zip(ours, baseline, strict=True)
    ]
    interval = paired_ratio(np.array(first, dtype=np.float64), np.full(len(first), float(length)))
    return Greedy(
        prompts=len(first),
        tokens=length,
        identical=sum(index == length for index in first),
        agreement=interval.estimate,
        ci_low=interval.low,
        ci_high=interval.high,
        confidence=CONFIDENCE,
        first_divergence=first,
    )


def capacity(profile: Profile, ours: Facts, baseline: Facts, environment: Mapping[str, str] = os.environ) -> Capacity:
    """Both servers' token capacities, and the ratio that the layout predicts at equal memory.

    Under pipeline parallelism the heaviest stage decides: of the profile's partition, and of the engine's even one.
    """
    model, layers = profile.model, profile.layer_specs()
    heads = heads_per_rank(model.num_kv_heads, ours.tensor_parallel)
    weights = [layer.bytes_per_token(heads, model.head_dim) for layer in layers]
    stored, raw = (
        stage_bytes(layers, engine().stage_layers(each, ours.pipeline_parallel, environment), heads, model.head_dim)
        for each in (weights, [1] * len(layers))
    )
    reason = memory_differs(baseline, ours)
    return Capacity(
        baseline_tokens=baseline.tokens,
        tokens=ours.tokens,
        ratio=ours.tokens / baseline.tokens,
        predicted=max(stage.raw for stage in raw) / max(stage.stored for stage in stored),
        comparable=not reason,
        reason=reason,
    )
