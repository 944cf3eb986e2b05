"""The composite action as GitHub runs it, and a command `kvtuner-search` for its shell lines."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
K8V8, K8V4 = "8-g64-asym/8-g64-asym", "8-g64-asym/4-g64-asym"
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}
# What GitHub runs for `shell: bash` in a composite action.
BASH = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail"]


def shim(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def command_line(python_path: str = f"{ROOT}:{ROOT / 'kernels'}", *, flags: str = "") -> str:
    return f'PYTHONPATH={shlex.quote(python_path)} exec {shlex.quote(sys.executable)} {flags} -m kvtuner_search "$@"'


def step_environment(step: dict[str, Any], inputs: dict[str, str], action_path: str = "") -> dict[str, str]:
    """The step's ``env`` with expressions filled in as GitHub does; an expression anywhere else would be shell injection."""
    defaults = {name: field.get("default", "") for name, field in ACTION["inputs"].items()}
    values = defaults | inputs

    def fill(match: re.Match[str]) -> str:
        context, _, name = match[1].partition(".")
        return {"inputs": values, "github": {"action_path": action_path}}[context][name]

    assert "${{" not in step["run"]
    return {key: re.sub(r"\$\{\{ (\S+) \}\}", fill, value) for key, value in step["env"].items()}
