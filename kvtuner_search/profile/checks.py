"""What ``check`` looks at beyond loading a profile: its canonical form, its transforms file, its model, what a reader expects."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

from kvtuner_search.errors import NotComparableError, ProfileError
from kvtuner_search.profile.canonical import dumps, parse_json, read_limited
from kvtuner_search.profile.model_config import MAX_NAMED, differences
from kvtuner_search.profile.schema import SCHEMA_VERSION, ModelInfo, Profile
from kvtuner_search.profile.text import shortened
from kvtuner_search.profile.validation_text import is_stale

MAX_HEADER: Final = 2**20  # bytes; a 128-layer transforms file has a header of about 25 KB
MAX_PAYLOAD: Final = 2**30  # bytes; 80 layers of 8 heads of 128 channels, all of them banded, take 85 MB
EXTRA_ROWS: Final = 2  # of a basis tensor, below the matrix: the mean, and the mean of first tokens
_FLOAT32: Final = 4  # bytes


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
    if found:
        raise NotComparableError(
            f"profile {profile.name} is for {'; '.join(found)}: it is for another model; choose its own, or calibrate this one"
        )


def transform_shapes(profile: Profile) -> dict[str, list[int]]:
    """Name -> shape of every tensor that the transforms file of a profile has.

    Tensors are called ``layers.I.key`` and ``layers.I.value``: a centring vector [num_kv_heads, head_dim] for each centred one, a
    basis [num_kv_heads, head_dim + 2, head_dim] for each banded one.
    """
    heads, dim = profile.model.num_kv_heads, profile.model.head_dim
    return {
        f"layers.{index}.{part}": [heads, dim] if entry.bands is None else [heads, dim + EXTRA_ROWS, dim]
        for index, layer in enumerate(profile.layers)
        for part, entry in (("key", layer.key), ("value", layer.value))
        if entry.fitted
    }


def folder_of(path: Path, profile: Profile) -> Path:
    """The folder of a profile's transforms file: that of the file that ``path`` leads to, or else of the link itself."""
    target = Path(os.path.realpath(path)).parent
    named = profile.transforms
    if named is not None and not (target / named.file).exists() and (path.parent / named.file).exists():
        return path.parent
    return target


def check_transforms(profile: Profile, folder: Path) -> bytes | None:
    """Check the transforms file beside a profile (:func:`folder_of`): its digest, and that it has the float32 tensors of :func:`transform_shapes` and none besides.

    Every number must be finite, and no matrix of a basis may have a row of zeros or the same row twice. Whether it can be inverted
    in all other ways takes torch: :func:`kvtuner_kernels.bands.basis` refuses it where the file is used.

    Returns:
        the file's bytes; None if the profile names none.

    Raises:
        ProfileError: if the file is missing or does not fit.
    """
    if profile.transforms is None:
        return None
    path = folder / profile.transforms.file
    shapes = transform_shapes(profile)
    payload = sum(map(math.prod, shapes.values())) * _FLOAT32
    if payload > MAX_PAYLOAD:
        raise ProfileError(
            f"the transforms of {profile.name} would take {payload} bytes, more than {MAX_PAYLOAD}: no model here needs as many;"
            " check the profile's layers, KV heads and head_dim"
        )
    data = read_limited(path, f"the transforms of {profile.name}", 8 + MAX_HEADER + payload)
    actual = "sha256:" + hashlib.sha256(data).hexdigest()
    if actual != profile.transforms.digest:
        raise ProfileError(
            f"{path} has digest {actual[:19]}…, {profile.name} names {profile.transforms.digest[:19]}…:"
            " restore the file that was written with the profile"
        )
    tensors, start = _safetensors_header(data, path)
    if sorted(tensors) != sorted(shapes):
        odd = sorted(set(tensors) ^ set(shapes))
        raise ProfileError(
            f"{path} and the centred or banded tensors of {profile.name} differ in {', '.join(map(shortened, odd[:3]))}"
            f"{' and more' if len(odd) > 3 else ''}: restore the file that was written with the profile"
        )
    for name, entry in tensors.items():
        shape = shapes[name]
        if entry.get("dtype") != "F32" or entry.get("shape") != shape:
            raise ProfileError(
                f"{path}: {name} is {shortened(entry.get('dtype'))} {shortened(entry.get('shape'))}, not F32 {shape}: restore the file"
            )
        first, last = entry["data_offsets"]
        _check_numbers(memoryview(data)[start + first : start + last], shape, f"{path}: {name}")
    return data


