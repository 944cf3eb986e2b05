"""The division of layers into pipeline stages: the best one by brute force, and the user's own."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtuner_search.errors import UsageError
from kvtuner_search.profile.canonical import load
from kvtuner_search.serving.sglang.partition import ENVIRONMENT, Partition, choose, of_profile
from tests.search.profile_factory import profile

PROFILES = Path(__file__).resolve().parents[3] / "profiles"


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=9).flatmap(lambda b: st.tuples(st.just(b), st.integers(1, len(b))))
)
def test_no_partition_is_better(case: tuple[list[int], int]) -> None:
    """By heaviest stage, then by evenness of layer counts, then by layers in later stages."""
    layer_bytes, stages = case
    best = min(
        (
            max(sum(layer_bytes[a:b]) for a, b in itertools.pairwise(cuts)),
            sum((b - a) ** 2 for a, b in itertools.pairwise(cuts)),
            tuple(b - a for a, b in itertools.pairwise(cuts)),
        )
        for inner in itertools.combinations(range(1, len(layer_bytes)), stages - 1)
        for cuts in [(0, *inner, len(layer_bytes))]
    )
    assert choose(layer_bytes, stages, {}).counts == best[2]


@pytest.mark.parametrize(("layers", "stages"), [(28, 2), (28, 3), (30, 4), (32, 4), (7, 5)])
def test_equal_layers_are_divided_as_sglang_does(layers: int, stages: int) -> None:
    """SGLang gives the last ``layers % stages`` stages one layer more."""
    base, extra = divmod(layers, stages)
    assert choose([544] * layers, stages, {}).counts == (base,) * (stages - extra) + (base + 1,) * extra


def test_bytes_move_the_cut() -> None:
    lopsided = profile(["16/16"] * 2 + ["2-g64-asym/2-g64-asym"] * 6)
    assert of_profile(lopsided, 1, 2).counts == (1, 7)
    assert of_profile(profile("4-g64-asym/4-g64-asym", 8), 1, 2).counts == (4, 4)
    with pytest.raises(UsageError, match="2 KV heads cannot be spread over 3 ranks"):
        of_profile(lopsided, 3, 2)


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*/*bit.json")), ids=lambda path: path.stem)
def test_the_reference_profiles_in_two_stages(path: Path) -> None:
    loaded = load(path)
    counts = of_profile(loaded, 2, 2).counts
    nbytes = [layer.bytes_per_token(1, loaded.model.head_dim) for layer in loaded.layer_specs()]
    heaviest = max(sum(nbytes[: counts[0]]), sum(nbytes[counts[0] :]))
    assert heaviest == min(max(sum(nbytes[:cut]), sum(nbytes[cut:])) for cut in range(1, len(nbytes)))


def test_what_is_set_for_sglang() -> None:
    assert choose([1, 1, 1, 3], 2, {}).to_environment() == {ENVIRONMENT: "3,1"}
    assert choose([1, 1], 1, {}).to_environment() == {}


def test_the_user_has_the_last_word() -> None:
    assert choose([1] * 28, 2, {ENVIRONMENT: "13,15"}) == Partition((13, 15), by_user=True)
    assert choose([1] * 28, 2, {ENVIRONMENT: " 13, 15"}).counts == (13, 15), "int() of SGLang takes blanks too"
    assert choose([1] * 28, 1, {ENVIRONMENT: "28"}).counts == (28,)


@pytest.mark.parametrize("text", ["", "28", "14,13", "13,14,1", "a,b", "0,28", "-1,29", "14;14"])
def test_a_partition_that_does_not_fit_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=ENVIRONMENT):
        choose([1] * 28, 2, {ENVIRONMENT: text})


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UsageError, match="5 pipeline stages for 4 layers"):
        choose([1] * 4, 5, {})
