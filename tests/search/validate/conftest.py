"""Fake servers, in this process and as an environment whose Python starts them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.search.servers.fake_base import in_threads, interpreter

sys.path.append(str(Path(__file__).parent))  # for fake_sglang

from fake_sglang import Fake

ROOT = Path(__file__).parents[3]


@pytest.fixture
def fake() -> Iterator[Callable[..., Fake]]:
    """Start fake servers in threads; they end with the test."""
    with in_threads() as serve:
        yield lambda **arguments: serve(Fake(**arguments))


@pytest.fixture(scope="session")
def server_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter whose ``-m sglang.launch_server`` is the fake, and whose SGLang says it is 0.5.14."""
    return interpreter(tmp_path_factory.mktemp("environment"), Path(__file__).parent / "fake_sglang.py")
