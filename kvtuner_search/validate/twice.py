"""The offline evaluation of one cache on a server's tokens, computed twice: as it is, and rounded differently.

Two correct computations in bfloat16 do not agree: they add in different orders and round in different places. With a
quantized cache the difference grows, because a key that moves by one step of the dtype may get another code. The difference
depends on the model, the profile and the text, so it is measured: before each layer the second computation differs
from the first as if each had rounded once more, and all later rounding differs too. It then plays the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvtuner_search.data import Sample, Split
from kvtuner_search.evaluation.scorer import CHUNK_NUMBERS
from kvtuner_search.evaluation.stored import PrefilledCache
from kvtuner_search.models.attention import Tap
from kvtuner_search.models.runner import Runner

Floats = NDArray[np.float64]
MOVED: Final = (
    1 / 6
)  # of the numbers, by one step: the variance, in squared steps, between two numbers that were each rounded once
SEED: Final = 0x5EED


@dataclass(frozen=True)
class Twice:
    """Both computations of one cache; row 0 is the offline evaluation, row 1 the one that plays the server."""

    scored: list[Floats]  # a sample each, [2, n]: log-probabilities of its scored tokens
    decoded: list[Floats]  # a prompt each, [2, n]: of the tokens that the server chose
    own: list[Floats]  # a prompt each, [2, n]: of the token that row 1 ranks first at each of these positions
    same: list[NDArray[np.bool_]]  # a prompt each, [2, n]: whether row 0 ranks first the server's token, and row 1's


def compute(
    runner: Runner,
    tap: Tap | None,
    split: Split,
    prompts: Sequence[tuple[int, ...]],
    continuations: Sequence[tuple[int, ...]],
    *,
    batch_tokens: int,
    as_stored: bool = True,
    advance: Callable[..., None] = lambda *_: None,
) -> Twice:
    """Score the sequences of ``split``, and each continuation after its prompt.

    Args:
        tap: what attention reads; None is the 16-bit cache.
        prompts, continuations: token ids; a server chose the latter greedily.
        batch_tokens: padded tokens of one forward pass.
        as_stored: whether the server's prefill reads a prompt's own keys and values as stored; otherwise its continuations follow prompts that were
            read as computed.
        advance: called with the number of tokens after each pass; there are two over every token.
    """
    answers = [
        Sample("continuation", (*prompt, *more), ((len(prompt), len(prompt) + len(more)),), is_task=False)
        for prompt, more in zip(prompts, continuations, strict=True)
    ]
    scored = {i: found[0] for i, found in _passes(runner, tap, split.samples, batch_tokens, advance)}
    decoding = tap if as_stored or tap is None else PrefilledCache(tap)
    decoded = dict(_passes(runner, decoding, answers, batch_tokens, advance))
    order = range(len(answers))
    return Twice(
        scored=[scored[i] for i in range(len(split.samples))],
        decoded=[decoded[i][0] for i in order],
        own=[decoded[i][1] for i in order],
        same=[decoded[i][2] for i in order],
    )


_Read = tuple[Floats, Floats, NDArray[np.bool_]]  # [2, n] each, as in Twice: of the given tokens, of row 1's own, same


def _passes(
    runner: Runner, tap: Tap | None, samples: Sequence[Sample], batch_tokens: int, advance: Callable[..., None]
) -> Iterator[tuple[int, _Read]]:
    """Each sample's index, and the results of both computations at its scored positions."""
    for number, members in enumerate(_batches(samples, batch_tokens)):
        width = max(len(samples[index].tokens) for index in members)
        tokens = torch.zeros(len(members), width, dtype=torch.int64)  # padded on the right, which nothing attends to
        for row, index in enumerate(members):
            tokens[row, : len(samples[index].tokens)] = torch.tensor(samples[index].tokens)
        if isinstance(tap, PrefilledCache):
            tap.begin(torch.tensor([samples[index].scored[0][0] for index in members]))
        states = [runner.hidden(tokens, tap)]
        with rounded_anew(runner, SEED + number):
            states.append(runner.hidden(tokens, tap))
        for row, index in enumerate(members):
            at = torch.tensor([p for start, end in samples[index].scored for p in range(start, end)])
            hidden = [state[row, (at - 1).to(state.device)] for state in states]
            yield index, _read(runner, hidden, tokens[row, at].to(hidden[0].device))
        advance(2 * sum(len(samples[index].tokens) for index in members))


@torch.inference_mode()
def _read(runner: Runner, hidden: Sequence[Tensor], targets: Tensor) -> _Read:
    """Both computations on ``targets`` [n], from their hidden states [n, E]."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    step = max(1, CHUNK_NUMBERS // runner.vocabulary)
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        logs = torch.stack([runner.log_probabilities(state[part]) for state in hidden])  # [2, n, vocabulary]
        tokens, (first, own) = targets[part].to(logs.device), logs.argmax(-1)
        parts.append(
            (
                logs.gather(2, tokens.expand(2, -1).unsqueeze(2))[..., 0],
                logs.gather(2, own.expand(2, -1).unsqueeze(2))[..., 0],
                torch.stack((first == tokens, first == own)),
            )
        )
    given, chosen, same = (torch.cat(each, 1).cpu() for each in zip(*parts, strict=True))
    return given.double().numpy(), chosen.double().numpy(), same.numpy()


def _batches(samples: Sequence[Sample], batch_tokens: int) -> list[list[int]]:
    """Indices of samples of similar length, at most ``batch_tokens`` padded tokens (or one sample) together."""
    groups: list[list[int]] = []
    for index in sorted(range(len(samples)), key=lambda i: (len(samples[i].tokens), i)):
        if groups and len(samples[index].tokens) * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


@contextmanager
def rounded_anew(runner: Runner, seed: int) -> Iterator[None]:
    """Forward passes inside the block round once more before each layer: one in six numbers of its input moves by one step of the dtype."""

    def move(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        state: Tensor = arguments[0] if arguments else named["hidden_states"]
        if state.device not in generators:
            generators[state.device] = torch.Generator(state.device).manual_seed(seed)
        draw = torch.rand(state.shape, generator=generators[state.device], device=state.device)
        sign = (draw < MOVED / 2).to(state.dtype) - (draw > 1 - MOVED / 2).to(state.dtype)
        # A step is eps for a mantissa of 1; three quarters of eps times the number round to one step for every mantissa.
        state = state + state * (sign * (0.75 * torch.finfo(state.dtype).eps))
        return ((state, *arguments[1:]), named) if arguments else (arguments, {**named, "hidden_states": state})

    generators: dict[torch.device, torch.Generator] = {}
    handles = [layer.register_forward_pre_hook(move, with_kwargs=True) for layer in runner.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
