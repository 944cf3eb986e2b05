"""Decode with long contexts resident: one process for each way to store the cache, against SGLang's bf16 with its faster backend."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving_checks.machine import Machine, Subject
from serving_checks.results import Record, Run, at_least, check

PART = "decode"
SLOTS = {"batches": "slots as allocated", "shuffled": "slots shuffled"}
SIXTY_FOUR, FULL = 1.8, 2.2  # times bf16: at 64 requests, and with as many as each cache holds


@dataclass(frozen=True)
class Sizes:
    """How much is decoded."""

    context: int
    steps: int
    max_batch: int
    batch: int = 64


def run(
    machine: Machine, subject: Subject, backends: list[str], labels: list[str], sizes: Sizes, run: Run, timeout: float
) -> list[Record]:
    """Measure bf16 with each backend, then each profile."""
    ways: list[tuple[str, str, Path | None]] = [(f"bf16 {backend}", backend, None) for backend in backends]
    ways += [(label, machine.own_backend, subject.profiles[label]) for label in labels]
    records, found = [], {}
    for name, backend, profile in ways:
        figures = _process(machine, subject, name, backend, profile, sizes, timeout)
        run.note(f"decode {name}", "decode", figures)
        if "error" in figures:
            records.append(check(PART, name, False, figures["error"], "figures"))
        else:
            found[name] = figures
    return [*records, *conclude(found, subject.main, machine.device == "cuda")]


def _process(
    machine: Machine, subject: Subject, name: str, backend: str, profile: Path | None, sizes: Sizes, timeout: float
) -> dict[str, Any]:
    stem = machine.folder / f"decode-{name.replace(' ', '-')}"
    out, log = stem.with_suffix(".json"), stem.with_suffix(".log")
    out.unlink(missing_ok=True)
    arguments = [
        "--model-path", subject.model, *machine.common(), *subject.arguments, "--attention-backend", backend,
        "--max-running-requests", str(sizes.max_batch),
        *(["--kvtuner-profile", str(profile)] if profile else []),
    ]  # fmt: skip
    plan = {
        "arguments": arguments, "packed": profile is not None, "context": sizes.context, "steps": sizes.steps,
        "batches": [sizes.batch, 0], "max_batch": sizes.max_batch, "out": str(out),
    }  # fmt: skip
    command = [sys.executable, "-m", "serving_checks.decode_worker", json.dumps(plan)]
    with log.open("wb") as stream:
        try:
            code: int | str = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=machine.variables, timeout=timeout
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"nothing after {timeout:g} s"
    figures: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if not figures.get("batches") or code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        return {**figures, "error": f"ended with {code}: {tail}"}
    return figures


def floor_seconds(figures: dict[str, Any], batch: int, tokens: float) -> float | None:
    """Seconds in which a step's bytes can be copied: the weights, and the rows of ``batch`` requests of ``tokens`` each."""
    if not figures["copy_bytes_per_second"]:
        return None
    read = figures["weight_bytes"] + batch * tokens * figures["bytes_per_token"]
    return float(read / figures["copy_bytes_per_second"])


def conclude(found: dict[str, dict[str, Any]], main: str, graphs: bool) -> list[Record]:
    """Rates, how far they are from the bytes' floor, and their ratios to the faster bf16."""
    records = []
    for name, figures in found.items():
        for kind, slots in SLOTS.items():
            for one in figures[kind]:
                least = floor_seconds(figures, one["batch"], one["context"])
                share = f", {least / one['seconds']:.2f} of copy bandwidth" if least else ""
                text = f"{one['tokens_per_second']:,.0f} tokens/s, {one['seconds'] * 1e3:.2f} ms a step{share}"
                label = f"{name}, {one['batch']} x {one['context']}, {slots}"
                records.append(Record(PART, label, text))
                if graphs:
                    records.append(check(PART, f"{label}: CUDA graph", one["graph"], str(one["graph"]), "every step"))
    baselines = [figures for name, figures in found.items() if name.startswith("bf16")]
    if not baselines:
        return records
    for name, figures in found.items():
        if name.startswith("bf16"):
            continue
        for kind, slots in SLOTS.items():
            for index, requests in ((0, f"{figures[kind][0]['batch']} requests"), (-1, "as many as fit")):
                best = max(one[kind][index]["tokens_per_second"] for one in baselines)
                text = f"{name} over bf16, {requests}, {slots}"
                ratio = figures[kind][index]["tokens_per_second"] / best
                if name == main and kind == "batches":
                    records.append(at_least(PART, text, ratio, SIXTY_FOUR if index == 0 else FULL))
                else:
                    records.append(Record(PART, text, f"{ratio:.3f}x"))
        tokens = max(figure["capacity"] for figure in baselines)
        records.append(Record(PART, f"{name}: capacity over bf16", f"{figures['capacity'] / tokens:.3f}x"))
    return records
