"""``kv_cache_scheme`` of compressed-tensors, and the cache settings that LLM Compressor and ModelOpt write: one ``QuantizationArgs`` for the keys and values of every layer.

``strategy="group"`` with ``dynamic=true`` computes scales of consecutive channels as it goes, which is what a profile stores.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from kvtuner_search.profile.text import quoted

_STRATEGIES: Final = {
    "tensor": "one scale for a whole tensor becomes a scale for each token and head",
    "channel": "a scale for each channel becomes a scale for each token and head",
    "block": "a scale for each block of tokens and channels becomes a scale for each token and head",
    "token": "one scale for all heads of a token becomes a scale for each head",
    "attn_head": "one scale for each head becomes a scale for each token and head",
    "tensor_group": "a global scale over the scales of groups is not kept",
    "group": "",
}
_PARTS: Final = (
    "_stage",
    "modifiers",
    "Modifier",
)  # of a recipe: NAME_stage, NAME_modifiers, and the modifiers' classes
_MODELOPT: Final = {
    "FP8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "INT8": {"num_bits": 8, "type": "int", "strategy": "tensor"},
    "NVFP4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
}
_FIELDS: Final = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
_ELSE: Final = ("block_structure", "actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs")


def read(source: Source) -> Imported:
    """A config.json, its ``quantization_config``, a recipe of LLM Compressor, ModelOpt's hf_quant_config.json, or the scheme alone.

    Raises:
        DataError: if there is no scheme, or it is not one that compressed-tensors accepts.
    """
    content = mapping(source.content, "the configuration", source.name)
    content = mapping(content.get("quantization_config", content), "quantization_config", source.name)
    if isinstance(content.get("quantization"), dict) or "kv_cache_quant_algo" in content:
        content = _of_modelopt(content.get("quantization", content), source)
    elif any(str(key).endswith(_PARTS) for key in content):
        content = _of_recipe(content, source)
    if "kv_cache_scheme" in content:
        if content["kv_cache_scheme"] is None:
            return Imported([LayerSpec()] * source.model.num_layers)
        content = mapping(content["kv_cache_scheme"], "kv_cache_scheme", source.name)
    elif "quant_method" in content or "config_groups" in content:
        raise DataError(
            f"{source.name} says nothing of the KV cache: it has no kv_cache_scheme, so there is nothing to import"
        )
    unknown = [str(key)[:40] for key in content if key not in (*_FIELDS, *_ELSE)]
    if unknown or not content:
        what = f"has no {', '.join(unknown[:3])}" if unknown else "is empty"
        raise DataError(f"{source.name}: kv_cache_scheme {what}: check the file and --from")
    return _read_scheme(content, source)


def _of_modelopt(content: Any, source: Source) -> dict[Any, Any]:
    """What ModelOpt's ``kv_cache_quant_algo`` means, as a ``kv_cache_scheme``.

    Raises:
        DataError: if there is none, or it is unknown.
    """
    fields = mapping(content, "quantization", source.name)
    if "kv_cache_quant_algo" not in fields:
        raise DataError(
            f"{source.name} says nothing of the KV cache: it has no kv_cache_quant_algo, so there is nothing to import"
        )
    algorithm = fields["kv_cache_quant_algo"]
    if algorithm is None or algorithm == "NONE":
        return {"kv_cache_scheme": None}
    if not isinstance(algorithm, str) or algorithm not in _MODELOPT:
        raise DataError(
            f"{source.name}: kv_cache_quant_algo={quoted(algorithm)} is not one of {', '.join(_MODELOPT)}: check the file and --from"
        )
    return {"kv_cache_scheme": _MODELOPT[algorithm]}


def _of_recipe(content: Any, source: Source) -> dict[Any, Any]:
    """The one ``kv_cache_scheme`` in a recipe's modifiers.

    Raises:
        DataError: if there is none, or several that differ.
    """
    schemes = list(_in_modifiers(content))
    if not schemes:
        raise DataError(
            f"{source.name} says nothing of the KV cache: no modifier has a kv_cache_scheme, so there is nothing to import"
        )
    if any(scheme != schemes[0] for scheme in schemes):
        raise DataError(
            f"{source.name} has several kv_cache_scheme that differ: keep the one that the model was made with"
        )
    return {"kv_cache_scheme": schemes[0]}


def _in_modifiers(content: Any) -> Iterator[Any]:
    if isinstance(content, list):
        for part in content:
            yield from _in_modifiers(part)
    elif isinstance(content, dict):
        if "kv_cache_scheme" in content:
            yield content["kv_cache_scheme"]
        for key, part in content.items():
            if str(key).endswith(_PARTS):
                yield from _in_modifiers(part)


def _read_scheme(scheme: dict[Any, Any], source: Source) -> Imported:
    name, dim = source.name, source.model.head_dim
    bits = integer(scheme.get("num_bits", 8), "num_bits", name, 1, 16)
    kind = scheme.get("type", "int")
    if kind not in ("int", "float"):
        raise DataError(f"{name}: type={str(kind)[:40]!r} is neither int nor float: restore the file")
    symmetric, dynamic = scheme.get("symmetric", True), scheme.get("dynamic", False)
    if not isinstance(symmetric, bool) or dynamic not in (True, False, "local"):
        raise DataError(f"{name}: symmetric is true or false, dynamic is true, false or local: restore the file")
    given = scheme.get("group_size")
    size = None if given is None else integer(given, "group_size", name, -1, 2**20)
    strategy = scheme.get("strategy") or ("tensor" if size is None else "group" if size > 0 else "channel")
    if not isinstance(strategy, str) or strategy.lower() not in _STRATEGIES:
        raise DataError(
            f"{name}: strategy={str(strategy)[:40]!r} is not one of {', '.join(_STRATEGIES)}: restore the file"
        )
    grouped = strategy.lower() in ("group", "tensor_group")
    if grouped and (size is None or size < 1):
        raise DataError(f"{name}: strategy {strategy} needs a positive group_size: restore the file")
    lost = [text for text in (_STRATEGIES[strategy.lower()],) if text]
    if dynamic is not True:
        lost.append("fixed scales are not kept; here each token's scale is computed from the token")
    if kind == "float":
        lost.append(f"{bits}-bit floating-point codes become integer codes")
    if round_bits(bits) != bits or bits == 16:
        lost.append(f"{bits}-bit codes become {'the 16-bit cache' if bits > 8 else f'{round_bits(bits)}-bit codes'}")
    group = nearest_group(size if grouped and size else dim, dim)
    if grouped and group != size:
        lost.append(f"groups of {size} become groups of {group} channels (head_dim={dim})")
    notes = (
        []
        if symmetric
        else ["its zero point is an integer, a profile's minimum is fp16: the grids differ by less than a step"]
    )
    spec = tensor(round_bits(bits), group, dim, name, symmetric=symmetric)
    return Imported([LayerSpec(spec, spec)] * source.model.num_layers, lost, notes)


def write(profile: Profile) -> Exported:
    """A fragment of config.json."""
    layers = profile.layer_specs()
    symmetric = all(spec.symmetric for layer in layers for spec in (layer.key, layer.value) if not spec.raw)
    spec = one_for_all(profile, lambda bits, group: TensorSpec(bits, group, symmetric))
    scheme = None
    if not spec.raw:
        scheme = {
            "num_bits": spec.bits,
            "type": "int",
            "symmetric": spec.symmetric,
            "strategy": "group",
            "group_size": spec.group_size,
            "dynamic": True,
        }
    content = {"quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}}
    notes = [] if scheme is None else ["vLLM runs kv_cache_scheme only as 8-bit float with fixed scales"]
    return Exported(canonical_json(content), changes(profile, [LayerSpec(spec, spec)] * len(layers)), notes)
