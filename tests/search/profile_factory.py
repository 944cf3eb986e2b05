"""Profiles for tests: small to read, with every part filled in."""

from __future__ import annotations

import hashlib
import json
import struct
from array import array
from pathlib import Path
from typing import Any

from kvtuner_kernels.layout import LayerSpec, bytes_per_token
from kvtuner_search.profile.canonical import digest_without_validation, save, seal
from kvtuner_search.profile.kinds import LayerKind
from kvtuner_search.profile.schema import LayerEntry, Profile
from kvtuner_search.profile.storage import storage_of

KV_HEADS, HEAD_DIM = 2, 64
BANDED = "b65443322/b44333222"


def digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def measure(
    metric: str = "kl", value: float = 0.02, half: float = 0.004, baseline: float = 0.0, **more: Any
) -> dict[str, Any]:
    """A measure whose interval is ``value - baseline`` plus and minus ``half``."""
    delta = value - baseline
    return {
        "metric": metric,
        "data": "recall",
        "split": "test",
        "samples": 200,
        "tokens": 51200,
        "baseline": baseline,
        "value": value,
        "ci_low": delta - half,
        "ci_high": delta + half,
        **more,
    }


def content(layers: list[str] | str = "8-g64-asym/4-g64-asym", count: int = 4, **more: Any) -> dict[str, Any]:
    """A profile's content without digest; ``layers`` is one short spec a layer, or one for all ``count`` layers, ``kinds`` one text a layer."""
    specs = [LayerSpec.parse(text) for text in ([layers] * count if isinstance(layers, str) else layers)]
    body: dict[str, Any] = {
        "name": "small",
        "model": {
            "id": "example/small",
            "architecture": "Qwen2ForCausalLM",
            "config_digest": digest("config"),
            "num_layers": len(specs),
            "num_attention_heads": 4,
            "num_kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
        },
        "layers": [LayerEntry.of(spec).model_dump() for spec in specs],
        "storage": storage_of(specs, KV_HEADS, HEAD_DIM).model_dump(),
        "quality": [measure()],
        "provenance": {
            "origin": "calibrated",
            "tool": "kvtuner-search 0.1.0",
            "versions": {"torch": "2.13.0"},
            "device": "cpu",
            "dtype": "float32",
            "search": {"sampler": "tpe", "seed": 0, "trials": 60, "variables": 4},
            "data": [{"name": "recall", "split": "test", "samples": 200, "tokens": 51200, "digest": digest("recall")}],
        },
    }
    kinds = more.pop("kinds", None)
    if kinds is not None:
        body["model"]["layer_kinds"] = kinds
        body["storage"] = storage_of(specs, KV_HEADS, HEAD_DIM, [LayerKind.parse(kind) for kind in kinds]).model_dump()
    for path, value in more.items():
        target = body
        *parents, last = path.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    return body


def profile(layers: list[str] | str = "8-g64-asym/4-g64-asym", count: int = 4, **more: Any) -> Profile:
    return seal(content(layers, count, **more))


def server_measure(metric: str, data: str, change: float, half: float, **more: Any) -> dict[str, Any]:
    """A measure through a server: ``change`` against the stock server, plus and minus ``half``."""
    return measure(metric, 3.0 + change, half, 3.0, **{"data": data, **more})


def capacity(tokens: int) -> dict[str, Any]:
    """Token capacity against a stock server with 100,000 tokens and a prediction of 4."""
    return {
        "baseline_tokens": 100_000, "tokens": tokens, "ratio": tokens / 100_000, "predicted": 4.0, "comparable": True, "reason": "",
    }  # fmt: skip


