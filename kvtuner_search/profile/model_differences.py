"""In which fields two models' config.json differ, also where one of them is known by a digest alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Final

from kvtuner_search.profile.canonical import canonical_json
from kvtuner_search.profile.model_config import digest_of_form, fields_of
from kvtuner_search.profile.schema import ModelInfo

_MAX_GUESSED: Final = 8192  # characters of a normal form that is tried with other values: some thousand times
MAX_NAMED: Final = 6  # fields that a message names
# Bases that other models' files have, to find the field that differs if a profile has only a digest.
_THETAS: Final = (10000, 100000, 500000, 1000000, 2000000, 5000000, 10000000)


def differences(stated: ModelInfo, actual: ModelInfo, sides: tuple[str, str] = ("there", "here")) -> list[str]:
    """The fields in which two models' configs differ, each with both values; empty if that cannot be told.

    Current profiles have the fields; for older ones, which have only a digest, values of other models are tried.
    """
    here = actual.config
    there = stated.config
    if there is None and actual.normal is not None:
        there = _guess(actual.normal, stated.config_digest)
    if here is None or there is None:
        return []
    names = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
    return [f"{name} ({there.get(name, 'absent')} {sides[0]}, {here.get(name, 'absent')} {sides[1]})" for name in names]


def _guess(content: dict[str, Any], digest: str | None) -> dict[str, str] | None:
    """The fields of a config that differs from ``content`` in one or two of them and has this digest; None if there is no such config."""
    if len(canonical_json(content)) > _MAX_GUESSED:
        return None
    changes = list(_variants(content))
    for pair in itertools.chain(((change,) for change in changes), itertools.combinations(changes, 2)):
        changed = {**content, **{key: value for change in pair for key, value in change.items()}}
        changed = {key: value for key, value in changed.items() if value not in (None, False)}
        if len({key for change in pair for key in change}) == len(pair) and digest_of_form(changed) == digest:
            return fields_of(changed)
    return None


def _variants(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    rope = content.get("rope")
    rope = rope if isinstance(rope, dict) and "rope_type" in rope else {"rope_theta": 10000, "partial_rotary_factor": 1}
    for theta in dict.fromkeys((rope["rope_theta"], *_THETAS)):
        for part in dict.fromkeys((rope["partial_rotary_factor"], 1, 0.5, 0.25)):
            yield {"rope": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": part}}
        yield {"rope": {**rope, "rope_theta": theta}}
    yield {"window": None}  # models with one had no profile when profiles had a digest alone
    yield from ({"attention_bias": value} for value in (None, True))
    for name in ("attn_logit_softcapping", "attention_multiplier", "query_pre_attn_scalar", "attention_chunk_size"):
        if name in content:
            yield {name: None}
