"""diff, check and show of a 128-layer profile, and of one with bases for Qwen2.5-7B's shape: little work, under 80 MB, without torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.search.large_profiles import COMMON, taken, write_common, write_small

HEAVY = {"torch", "transformers", "optuna", "datasets", "numpy", "triton", "plotly", "sklearn"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("common")
    write_common(folder)
    assert 14e6 < (folder / "t.safetensors").stat().st_size < 16e6
    return folder


@pytest.mark.parametrize("command", COMMON)
def test_work_memory_and_imports(command: str, folder: Path, tmp_path: Path) -> None:
    """Under 0.5 s: most of it goes into imports, whose number is bounded here, the rest into what is counted."""
    write_small(tmp_path)
    found = taken(command, folder, small=tmp_path)
    assert found.code in (0, 1)
    assert not {name.partition(".")[0] for name in found.modules} & HEAVY
    assert len(found.modules) < 400
    assert 50_000 < found.work < 400_000
    assert found.peak < 80 * 10**6
