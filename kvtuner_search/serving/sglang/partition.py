"""Which layers each pipeline stage holds: balanced by bytes, or as the user says in SGLang's own variable."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvtuner_search.errors import UsageError
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.stages import balanced_partition
from kvtuner_search.serving.capacity import heads_per_rank

ENVIRONMENT: Final = "SGLANG_PP_LAYER_PARTITION"  # layers of each stage, e.g. 13,15; SGLang reads it in every process


@dataclass(frozen=True)
class Partition:
    """The number of layers of each pipeline stage, from the first to the last."""

    counts: tuple[int, ...]
    by_user: bool = False  # True: from the user's ENVIRONMENT; False: balanced by bytes

    def __str__(self) -> str:
        return ",".join(map(str, self.counts))

    def to_environment(self) -> dict[str, str]:
        """The variable to set before the server's first process starts; none for one stage."""
        return {ENVIRONMENT: str(self)} if len(self.counts) > 1 else {}


def of_profile(profile: Profile, tp_size: int, pp_size: int) -> Partition:
    """The partition for a server of ``profile`` with these parallel sizes.

    Raises:
        UsageError: if the profile's heads or layers cannot be divided that way.
    """
    model = profile.model
    kv_heads = heads_per_rank(model.num_kv_heads, tp_size)
    return choose([layer.bytes_per_token(kv_heads, model.head_dim) for layer in profile.layer_specs()], pp_size)


def choose(layer_bytes: Sequence[int], stages: int, environment: Mapping[str, str] = os.environ) -> Partition:
    """The partition that a server uses: the user's if there is one, else the one whose heaviest stage is lightest.

    The heaviest stage limits the tokens of all. Among equally good partitions it takes the most even one in layers, because
    a stage's time grows with its layers; remaining layers go to later stages, as in SGLang.

    Args:
        layer_bytes: bytes a token of each layer, on one rank.
        stages: pipeline stages.
        environment: the variables that may hold the user's choice.

    Raises:
        UsageError: if there are more stages than layers, or the user's partition does not fit.
    """
    layers = len(layer_bytes)
    if stages > layers:
        raise UsageError(f"{stages} pipeline stages for {layers} layers: choose at most {layers}")
    text = environment.get(ENVIRONMENT)
    if text is None:
        return Partition(tuple(b - a for a, b in balanced_partition(list(layer_bytes), stages)))
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
        raise UsageError(
            f"{ENVIRONMENT}={text!r} does not divide {layers} layers among {stages} stages: give {stages} positive numbers"
            f" that add up to {layers}, or unset it to have the stages balanced by bytes"
        )
    return Partition(counts, by_user=True)
