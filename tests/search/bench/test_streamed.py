"""Whether answers were streamed is judged by when their tokens came, and only where they are long enough to tell."""

from __future__ import annotations

from kvtuner_search.bench import load
from kvtuner_search.bench.client import RequestResult
from tests.search.bench.test_load import result


def answers(*arrivals: tuple[float, int], count: int = 4) -> list[RequestResult]:
    """So many answers whose tokens came so."""
    tokens = tuple(range(sum(number for _, number in arrivals)))
    return [result(index, tokens=(index, *tokens[1:]), arrivals=arrivals) for index in range(count)]


def found(results: list[RequestResult]) -> list[str]:
    return [violation.rule for violation in load.violations("here", results)]


def test_distinct_arrival_times_count() -> None:
    for arrivals in ([(10.0, 16)], [(10.0, 1), (10.0, 15)], [(10.0, 1)] * 16):
        assert found(answers(*arrivals)) == ["not-streamed"]
    assert found(answers((10.0, 1), (15.0, 1), (15.0, 14))) == [], (
        "two pieces, as --stream-interval and speculation send them"
    )
    reads = [(100.0 + 0.3 * read, 20) for read in range(5)]  # 64 KiB each of one body of 100 tokens
    assert found(answers(*reads)) == ["not-streamed"]
    assert found(answers(*[(100.0 + 80 * read, 20) for read in range(5)])) == [], "pieces of 20 tokens, 4 ms each"
    assert found(answers(*[(100.0 + 0.01 * step, 1) for step in range(100)])) == [], "each at its own time"
    assert found(answers((10.0, 1))) == [], "one token has nothing to stream"
    assert found(answers((7.9, 1), (7.9, 15))) == [], (
        "two lines in 8 ms: no server of a model is so quick, and one read may take both"
    )
    assert found(answers((7.9, 16))) == ["not-streamed"], "one line is one piece at any speed"


def test_a_few_tokens_read_at_once_by_a_busy_machine_prove_nothing() -> None:
    """An honest server's lines are read together whenever a process waits for a core; that is named, and no violation."""
    for few in (answers(*[(80.0, 1)] * 4, count=12), answers(*[(80.0, 1)] * 8, count=3), answers((80.0, 4))):
        assert found(few) == []
        (remark,) = load.remarks("here", few)
        assert f"here: {len(few)} of {len(few)} answers came in one piece; their tokens are too few to tell" in remark
    enough = answers(*[(80.0, 1)] * 8, count=5)
    assert found(enough) == ["not-streamed"]
    assert load.remarks("here", enough) == [], "it is a violation"
    assert load.remarks("here", answers((10.0, 1), (15.0, 3))) == []


def test_short_answers_do_not_outvote_long_ones() -> None:
    short, long = answers(*[(80.0, 1)] * 4, count=9), answers(*[(80.0 + step, 1) for step in range(40)], count=2)
    assert found(short + long) == []
    assert load.remarks("here", short + long) == [], "the long ones show that the server streams"


def test_only_most_answers_in_one_piece_are_a_violation() -> None:
    whole, late = answers((10.0, 1), (25.0, 15)), answers((25.0, 1), (25.0, 15))
    assert found([*late[:2], *whole[2:]]) == []
    assert found([*late[:3], whole[3]]) == ["not-streamed"]
