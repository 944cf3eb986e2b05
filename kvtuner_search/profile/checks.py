"""What ``check`` tests beyond loading a profile: canonical form, model, and what a reader expects."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from kvtuner_search.errors import NotComparableError
from kvtuner_search.profile.canonical import dumps, parse_json
from kvtuner_search.profile.model_differences import MAX_NAMED, differences
from kvtuner_search.profile.schema import SCHEMA_VERSION, ModelInfo, Profile
from kvtuner_search.profile.validation_text import is_stale


@dataclass(frozen=True)
class Remark:
    """Something that only a strict check refuses."""

    id: str
    message: str


def check_model(profile: Profile, model: ModelInfo, source: str) -> None:
    """Compare a profile with the model that ``source`` describes: shape, class, and config digest where both have one.

    Raises:
        NotComparableError: if the profile belongs to another model.
    """
    names = ("architecture", "num_layers", "num_attention_heads", "num_kv_heads", "head_dim")
    pairs = [(name, getattr(profile.model, name), getattr(model, name)) for name in names]
    found = [f"{name}={stated}, {source} has {actual}" for name, stated, actual in pairs if stated != actual]
    stated, actual = profile.model.config_digest, model.config_digest
    if not found and None not in (stated, actual) and not model.has_digest(str(stated)):
        fields = differences(profile.model, model)
        which = (
            f"they differ in {'; '.join(fields[:MAX_NAMED])}" if fields else "which of its fields differ is not stored"
        )
        more = f" and {len(fields) - MAX_NAMED} more" if len(fields) > MAX_NAMED else ""
        found = [f"config_digest={str(stated)[:19]}…, {source} has {str(actual)[:19]}…: {which}{more}"]
    if not found:
        found = [f"{change}, {source} has {other}" for change, other in _kinds(profile.model, model)]
    if found:
        raise NotComparableError(
            f"profile {profile.name} is for {'; '.join(found)}: it belongs to another model; use that model, or calibrate this one"
        )


def _kinds(stated: ModelInfo, actual: ModelInfo) -> list[tuple[str, str]]:
    """The first layer whose kind differs, and how many more do."""
    pairs = enumerate(zip(stated.kinds, actual.kinds, strict=True))
    layers = [i for i, (a, b) in pairs if a.within(actual.most) != b.within(actual.most)]
    if not layers:
        return []
    more = f" (and {len(layers) - 1} more layers differ)" if len(layers) > 1 else ""
    return [(f"layer {layers[0]}={stated.kinds[layers[0]]}", f"{actual.kinds[layers[0]]}{more}")]


def strict_remarks(profile: Profile, data: bytes) -> Iterator[Remark]:
    """What is allowed, but not in a profile that passes review; ``data`` is the file."""
    if data != dumps(profile).encode():
        yield _form(data)
    if profile.model.config_digest is None:
        yield Remark(
            "model-unverified", "no config digest: only the model's shape can be checked; import it with --model"
        )
    quantized = any(not tensor.raw for layer in profile.layer_specs() for tensor in (layer.key, layer.value))
    if quantized and not profile.quality:
        yield Remark("quality-unproven", "nothing was measured: run evaluate")
    elif quantized and not any(measure.has_interval for measure in profile.quality):
        message = (
            "everything was measured on one sample, which has no interval: calibrate or evaluate with more --samples"
        )
        yield Remark("quality-unproven", message)
    for measure in profile.quality:
        slack = 8 * math.ulp(max(abs(measure.value), abs(measure.baseline)))  # the interval is not of the rounded means
        if measure.has_interval and not measure.ci_low - slack <= measure.delta <= measure.ci_high + slack:
            name = f"{measure.metric} {measure.data} {measure.split}"
            yield Remark(
                "interval-excludes-value",
                f"{name} changed by {measure.delta:g}, outside its interval [{measure.ci_low:g}, {measure.ci_high:g}]",
            )
    if profile.transforms is not None and not any(layer.key.fitted or layer.value.fitted for layer in profile.layers):
        yield Remark("unused-transforms", f"{profile.transforms.file} is named, but no tensor is centred or banded")
    if is_stale(profile):
        yield Remark("validation-stale", "the validation block belongs to another profile: run validate again")
    elif profile.validation is not None and profile.validation.verdict == "fail":
        failed = ", ".join(check.name for check in profile.validation.checks if not check.passed)
        yield Remark("validation-failed", f"the validation failed: {failed}")


def _form(data: bytes) -> Remark:
    """Why a sound profile's file differs from what would be written today."""
    version = parse_json(data, "the profile")["schema_version"]
    if version < SCHEMA_VERSION:
        message = (
            f"the file has schema version {version}, the current one is {SCHEMA_VERSION}: check --rewrite updates it"
        )
        return Remark("older-schema", message)
    return Remark("not-canonical", "the file is not in canonical form: it was edited; check --rewrite restores it")
