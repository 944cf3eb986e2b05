"""Figures with intervals, the predicted capacity, and the thresholds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvtuner_search.data import Sample, Split
from kvtuner_search.profile.validation import Capacity, Semantics
from kvtuner_search.servers.facts import Facts
from kvtuner_search.validate import figures
from kvtuner_search.validate.explained import Explained, ExplainedSide, notes_on_rounding
from kvtuner_search.validate.judge import judge
from kvtuner_search.validate.measure import ServerAnswers
from kvtuner_search.validate.options import Limits
from kvtuner_search.validate.prompts import TaskPrompt
from kvtuner_search.validate.twice import Twice
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


def token_logs(*rows: float) -> list[np.ndarray]:
    return [np.array(rows) for _ in range(2)]


def side(server: float, second: float) -> ExplainedSide:
    """Two samples and two prompts: the server is ``server`` nats above the offline evaluation at every token, the second offline
    computation ``second``; decode and extend differ by ``server`` too."""
    twice = [np.array([[-1.0] * 4, [-1.0 + second] * 4]) for _ in range(2)]
    same = [np.array([[True, True, True, False], [True] * 4]) for _ in range(2)]
    outcome = ServerAnswers(
        token_logs(*[-1.0 + server] * 4), [], [(1, 2, 3, 4)] * 2, token_logs(*[-1.0 + server] * 4), token_logs(*[-1.0] * 4), []
    )  # fmt: skip
    return ExplainedSide(outcome, Twice(twice, twice, twice, same))


ALL_RIGHT = [True] * 98


def checks(
    limits: Limits, share: float = 1.0, comparable: bool = True, explained: Explained | None = None, method: str = "as-stored-extend",
    right: list[bool] = ALL_RIGHT,
) -> dict[str, Any]:  # fmt: skip
    split = Split("test", (sample("text", 11), sample("text", 11)))
    likelihood = figures.likelihood(split, np.array([10.1, 10.3]), np.array([10.0, 10.0]))
    tasks = figures.task_results([TaskPrompt("recall", (1,), "x", 4)] * 98, right, right)
    greedy = figures.greedy_agreement([(1, 2), (1, 2)], [(1, 2), (1, 2)])
    capacity = Capacity(
        baseline_tokens=1000,
        tokens=int(2000 * share),
        ratio=2 * share,
        predicted=2.0,
        comparable=comparable,
        reason="why",
    )
    semantics = Semantics.model_validate(
        {"method": method, "tokens": 4, "difference": 0.03, "baseline_difference": 0.01}
    )
    found = judge(limits, likelihood, tasks, greedy, capacity, semantics, explained)
    return {check.name: check for check in found}


def test_each_threshold_judges_the_worse_end() -> None:
    found = checks(Limits(min_agreement=0.9))
    values = {name: check.value for name, check in found.items()}
    assert values == pytest.approx(
        {"nll.text": 0.03, "accuracy.recall": -0.0196, "greedy": 1.0, "capacity": 1.0, "decode-semantics": 0.02}, abs=1e-5
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "limits", "passed"),
    [
        ("nll.text", {"max_nll_increase": 0.0301}, True),
        ("nll.text", {"max_nll_increase": 0.0299}, False),
        ("accuracy.recall", {"max_accuracy_drop": 0.0197}, True),
        ("accuracy.recall", {"max_accuracy_drop": 0.0195}, False),
        ("decode-semantics", {"max_path_difference": 0.0201}, True),
        ("decode-semantics", {"max_path_difference": 0.0199}, False),
    ],
)
def test_a_threshold_holds_just_within(name: str, limits: dict[str, float], passed: bool) -> None:
    assert checks(Limits(**limits))[name].passed is passed


@pytest.mark.parametrize(("right", "tested"), [(0, False), (4, False), (5, True)])
def test_a_task_that_the_stock_server_cannot_do_proves_nothing(right: int, tested: bool) -> None:
    """No drop from 4 of 98 could reach a threshold of five points."""
    found = checks(Limits(), right=[True] * right + [False] * (98 - right))["accuracy.recall"]
    assert found.passed is tested
    assert (found.value is None) is not tested
    assert ("give a task, or options of it, that the model can do" in found.reason) is not tested
    assert checks(Limits(max_accuracy_drop=0.03), right=[True] * 4 + [False] * 94)["accuracy.recall"].passed


def test_without_an_offline_evaluation_decode_may_differ_by_what_the_profile_may_cost() -> None:
    assert checks(Limits(max_nll_increase=0.019))["decode-semantics"].limit == 0.019
    assert checks(Limits(max_nll_increase=None))["decode-semantics"].limit == 0.05


def test_a_server_may_be_a_quarter_farther_than_rounding_explains() -> None:
    """Rounding explains 0.4 nats; the server's distance is 0.5 and, beyond the floor, 0.51."""
    stock = side(0.2, 0.4)
    for server, passed in ((0.5, True), (0.504, True), (0.506, False)):
        found = checks(Limits(), explained=Explained(side(server, 0.4), stock))
        for name in ("offline.distance", "offline.decode-distance", "decode-semantics"):
            assert found[name].limit == pytest.approx(0.505)
            assert found[name].value == pytest.approx(server)
            assert found[name].passed is passed


