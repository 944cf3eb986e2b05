"""Figures with intervals, the predicted capacity, and the thresholds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtuner_search.data import Sample, Split
from kvtuner_search.profile.validation import Capacity, OfflineAgreement, Semantics
from kvtuner_search.serving.validate import figures
from kvtuner_search.serving.validate.facts import Facts
from kvtuner_search.serving.validate.judge import judge
from kvtuner_search.serving.validate.options import Limits
from kvtuner_search.serving.validate.prompts import TaskPrompt
from tests.search.profile_factory import profile

FACTS = Facts(
    version="0.5.14", model="m", dtype="auto", quantization=None, attention_backend="triton", device="cuda", tensor_parallel=1,
    pipeline_parallel=1, page_size=1, prefix_cache=True, memory_fraction=0.5, token_cap=None, tokens=1000, cache_gib=10.0,
    profile_digest=None, as_stored=False, tool=None,
)  # fmt: skip
MIXED = ["16/16", "16/16", "4-g64-sym/4-g64-sym", "4-g64-sym/4-g64-sym"]  # 512, 512, 136, 136 bytes a token


def sample(source: str, length: int) -> Sample:
    return Sample(source, tuple(range(length)), ((1, length),), is_task=False)


def test_likelihood_is_paired_by_source() -> None:
    split = Split("test", (sample("a", 11), sample("b", 5), sample("a", 31)))
    rows = figures.likelihood(split, np.array([12.0, 8.0, 33.0]), np.array([10.0, 8.0, 30.0]))
    assert [(m.data, m.samples, m.tokens) for m in rows] == [("a", 2, 40), ("b", 1, 4)]
    assert rows[0].baseline == 1.0
    assert rows[0].delta == pytest.approx(5 / 40)
    assert (rows[0].ci_low, rows[0].ci_high) == pytest.approx((3 / 30, 2 / 10))  # each of the two samples alone
    assert rows[1].ci_low == rows[1].ci_high == 0


@pytest.mark.parametrize(
    ("lost", "gained", "count", "low", "high"),
    [
        # (c - b)/(n + 2) -+ 1.959964 sqrt((b + c + 1) - (c - b)^2/(n + 2))/(n + 2), by hand
        (0, 0, 98, -0.0195996, 0.0195996),
        (6, 1, 48, -0.207352, 0.007352),
        (10, 0, 10, -1.0, -0.566616),
    ],
)
def test_paired_proportions(lost: int, gained: int, count: int, low: float, high: float) -> None:
    interval = figures.paired_proportions(lost, gained, count)
    assert interval.estimate == pytest.approx((gained - lost) / count)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-6)


def test_flips_are_counted_apart() -> None:
    prompts = [TaskPrompt("t", (1,), "x", 4)] * 4 + [TaskPrompt("u", (1,), "x", 4)]
    rows = figures.task_results(prompts, [True, True, False, False, True], [True, False, True, True, True])
    assert [(r.data, r.samples, r.lost, r.gained, r.value, r.baseline) for r in rows] == [
        ("t", 4, 2, 1, 0.5, 0.75),
        ("u", 1, 0, 0, 1.0, 1.0),
    ]


def test_greedy_agreement_ends_at_the_first_difference() -> None:
    found = figures.greedy_agreement(
        [(1, 2, 3, 4), (1, 9, 3, 4), (5, 6, 7, 8)], [(1, 2, 3, 4), (1, 2, 3, 4), (0, 6, 7, 8)]
    )
    assert found.first_divergence == [4, 1, 0]
    assert found.identical == 1
    assert found.agreement == pytest.approx(5 / 12)
    assert found.ci_low < 5 / 12 < found.ci_high


@pytest.mark.parametrize(
    ("tensor", "pipeline", "environment", "predicted"),
    [
        (1, 1, {}, 2048 / 1296),
        (2, 1, {}, 1024 / 648),  # one KV head a rank
        (4, 1, {}, 1024 / 648),  # two KV heads, so ranks hold copies
        (1, 2, {}, 1024 / 784),  # the profile's stages are 1 and 3 layers, the stock server's 2 and 2
        (1, 2, {"SGLANG_PP_LAYER_PARTITION": "2,2"}, 1024 / 1024),
    ],
)
def test_the_predicted_capacity_follows_the_heaviest_rank(
    tensor: int, pipeline: int, environment: dict[str, str], predicted: float
) -> None:
    ours = replace(FACTS, tensor_parallel=tensor, pipeline_parallel=pipeline, tokens=1500)
    found = figures.capacity(profile(MIXED), ours, replace(ours, tokens=1000), environment)
    assert found.predicted == pytest.approx(predicted)
    assert (found.ratio, found.comparable) == (1.5, True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token_cap": 500}, "capped at 500 tokens"),
        ({"dtype": "float32"}, "stores 32 bits a number"),
        ({"memory_fraction": 0.4}, "memory fraction is 0.4"),
        ({"cache_gib": 9.8}, "the caches fill 9.8 and 10.0 GiB"),
    ],
)
def test_unequal_memory_is_not_compared(change: dict[str, Any], reason: str) -> None:
    found = figures.capacity(profile(), FACTS, replace(FACTS, **change))
    assert not found.comparable
    assert reason in found.reason


def checks(limits: Limits, share: float = 1.0, comparable: bool = True, low: float = -0.001) -> dict[str, Any]:
    split = Split("test", (sample("text", 11), sample("text", 11)))
    likelihood = figures.likelihood(split, np.array([10.1, 10.3]), np.array([10.0, 10.0]))
    tasks = figures.task_results([TaskPrompt("recall", (1,), "x", 4)] * 98, [True] * 98, [True] * 98)
    greedy = figures.greedy_agreement([(1, 2), (1, 2)], [(1, 2), (1, 2)])
    capacity = Capacity(
        baseline_tokens=1000,
        tokens=int(2000 * share),
        ratio=2 * share,
        predicted=2.0,
        comparable=comparable,
        reason="why",
    )
    semantics = Semantics(method="as-stored-extend", tokens=4, difference=0.03, baseline_difference=0.01)
    offline = OfflineAgreement(
        cache="profile", samples=2, tokens=20, nll_difference=0.0, ci_low=low, ci_high=0.002, generated=4,
        token_agreement=0.96, decode_difference=0.0, decode_low=-0.004, decode_high=0.001,
    )  # fmt: skip
    sixteen = offline.model_copy(update={"cache": "16bit", "ci_high": 9.0})
    found = judge(limits, likelihood, tasks, greedy, capacity, semantics, [offline, sixteen])
    return {check.name: check for check in found}


def test_each_threshold_judges_the_worse_end() -> None:
    found = checks(Limits(min_agreement=0.9))
    values = {name: check.value for name, check in found.items()}
    assert values == pytest.approx(
        {
            "nll.text": 0.03,
            "accuracy.recall": -0.0196,
            "greedy": 1.0,
            "capacity": 1.0,
            "decode-semantics": 0.02,
            "offline.nll": 0.002,
            "offline.decode": 0.004,
            "offline.tokens": 0.96,
        },
        abs=1e-5,
    )
    assert checks(Limits(), low=-0.019)["offline.nll"].value == 0.019


@pytest.mark.parametrize(
    ("name", "limits", "passed"),
    [
        ("nll.text", {"max_nll_increase": 0.0301}, True),
        ("nll.text", {"max_nll_increase": 0.0299}, False),
        ("accuracy.recall", {"max_accuracy_drop": 0.0197}, True),
        ("accuracy.recall", {"max_accuracy_drop": 0.0195}, False),
        ("offline.tokens", {"min_offline_tokens": 0.96}, True),
        ("offline.tokens", {"min_offline_tokens": 0.961}, False),
        ("decode-semantics", {"max_path_difference": 0.0201}, True),
        ("decode-semantics", {"max_path_difference": 0.0199}, False),
    ],
)
def test_a_threshold_holds_just_within(name: str, limits: dict[str, float], passed: bool) -> None:
    assert checks(Limits(**limits))[name].passed is passed


def test_capacity_is_judged_against_the_prediction_and_must_be_measured() -> None:
    assert checks(Limits(), share=0.99)["capacity"].passed
    assert not checks(Limits(), share=0.985)["capacity"].passed
    unequal = checks(Limits(), comparable=False)["capacity"]
    assert (unequal.passed, unequal.value, unequal.reason) == (False, None, "why")


def test_none_drops_a_threshold() -> None:
    nothing = Limits(**dict.fromkeys(Limits.__dataclass_fields__))
    assert checks(nothing) == {}
