"""``cache_config`` of transformers' ``QuantizedCache`` (``cache_implementation="quantized"``), backends quanto and hqq.

One setting holds for every layer and for keys and values. Groups of consecutive channels of one token, which is what a profile
stores, are axis 0 in quanto (it reshapes to rows of ``q_group_size``) and axis 1 in hqq; their other axis groups along tokens.
"""

from __future__ import annotations

from typing import Any, Final

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_search.errors import DataError
from kvtuner_search.profile.canonical import canonical_json
from kvtuner_search.profile.convert.base import (
    Exported,
    Imported,
    Source,
    changes,
    integer,
    mapping,
    nearest_group,
    one_for_all,
    round_bits,
    tensor,
)
from kvtuner_search.profile.schema import Profile

_DEFAULTS: Final = {"nbits": 4, "axis_key": 0, "axis_value": 0, "q_group_size": 64, "residual_length": 128}
_ALLOWED_BITS: Final = {"quanto": (2, 4), "hqq": (1, 2, 3, 4, 8)}  # the first that has the bits is written
_CHANNEL_AXIS: Final = {"quanto": 0, "hqq": 1}  # the axis whose groups are consecutive channels
_OTHER_AXIS: Final = {"quanto": -1, "hqq": 0}
_IGNORED: Final = ("compute_dtype", "device")  # of older versions; they say where and in what to compute


def read(source: Source) -> Imported:
    """A generation_config or its ``cache_config`` as layers.

    Raises:
        DataError: if it is not such a configuration, or one that transformers itself refuses.
    """
    content = mapping(source.content, "the configuration", source.name)
    implementation = content.get("cache_implementation")
    if implementation in ("dynamic", "static") and not content.get("cache_config"):
        return Imported([LayerSpec()] * source.model.num_layers)
    if "cache_implementation" in content or "cache_config" in content:
        if implementation != "quantized":
            raise DataError(
                f"{source.name}: cache_implementation={str(implementation)[:40]!r} is not quantized: check the file"
            )
        content = mapping(content.get("cache_config") or {}, "cache_config", source.name)
    unknown = [str(key)[:40] for key in content if key not in (*_DEFAULTS, *_IGNORED, "backend")]
    if unknown:
        raise DataError(f"{source.name}: cache_config has no {', '.join(unknown[:3])}: check the file and --from")
    backend = content.get("backend", "quanto")
    if not isinstance(backend, str) or backend.lower() not in _ALLOWED_BITS:
        raise DataError(f"{source.name}: backend={str(backend)[:40]!r}: only {', '.join(_ALLOWED_BITS)} are read")
    return _read_fields(content, backend.lower(), source)


def _read_fields(content: dict[Any, Any], backend: str, source: Source) -> Imported:
    name, head_dim = source.name, source.model.head_dim
    fields = {key: default if content.get(key) is None else content[key] for key, default in _DEFAULTS.items()}
    bits = integer(fields["nbits"], "nbits", name, 1, 8)
    if bits not in _ALLOWED_BITS[backend]:
        raise DataError(f"{name}: backend {backend} has no {bits} bits: use one of {_ALLOWED_BITS[backend]}")
    lost = []
    if round_bits(bits) != bits:
        lost.append(f"{bits} bits become {round_bits(bits)}")
    for key in ("axis_key", "axis_value"):
        axis = integer(fields[key], key, name, -1, 1)
        if axis not in (_CHANNEL_AXIS[backend], _OTHER_AXIS[backend]):
            raise DataError(f"{name}: {key}={axis}: {backend} has {_CHANNEL_AXIS[backend]} and {_OTHER_AXIS[backend]}")
        if axis != _CHANNEL_AXIS[backend]:
            lost.append(f"{key}={axis} groups along tokens; here groups are consecutive channels of one token")
    given = integer(fields["q_group_size"], "q_group_size", name, 1, 2**20)
    group = nearest_group(given, head_dim)
    if group != given:
        lost.append(f"groups of {given} become groups of {group} channels (head_dim={head_dim})")
    window = integer(fields["residual_length"], "residual_length", name, 0, 2**31)
    if window > 1:
        lost.append(f"up to {window} of the newest tokens stay unquantized; here every token is quantized at once")
    notes = (
        ["hqq fits scale and zero point by optimization; here they follow from minimum and maximum"]
        if backend == "hqq"
        else []
    )
    spec = tensor(round_bits(bits), group, head_dim, name)
    return Imported([LayerSpec(spec, spec)] * source.model.num_layers, lost, notes)


def write(profile: Profile) -> Exported:
    """A fragment of generation_config.json.

    Raises:
        DataError: if no backend has the bits.
    """
    spec = one_for_all(profile, lambda bits, group: TensorSpec(bits, group))
    layers = [LayerSpec(spec, spec)] * len(profile.layers)
    lost = changes(profile, layers)
    if spec.raw:
        return Exported(canonical_json({"cache_implementation": "dynamic"}), lost)
    backend = next((name for name, widths in _ALLOWED_BITS.items() if spec.bits in widths), None)
    if backend is None:
        known = ", ".join(map(str, sorted({width for widths in _ALLOWED_BITS.values() for width in widths})))
        raise DataError(
            f"{profile.name} needs {spec.bits} bits, which no backend of transformers' QuantizedCache has (only {known}):"
            " export to another format"
        )
    axis = _CHANNEL_AXIS[backend]
    config = {
        "backend": backend,
        "nbits": spec.bits,
        "axis_key": axis,
        "axis_value": axis,
        "q_group_size": spec.group_size,
        "residual_length": 1,
    }
    notes = [
        "residual_length=1 is the smallest window; each step quantizes the whole cache again, as QuantizedCache does"
    ]
    return Exported(canonical_json({"cache_implementation": "quantized", "cache_config": config}), lost, notes)
