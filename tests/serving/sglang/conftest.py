"""Prompts, and what the offline packed reference makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from offline_packed import COUNT, Greedy, OfflinePacked

PAIRS = 10  # codes in a recall prompt, about 180 tokens


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Token ids: free text, code, sums, and codes to be recalled, from 2 to about 180 tokens."""
    from transformers import AutoTokenizer

    from kvtuner_search.data.tasks import recall, stream
    from kvtuner_search.models.reference_model import reference_model_path

    tokenizer = AutoTokenizer.from_pretrained(reference_model_path())
    texts = [
        "Once upon a time",
        "The quick brown fox",
        "import os\n\ndef main(",
        "The language reference describes",
        "Question: What is 12 + 30?\nAnswer: ",
    ]
    for seed in range(4):
        document = recall(stream("recall", "test", seed), pairs=PAIRS)
        texts.append(document.text[: document.answers[0][0]])
    return [tokenizer(text)["input_ids"] for text in texts]


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
