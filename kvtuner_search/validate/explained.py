"""How much of the difference between a server and the offline evaluation rounding explains, and the limits that follow.

Each figure is computed twice in the same way: for the server against the offline evaluation, and for the second offline computation
against the first (:mod:`kvtuner_search.validate.twice`); the second plays the server and is known to be correct. The latter figure is
what rounding explains, with all its consequences: codes that change, and tokens that are chosen differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtuner_search.evaluation.statistics import CONFIDENCE, RESAMPLES, Interval, paired_ratio
from kvtuner_search.profile.validation import OfflineAgreement
from kvtuner_search.validate.measure import ServerAnswers
from kvtuner_search.validate.twice import Floats, Twice

FLOOR: Final = 0.005  # nats a token that are always allowed: a tenth of what a profile may cost by default
SLACK: Final = 0.25  # fraction by which a distance may exceed what rounding explains
TIMES: Final = (
    2.0  # factor over two correct computations allowed for a mean, a share of tokens, or the stock server's distance
)
TOKENS: Final = 0.01  # share of the greedy tokens that is always allowed
LEAST: Final = (
    0.1  # two correct computations must share this much of the profile's effect, otherwise it cannot be tested
)


class Bound(NamedTuple):
    """The value that is compared with a limit, and the limit."""

    value: float
    limit: float


class Distance(NamedTuple):
    """Mean absolute difference of the log-probabilities of the same tokens, nats a token."""

    found: float  # of the judged computation
    explained: float  # of the two offline computations

    @classmethod
    def of(cls, found: Sequence[Floats], twice: Sequence[Floats]) -> Distance:
        """Of differences [n] and of two computations [2, n], a sample each."""
        count = sum(len(part) for part in found)
        return cls(float(_size(found).sum()) / count, float(_size(_between(twice)).sum()) / count)


@dataclass(frozen=True)
class ExplainedSide:
    """One server's answers, and the two offline computations of the same cache on the same tokens."""

    outcome: ServerAnswers
    twice: Twice

    def scored(self) -> list[Floats]:
        """Server minus offline, log-probabilities of the scored tokens."""
        return [ours - theirs[0] for ours, theirs in zip(self.outcome.scored, self.twice.scored, strict=True)]

    def decoded(self) -> list[Floats]:
        """The same of the tokens that the server chose."""
        return [ours - theirs[0] for ours, theirs in zip(self.outcome.decoded, self.twice.decoded, strict=True)]

    def paths(self) -> list[Floats]:
        """The server's decode minus its extend on the tokens that it chose."""
        return [a - b for a, b in zip(self.outcome.decoded, self.outcome.rescored, strict=True)]

    def agreement(self, cache: Literal["profile", "16bit"]) -> OfflineAgreement:
        """For the block: the server against the offline evaluation."""
        return _agreement(cache, self.scored(), self.decoded(), [same[0] for same in self.twice.same])

    def played(self, cache: Literal["profile", "16bit"]) -> OfflineAgreement:
        """The same with the second offline computation in the server's place; it too is scored on tokens that it ranks first itself."""
        own, same = _between(self.twice.own), [same[1] for same in self.twice.same]
        return _agreement(cache, _between(self.twice.scored), own, same)


