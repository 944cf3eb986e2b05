"""Pipeline stages: how layers are divided, and what a setting then costs."""

from __future__ import annotations


def pipeline_cost(layer_bytes: list[int], stages: int) -> int:
    """Bytes that limit token capacity: the heaviest stage's times ``stages``, under the best contiguous partition of the layers.

    Every stage has the same memory and must hold every token, so the lighter stages' surplus is of no use.
    """
    return stages * max(sum(layer_bytes[a:b]) for a, b in balanced_partition(layer_bytes, stages))


def balanced_partition(layer_bytes: list[int], stages: int) -> list[tuple[int, int]]:
    """Half-open layer ranges of ``stages`` non-empty stages whose heaviest is as light as possible."""
    count = len(layer_bytes)
    prefix = [0]
    for nbytes in layer_bytes:
        prefix.append(prefix[-1] + nbytes)
    best: list[list[tuple[int, int]]] = [[(prefix[end], 0) for end in range(count + 1)]]
    for stage in range(1, stages):
        previous = best[-1]
        row = [(prefix[-1] + 1, 0)] * (count + 1)
        for end in range(stage + 1, count + 1):
            row[end] = min((max(previous[start][0], prefix[end] - prefix[start]), start) for start in range(stage, end))
        best.append(row)
    ranges, end = [], count
    for stage in range(stages - 1, -1, -1):
        start = best[stage][end][1]
        ranges.append((start, end))
        end = start
    return ranges[::-1]
