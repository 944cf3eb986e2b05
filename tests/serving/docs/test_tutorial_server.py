"""The commands of docs/tutorial.md that need a server, as they stand there, with the real SGLang on the CPU and fewer prompts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from kvtuner_search.profile.canonical import load
from kvtuner_search.servers.process import free_port
from tests.tutorial import FEW, blocks, calibrated, needs_server, run


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return calibrated(tmp_path / "checkout")


def run_sections(checkout: Path, *chosen: list[str]) -> subprocess.CompletedProcess[str]:
    """Run blocks of the tutorial after those that keep a profile; the port is another, as the tutorial's may be taken."""
    port = str(free_port())
    begin = [". .venv/bin/activate\n", *blocks()["Keep it like code"]]
    done = run([*begin, *(block.replace("31000", port) for section in chosen for block in section)], checkout, **FEW)
    log = checkout / "server.log"
    assert done.returncode == 0, done.stderr + done.stdout + (log.read_text()[-2000:] if log.exists() else "")
    return done


def test_the_tutorial_serves(checkout: Path) -> None:
    done = run_sections(checkout, blocks()["Serve it"])
    assert "listens on  http://127.0.0.1:" in done.stdout, "the plan"
    assert " amber, moss" in json.loads(done.stdout.splitlines()[-1])["text"]


@pytest.mark.slow
def test_the_tutorial_validates_and_reviews(checkout: Path) -> None:
    found = blocks()
    settings = [block for block in found["Serve it"] if not needs_server(block)]
    run_sections(checkout, settings, found["Validate it"], found["Review it"])
    profile = load(checkout / "profiles/mine/reference-4.00bit.json")
    assert profile.validation is not None
    assert profile.validation.verdict == "pass"
