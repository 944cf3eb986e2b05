"""The one Pareto front: of trials and of what the report draws. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def pareto_front(items: Iterable[T], cost: Callable[[T], float], loss: Callable[[T], float]) -> list[T]:
    """The items that no other one beats on both cost and loss, cheapest first; of equals, the first given.

    Example:
        >>> pareto_front([(3, 0.1), (1, 0.5), (2, 0.7)], lambda p: p[0], lambda p: p[1])
        [(1, 0.5), (3, 0.1)]
    """
    found: list[T] = []
    for item in sorted(items, key=lambda item: (cost(item), loss(item))):
        if not found or loss(item) < loss(found[-1]):
            found.append(item)
    return found
