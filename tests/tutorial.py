"""The commands of docs/tutorial.md, and a folder in which they can be run."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from kvtuner_search.profile.canonical import load, save, seal

ROOT = Path(__file__).resolve().parents[1]
# Enough for the validation to be one, and for it to hold.
FEW = {
    "KVTUNER_VALIDATE_DATA": "recall text",
    "KVTUNER_VALIDATE_SAMPLES": "4",
    "KVTUNER_VALIDATE_LENGTH": "448",
    "KVTUNER_VALIDATE_TASK_PROMPTS": "10",
    "KVTUNER_VALIDATE_GREEDY_PROMPTS": "6",
    "KVTUNER_VALIDATE_GREEDY_TOKENS": "16",
    "KVTUNER_VALIDATE_MAX_ACCURACY_DROP": "0.2",
    "KVTUNER_VALIDATE_MIN_OFFLINE_TOKENS": "0.9",
}


def blocks() -> dict[str, list[str]]:
    """Heading -> the blocks of commands below it, in order."""
    parts = re.split(r"^## (.+)$", (ROOT / "docs" / "tutorial.md").read_text(), flags=re.MULTILINE)
    return {
        heading: re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def needs_server(block: str) -> bool:
    """Whether a block starts a server, or speaks of what one measured: those run where SGLang is (tests/serving)."""
    return "--port" in block or "validate" in block.lower() or "HEAD:" in block


def workplace(folder: Path) -> Path:
    """A checkout as the tutorial finds it, but for the installation: `scripts/environment` and the like take this interpreter."""
    folder.mkdir(exist_ok=True)
    for name in ("kvtuner_search", "docs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "profiles/reference", folder / "profiles/reference")
    python = shlex.quote(sys.executable)
    stubs = {
        "scripts/environment": f'ROOT=$PWD PYTHON={python}\nmkdir -p "$ROOT/.venv"\n',
        "scripts/serving_environment": f"SERVING_PYTHON={python}\n",
        ".venv/bin/activate": "PATH=$PWD/.venv/bin:$PATH\n",
        ".venv/bin/kvtuner-search": f'#!/bin/sh\nexec {python} -m kvtuner_search "$@"\n',
    }
    for name, text in stubs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / ".venv/bin/kvtuner-search").chmod(0o755)
    shutil.copy(ROOT / "scripts/demo", folder / "scripts/demo")
    git = ["git", "-C", str(folder)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "profiles"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "Begin"], check=True, env=environment())
    return folder


def calibrated(folder: Path) -> Path:
    """A workplace as it is after calibration; the demo's profile is one that was calibrated on more data than a test has time for."""
    workplace(folder)
    source = ROOT / "profiles/reference/reference-4.00bit.json"
    content = load(source).model_dump(exclude={"digest", "validation"})
    for place in ("demo-output", "profiles/reference"):
        (folder / place).mkdir(exist_ok=True)
        save(seal(content), folder / place / source.name)
    shutil.copy(source.with_suffix(".safetensors"), folder / "demo-output")
    return folder


def environment(**more: str) -> dict[str, str]:
    """The tests' own environment, with this checkout's code and an author for commits, and no option set by a variable but ``more``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "KVTUNER_"))}
    who = {
        f"GIT_{role}_{what}": "tutorial@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    code = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return inherited | who | {"PYTHONPATH": code, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"} | more


def run(commands: Iterable[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run blocks in one bash that ends at the first command that fails; whatever they left running is killed."""
    script = "set -euo pipefail\n" + "\n".join(commands)
    bash = subprocess.Popen(
        ["bash", "--noprofile", "--norc", "-c", script],
        cwd=folder, env=environment(**variables), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = bash.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(bash.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(script, bash.returncode, out, err)
