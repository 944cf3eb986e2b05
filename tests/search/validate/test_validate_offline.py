"""A server against the offline evaluation that is computed twice: a correct one passes, and faults that real servers have do not.

The servers here are the offline evaluation itself, in bfloat16 and rounded differently from both computations, with a fault planted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvtuner_search.data import Sample, Split, load_evaluation
from kvtuner_search.evaluation.offline import open_profile
from kvtuner_search.evaluation.stored import PrefilledCache, stored_cache
from kvtuner_search.models.attention import Tap
from kvtuner_search.models.load import ModelOptions, load_model
from kvtuner_search.models.runner import Runner
from kvtuner_search.profile.validation import Capacity, Check, Semantics
from kvtuner_search.validate import figures
from kvtuner_search.validate.explained import Distance, Explained, ExplainedSide, notes_on_rounding
from kvtuner_search.validate.judge import judge
from kvtuner_search.validate.measure import ServerAnswers
from kvtuner_search.validate.options import Limits
from kvtuner_search.validate.twice import compute, rounded_anew

PROFILES = Path(__file__).parents[3] / "profiles" / "reference"
PROMPT, NEW = 48, 8  # tokens of a prompt and of its continuation
LAYER = 2  # where a fault is


class Lab:
    """The reference model with its 4-bit profile, prompts, and what two correct servers answer, a stock one and one with the profile."""

    def __init__(self) -> None:
        loaded = load_model(ModelOptions(dtype="bfloat16", device="cpu"))
        self.runner = Runner(loaded)
        self.tap = self.profile("reference-4.00bit")
        self.split = load_evaluation(["text", "list"], loaded.tokenizer, seed=0, samples=8, length=192)
        self.prompts = [sample.tokens[:PROMPT] for sample in self.split.samples]
        self.stock, self.correct = (self.side(tap) for tap in (None, self.tap))

    def profile(self, name: str) -> Tap:
        profile, centres = open_profile(PROFILES / f"{name}.json")
        return stored_cache(tuple(profile.layer_specs()), centres)

    def side(self, tap: Tap | None) -> ExplainedSide:
        """A correct server whose attention reads what ``tap`` returns, and both offline computations of what it was asked."""
        with rounded_anew(self.runner, 1):
            tokens = torch.tensor(self.prompts)
            for _ in range(NEW):
                state = self.runner.hidden(tokens, tap)[:, -1]
                tokens = torch.cat((tokens, self.runner.log_probabilities(state).argmax(-1, keepdim=True)), 1)
        chosen = [tuple(row[PROMPT:].tolist()) for row in tokens]
        twice = compute(self.runner, tap, self.split, self.prompts, chosen, batch_tokens=2048)
        outcome = ServerAnswers([], [], chosen, [], [], [])
        return ExplainedSide(replace(outcome, **self.answers(outcome, extend=tap, decode=tap)), twice)

    def answers(self, asked: ServerAnswers, *, extend: Tap | None, decode: Tap | None) -> dict[str, Any]:
        """What a server answers to the same questions whose attention reads what these return, in prompts and in decode."""
        chosen = [
            Sample("chosen", (*prompt, *more), ((PROMPT, PROMPT + NEW),), is_task=False)
            for prompt, more in zip(self.prompts, asked.continuations, strict=True)
        ]
        return {
            "scored": self.score(extend, self.split.samples, 2),
            "decoded": self.score(decode, chosen, 3),
            "rescored": self.score(extend, chosen, 4),
        }

    def score(self, tap: Tap | None, samples: Sequence[Sample], seed: int) -> list[np.ndarray]:
        found = []
        with rounded_anew(self.runner, seed):
            for sample in samples:
                at = torch.tensor([p for start, end in sample.scored for p in range(start, end)])
                tokens = torch.tensor(sample.tokens)
                logs = self.runner.log_probabilities(self.runner.hidden(tokens[None], tap)[0, at - 1])
                found.append(logs.gather(1, tokens[at, None])[:, 0].double().numpy())
        return found

    def checks(self, extend: Tap | None, decode: Tap | None) -> list[Check]:
        """The checks of a server in the profile's place whose attention reads what these return."""
        answers = self.answers(self.correct.outcome, extend=extend, decode=decode)
        ours = replace(self.correct, outcome=replace(self.correct.outcome, **answers))
        greedy = figures.greedy_agreement([(1,), (1,)], [(1,), (1,)])
        capacity = Capacity(baseline_tokens=1, tokens=1, ratio=1.0, predicted=1.0, comparable=True)
        semantics = Semantics(method="as-stored-extend", tokens=1, difference=0.0, baseline_difference=0.0)
        found = judge(Limits(), [], [], greedy, capacity, semantics, Explained(ours, self.stock))
        assert {check.name for check in found} >= {"decode-semantics", "offline.distance", "offline.effect"}
        return found

    def failed(self, extend: Tap | None, decode: Tap | None) -> set[str]:
        """Names of those that do not hold."""
        return {check.name for check in self.checks(extend, decode) if not check.passed}


