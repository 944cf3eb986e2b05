"""Checks, before and after transformers loads a model, that its weights are those of its checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from kvtuner_search.errors import DataError
from kvtuner_search.models.source import weight_files
from kvtuner_search.profile.canonical import parse_json, read_limited
from kvtuner_search.profile.model_config import text_config

_MAX_HEADER: Final = 2**27  # bytes of a safetensors header; a model of 100,000 experts' tensors has one of 15 MB
_NAMED: Final = 3  # names in a message
# Buffers that older versions saved and that no version needs: they follow from the config.
_DERIVED: Final = re.compile(r"(?:rotary_emb\.inv_freq|\.(?:attn|attention)\.(?:masked_)?bias|\bposition_ids)$")
_CODES: Final = re.compile(r"F8_.*|F4(?:_.*)?|F6_.*|[IU]\d+|BOOL")  # dtypes of safetensors in which weights are codes


def stored_dtypes(folder: Path) -> dict[str, str]:
    """Name -> dtype, as safetensors calls it, of every tensor in the safetensors files that are loaded from a folder; files without a sound
    header are left out."""
    found: dict[str, str] = {}
    for path in weight_files(folder):
        if path.suffix != ".safetensors" or not path.is_file():
            continue
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = stream.read(size) if size <= _MAX_HEADER else b""
        try:
            content = json.loads(header)
        except ValueError:
            continue
        if isinstance(content, dict):
            found |= {
                name: str(entry["dtype"])
                for name, entry in content.items()
                if isinstance(entry, dict) and "dtype" in entry
            }
    return found


def check_quantization(config: Mapping[str, Any], folder: Path | None, source: str) -> None:
    """Refuse a quantized checkpoint that transformers would read as unquantized.

    Args:
        config: the content of config.json.
        folder: the folder of the weights; None if they are not downloaded yet.
        source: what messages call the model.

    Raises:
        DataError: names the method, and the scales that would not be used.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    dtypes = {} if folder is None else stored_dtypes(folder)
    scales = [name for name in dtypes if "scale" in name.rpartition(".")[2]]
    unused = f"; the scales {named(scales)} would not be used" if scales else ""
    remedy = "use the unquantized model, or a checkpoint in a format that transformers loads (docs/calibration.md)"
    stated = quantization_of(config)
    if stated is not None:
        method = stated.get("quant_method") or stated.get("quant_algo") if isinstance(stated, dict) else stated
        try:
            known = isinstance(stated, dict) and AutoHfQuantizer.supports_quant_method(dict(stated))  # type: ignore[no-untyped-call]
        except (ValueError, AttributeError, TypeError):
            known = False
        if not known:
            raise DataError(
                f"{source} is quantized by a method that transformers does not know, quantization_config with"
                f" {str(method)[:80]!r}{unused}: {remedy}"
            )
        return
    file = None if folder is None else folder / "hf_quant_config.json"
    if file is not None and file.is_file():
        method = _model_opt_method(file)
        if method:
            raise DataError(
                f"{source} is quantized by ModelOpt ({file.name}: {method[:80]}), and its config.json has no quantization_config,"
                f" so transformers would read codes as weights{unused}: {remedy}"
            )
    codes = {name: dtype for name, dtype in dtypes.items() if _CODES.fullmatch(dtype) and "weight" in name}
    if codes:
        kinds = ", ".join(sorted(set(codes.values())))
        raise DataError(
            f"{source} stores {named(list(codes))} as {kinds}, and its config.json has no quantization_config, so transformers would"
            f" read codes as weights{unused}: {remedy}"
        )


def quantization_of(config: Mapping[str, Any]) -> Any:
    """The quantization of the weights that config.json declares, or None."""
    for part in (config, text_config(dict(config))):
        for name in ("quantization_config", "compression_config"):
            if part.get(name):
                return part[name]
    return None


def keeps_codes(config: Mapping[str, Any]) -> bool:
    """Whether the weights that config.json declares quantized stay so in memory: transformers dequantizes MXFP4 (gpt-oss) where its kernels are
    not installed, and then drops the quantizer; blocks that it did not read are unused weights."""
    stated = quantization_of(config)
    return stated is not None and not (isinstance(stated, dict) and stated.get("quant_method") == "mxfp4")


