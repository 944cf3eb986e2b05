"""vLLM's and SGLang's options for the KV cache: the YAML that ``--config`` reads, and the JSON of static FP8 scales.

Both store FP8 with scales that are fixed per tensor; only vLLM's ``int8_per_token_head`` computes integer codes and one scale for
each token and head as it goes, which is what a profile calls ``8-gHEAD_DIM-sym``. ``--kv-cache-dtype-skip-layers`` leaves layers
in 16 bits. The scales JSON (``{"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {rank: {layer: scale}}}}``) is SGLang's
``--quantization-param-path``, and was vLLM's.
"""

from __future__ import annotations

from typing import Any, Final

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_search.errors import DataError
from kvtuner_search.profile.convert.base import (
    Exported,
    Imported,
    Source,
    changes,
    integer,
    mapping,
    nearest_group,
    tensor,
)
from kvtuner_search.profile.schema import Profile

_SCALES: Final = "one fixed scale for a whole tensor becomes a scale for each token and head"
_FP8: Final = ("FP8 codes become 8-bit integer codes", _SCALES)
_BLOCKS: Final = "scales of blocks of channels become fp16 scales of groups"
# dtype -> (key bits, value bits, group in channels or 0 for the whole head, what is lost)
_RAW: Final = (16, 16, 0, ())
_SHARED: Final[dict[str, tuple[int, int, int, tuple[str, ...]]]] = {
    "auto": _RAW,
    "bfloat16": _RAW,
    "fp8_e4m3": (8, 8, 0, _FP8),
    "fp8_e5m2": (8, 8, 0, _FP8),
    "nvfp4": (4, 4, 16, ("FP4 codes become 4-bit integer codes", _BLOCKS)),
}
_VLLM: Final = _SHARED | {
    "float16": _RAW,
    "fp8": (8, 8, 0, _FP8),
    "fp8_inc": (8, 8, 0, _FP8),
    "fp8_per_token_head": (8, 8, 0, ("FP8 codes become 8-bit integer codes",)),
    "int8_per_token_head": (8, 8, 0, ()),
    "int4_per_token_head": (4, 4, 32, ("codes of a non-uniform codebook become a uniform 4-bit grid",)),
    "nvfp4_4over6": (4, 4, 16, ("FP4 codes become 4-bit integer codes", _BLOCKS)),
    "turboquant_k8v4": (8, 4, 0, ("TurboQuant's FP8 keys and values become integer codes",)),
    "turboquant_4bit_nc": (4, 4, 0, ("TurboQuant's codebooks become a uniform 4-bit grid",)),
    "turboquant_k3v4_nc": (4, 4, 0, ("TurboQuant's codebooks become a uniform 4-bit grid, 3 bits become 4",)),
    "turboquant_3bit_nc": (4, 4, 0, ("TurboQuant's codebooks become a uniform 4-bit grid, 3 bits become 4",)),
}
_SGLANG: Final = _SHARED | {
    "bf16": _RAW,
    "fp4_e2m1": (4, 4, 16, ("FP4 codes become 4-bit integer codes", _BLOCKS)),
    "mxfp8": (8, 8, 32, ("FP8 codes become 8-bit integer codes", _BLOCKS)),
}


def read_vllm(source: Source) -> Imported:
    """vLLM's options as layers.

    Raises:
        DataError: if the file has none, or one that is unknown.
    """
    return _read(source, _VLLM)


def read_sglang(source: Source) -> Imported:
    """SGLang's options as layers.

    Raises:
        DataError: if the file has none, or one that is unknown.
    """
    return _read(source, _SGLANG)


