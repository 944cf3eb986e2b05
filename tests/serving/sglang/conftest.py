"""Prompts, and what the offline packed reference makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from offline_packed import COUNT, Greedy, OfflinePacked
from serving_checks.greedy import prompts as make_prompts


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Token ids: free text, code, sums, and codes to be recalled, from 2 to about 180 tokens."""
    return make_prompts(recalls=4)


@pytest.fixture(scope="session")
def offline(prompts: Sequence[Sequence[int]]) -> Callable[..., list[Greedy]]:
    """``offline(profile, dtype)``: greedy tokens after every prompt, each computed once."""
    import torch

    known: dict[tuple[Path, str], list[Greedy]] = {}

    def greedy(profile: Path, dtype: str) -> list[Greedy]:
        if (profile, dtype) not in known:
            reference = OfflinePacked(profile, getattr(torch, dtype))
            known[profile, dtype] = [reference.greedy(prompt, COUNT) for prompt in prompts]
        return known[profile, dtype]

    return greedy
