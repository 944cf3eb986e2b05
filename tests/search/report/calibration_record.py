"""Calibration records for the report's tests: small, made up, and of any number of layers and targets."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from kvtuner_kernels.layout import LayerSpec, TensorSpec, bytes_per_token, effective_bits
from kvtuner_search.calibration.record import CalibrationRecord

HEADS, HEAD_DIM = 2, 64
CLASSES = {
    "16": "16",
    "8-g64-asym": "8-g64-asym-c-r",
    "8-g64-sym": "8-g64-sym-c-r",
    "4-g64-asym": "4-g64-asym-c-r-x0.95",
    "4-g64-sym": "4-g64-sym-c-r-x0.95",
    "2-g64-asym": "2-g64-asym-c-r-x0.75",
    "2-g64-sym": "2-g64-sym-c-r-x0.65",
}
Json = dict[str, Any]


def typed(content: Json) -> CalibrationRecord:
    """The record that the content is."""
    return CalibrationRecord.model_validate_json(json.dumps(content))


def digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def alone(layer: int, name: str, side: int) -> float:
    """A layer-alone KL that differs in every layer, class and side."""
    order = list(CLASSES).index(name)
    return 0.0 if order == 0 else round(10.0 ** (order - 8) * (1 + layer % 7) * (1.5 if side else 1), 12)


def layer_record(layer: int) -> Json:
    """Sensitivity of one layer: variants of 4 and 2 bits without and with centring and rotation, and the chosen ones."""
    keys = ["16", *CLASSES.values()]
    keys += [f"{bits}-g64-asym{flags}" for bits in (4, 2) for flags in ("", "-c")]
    errors = []
    for key in dict.fromkeys(keys):
        for value in dict.fromkeys(["16", *CLASSES.values()]):
            k, v = TensorSpec.parse(key), TensorSpec.parse(value)
            e_k, e_v = (0.0 if spec.raw else 2.0**-spec.bits * (1 if spec.centred else 3) for spec in (k, v))
            errors.append([f"{key}/{value}", e_k, e_v, e_k / 2, round(math.hypot(e_k, e_v) * (1 + layer / 100), 6)])
    return {
        "keys": {name: [spec, alone(layer, name, 0)] for name, spec in CLASSES.items()},
        "values": {name: [spec, alone(layer, name, 1)] for name, spec in CLASSES.items()},
        "errors": errors,
    }


def setting(layers: int, *pairs: tuple[str, str]) -> list[str]:
    """Specs of all layers; the pairs of class names are taken in turn."""
    picked = [pairs[i % len(pairs)] for i in range(layers)]
    return [f"{CLASSES[key]}/{CLASSES[value]}" for key, value in picked]


def measure(metric: str, data: str, baseline: float, value: float, half: float) -> Json:
    delta = value - baseline
    return {
        "metric": metric,
        "data": data,
        "split": "test",
        "samples": 12,
        "tokens": 480,
        "baseline": baseline,
        "value": value,
        "ci_low": delta - half,
        "ci_high": delta + half,
        "confidence": 0.95,
    }


def row(name: str, origin: str, layers: list[str], loss: float, minus: tuple[float, float, float], **more: Any) -> Json:
    """A compared setting."""
    specs = [LayerSpec.parse(text) for text in layers]
    estimate, low, high = minus
    measures = [
        measure("kl", "recall", 0.0, loss * 0.8, loss / 4),
        measure("nll", "recall", 0.125, 0.125 + loss, loss / 3),
        measure("accuracy", "recall", 0.75, 0.75 - 0.25 * (loss > 0.1), 0.125),
        measure("kl", "text", 0.0, loss * 1.2, loss / 4),
        measure("nll", "text", 3.5, 3.5 + loss / 2, loss / 3),
    ]
    return {
        "name": name,
        "origin": origin,
        "bytes_per_token": bytes_per_token(specs, HEADS, HEAD_DIM),
        "effective_bits": effective_bits(specs, HEADS, HEAD_DIM),
        "layers": layers,
        "search_loss": loss,
        "loss": loss,
        "measures": measures,
        "chosen_minus_this": {"estimate": estimate, "low": low, "high": high},
        "verdict": "same" if low == high == 0 else "better" if high < 0 else "worse" if low > 0 else "inconclusive",
        **more,
    }


def trial(number: int, origin: str, layers: list[str], loss: float, **more: Any) -> Json:
    nbytes = bytes_per_token([LayerSpec.parse(text) for text in layers], HEADS, HEAD_DIM)
    return {
        "number": number,
        "origin": origin,
        "cost": nbytes,
        "bytes_per_token": nbytes,
        "loss": loss,
        "rungs": [loss],
        "complete": True,
        "seconds": 0.5 + number,
        "duplicate": False,
        "layers": layers,
        **more,
    }


def record(layers: int = 4, targets: tuple[float, ...] = (4.0,), max_loss: float | None = None) -> Json:
    """A record; with ``max_loss`` it has one target, without bits."""
    mixed = setting(layers, ("4-g64-asym", "2-g64-sym"), ("2-g64-asym", "4-g64-sym"))
    other = setting(layers, ("2-g64-asym", "4-g64-sym"), ("4-g64-asym", "2-g64-sym"))  # as large as mixed
    low, wide = (setting(layers, (c, c)) for c in ("2-g64-sym", "8-g64-asym"))
    plain = ["4-g64-asym/2-g64-asym"] * layers
    goals = [("loss 0.05", None)] if max_loss is not None else [(f"{bits:g} bits", bits) for bits in targets]
    return {
        "record_version": 1,
        "tool": "kvtuner-search 9.8.7",
        "model": {
            "id": "reference",
            "revision": None,
            "architecture": "Qwen2ForCausalLM",
            "config_digest": "sha256:" + "c" * 64,
            "weights_digest": "sha256:" + "d" * 64,
            "num_layers": layers,
            "num_attention_heads": 4,
            "num_kv_heads": HEADS,
            "head_dim": HEAD_DIM,
        },
        "options": {
            "model": {"source": "reference"},
            "sources": ["recall", "text"],
            "samples": 12,
            "length": 448,
            "bits": [2, 4, 8, 16],
            "group_sizes": [0],
            "symmetric": True,
            "target_bits": list(targets),
            "max_loss": max_loss,
            "trials": 6,
            "sampler": "tpe",
            "seed": 7,
            "grouping": "auto",
            "random_baseline": True,
            "batch_tokens": 4096,
        },
        "data": [
            {"name": name, "split": split, "samples": 12, "tokens": 480 + i, "digest": digest(name + split)}
            for split in ("search", "selection", "test")
            for i, name in enumerate(("recall", "text"))
        ],
        "sensitivity": [layer_record(layer) for layer in range(layers)],
        "space": {
            "variables": [
                {"name": f"layer {i}", "layers": [i], "pairs": ["2-g64-sym/2-g64-sym", "4-g64-sym/4-g64-sym"]}
                for i in range(layers)
            ],
            "grouping_quality": None,
            "rejected_quality": 0.3125,
        },
        "trials": [
            trial(0, "proxy", mixed, 0.041),
            trial(1, "uniform", low, 0.613),
            trial(2, "tpe", mixed, 0.0021, complete=False),
            trial(3, "refined", mixed, 0.0231),
            trial(4, "tpe", mixed, 0.0231, duplicate=True),
        ],
        "random_trials": [trial(0, "random", low, 0.77), trial(1, "random", other, 0.337)],
        "proxy_front": [[256 * layers, 0.4], [512 * layers, 0.0]],
        "proxy_at_target": [0.033] * len(goals),
        "targets": [
            {
                "label": label,
                "target_bits": bits,
                "chosen": row("trial 3", "refined", mixed, 0.0217, (0.0, 0.0, 0.0)),
                "rivals": [
                    row("trial 0", "proxy", mixed, 0.0434, (-0.0217, -0.031, -0.0113)),
                    row("2-g64-sym/2-g64-sym", "uniform", low, 0.651, (-0.6293, -0.71, -0.52)),
                    row("trial 1", "random", other, 0.0229, (-0.0012, -0.0054, 0.0039)),
                    row("plain K4V2", "plain", plain, 0.873, (-0.8513, -0.99, -0.73)),
                    row("8-g64-asym/8-g64-asym", "uniform", wide, 0.0004, (0.0213, 0.0149, 0.0278)),
                ],
            }
            for label, bits in goals
        ],
        "hypervolume": {"searched": 12.5, "random": 4.5, "uniform": 11.125, "proxy": 10.75, "preset": 0.0},
        "hypervolume_corner": [16.0, 0.77],
        "seconds": {"load the model": 0.375, "search": 64.25, "choose and test": 17.125},
        "environment": {
            "device": "cpu",
            "threads": 2,
            "dtype": "float32",
            "peak_memory_bytes": 3 << 29,
            "peak_gpu_memory_bytes": None,
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.0.0",
            "optuna": "5.0.0",
            "numpy": "2.3.0",
        },
    }


BANDS = ("b65443322", "b44333222", "b88654321", "b33222110")


def worth(layer: int, side: int, head: int = 0) -> list[float]:
    """What bands are worth: falling from band to band, and different in every layer, side and head."""
    return [round(10.0 ** (-band / 2 - side) * (1 + layer % 5) * (1 + head / 4), 12) for band in range(8)]


def banded(layers: int = 4, targets: tuple[float, ...] = (4.0,)) -> Json:
    """A record with what bands are worth, whose settings are stored in bands but for the values of the second layer."""
    made = record(layers, targets)
    for index, layer in enumerate(made["sensitivity"]):
        heads = {side: [worth(index, i, head) for head in range(HEADS)] for i, side in enumerate(("keys", "values"))}
        layer["worth_by_head"] = heads
        layer["worth"] = {side: [sum(column) for column in zip(*rows, strict=True)] for side, rows in heads.items()}
        for side in ("keys", "values"):
            layer[side]["bands"] = [BANDS[index % 4], 0.001 * (1 + index)]
    texts = [f"{BANDS[i % 4]}/{BANDS[(i + 1) % 4] if i != 1 else CLASSES['4-g64-asym']}" for i in range(layers)]
    for target in made["targets"]:
        old = target["chosen"]
        target["chosen"] = row(old["name"], old["origin"], texts, old["loss"], (0.0, 0.0, 0.0))
    return made


def variants() -> dict[str, Json]:
    """Records of every shape that the report must stand."""
    quiet, no_task, zero, none_done, raw = (record() for _ in range(5))
    quiet["random_trials"] = []
    quiet["targets"][0]["rivals"] = [r for r in quiet["targets"][0]["rivals"] if r["origin"] != "random"]
    for each in [no_task["targets"][0]["chosen"], *no_task["targets"][0]["rivals"]]:
        each["measures"] = [m for m in each["measures"] if m["metric"] != "accuracy"]
    zero["targets"][0]["chosen"]["loss"] = 0.0
    zero["targets"][0]["rivals"][0]["loss"] = -2e-9
    zero["trials"][0]["loss"] = 0.0
    zero["trials"][3]["loss"] = -1e-9
    zero["sensitivity"][0]["keys"]["2-g64-sym"][1] = -1e-9
    for each in [*none_done["trials"], *none_done["random_trials"]]:
        each["complete"] = False
    raw["targets"][0]["chosen"] = row("trial 3", "uniform", ["16/16"] * 4, 0.0, (0.0, 0.0, 0.0))
    some, no_heads, worthless = banded(), banded(), banded()
    del (
        some["sensitivity"][1]["worth"],
        some["sensitivity"][1]["worth_by_head"],
        some["sensitivity"][2]["keys"]["2-g64-sym"],
    )
    some["sensitivity"][0]["worth"]["values"] = None
    for layer in no_heads["sensitivity"]:
        del layer["worth_by_head"]
    for layer in worthless["sensitivity"]:
        layer["worth"] = {side: [0.0] * 8 for side in ("keys", "values")}
        layer["worth_by_head"] = {side: [[0.0] * 8] * HEADS for side in ("keys", "values")}
    return {
        "one target": record(),
        "four targets": record(16, (3.25, 3.5, 4.0, 4.5)),
        "a loss": record(8, max_loss=0.05),
        "one layer": record(1),
        "128 layers": record(128),
        "no random search": quiet,
        "no task": no_task,
        "losses of zero and less": zero,
        "no complete trial": none_done,
        "16 bits": raw,
        "bands": banded(),
        "bands of 128 layers": banded(128),
        "bands of one layer": banded(1),
        "worth of some layers": some,
        "no worth by head": no_heads,
        "worth of nothing": worthless,
    }
