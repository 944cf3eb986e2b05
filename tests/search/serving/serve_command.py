"""``serve`` in an empty folder, on a machine without a GPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.cli.main import run
from kvtuner_search.serving.sglang import launch
from tests.search.profile_factory import HEAD_DIM, KV_HEADS, write

SMALL_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "num_hidden_layers": 4,
}  # fmt: skip
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``serve`` in ``tmp_path`` on a machine without a GPU: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "_free_gpu_memory", lambda: None)
    for name in [name for name in os.environ if name.startswith(("KVTUNER_", "SGLANG_"))]:
        monkeypatch.delenv(name)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run(["serve", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """(profile, model folder) of a small model whose config.json alone exists."""
    model = folder(tmp_path / "small", SMALL_CONFIG)
    return write(tmp_path / "p.json", "4-g64-asym/4-g64-asym", model__config_digest=None), model


def folder(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def plan(command: Run, *arguments: object) -> dict[str, Any]:
    code, out, err = command("--dry-run", "--json", *arguments)
    assert (code, err) == (0, "")
    loaded: dict[str, Any] = json.loads(out)
    return loaded