def validation(of: str, *, failing: bool = False, **more: Any) -> dict[str, Any]:
    """A validation block for the profile with the digest ``of``; ``more`` replaces fields, ``__`` goes into parts."""
    check = {"name": "nll.recall", "relation": "at most", "limit": 0.01 if failing else 0.05, "value": 0.02}
    offline = {
        "samples": 40, "tokens": 20000, "nll_difference": 0.001, "ci_low": -0.001, "ci_high": 0.003, "generated": 2048,
        "token_agreement": 0.98, "decode_difference": -0.001, "decode_low": -0.004, "decode_high": 0.002,
    }  # fmt: skip
    body: dict[str, Any] = {
        "profile_digest": of,
        "verdict": "fail" if failing else "pass",
        "checks": [{**check, "passed": not failing, "reason": ""}],
        "date": "2026-11-22T12:00:00Z",
        "tool": "kvtuner-search 0.1.0",
        "command": "kvtuner-search validate --profile small.json",
        "server": {
            "version": "0.5.14", "started": True, "attention_backend": "triton", "dtype": "bfloat16", "tensor_parallel": 1,
            "pipeline_parallel": 1, "page_size": 1,
        },
        "versions": {"sglang": "0.5.14", "torch": "2.13.0"},
        "hardware": "1 x Example GPU",
        "semantics": {"method": "as-stored-extend", "tokens": 2048, "difference": 0.016, "baseline_difference": 0.005},
        "likelihood": [server_measure("nll", "recall", 0.01, 0.004)],
        "tasks": [server_measure("accuracy", "recall", 0.0, 0.03, samples=100, tokens=1000) | {"lost": 1, "gained": 1}],
        "greedy": {
            "prompts": 3, "tokens": 64, "identical": 1, "agreement": 0.5, "ci_low": 0.2, "ci_high": 0.9,
            "first_divergence": [64, 30, 2],
        },
        "capacity": capacity(399_000),
        "offline": [{"cache": "profile", **offline}, {"cache": "16bit", **offline}],
        "data": [{"name": "recall", "split": "test", "samples": 40, "tokens": 20000, "digest": digest("recall")}],
        "notes": ["a note"],
    }  # fmt: skip
    for path, value in more.items():
        target = body
        *parents, last = path.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    return body


def validated(layers: list[str] | str = "8-g64-asym/4-g64-asym", failing: bool = False, **more: Any) -> Profile:
    """A profile with a block of its own."""
    block = validation(digest_without_validation(profile(layers)), failing=failing, **more)
    return profile(layers, validation=block)


def write(path: Path, layers: list[str] | str = "8-g64-asym/4-g64-asym", count: int = 4, **more: Any) -> Path:
    save(profile(layers, count, **more), path)
    return path


def front(*points: tuple[str, float], count: int = 4) -> list[dict[str, Any]]:
    """Pareto points, each one spec for all layers."""
    return [
        {
            "bytes_per_token": bytes_per_token([LayerSpec.parse(spec)] * count, KV_HEADS, HEAD_DIM),
            "loss": loss,
            "origin": "trial",
            "layers": [spec] * count,
        }
        for spec, loss in points
    ]


def safetensors(
    tensors: dict[str, list[int]], dtype: str = "F32", numbers: dict[str, dict[int, float]] | None = None
) -> bytes:
    """A safetensors file with the given shapes: unit matrices above rows of zeros in tensors [H, D + 2, D], else zeros.

    Args:
        numbers: by tensor, index in the flat tensor -> another number.
    """
    header: dict[str, Any] = {}
    payload = b""
    for name, shape in tensors.items():
        size = 1
        for length in shape:
            size *= length
        flat = array("f", bytes(4 * size))
        if len(shape) == 3:
            heads, rows, dim = shape
            for head in range(heads):
                for row in range(min(rows, dim)):
                    flat[(head * rows + row) * dim + row] = 1.0
        for index, number in (numbers or {}).get(name, {}).items():
            flat[index] = number
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(payload), len(payload) + 4 * size]}
        payload += flat.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def transforms(layers: list[str], heads: int = KV_HEADS, dim: int = HEAD_DIM) -> dict[str, list[int]]:
    """Shapes of the tensors that layers with these specs need."""
    return {
        f"layers.{index}.{part}": [heads, dim + 2, dim] if spec.banded else [heads, dim]
        for index, text in enumerate(layers)
        for part, spec in zip(("key", "value"), (LayerSpec.parse(text).key, LayerSpec.parse(text).value), strict=True)
        if spec.fitted
    }


def fitted(layers: list[str], data: bytes | None = None, file: str = "t.safetensors", **more: Any) -> Profile:
    """A profile with centred or banded layers, whose transforms file is ``data``, or else one with unit matrices."""
    return profile(layers, transforms=named(safetensors(transforms(layers)) if data is None else data, file), **more)


def named(data: bytes, file: str = "t.safetensors") -> dict[str, str]:
    """What a profile says of its transforms file."""
    return {"file": file, "digest": "sha256:" + hashlib.sha256(data).hexdigest()}


def write_fitted(path: Path, layers: list[str], **more: Any) -> Path:
    """The same as :func:`fitted` on disk, with its transforms file."""
    data = safetensors(transforms(layers))
    path.with_suffix(".safetensors").write_bytes(data)
    save(fitted(layers, data, path.with_suffix(".safetensors").name, **more), path)
    return path
