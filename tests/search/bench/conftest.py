"""Fake servers, in this process and as an environment whose Python starts them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.search.servers.fake_base import in_threads, interpreter

sys.path.append(str(Path(__file__).parent))  # for fake_server and small_runs

from fake_server import Fake
from small_runs import PROFILE, Start

from kvtuner_search.models.reference_model import reference_model_path


@pytest.fixture
def fake() -> Iterator[Start]:
    """Start fake servers in threads; they end with the test."""
    with in_threads() as serve:

        def start(profile: Path | None = PROFILE, **info: Any) -> Fake:
            given = {"model_path": str(reference_model_path()), **info}
            server: Fake = serve(Fake(profile=None if profile is None else str(profile), **given))
            return server

        yield start


@pytest.fixture(scope="session")
def fake_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter whose ``-m sglang.launch_server`` is the fake, and whose SGLang says it is 0.5.14."""
    return interpreter(tmp_path_factory.mktemp("environment"), "tests.search.bench.fake_server")
