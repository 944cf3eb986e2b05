"""Pipeline stages: how layers are divided, and what a setting then costs."""

from __future__ import annotations

from itertools import accumulate


def pipeline_cost(layer_bytes: list[int], stages: int) -> int:
    """Bytes that limit token capacity: the heaviest stage's times ``stages``, under the best contiguous partition of the layers.

    Every stage has the same memory and must hold every token, so the lighter stages' surplus is unused.
    """
    return stages * _lightest(layer_bytes, stages)


def balanced_partition(layer_bytes: list[int], stages: int) -> list[tuple[int, int]]:
    """Half-open layer ranges of ``stages`` non-empty stages whose heaviest is as light as possible.

    Among those, the ranges whose lengths have the least sum of squares; among these, the one with the shortest early stages.
    """
    count = len(layer_bytes)
    prefix = [0, *accumulate(layer_bytes)]
    limit = _lightest(layer_bytes, stages)
    # best[start]: least sum of squares for layers start.. in the stages that are left, and the first of them's end
    best: list[tuple[int, int] | None] = [None] * count + [(0, count)]
    chosen = []
    for _ in range(stages):
        best = [
            min(
                (
                    ((end - start) ** 2 + rest[0], end)
                    for end in range(start + 1, count + 1)
                    if (rest := best[end]) is not None and prefix[end] - prefix[start] <= limit
                ),
                default=None,
            )
            for start in range(count)
        ] + [None]
        chosen.append(best)
    ranges, start = [], 0
    for row in reversed(chosen):
        found = row[start]
        assert found is not None  # _lightest found a partition within the limit
        ranges.append((start, found[1]))
        start = found[1]
    return ranges


def _lightest(layer_bytes: list[int], stages: int) -> int:
    """Bytes of the heaviest stage under the best contiguous partition."""
    count = len(layer_bytes)
    prefix = [0, *accumulate(layer_bytes)]
    row = prefix[:]  # row[end]: the heaviest stage's bytes for layers ..end in the stages so far
    for stage in range(1, stages):
        row = [
            min((max(row[start], prefix[end] - prefix[start]) for start in range(stage, end)), default=prefix[-1] + 1)
            for end in range(count + 1)
        ]
    return row[count]
