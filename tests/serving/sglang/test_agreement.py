"""What ranks tell each other before the first request."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from torch.distributed import HashStore

from kvtuner_search.errors import ServingError
from kvtuner_search.serving.sglang.agreement import RankReport, check, exchange

LAYERS, HEADS = 6, 4


def report(rank: int, layers: tuple[int, int] = (0, LAYERS), heads: tuple[int, int] = (0, HEADS)) -> RankReport:
    per_token = 100 * (layers[1] - layers[0]) * (heads[1] - heads[0])
    return RankReport(
        rank, "sha256:1", 1, False, "kvtuner-search 0.1.0", "0.5.14", layers, heads, per_token, 50, 51 * per_token
    )


def world(tp: int, pp: int) -> list[RankReport]:
    """All ranks of a server: stage by stage, then by heads; heads are repeated where there are more ranks."""
    found = []
    for stage in range(pp):
        for rank in range(tp):
            width = max(1, HEADS // tp)
            head = rank * width if tp <= HEADS else rank // (tp // HEADS)
            layers = (stage * LAYERS // pp, (stage + 1) * LAYERS // pp)
            found.append(report(len(found), layers, (head, head + width)))
    return found


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 3), (2, 2), (8, 3)])
def test_every_arrangement_that_stores_all_agrees(tp: int, pp: int) -> None:
    check(world(tp, pp), LAYERS, HEADS)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: replace(r, profile_digest="sha256:2"), "rank 0 has profile_digest=sha256:1, rank 3 has sha256:2"),
        (lambda r: replace(r, layout_version=2), "layout_version=1, rank 3 has 2"),
        (lambda r: replace(r, tool="kvtuner-search 9"), "tool=kvtuner-search 0.1.0, rank 3 has kvtuner-search 9"),
        (lambda r: replace(r, sglang="0.5.23"), "sglang=0.5.14, rank 3 has 0.5.23"),
        (lambda r: replace(r, as_stored=True), "as_stored=False, rank 3 has True"),
        (lambda r: replace(r, tokens=49), "tokens=50, rank 3 has 49"),
        (lambda r: replace(r, pool_bytes=1), "ranks 2 and 3 hold layers 3 to 5 in 30600 and 1 bytes"),
        (lambda r: replace(r, layers=(2, LAYERS)), "another stage holds layer 2 too"),
        (lambda r: replace(r, heads=(0, 2)), "layer 3 is not stored completely"),
    ],
)
def test_a_rank_that_differs_stops_all(change: Callable[[RankReport], RankReport], text: str) -> None:
    reports = world(2, 2)
    with pytest.raises(ServingError, match=text):
        check([*reports[:3], change(reports[3])], LAYERS, HEADS)


def test_a_missing_stage_is_noticed() -> None:
    with pytest.raises(ServingError, match="layer 3 is not stored completely by the 2 ranks"):
        check(world(2, 2)[:2], LAYERS, HEADS)


def test_reports_are_exchanged_and_a_silent_rank_is_named() -> None:
    store, reports = HashStore(), world(2, 2)
    found: dict[int, list[RankReport]] = {}

    def run(rank: int) -> None:
        found[rank] = exchange(reports[rank], len(reports), store, timeout=30)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(reports))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(len(reports)), reports)
    silent = HashStore()
    silent.set("kvtuner/2", "{}")
    with pytest.raises(ServingError, match=r"rank 1, 3 of 4 did not report what it serves within 0\.2 s"):
        exchange(reports[0], 4, silent, timeout=0.2)
