"""Fake servers, in this process and as an environment whose Python starts them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # for fake_server and small_runs

from fake_server import Fake
from small_runs import PROFILE, Start

from kvtuner_search.models.reference_model import reference_model_path


@pytest.fixture
def fake() -> Iterator[Start]:
    """Start fake servers in threads; they end with the test."""
    servers: list[Fake] = []

    def start(profile: Path | None = PROFILE, **info: Any) -> Fake:
        server = Fake(
            profile=None if profile is None else str(profile), **{"model_path": str(reference_model_path()), **info}
        )
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def fake_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter whose ``-m sglang.launch_server`` is the fake, and whose SGLang says it is 0.5.14."""
    site = tmp_path_factory.mktemp("environment")
    (site / "sglang").mkdir()
    (site / "sglang" / "__init__.py").write_text("")
    (site / "sglang" / "launch_server.py").write_bytes((Path(__file__).parent / "fake_server.py").read_bytes())
    metadata = site / "sglang-0.5.14.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.14\n")
    python = site / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site}:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)
