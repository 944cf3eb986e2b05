"""What the tests with the real SGLang share. They run in its own environment (scripts/serving_environment), two files at a time."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path += [str(HERE), str(ROOT / "scripts")]  # for servers and offline_packed, and for serving_checks


@pytest.fixture(scope="session")
def mixed_profile() -> Path:
    """A profile with rotated, centred and clipped sides of several bit-widths in every layer."""
    return ROOT / "profiles" / "reference" / "reference-4.00bit.json"


@pytest.fixture(scope="session")
def banded_profile(tmp_path_factory: pytest.TempPathFactory, mixed_profile: Path) -> Path:
    """Of four layers, one with both sides in a fitted basis, one with its keys, one with its values, and one as in the mixed profile."""
    from serving_checks.bases import reference_profile
    from serving_checks.greedy import prompts

    return reference_profile(tmp_path_factory.mktemp("bases"), mixed_profile, prompts(recalls=4))


@pytest.fixture(scope="session")
def raw_profile(tmp_path_factory: pytest.TempPathFactory, mixed_profile: Path) -> Path:
    """The reference model with 16 bits everywhere."""
    from kvtuner_kernels.layout import LayerSpec
    from kvtuner_search.profile.canonical import load, save, seal
    from kvtuner_search.profile.schema import LayerEntry
    from kvtuner_search.profile.storage import storage_of

    model = load(mixed_profile).model
    layers = [LayerSpec()] * model.num_layers
    path = tmp_path_factory.mktemp("profiles") / "reference-16bit.json"
    content = {
        "name": "reference-16bit",
        "model": model.model_dump(),
        "layers": [LayerEntry.of(layer).model_dump() for layer in layers],
        "storage": storage_of(layers, model.num_kv_heads, model.head_dim).model_dump(),
        "provenance": {"origin": "uniform", "tool": "test"},
    }
    save(seal(content), path)
    return path
