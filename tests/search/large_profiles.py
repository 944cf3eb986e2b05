"""The largest profiles that are accepted, long ones as models have them, and what a command takes for them.

Time depends on the machine and on what else runs there, so tests hold commands to counts: of lines of this project that are run, of
calls of functions, and of bytes that are held. ``scripts/profile_limits`` measures the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtuner_kernels.layout import LayerSpec, bytes_per_token
from kvtuner_search.profile.canonical import digest_without_validation, save, seal
from kvtuner_search.profile.fields import MAX_NOTES
from kvtuner_search.profile.storage import storage_of
from tests.search.profile_factory import (
    HEAD_DIM,
    KV_HEADS,
    content,
    digest,
    fitted,
    measure,
    profile,
    safetensors,
    transforms,
    validation,
    write,
)

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]
STYLES = ("text", "json", "markdown", "github", "junit")
LARGEST = (  # command lines for the files of `write_largest`
    "check --strict new.json",
    "show new.json",
    "show new.json --json",
    "show new.json --html x.html",
    *(f"diff old.json new.json --format {style}" for style in STYLES),
)
COMMON = (  # for those of `write_common`
    "check new.json",
    "diff old.json new.json",
    "diff old.json new.json --json",
    "diff old.json new.json --format github",
    "show new.json",
    "check --strict banded.json",
    "check --json banded.json",
    "show banded.json",
    "show banded.json --json",
    "diff banded.json banded.json",
)


def front_of(points: int, layers: int) -> list[Json]:
    """A front of so many points, each of so many layers."""
    cheap, dear = "2-g64-sym/2-g64-sym", "8-g64-asym/8-g64-asym"
    settings = [[dear] * number + [cheap] * (layers - number) for number in range(points)]
    specs = {text: LayerSpec.parse(text) for text in (cheap, dear)}
    return [
        {"bytes_per_token": bytes_per_token([specs[text] for text in setting], KV_HEADS, HEAD_DIM), "loss": 1 / (1 + number), "origin": "trial", "layers": setting}
        for number, setting in enumerate(settings)
    ]  # fmt: skip


def block(**changes: Any) -> Json:
    body = validation(profile().digest)
    for name, value in changes.items():
        target = body
        *parents, last = name.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    return body


def datum(index: int) -> Json:
    return {"name": f"d{index}", "split": "test", "samples": 1, "tokens": 1, "digest": digest("x")}


def largest(seed: int) -> bytes:
    """A profile that comes near the bound in bytes: layers that all differ, a front, measures, notes, a validation block."""
    kinds = [
        f"{bits}-g{group}-{sign}{turned}-x0.{clip}"
        for bits in (2, 4, 8) for group in (32, 64) for sign in ("sym", "asym") for turned in ("", "-r") for clip in range(30, 100)
    ]  # fmt: skip
    layers = [f"{kinds[(7 * i + seed) % len(kinds)]}/{kinds[(11 * i + 3 + seed) % len(kinds)]}" for i in range(4096)]
    text = "aé字" * 2000
    names = [(f"{i}" + text)[:512] for i in range(530)]
    body = content(
        layers,
        quality=[measure(data=name, value=0.02 + seed * 0.1) for name in names],
        pareto=front_of(8, 4096),
        provenance__data=[datum(i) | {"name": name, "digest": digest(f"{i} {seed}")} for i, name in enumerate(names)],
        provenance__notes=[(f"{i}" + text)[:4096] for i in range(MAX_NOTES)],
        provenance__versions={(f"{i}" + text)[:128]: (f"{seed}" + text)[:256] for i in range(64)},
    )
    likelihood = [measure("nll", 3.01 + seed, 0.001, 3.0, data=name) for name in names]
    own = block(
        profile_digest=digest_without_validation(seal(body)),
        likelihood=likelihood,
        greedy__first_divergence=[64] * 20_000,
    )
    made = seal(body | {"validation": own}).model_dump(mode="json")
    return json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode()  # without white space more fits in


def write_largest(folder: Path) -> None:
    """``old.json`` and ``new.json``, near the bound in bytes and different everywhere."""
    for seed, name in enumerate(("old.json", "new.json")):
        (folder / name).write_bytes(largest(seed))


def write_common(folder: Path) -> None:
    """``old.json`` and ``new.json`` of 128 different layers with a long front; ``banded.json`` of Qwen2.5-7B's shape, with 15 MB of bases."""
    kinds = ["8-g64-asym/8-g64-asym", "8-g64-asym/4-g64-asym", "4-g64-asym/4-g64-asym", "4-g32-asym-r/2-g32-asym"]
    points = []
    for number in range(40):
        layers = [kinds[0] if index < number else kinds[2] for index in range(128)]
        nbytes = bytes_per_token([LayerSpec.parse(text) for text in layers], KV_HEADS, HEAD_DIM)
        points.append({"bytes_per_token": nbytes, "loss": 1 / (1 + number), "origin": "trial", "layers": layers})
    old, new = ([kinds[index % count] for index in range(128)] for count in (3, 4))
    write(folder / "old.json", old, pareto=points)
    write(folder / "new.json", new, pareto=points, quality=[measure(value=0.1)])
    heads, dim, banded = 4, 128, [f"b6544332{index % 3}/b4433322{index % 2}" for index in range(28)]
    data = safetensors(transforms(banded, heads, dim))
    (folder / "t.safetensors").write_bytes(data)
    storage = storage_of([LayerSpec.parse(text) for text in banded], heads, dim).model_dump()
    save(fitted(banded, data, model__num_kv_heads=heads, model__head_dim=dim, storage=storage), folder / "banded.json")