def _check_numbers(data: memoryview, shape: list[int], name: str) -> None:
    """Refuse numbers that are not finite, and bases that plainly cannot be inverted.

    Raises:
        ProfileError: with the tensor's name.
    """
    numbers = array("f")
    numbers.frombytes(data)
    if sys.byteorder == "big":
        numbers.byteswap()
    # In a double, finite float32 numbers never add up to infinity, and nothing makes up for NaN or infinity: 30 ms for 15 MB.
    if not math.isfinite(sum(numbers)):
        raise ProfileError(f"{name} has a number that is not finite: calibrate again")
    if len(shape) == 3:
        heads, rows, dim = shape
        width = dim * _FLOAT32
        for head in range(heads):
            at = head * rows * width
            found = {bytes(data[at + row * width : at + (row + 1) * width]) for row in range(dim)}
            if len(found) < dim or bytes(width) in found:
                raise ProfileError(
                    f"{name}: the basis of head {head} has a row of zeros, or the same row twice, and cannot be inverted:"
                    " calibrate again"
                )


def _safetensors_header(data: bytes, path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries of a safetensors file, whose offsets must tile the rest of the file, and where that starts.

    Raises:
        ProfileError: if it is no safetensors file.
    """
    length = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER, len(data) - 8):
        raise ProfileError(f"{path} is no safetensors file: its header does not fit; restore it")
    header = parse_json(data[8 : 8 + length], str(path))
    if not isinstance(header, dict):
        raise ProfileError(f"{path} is no safetensors file: its header is no object; restore it")
    header.pop("__metadata__", None)
    spans = []
    for entry in header.values():
        shape, offsets = (entry.get("shape"), entry.get("data_offsets")) if isinstance(entry, dict) else (None, None)
        if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2):
            raise ProfileError(f"{path} is no safetensors file: a tensor has no shape or offsets; restore it")
        spans.append((offsets[0], offsets[1], _FLOAT32 * math.prod(shape)))
    end = 0
    for start, stop, nbytes in sorted(spans):
        if start != end or stop - start != nbytes:
            raise ProfileError(f"{path} is no safetensors file of float32 tensors: its offsets do not fit; restore it")
        end = stop
    if end != len(data) - 8 - length:
        raise ProfileError(f"{path} is no safetensors file of float32 tensors: its offsets do not fit; restore it")
    return header, 8 + length


def _sizes(value: Any) -> TypeGuard[list[int]]:
    """True for a list of few integers from 0 to 2**32."""
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(item) is int and 0 <= item < 2**32 for item in value)
    )


def strict_remarks(profile: Profile, data: bytes) -> Iterator[Remark]:
    """What is allowed but not what a reviewed profile should look like; ``data`` is the file."""
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
        message = "all was measured on one sample, which has no interval: calibrate or evaluate with more --samples"
        yield Remark("quality-unproven", message)
    for measure in profile.quality:
        slack = 8 * math.ulp(max(abs(measure.value), abs(measure.baseline)))  # the interval is not of the rounded means
        if measure.has_interval and not measure.ci_low - slack <= measure.delta <= measure.ci_high + slack:
            name = f"{measure.metric} {measure.data} {measure.split}"
            yield Remark(
                "interval-excludes-value",
                f"{name} changed by {measure.delta:g}, outside its interval [{measure.ci_low:g}, {measure.ci_high:g}]",
            )
    if profile.transforms is not None and not transform_shapes(profile):
        yield Remark("unused-transforms", f"{profile.transforms.file} is named, but no tensor is centred or banded")
    if is_stale(profile):
        yield Remark("validation-stale", "the validation block is of another profile: run validate again")
    elif profile.validation is not None and profile.validation.verdict == "fail":
        failed = ", ".join(check.name for check in profile.validation.checks if not check.passed)
        yield Remark("validation-failed", f"the validation failed: {failed}")


def _form(data: bytes) -> Remark:
    """Why a sound profile's file is not what would be written today."""
    version = parse_json(data, "the profile")["schema_version"]
    if version < SCHEMA_VERSION:
        message = f"the file has schema version {version}, the current one is {SCHEMA_VERSION}: check --rewrite brings it up to date"
        return Remark("older-schema", message)
    return Remark("not-canonical", "the file is not in canonical form: it was edited; check --rewrite writes it again")
