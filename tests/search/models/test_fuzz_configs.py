"""A part of ``scripts/fuzz_configs``, which takes any number: damaged config.json files end in one line and a documented code."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvtuner_search.profile.model_config import model_info, normal_form
from kvtuner_search.profile.model_support import unsupported

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "fuzz_configs"
CASES = 120


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("fuzz_configs", str(SCRIPT))
    spec = importlib.util.spec_from_loader("fuzz_configs", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_damaged_configs(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    codes = script.fuzz(CASES, 1, tmp_path)
    assert sum(codes.values()) == 3 * CASES
    for command, expected in script.ALLOWED.items():
        seen = {code for name, code in codes if name == command}
        assert seen <= expected
        assert {0, 3} <= seen, "some must be understood, and some refused"


def test_the_same_seed_gives_the_same_files(script: ModuleType) -> None:
    first, again, other = ([script.damaged(random.Random(f"{seed}/{n}")) for n in range(20)] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_sound_files_are_understood(script: ModuleType) -> None:
    refused = {name for name, config in script.SEEDS.items() if unsupported(config) is not None}
    assert refused == {"deepseek"}
    for name, config in script.SEEDS.items():
        assert model_info(config, name).num_layers == 4
        assert normal_form(config)["layers"] == 4


def test_the_script_reads_configs_without_torch() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "10", "3"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert sum(int(line.rpartition(": ")[2]) for line in done.stdout.splitlines()) == 30


@pytest.mark.parametrize(
    "config",
    [
        {"max_position_embeddings": 10**300, "rope_scaling": {"type": "yarn", "factor": 4.5}},
        {"rope_scaling": {"type": "yarn", "factor": 1e308}, "max_position_embeddings": 2**40},
        {"model_type": "x" * 5000, "layer_types": ["x" * 5000]},
        {"rope_scaling": {"\x1b[2J": 1, "": 2}},
        {"layer_types": [[], {}, None, 5]},
        {"text_config": {"num_hidden_layers": None}},
    ],
)
def test_what_the_fuzz_found(config: dict[str, Any]) -> None:
    """Huge numbers are no lengths, long names are cut, and nothing that steers a terminal gets into a profile."""
    whole = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 4, **config,
    }  # fmt: skip
    reason = unsupported(whole)
    assert reason is None or (len(reason) < 1500 and reason.isprintable())
    if "text_config" not in whole:
        info = model_info(whole, "config.json")
        assert info.config is not None
        assert all(name.isprintable() and value.isprintable() for name, value in info.config.items())