def check_loaded(model: Any, loading: Mapping[str, Any], quantized: bool, source: str) -> None:
    """Refuse a model whose weights differ from those of its checkpoint.

    Args:
        model: what transformers loaded.
        loading: its loading information (``output_loading_info``).
        quantized: whether transformers must have kept a quantizer (:func:`keeps_codes`).
        source: what messages call the model.

    Raises:
        DataError: names weights that are missing, left over, or of another shape, or hold numbers that are not finite.
    """
    if quantized and getattr(model, "hf_quantizer", None) is None:
        raise DataError(
            f"{source} has a quantization_config that transformers did not apply: use the unquantized model, or install what its"
            " method needs"
        )
    mismatched = sorted(map(_mismatch, loading.get("mismatched_keys") or ()))
    if mismatched:
        raise DataError(
            f"weights of {source} have other shapes than its config.json says: {named(mismatched)}: take config.json and weights"
            " from the same model"
        )
    missing = sorted(map(str, loading.get("missing_keys") or ()))
    left = sorted(name for name in map(str, loading.get("unexpected_keys") or ()) if not _DERIVED.search(name))
    if missing or left:
        parts = [f"{word} {named(names)}" for word, names in (("missing", missing), ("unused", left)) if names]
        raise DataError(f"the weights of {source} do not match its model: {'; '.join(parts)}: {_remedy(missing, left)}")
    errors = list(loading.get("error_msgs") or ()) + list(map(str, loading.get("conversion_errors") or ()))
    if errors:
        raise DataError(f"the weights of {source} cannot be loaded: {str(errors[0])[:200]}: restore them")
    check_finite(model, source)


def check_finite(model: torch.nn.Module, source: str) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        DataError: names the first such tensor.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or tensor.itemsize < 2 or tensor.device.type == "meta" or not tensor.numel():
            continue
        low, high = torch.aminmax(tensor.detach())  # NaN in any place gives NaN in both
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            kind = "NaN" if bool(torch.isnan(low)) else "infinity"
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise DataError(
                f"the weights of {source} are not finite: {name} holds {kind} in {dtype}: restore the file, or give another --dtype"
                " if the checkpoint's own numbers exceed this one's range"
            )


def named(names: Sequence[str]) -> str:
    """The first few of some names, and how many there are."""
    shown = ", ".join(name[:120] for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _mismatch(entry: Any) -> str:
    if isinstance(entry, (tuple, list)) and len(entry) == 3:
        return f"{entry[0]} {list(entry[1])} instead of {list(entry[2])}"
    return str(entry)


def _remedy(missing: Sequence[str], left: Sequence[str]) -> str:
    if any("lora_" in name or name.startswith("base_model.") or ".base_layer." in name for name in left):
        return "these belong to an adapter: merge it into its base model (peft: merge_and_unload) and save that"
    if any("scale" in name for name in left):
        return "these are scales of a quantization that config.json does not declare: use the unquantized model"
    prefix = _inserted(missing, left)
    if prefix is not None:
        return f"strip {prefix!r} from the names in the checkpoint, or save the model that it wraps"
    if missing and not left:
        return "restore the files that hold them; an index of shards may be incomplete"
    return "take config.json and weights from the same model"


def _inserted(missing: Iterable[str], left: Sequence[str]) -> str | None:
    """The part that the unused names have and the missing names lack, e.g. ``_orig_mod.``."""
    wanted = set(missing)
    for name in left[:_NAMED]:
        parts = name.split(".")
        for start in range(len(parts)):
            for end in range(start + 1, len(parts)):
                if ".".join((*parts[:start], *parts[end:])) in wanted:
                    return ".".join(parts[start:end]) + "."
    return None


def _model_opt_method(file: Path) -> str | None:
    content = parse_json(read_limited(file, "ModelOpt's description of a checkpoint"), str(file), "ModelOpt file")
    part = content.get("quantization") if isinstance(content, dict) else None
    method = part.get("quant_algo") if isinstance(part, dict) else None
    return str(method) if method else None