@dataclass(frozen=True)
class Explained:
    """Both servers against their offline evaluations."""

    profile: ExplainedSide
    stock: ExplainedSide

    def rows(self) -> list[OfflineAgreement]:
        """For the block."""
        return [self.profile.agreement("profile"), self.stock.agreement("16bit")]

    def path(self) -> Bound:
        """Decode against extend on the profile's server."""
        wide = Distance.of(self.stock.paths(), self.stock.twice.decoded)
        return _distance(self.profile.paths(), self.profile.twice.decoded, wide)

    def distance(self) -> Bound:
        """The profile's server against offline, scored tokens."""
        return _distance(self.profile.scored(), self.profile.twice.scored, self.scored_distances()[1])

    def decode_distance(self) -> Bound:
        """The same, tokens that the server chose."""
        wide = Distance.of(self.stock.decoded(), self.stock.twice.decoded)
        return _distance(self.profile.decoded(), self.profile.twice.decoded, wide)

    def stock_distance(self) -> Bound:
        """The stock server against offline, scored tokens. Its noise widens the other limits, so it has a limit of its own."""
        found, explained = self.scored_distances()[1]
        return Bound(found, TIMES * explained + FLOOR)

    def scored_distances(self) -> tuple[Distance, Distance]:
        """Of the profile's and of the stock server, scored tokens."""
        first, second = (Distance.of(side.scored(), side.twice.scored) for side in (self.profile, self.stock))
        return first, second

    def nll(self) -> Bound:
        """Mean likelihood of the scored tokens."""
        ours, played = self.profile.agreement("profile"), self.profile.played("profile")
        return Bound(worse(ours.ci_low, ours.ci_high), TIMES * worse(played.ci_low, played.ci_high) + FLOOR)

    def decode_nll(self) -> Bound:
        """Mean likelihood of the chosen tokens, which is higher for the server that chose them."""
        ours, played = self.profile.agreement("profile"), self.profile.played("profile")
        return Bound(
            worse(ours.decode_low, ours.decode_high), TIMES * worse(played.decode_low, played.decode_high) + FLOOR
        )

    def tokens(self) -> Bound:
        """Share of the chosen tokens that the offline evaluation ranks first too; at least the limit."""
        ours, played = (side("profile").token_agreement for side in (self.profile.agreement, self.profile.played))
        return Bound(ours, 1 - TIMES * (1 - played) - TOKENS)

    def effect(self) -> Interval | None:
        """Share of the profile's effect, token by token, that the server shows: about 1 if it is correct, 0 if it reads 16 bits.

        The effect of a computation is the profile's log-probability of a scored token minus the 16-bit one. The share is the part
        of the offline effect that the server's shows, over the part that the second computation's shows. None if the latter is too small.
        """
        ours, stock = self.profile, self.stock
        offline, second = (
            [a[row] - b[row] for a, b in zip(ours.twice.scored, stock.twice.scored, strict=True)] for row in (0, 1)
        )
        server = [a - b for a, b in zip(ours.outcome.scored, stock.outcome.scored, strict=True)]
        held = [_products(offline, other) for other in (server, second, offline)]
        picks = np.random.default_rng(0).integers(0, len(server), size=(RESAMPLES, len(server)))
        found, shared, whole = (part[picks].sum(1) for part in held)
        tail = (1 - CONFIDENCE) / 2
        if not held[2].any() or np.quantile(shared - LEAST * whole, tail) <= 0:
            return None
        low, high = np.quantile(found / shared, [tail, 1 - tail])
        return Interval(float(held[0].sum() / held[1].sum()), float(low), float(high))


def notes_on_rounding(explained: Explained) -> list[str]:
    """How the limits were derived, for the block."""
    profile, stock = explained.scored_distances()
    notes = [
        f"two correct computations of this cache differ by {profile.explained:.2g} nats a token on the scored tokens (16 bits:"
        f" {stock.explained:.2g}), the server and the offline evaluation {profile.found:.2g} ({stock.found:.2g})"
    ]
    if explained.effect() is None:
        notes.append(
            "the profile's effect on a token's likelihood is lost in rounding, so the server was not tested for it"
        )
    return notes


def worse(low: float, high: float) -> float:
    """The end of an interval that is farther from zero."""
    return max(abs(low), abs(high))


def _size(parts: Sequence[Floats]) -> Floats:
    """[samples]: sums of absolute values."""
    return np.array([np.abs(part).sum() for part in parts], dtype=np.float64)


def _products(a: Sequence[Floats], b: Sequence[Floats]) -> Floats:
    """[samples]: sums of products."""
    return np.array([x @ y for x, y in zip(a, b, strict=True)], dtype=np.float64)


def _between(twice: Sequence[Floats]) -> list[Floats]:
    """The second computation minus the first."""
    return [part[1] - part[0] for part in twice]


def _weights(parts: Sequence[NDArray[np.generic]]) -> Floats:
    return np.array([len(part) for part in parts], dtype=np.float64)


def _distance(found: Sequence[Floats], twice: Sequence[Floats], stock: Distance) -> Bound:
    """The upper end of a distance, paired by sample with what rounding explains, against that and a quarter.

    A server rounds in other places than the offline evaluation. If the stock server is farther from its own evaluation than rounding
    explains, the explained distance grows in the same ratio.
    """
    ratio = max(1.0, stock.found / stock.explained) if stock.explained else 1.0
    explained, weights = ratio * _size(_between(twice)), _weights(found)
    mean = float(explained.sum() / weights.sum())
    return Bound(mean + paired_ratio(_size(found) - explained, weights).high, (1 + SLACK) * mean + FLOOR)


def _agreement(
    cache: Literal["profile", "16bit"],
    scored: Sequence[Floats],
    decoded: Sequence[Floats],
    same: Sequence[NDArray[np.bool_]],
) -> OfflineAgreement:
    """Of differences of log-probabilities, whose negative is that of the negative log-likelihoods."""
    text, chosen = (
        paired_ratio(np.array([-part.sum() for part in parts], dtype=np.float64), _weights(parts))
        for parts in (scored, decoded)
    )
    return OfflineAgreement(
        cache=cache,
        samples=len(scored),
        tokens=int(_weights(scored).sum()),
        nll_difference=text.estimate,
        ci_low=text.low,
        ci_high=text.high,
        generated=int(_weights(decoded).sum()),
        token_agreement=float(np.concatenate(same).mean()),
        decode_difference=chosen.estimate,
        decode_low=chosen.low,
        decode_high=chosen.high,
        confidence=CONFIDENCE,
    )