@dataclass(frozen=True)
class Taken:
    """What one process took."""

    code: int  # that the command ended with
    work: int  # lines of this project that were run, and calls of functions wherever they are; 0 if not counted
    peak: int  # greatest memory, bytes
    seconds: float  # of processor time, user and system
    modules: frozenset[str]  # that were imported


# The counted run is a second one: what is imported and set up once says nothing of the file, and is other packages' work.
_PROGRAM = """
import json, os, sys
from kvtuner_search.cli.main import run
counted, first, arguments = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
work = 0
def line(frame, event, _):
    global work
    work += event == "line"
    return line
def entered(frame, event, _):
    global work
    work += 1
    return line if "kvtuner" in frame.f_code.co_filename else None
def called(frame, event, _):
    global work
    work += event == "c_call"
if counted:
    run(first)
    sys.setprofile(called)
    sys.settrace(entered)
code = run(arguments)
sys.settrace(None)
sys.setprofile(None)
sys.stdout.flush()
seconds = sum(os.times()[:2])
# Not ru_maxrss, which a child inherits from the process that started it.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps([code, work, peak, seconds, sorted(sys.modules)]), file=sys.stderr)
"""


def taken(command: str, folder: Path, *, small: Path | None = None) -> Taken:
    """Run a command line in ``folder``, in a process of its own.

    Args:
        command: words that are divided by spaces.
        folder: where its files are.
        small: a folder with small files of the same names; if given, work is counted. Counting takes several times as long.
    """
    words = command.split()
    first = [str(small / word) if small and word.endswith((".json", ".html")) else word for word in words]
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(int(small is not None)), json.dumps(first), *words],
        env=environment, capture_output=True, text=True, cwd=folder, check=True,
    )  # fmt: skip
    code, work, peak, seconds, modules = json.loads(done.stderr.splitlines()[-1])
    return Taken(code, work, peak, seconds, frozenset(modules))


def write_small(folder: Path) -> None:
    """Files of the same names with every part in them, and little of each."""
    for seed, name in enumerate(("old.json", "new.json")):
        body = content("8-g64-asym/4-g64-asym" if seed else "8-g64-asym/8-g64-asym", pareto=front_of(3, 4))
        own = validation(digest_without_validation(seal(body)))
        save(seal(body | {"validation": own}), folder / name)
    data = safetensors(transforms(["b65443322/b44333222"] * 2))
    (folder / "t.safetensors").write_bytes(data)
    save(fitted(["b65443322/b44333222"] * 2, data), folder / "banded.json")
