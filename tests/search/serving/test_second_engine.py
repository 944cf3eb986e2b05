"""A second engine is one folder beside serving/sglang: it is served, benched and validated, and no other file knows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvtuner_search.servers.process import free_port

ROOT = Path(__file__).parents[3]
PROFILE = ROOT / "profiles" / "reference" / "reference-4.00bit.json"
MODEL = ROOT / "kvtuner_search" / "models" / "reference"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as it is, the small engine's folder, and its package as pip would have installed it."""
    root = tmp_path_factory.mktemp("checkout")
    package = root / "kvtuner_search"
    (package / "serving").mkdir(parents=True)
    for place in ("", "serving"):
        for path in (ROOT / "kvtuner_search" / place).iterdir():
            if path.name != "serving":
                (package / place / path.name).symlink_to(path)
    (package / "serving" / "tiny").symlink_to(Path(__file__).parent / "tiny")
    (root / "tiny-1.0.dist-info").mkdir()
    (root / "tiny-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
    return root


def start(checkout: Path, *arguments: str, engine: str = "tiny") -> subprocess.Popen[str]:
    code = os.pathsep.join([str(checkout), str(ROOT / "kernels")])
    return subprocess.Popen(
        [sys.executable, "-m", "kvtuner_search", *arguments],
        env=os.environ | {"PYTHONPATH": code, "KVTUNER_ENGINE": engine, "HF_HUB_OFFLINE": "1"},
        cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def call(checkout: Path, *arguments: str, engine: str = "tiny") -> str:
    """What a command that succeeds prints."""
    command = start(checkout, *arguments, engine=engine)
    out, err = command.communicate()
    assert command.returncode == 0, err + out
    return out


@pytest.fixture
def served(checkout: Path) -> Iterator[str]:
    """The address of a server that `serve` has become."""
    port = str(free_port())
    server = start(checkout, "serve", "--profile", str(PROFILE), "--weights", str(MODEL), "--at", port)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.communicate()


def test_it_is_served(checkout: Path, served: str) -> None:
    help_ = call(checkout, "serve", "--help")
    assert "Any option of Tiny, passed on unchanged" in " ".join(help_.split())
    assert "--kvtuner" not in help_
    for _ in range(300):
        with suppress(OSError), urllib.request.urlopen(f"{served}/about") as answer:
            assert json.load(answer)["profile"] == json.loads(PROFILE.read_text())["digest"]
            return
        time.sleep(0.1)
    raise AssertionError("it does not listen")


def test_it_is_benched(checkout: Path, tmp_path: Path) -> None:
    out = call(
        checkout, "bench", "--profile", str(PROFILE), "--model-path", "reference", "--section", "ttft", "--slo", "memory=0.9",
        "--section", "memory", "--folder", str(tmp_path / "run"), "--json", "--quiet", "--hardware", "slow,bandwidth=1e12,flops=1e14",
    )  # fmt: skip
    record = json.loads(out)
    assert record["environment"]["versions"]["tiny"] == record["served"]["version"] == "1.0"
    assert "sglang" not in record["environment"]["versions"]
    assert {check["name"] for check in record["correctness"]} == {"profile", "answers", "likelihood", "totals"}
    assert all(cell["succeeded"] == cell["shape"]["requests"] for cell in record["cells"])
    assert {scrape["name"] for scrape in record["scrapes"]} == {"tiny_said_total", "tiny_fill"}
    assert [(gate["name"], gate["value"]) for gate in record["gates"]] == [("memory", 0.5)]
    assert record["cells"][-1]["free_tokens"] == [200_000, 200_000]
    shown = call(checkout, "bench", "report", str(tmp_path / "run" / "record.json"), engine="sglang")
    assert "Tiny 1.0" in shown, "a record names its engine, whichever is used now"


def test_it_is_validated(checkout: Path, tmp_path: Path) -> None:
    out = call(
        checkout, "validate", "--profile", str(PROFILE), "--data", "list", "--samples", "2", "--length", "160", "--task", "list",
        "--task-prompts", "2", "--greedy-prompts", "2", "--greedy-tokens", "4", "--no-offline", "--folder", str(tmp_path / "run"), "--json", "--quiet",
        "--max-accuracy-drop", "none",
    )  # fmt: skip
    block = json.loads(out)
    assert block["verdict"] == "pass"
    assert (block["versions"]["tiny"], block["server"]["version"]) == ("1.0", "1.0")
    assert block["semantics"]["method"] == "as-stored-extend"
    assert (block["capacity"]["ratio"], block["capacity"]["predicted"]) == (4.0, 4.0)


def test_the_others_do_not_know_it(checkout: Path) -> None:
    """And an engine that nobody put there is refused in one line, by the commands that have one alone."""
    tiny = start(checkout, "serve", "--help", engine="absent")
    _, err = tiny.communicate()
    assert (tiny.returncode, err) == (2, "kvtuner-search: there is no engine 'absent': choose from sglang, tiny\n")
    assert "sound" in call(checkout, "check", str(PROFILE), engine="absent")