def _read(source: Source, dtypes: dict[str, tuple[int, int, int, tuple[str, ...]]]) -> Imported:
    content = mapping(source.content, "the configuration", source.name)
    if "kv_cache" in content:
        return _read_scales(content, source)
    options = {str(key).replace("_", "-"): value for key, value in content.items()}
    dtype = options.get("kv-cache-dtype")
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise DataError(
            f"{source.name}: kv-cache-dtype={str(dtype)[:40]!r} is not one of {', '.join(dtypes)}: check the file and --from"
        )
    key_bits, value_bits, group, lost = dtypes[dtype]
    dim = source.model.head_dim
    size = nearest_group(group or dim, dim)
    spec = LayerSpec(*(tensor(bits, size, dim, source.name, symmetric=True) for bits in (key_bits, value_bits)))
    result = Imported([spec] * source.model.num_layers, list(lost))
    if dtype == "int8_per_token_head":
        result.notes.append("vLLM keeps its scales in fp32, a profile in fp16")
    if options.get("quantization-param-path") is not None:
        result.lost.append("the fixed scales of quantization-param-path are not kept")
    _skip(options.get("kv-cache-dtype-skip-layers"), source, result)
    return result


def _skip(patterns: Any, source: Source, result: Imported) -> None:
    """Layers that stay in 16 bits: indices, or names of attention types, which a profile does not know."""
    listed = patterns if isinstance(patterns, list) else [] if patterns is None else str(patterns).split(",")
    for pattern in listed:
        text = str(pattern).strip()
        if text.isascii() and text.isdigit():
            index = integer(int(text[:9]), "kv-cache-dtype-skip-layers", source.name, 0, source.model.num_layers - 1)
            result.layers[index] = LayerSpec()
        else:
            result.lost.append(
                f"kv-cache-dtype-skip-layers {text[:40]!r} names layers by kind, which a profile cannot; they are quantized"
            )


def _read_scales(content: dict[Any, Any], source: Source) -> Imported:
    cache = mapping(content["kv_cache"], "kv_cache", source.name)
    if cache.get("dtype") != "float8_e4m3fn":
        raise DataError(
            f"{source.name}: kv_cache.dtype={str(cache.get('dtype'))[:40]!r} is not float8_e4m3fn: check the file"
        )
    ranks = mapping(cache.get("scaling_factor"), "kv_cache.scaling_factor", source.name)
    for rank, layers in ranks.items():
        count = len(mapping(layers, f"kv_cache.scaling_factor.{str(rank)[:40]}", source.name))
        if count != source.model.num_layers:
            raise DataError(f"{source.name} has scales of {count} layers, the model has {source.model.num_layers}")
    dim = source.model.head_dim
    spec = tensor(8, dim, dim, source.name, symmetric=True)
    return Imported([LayerSpec(spec, spec)] * source.model.num_layers, list(_FP8))


def write_vllm(profile: Profile) -> Exported:
    """YAML for ``vllm serve --config``: 8 bits per token and head, and 16 bits in the layers that have them."""
    dim = profile.model.head_dim
    wide = TensorSpec(8, dim, symmetric=True)
    specs = profile.layer_specs()
    layers = [LayerSpec() if spec == LayerSpec() else LayerSpec(wide, wide) for spec in specs]
    skipped = [index for index, layer in enumerate(layers) if layer == LayerSpec()]
    lost = changes(profile, layers)
    if len(skipped) == len(layers):
        return Exported("kv-cache-dtype: auto\n", lost)
    text = "kv-cache-dtype: int8_per_token_head\n"
    if skipped:
        text += "kv-cache-dtype-skip-layers:\n" + "".join(f'  - "{index}"\n' for index in skipped)
    return Exported(text, lost, ["vLLM keeps its scales in fp32, a profile in fp16"])


def write_sglang(profile: Profile) -> Exported:
    """YAML for SGLang's ``--config``: FP8 is the nearest that it has without this project's plugin."""
    if all(spec == LayerSpec() for spec in profile.layer_specs()):
        return Exported("kv-cache-dtype: auto\n")
    found = [line.partition(" becomes ") for line in changes(profile, [_NOTHING] * len(profile.layers))]
    lost = [f"{what} becomes FP8 (e4m3)" if becomes else what for what, becomes, _ in found]
    lost.append("scales for each token become one fixed scale a layer, which is 1.0 unless the checkpoint has another")
    note = "the plugin of kvtuner-search serves the profile itself, without loss"
    return Exported("kv-cache-dtype: fp8_e4m3\n", lost, [note])


_NOTHING: Final = LayerSpec(
    TensorSpec(2, 1), TensorSpec(2, 1)
)  # differs from every storable spec, so every tensor is listed
