"""Samples, splits and datasets: spans, digests, and the check that splits share nothing."""

from __future__ import annotations

import pytest

from kvtuner_search.data import Dataset, Sample, Split
from kvtuner_search.errors import DataError


def sample(tokens: tuple[int, ...], source: str = "a", scored: tuple[tuple[int, int], ...] | None = None) -> Sample:
    return Sample(source, tokens, ((1, len(tokens)),) if scored is None else scored, is_task=False)


@pytest.mark.parametrize("scored", [(), ((0, 2),), ((1, 1),), ((2, 1),), ((1, 5),), ((2, 4), (3, 4)), ((3, 4), (1, 2))])
def test_impossible_spans_are_refused(scored: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"span|no scored token"):
        sample((7, 8, 9, 10), scored=scored)


def test_counts() -> None:
    split = Split("search", (sample((1, 2, 3)), sample((4, 5, 6, 7), scored=((1, 2), (3, 4)))))
    assert split.tokens == 7
    assert [s.scored_tokens for s in split.samples] == [2, 2]


def test_digest_depends_on_names_tokens_spans_and_order_only() -> None:
    base = (sample((1, 2, 3)), sample((4, 5)))
    digest = Split("search", base).digest
    assert digest.startswith("sha256:")
    assert len(digest) == len("sha256:") + 64
    assert Split("test", base).digest == digest  # the split's own name is recorded beside the digest
    others = [
        (sample((1, 2, 4)), base[1]),
        (sample((1, 2, 3), source="b"), base[1]),
        (sample((1, 2, 3), scored=((2, 3),)), base[1]),
        (base[1], base[0]),
        (sample((1, 2, 3, 4, 5)),),
        base[:1],
    ]
    digests = {Split("search", samples).digest for samples in others}
    assert len(digests) == len(others)
    assert digest not in digests


def test_by_source_keeps_every_sample_under_its_name() -> None:
    samples = (sample((1, 2)), sample((3, 4), source="b"), sample((5, 6)))
    groups = Split("selection", samples).by_source()
    assert {name: [s.tokens for s in split.samples] for name, split in groups.items()} == {
        "a": [(1, 2), (5, 6)],
        "b": [(3, 4)],
    }
    assert {split.name for split in groups.values()} == {"selection"}


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 2)])
def test_a_sequence_in_two_splits_is_an_error(pair: tuple[int, int]) -> None:
    samples = [[sample((1, 2))], [sample((3, 4))], [sample((5, 6))]]
    samples[pair[1]].append(samples[pair[0]][0])
    with pytest.raises(DataError, match="held out") as raised:
        Dataset(*(Split(n, tuple(s)) for n, s in zip(("search", "selection", "test"), samples, strict=True)))
    assert "\n" not in str(raised.value)


def test_a_sequence_twice_in_one_split_is_allowed() -> None:
    twice = Split("search", (sample((1, 2)), sample((1, 2))))
    assert len(Dataset(twice, Split("selection", ()), Split("test", ())).search.samples) == 2
