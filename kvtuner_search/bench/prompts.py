"""Random token ids to send. Neither torch nor a tokenizer is needed, so a server without one can be measured too."""

from __future__ import annotations

import random
from typing import Final

from kvtuner_search.errors import UsageError

_SPECIAL: Final = 10  # ids below this are special tokens in many vocabularies


def draw(seed: int | str, length: int, count: int, vocabulary: int) -> list[list[int]]:
    """``count`` prompts of ``length`` ids, each id as likely as any other; the same for the same arguments, on any machine.

    No two begin with the same id, so that not even one token of a prompt can be found in the prefix cache of another.

    Args:
        seed: of Python's Mersenne Twister; different for each cell, e.g. ``"0:ttft:1000"``.
        length: tokens of a prompt, at least 1.
        count: prompts, at most ``vocabulary - 10``.
        vocabulary: size of the vocabulary; ids 0 to 9 are left out.

    Raises:
        UsageError: if the vocabulary has too few ids for that many first tokens.
    """
    ids = range(_SPECIAL, vocabulary)
    if length < 1 or count > len(ids):
        raise UsageError(
            f"cannot draw {count} prompts of {length} tokens from {vocabulary} ids: at least one token each, and at most"
            f" {max(len(ids), 0)} prompts, so that no two begin alike"
        )
    source = random.Random(seed)
    return [[first, *source.choices(ids, k=length - 1)] for first in source.sample(ids, count)]
