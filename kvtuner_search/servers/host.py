"""The hardware and versions that servers ran on."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from kvtuner_search import __version__
from kvtuner_search.errors import UsageError
from kvtuner_search.secrets import mask_arguments
from kvtuner_search.servers.facts import Facts
from kvtuner_search.serving.engine import engine

_ASK: Final = """
import json, sys
from importlib import metadata
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def server_versions(python: str) -> dict[str, str]:
    """Versions of the packages in a server's environment.

    Raises:
        UsageError: if the interpreter cannot be run, or does not have the engine.
    """
    packages = ("kvtuner-search", engine().NAME, "torch", "transformers", "triton")
    try:
        done = subprocess.run([python, "-c", _ASK, *packages], capture_output=True, text=True, timeout=60, check=True)
        found: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        reason = f"it ended with {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise UsageError(
            f"{python} cannot be run as a Python ({reason}): name the {engine().TITLE} environment's with --server-python"
        ) from error
    if engine().NAME not in found:
        raise UsageError(
            f"{python} has no {engine().TITLE}: install {engine().INSTALL} there, name another with --server-python, or point at"
            " running servers with --url and --baseline-url"
        )
    return found


def offline_versions() -> dict[str, str]:
    """Versions of the packages that the offline evaluation uses."""
    return {f"offline {name}": metadata.version(name) for name in ("torch", "transformers")}


def tool() -> str:
    """Name and version of this program."""
    return f"kvtuner-search {__version__}"


def hardware(facts: Facts, url: str | None, stated: str | None) -> str:
    """What a server runs on: as stated, or this machine's processor or GPUs for a local server."""
    if stated is not None:
        return stated
    if url is not None and urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1"):
        return "unknown: the server runs elsewhere"
    if facts.device == "cpu":
        return processor()
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    used = names[: facts.tensor_parallel * facts.pipeline_parallel] or ["unknown GPU"]
    return ", ".join(f"{used.count(name)} x {name}" for name in dict.fromkeys(used))


def processor() -> str:
    """This machine's processor, and the cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def public_command(arguments: Sequence[str]) -> str:
    """The command line without passwords and keys, and without the folders of absolute paths: a profile contains no paths of a machine."""
    shown = []
    for argument in mask_arguments(arguments):
        option, equals, value = argument.rpartition("=")
        shown.append(option + equals + (Path(value).name if value.startswith(("/", "~")) else value))
    text = " ".join(["kvtuner-search", *shown])
    return text if len(text) <= 500 else text[:499] + "…"