@pytest.fixture(scope="module")
def lab() -> Lab:
    return Lab()


def faulty(tap: Tap, fault: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tap:
    """``fault(stored key, stored value)`` in one layer."""

    def read(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Any:
        stored = tap(layer, query, key, value)
        return fault(stored[0], stored[1]) if layer == LAYER else stored

    return read


def test_a_correct_server_passes(lab: Lab) -> None:
    assert lab.failed(lab.tap, lab.tap) == set()


def test_rounding_is_most_of_what_differs(lab: Lab) -> None:
    """The second computation is as far from the first as a server is, and shows as much of the profile's effect."""
    explained = Explained(lab.correct, lab.stock)
    for found, expected in explained.scored_distances():
        assert found == pytest.approx(expected, rel=0.15)
    share = explained.effect()
    assert share is not None
    assert share.low < 1.05
    assert share.high > 0.95
    assert len(notes_on_rounding(explained)) == 1


@pytest.mark.parametrize("name", ["reference-3.25bit", "reference-4.50bit"])
def test_a_server_with_another_profile_fails(lab: Lab, name: str) -> None:
    other = lab.profile(name)
    assert {"offline.distance", "offline.effect"} & lab.failed(other, other)


def test_a_server_that_reads_16_bits_fails(lab: Lab) -> None:
    """Though it is nearer to the truth than the profile."""
    checks = {check.name: check for check in lab.checks(None, None)}
    assert not checks["offline.distance"].passed
    assert not checks["offline.effect"].passed
    assert checks["offline.effect"].value == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize(
    "fault",
    [
        lambda k, v: (k, v * 0),
        lambda k, v: (k.roll(1, 1), v),
        lambda k, v: (k, v * 1.5),
        lambda k, v: (k * 2, v),
    ],
    ids=["values zero", "keys a row late", "values scaled", "keys scaled"],
)
def test_a_fault_in_one_layer_fails(lab: Lab, fault: Callable[..., tuple[Tensor, Tensor]]) -> None:
    broken = faulty(lab.tap, fault)
    assert "offline.distance" in lab.failed(broken, broken)


def test_a_fault_of_decode_alone_fails(lab: Lab) -> None:
    broken = faulty(lab.tap, lambda k, v: (k, v * 0))
    failed = lab.failed(lab.tap, broken)
    assert {"decode-semantics", "offline.decode-distance"} <= failed
    assert "offline.distance" not in failed


def prefilled(tap: Tap) -> PrefilledCache:
    """For the lab's prompts."""
    found = PrefilledCache(tap)
    found.begin(torch.tensor([PROMPT]))
    return found


def test_a_server_whose_prefill_reads_prompts_as_computed(lab: Lab) -> None:
    """Its continuations follow prompts that were read as computed; against prompts read as stored, it differs by more than rounding."""
    tap, chosen = prefilled(lab.tap), lab.correct.outcome.continuations
    outcome = replace(lab.correct.outcome, **lab.answers(lab.correct.outcome, extend=lab.tap, decode=tap))
    distances = {}
    for as_stored in (True, False):
        twice = compute(lab.runner, lab.tap, lab.split, lab.prompts, chosen, batch_tokens=2048, as_stored=as_stored)
        ours = ExplainedSide(outcome, twice)
        distances[as_stored] = Distance.of(ours.decoded(), twice.decoded)
        bound = Explained(ours, lab.stock).decode_distance()
        assert as_stored or bound.value <= bound.limit
    assert distances[False].found < 1.1 * distances[False].explained
    assert distances[True].found > 1.2 * distances[False].found


def test_a_prefill_reads_its_own_tokens_and_later_tokens_read_the_cache() -> None:
    """Against attention written out for each query, with prompts of several lengths."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 6, heads, 8) for heads in (4, 2, 2))
    tap = PrefilledCache(lambda layer, q, k, v: (k.round(), v.round()))
    lengths = [0, 4, 6]
    tap.begin(torch.tensor(lengths))
    keys, values, visible, at = tap(0, query, key, value)
    assert at.tolist() == [*range(6), *range(6)]
    found = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, keys, values)), attn_mask=visible, enable_gqa=True
    ).transpose(1, 2)
    for row, length in enumerate(lengths):
        for at in range(6):
            seen_key, seen_value = (x[row, : at + 1] if at < length else x[row, : at + 1].round() for x in (key, value))
            for head in range(4):
                weight = (seen_key[:, head // 2] @ query[row, at, head] / 8**0.5).softmax(0)
                assert torch.allclose(found[row, at, head], weight @ seen_value[:, head // 2], atol=1e-5)


def test_both_computations_are_of_the_same_tokens(lab: Lab) -> None:
    """Row 0 is the offline evaluation to the bit; the order of the samples is kept, whatever was batched together."""
    sample = lab.split.samples[3]
    logs = lab.runner.log_probabilities(lab.runner.hidden(torch.tensor([sample.tokens]), lab.tap)[0])
    at = [p for start, end in sample.scored for p in range(start, end)]
    expected = np.array([float(logs[p - 1, sample.tokens[p]]) for p in at])
    alone = compute(lab.runner, lab.tap, Split("test", (sample,)), [], [], batch_tokens=1).scored[0]
    assert np.array_equal(alone[0], expected)
    assert not np.array_equal(alone[1], expected)
    together = lab.correct.twice.scored
    assert np.abs(together[3][0] - expected).mean() < 0.2
    assert [part.shape for part in together] == [(2, s.scored_tokens) for s in lab.split.samples]


def test_rounding_anew_moves_numbers_by_one_step(lab: Lab) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    layer = lab.runner.layers[1]
    before: list[Tensor] = []
    first = layer.register_forward_pre_hook(
        lambda _, a, n: before.append(a[0] if a else n["hidden_states"]), with_kwargs=True
    )
    with rounded_anew(lab.runner, 0):
        last = layer.register_forward_pre_hook(
            lambda _, a, n: seen.append((before[-1], a[0] if a else n["hidden_states"])), with_kwargs=True
        )
        lab.runner.hidden(torch.tensor([lab.split.samples[0].tokens]))
    first.remove()
    last.remove()
    ((old, new),) = seen
    moved = old != new
    assert 0.15 < float(moved.float().mean()) < 0.18
    ends = torch.stack([torch.nextafter(old, torch.full_like(old, end)) for end in (-torch.inf, torch.inf)])
    assert bool((moved <= (ends == new).any(0)).float().mean() > 0.995)  # below a power of two a step is half as long


def test_ids_of_both_computations_agree_with_what_they_say(lab: Lab) -> None:
    twice = lab.stock.twice
    assert len(twice.own) == len(lab.prompts)
    for given, own, same in zip(twice.decoded, twice.own, twice.same, strict=True):
        assert (own[1] >= given[1]).all(), "the second computation ranks its own token first"
        assert (own[0][same[1]] >= given[0][same[1]]).all()
        assert same.shape == given.shape == (2, NEW)
