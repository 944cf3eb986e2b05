"""What the tests of profiles in git share."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

K8V8, K8V4, K4V4 = "8-g64-asym/8-g64-asym", "8-g64-asym/4-g64-asym", "4-g64-asym/4-g64-asym"
Run = Callable[..., tuple[int, str, str]]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 4096\n".format("0" * 63 + "1")


def git(*arguments: str, folder: Path | str = ".") -> str:
    identity = [
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@example.org",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "init.defaultBranch=main",
    ]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(message: str = "x") -> None:
    git("add", "-A")
    git("commit", "-qm", message, "--allow-empty")


def report(command: Run, *arguments: object) -> dict[str, Any]:
    _, out, err = command("diff", *arguments, "--json")
    assert out, err
    found: dict[str, Any] = json.loads(out)
    return found