def test_a_stock_server_that_is_noisier_widens_the_limits_up_to_a_point() -> None:
    ours = side(0.75, 0.4)
    assert not checks(Limits(), explained=Explained(ours, side(0.4, 0.4)))["offline.distance"].passed
    found = checks(Limits(), explained=Explained(ours, side(0.6, 0.4)))
    assert found["offline.distance"].limit == pytest.approx(1.25 * 0.4 * 1.5 + 0.005)
    assert found["offline.distance"].passed
    assert found["offline.stock-distance"].passed
    assert not checks(Limits(), explained=Explained(ours, side(0.81, 0.4)))["offline.stock-distance"].passed


def test_means_may_be_twice_what_they_are_between_two_correct_computations() -> None:
    for server, passed in ((0.804, True), (0.806, False), (-0.804, True), (-0.806, False)):
        found = checks(Limits(), explained=Explained(side(server, 0.4), side(0.0, 0.4)))
        assert found["offline.nll"].value == pytest.approx(abs(server))
        assert found["offline.nll"].passed is passed
        assert found["offline.decode"].passed is passed


def test_tokens_are_counted_against_those_of_the_second_computation() -> None:
    found = checks(Limits(), explained=Explained(side(0.0, 0.4), side(0.0, 0.4)))["offline.tokens"]
    assert (found.value, found.limit, found.passed) == (0.75, pytest.approx(0.99), False)
    assert checks(Limits(min_offline_tokens=0.75), explained=Explained(side(0, 0.4), side(0, 0.4)))[
        "offline.tokens"
    ].passed


def test_a_number_judges_the_means_alone_as_it_did_before() -> None:
    explained = Explained(side(0.5, 0.0), side(0.0, 0.0))
    found = checks(Limits(max_offline_difference=0.51, max_path_difference=0.02), explained=explained)
    assert (found["offline.nll"].limit, found["offline.nll"].passed, found["offline.decode"].passed) == (
        0.51,
        True,
        True,
    )
    assert not checks(Limits(max_offline_difference=0.49), explained=explained)["offline.nll"].passed
    assert (found["decode-semantics"].limit, found["decode-semantics"].value) == (0.02, pytest.approx(0.02))
    assert not {"offline.distance", "offline.decode-distance", "offline.stock-distance"} & found.keys()


def test_what_was_scored_token_by_token_is_not_compared_token_by_token() -> None:
    explained = with_effect(1.0, 0.3)
    assert {"offline.distance", "offline.effect"} <= checks(Limits(), explained=explained).keys()
    found = checks(Limits(), explained=explained, method="token-by-token")
    assert not {"offline.distance", "offline.effect"} & found.keys()
    assert {"offline.nll", "offline.decode-distance"} <= found.keys()


def with_effect(share: float, noise: float) -> Explained:
    """Fifty samples of 40 tokens, each of which the profile makes likelier or less likely by 1; the server shows ``share`` of that. Every
    computation has noise of its own."""
    rng = np.random.default_rng(0)
    steps = [rng.choice([-1.0, 1.0], 40) for _ in range(50)]
    rest = side(0.0, 0.4)

    def one(server: float, offline: float) -> ExplainedSide:
        drawn = [rng.normal(0, noise, (3, 40)) for _ in steps]
        scored = [server * x + d[0] for x, d in zip(steps, drawn, strict=True)]
        twice = [offline * x + d[1:] for x, d in zip(steps, drawn, strict=True)]
        return ExplainedSide(replace(rest.outcome, scored=scored), replace(rest.twice, scored=twice))

    return Explained(one(share, 1.0), one(0.0, 0.0))


@pytest.mark.parametrize(("share", "noise"), [(1.0, 0.0), (1.0, 1.0), (0.4, 0.3), (0.0, 0.3)])
def test_the_effect_is_found_whatever_the_noise(share: float, noise: float) -> None:
    found = with_effect(share, noise).effect()
    assert found is not None
    assert found.low - 1e-9 <= share <= found.high + 1e-9
    assert found.high - found.low < 0.35


@pytest.mark.parametrize(("share", "passed"), [(1.0, True), (0.6, True), (0.4, False), (0.0, False)])
def test_a_server_must_show_half_of_the_effect(share: float, passed: bool) -> None:
    found = checks(Limits(), explained=with_effect(share, 0.3))["offline.effect"]
    assert (found.relation, found.limit, found.passed) == ("at least", 0.5, passed)


def test_an_effect_that_is_lost_in_rounding_is_not_asked_for() -> None:
    explained = with_effect(1.0, 10.0)
    assert explained.effect() is None
    assert "offline.effect" not in checks(Limits(), explained=explained)
    assert "was not tested for it" in notes_on_rounding(explained)[1]


def test_capacity_is_judged_against_the_prediction_and_must_be_measured() -> None:
    assert checks(Limits(), share=0.99)["capacity"].passed
    assert not checks(Limits(), share=0.985)["capacity"].passed
    unequal = checks(Limits(), comparable=False)["capacity"]
    assert (unequal.passed, unequal.value, unequal.reason) == (False, None, "why")


def test_none_drops_a_threshold() -> None:
    nothing = Limits(**dict.fromkeys(Limits.__dataclass_fields__))
    assert checks(nothing, explained=Explained(side(0.0, 0.4), side(0.0, 0.4))) == {}
