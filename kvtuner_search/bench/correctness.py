"""Checks that must pass before any speed is measured, one request at a time.

No tokenizer is needed: prompts are token ids, and the likelihood is that of the server's own text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from kvtuner_search.bench.record import Check, Model
from kvtuner_search.profile.schema import Profile
from kvtuner_search.servers.client import Answer, Client, Request
from kvtuner_search.servers.facts import Facts
from kvtuner_search.servers.transport import ServerError

PROMPTS: Final = 3
PROMPT_TOKENS: Final = 32
ANSWER_TOKENS: Final = 16
SAME: Final = 0.25  # nats; the same prompt's first token, twice: rounding may decide a tie, but not change it this much


def check_profile(profile: Profile | None, facts: Facts) -> Check:
    """Whether the server has the requested profile."""
    serves = "a 16-bit cache" if facts.profile_digest is None else f"profile {facts.profile_digest[:19]}…"
    if profile is None:
        return Check(name="profile", passed=True, detail=f"the server has {serves}; no profile was requested")
    return Check(
        name="profile",
        passed=facts.profile_digest == profile.digest,
        detail=f"the server has {serves}; requested: {profile.name}, {profile.digest[:19]}…",
    )


async def check_answers(client: Client, prompts: Sequence[Sequence[int]], model: Model) -> list[Check]:
    """Checks ``answers`` and ``likelihood``. A server that does not answer fails them; nothing is raised.

    Args:
        client: of the server.
        prompts: PROMPTS different lists of token ids.
        model: for its vocabulary, and whether its weights are random.
    """
    answers: list[tuple[Answer, Answer]] = []
    try:
        for prompt in prompts:
            request = Request(tuple(prompt), max_new_tokens=ANSWER_TOKENS, output_logprobs=True)
            pair = []
            for _ in range(2):
                await client.flush()  # otherwise the second answer may come from the first's prefix
                pair.append((await client.generate(request))[0])
            answers.append((pair[0], pair[1]))
    except ServerError as error:
        return [Check(name="answers", passed=False, detail=str(error))]
    checks = [_judge_answers(answers)]
    try:
        scored = []
        for prompt, (answer, _) in zip(prompts, answers, strict=True):
            await client.flush()
            whole = (*prompt, *answer.output_ids)
            scored.append((await client.generate(Request(whole, logprob_start=0)))[0].input_logprobs)
    except ServerError as error:
        return [*checks, Check(name="likelihood", passed=False, detail=str(error))]
    return [*checks, _judge_likelihood(scored, model)]


def _judge_answers(answers: Sequence[tuple[Answer, Answer]]) -> Check:
    said = {(first.output_ids, first.output_logprobs) for first, _ in answers}
    moved = max(abs(first.output_logprobs[0] - second.output_logprobs[0]) for first, second in answers)
    repeated = sum(first.output_ids == second.output_ids for first, second in answers)
    faults = []
    if len(said) < len(answers):
        faults.append("different prompts got the same answer: one prompt's answer was returned for another")
    if not moved <= SAME:
        faults.append(
            "the same prompt, sent twice, was answered with tokens of different likelihood: answers are not greedy"
        )
    seen = (
        f"{len(answers)} greedy prompts, twice each: {ANSWER_TOKENS} tokens came back each time, {repeated} of {len(answers)}"
        f" repeated token by token, the first token's log-probability within {moved:.3g} nats"
    )
    return Check(name="answers", passed=not faults, detail="; ".join([seen, *faults]))


def _judge_likelihood(scored: Sequence[Sequence[float]], model: Model) -> Check:
    """The server's own greedy continuations, scored again as part of a prompt.

    Greedy tokens are each at least as likely as 1 / vocabulary. If decoding read a broken cache, the tokens are not what the model would
    write, and scoring them as a prompt, which recomputes their keys, shows it.
    """
    own = [value for logprobs in scored for value in logprobs[-ANSWER_TOKENS:]]
    nll, uniform = -sum(own) / len(own), math.log(model.vocabulary)
    seen = f"the server's own continuations, scored again as a prompt: {nll:.3f} nats a token, uniform is {uniform:.3f}"
    if model.dummy_weights:
        return Check(
            name="likelihood", passed=True, detail=f"{seen}; finite, the only test possible with random weights"
        )
    fault = (
        "" if nll < uniform else ": decode reads something else than was stored, or these are not the model's weights"
    )
    return Check(name="likelihood", passed=not fault, detail=seen + fault)


def check_totals(returned: int, before: float | None, after: float | None) -> list[Check]:
    """Whether the server's own counter of generated tokens covers what was counted here; empty without metrics.

    The server may have generated more: warm-up, answers that failed here, and other clients count there too.

    Args:
        returned: tokens that came back, warm-up excluded.
        before, after: that counter around them; None: it was not read.
    """
    if before is None or after is None or not returned:
        return []
    detail = f"{returned} tokens came back; the server's own counter rose by {after - before:.0f}"
    return [Check(name="totals", passed=returned <= after - before, detail=detail)]
