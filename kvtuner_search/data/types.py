"""Calibration data as token ids: samples, splits, and the check that splits share nothing."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from kvtuner_search.errors import DataError

SplitName = Literal["search", "selection", "test"]
SPLITS: Final[tuple[SplitName, ...]] = ("search", "selection", "test")


@dataclass(frozen=True)
class Sample:
    """One sequence that is fed to the model from its first token.

    Raises:
        ValueError: if a span is empty, out of order, or outside 1 .. len(tokens).
    """

    source: str  # name of the source, e.g. recall
    tokens: tuple[int, ...]  # token ids
    scored: tuple[tuple[int, int], ...]  # half-open spans of positions that are predicted from the one before
    is_task: bool  # whether "every scored token right under teacher forcing" is a meaningful accuracy

    def __post_init__(self) -> None:
        last = 1  # nothing precedes position 0, so it is never predicted
        for start, end in self.scored:
            if not last <= start < end <= len(self.tokens):
                raise ValueError(f"span {(start, end)} of {self.source} is not in {last}..{len(self.tokens)}")
            last = end
        if not self.scored:
            raise ValueError(f"a sample of {self.source} has no scored token")

    @property
    def scored_tokens(self) -> int:
        """Number of positions whose prediction is scored."""
        return sum(end - start for start, end in self.scored)


@dataclass(frozen=True)
class Split:
    """The samples of one split, source by source in the order in which the sources were named."""

    name: SplitName
    samples: tuple[Sample, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all samples, scored or not."""
        return sum(len(sample.tokens) for sample in self.samples)

    @property
    def digest(self) -> str:
        """``sha256:`` and the hex digest over the samples' source names, token ids and spans, in order."""
        state = hashlib.sha256()
        for sample in self.samples:
            spans = itertools.chain.from_iterable(sample.scored)
            # One sample a line, three tab-separated fields; repr keeps tabs and newlines out of the name.
            fields = (repr(sample.source), " ".join(map(str, sample.tokens)), " ".join(map(str, spans)))
            state.update("\t".join(fields).encode() + b"\n")
        return f"sha256:{state.hexdigest()}"

    def by_source(self) -> dict[str, Split]:
        """One split of the same name for each source."""
        groups: dict[str, list[Sample]] = {}
        for sample in self.samples:
            groups.setdefault(sample.source, []).append(sample)
        return {source: Split(self.name, tuple(samples)) for source, samples in groups.items()}


@dataclass(frozen=True)
class Dataset:
    """The three splits: trials see ``search``, finalists ``selection``, and ``test`` is used once.

    Raises:
        DataError: if two splits share a sequence.
    """

    search: Split
    selection: Split
    test: Split

    def __post_init__(self) -> None:
        owner: dict[tuple[int, ...], Split] = {}
        for split in self:
            for sample in split.samples:
                other = owner.setdefault(sample.tokens, split)
                if other is not split:
                    raise DataError(
                        f"a sequence of {len(sample.tokens)} tokens from {sample.source} is in the {other.name} and the"
                        f" {split.name} split, so results would not be held out: remove duplicates from the source"
                    )

    def __iter__(self) -> Iterator[Split]:
        return iter((self.search, self.selection, self.test))
